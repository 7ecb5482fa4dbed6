"""Flags of the commands of `python -m dama` that run LLaVA's code; importing a module here imports no torch."""
