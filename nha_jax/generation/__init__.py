"""Continuing texts: drawing tokens, one call for a few prompts, an engine for many."""
