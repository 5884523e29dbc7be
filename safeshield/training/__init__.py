"""Parts that all learners share: base class, settings, training loop, checkpoints, critics."""
