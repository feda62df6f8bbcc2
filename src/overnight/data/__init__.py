"""Text to batches: sources, documents, preparation, shards, and the stream that trains on them."""
