"""The part of the language model: LLaMA with images spliced into its input."""
