"""Task embeddings at the door."""
