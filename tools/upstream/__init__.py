"""Comparison of this repository with LLaVA, for its maintainers."""
