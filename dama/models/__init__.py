"""Any Hugging Face vision-language model as a model family of preference training."""
