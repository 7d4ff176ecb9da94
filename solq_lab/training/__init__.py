"""Training: criterion, matcher, optimiser, trainer, checkpoints."""
