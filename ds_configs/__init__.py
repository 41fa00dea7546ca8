"""How a run is spread over processes: one DeepSpeed configuration per scale, read by ``run.scale``."""
