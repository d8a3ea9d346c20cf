"""`nha data prepare`: raw files into a folder of token shards, in parallel, resumable."""
