"""What all learners share: the agent's face, settings, the loop, checkpoints, critics."""
