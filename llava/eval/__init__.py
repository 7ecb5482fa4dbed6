"""Answers from models: the generation driver and the commands on it."""
