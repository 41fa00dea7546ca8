"""``python -m fd_scale``: the same entry point as ``fd-scale``."""

from fd_scale.cli import main

main()
