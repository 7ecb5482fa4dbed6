"""Training that is independent of the model family: sealed checkpoints, resuming, provenance."""
