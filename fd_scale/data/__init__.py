"""Images from tar shards to uint8 batches: what is there, in which order, and through which view."""
