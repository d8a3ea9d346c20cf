"""Text into token shards, corpora into windows, windows into batches."""
