"""Training that is independent of the model family: steps, the trainer, logs, reference stage, sealed checkpoints."""
