"""Play the faults of sensors and actuators behind shields of the boat and the pendulum.

    python benchmarks/faults.py                       # two tasks, 3 seeds; resumes; prints tables
    python benchmarks/faults.py --picture faults.png  # and draws them

Each seed has a log of its own, a small shield (two layers of 64; 6,000 updates) and a calibration
without faults, with the default proposers, at epsilon 0.05 and confidence 0.95. Then `stress` plays
its matrix with a reckless agent: on the boat one that steers straight for the goal, on the pendulum
one that pushes in the direction of its motion, where h = |speed| - 5 rad/s. Then the shield is
calibrated again under each of some faults, for this agent, and plays fresh episodes under the
fault. Last, the false alarms of the checks for frozen observations and jumps are counted, in
healthy episodes of the log's policy and of the reckless agent behind the shield.
"""
