"""Training data: text to token shards, a corpus to sequences, and sequences to batches."""
