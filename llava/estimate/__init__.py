"""Estimate what a training run needs before it starts: memory, disk, libraries, time."""
