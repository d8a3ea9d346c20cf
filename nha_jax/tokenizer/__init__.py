"""Text to tokens and back, as bytes or by a Hugging Face `tokenizer.json`."""
