"""The training loop: a step, its losses, the optimizer, evaluation."""
