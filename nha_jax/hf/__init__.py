"""Models in the format of Hugging Face's transformers; torch is never needed."""
