"""Text in, batches out: files, formats, shards, and the token stream."""
