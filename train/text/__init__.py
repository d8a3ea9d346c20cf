"""Texts for a trained model: loading it, reading a user's texts, and continuing them."""
