"""Preference training of any model family: steps, the trainer, logs, the reference stage."""
