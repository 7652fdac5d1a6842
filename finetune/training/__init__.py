"""Training: the step plan, the training step, strategies, checkpoints."""
