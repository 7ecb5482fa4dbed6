"""Training: arguments, data, model set-up, trainers and the commands."""
