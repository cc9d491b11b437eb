"""Training: one loop, stages as data, optimizer, losses, checkpoints, monitor."""
