"""How tests are dealt out where several processes run them (``pytest -n 2 --dist loadgroup``)."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups off
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a file stay together, as they share what it prepares, and so do all on the Slurm cluster."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        place = item.path.relative_to(ROOT)
        group = "cluster" if place.parts[0] == "cluster" else str(place)
        item.add_marker(pytest.mark.xdist_group(group))
