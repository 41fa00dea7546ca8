"""Tools that look at sets of shards: one question per module."""
