"""The loading benchmark: every way gives every sample, and the documentation shows what was measured."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import data, record
from tests.data.pictures import jpeg

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Twelve samples of five pictures, as a folder and as shards."""
    monkeypatch.setattr(data, "BATCH", 4)
    monkeypatch.setattr(data, "SIZE", 16)
    return data._data_set([jpeg(n) for n in range(5)], data.Kind("small", 12), tmp_path)


def test_every_way_gives_every_sample(small):
    for ways, count in ((data._ways(*small), 12), (data._readers(small[1]), 12 * data.PASSES)):
        assert {name: way() for name, way in ways.items()} == dict.fromkeys(ways, count)


def test_the_cpu_time_of_workers_counts(small):
    count, cpu_s, wall_s = data._apart(data._ways(*small)[data.BASELINE])
    assert count == 12
    assert cpu_s > 0
    assert wall_s > 0


def test_photographs_get_the_shape_of_their_kind():
    for height, width in ((40, 60), (60, 40), (50, 50)):
        photograph = jpeg(0, height, width)
        as_it_is, *shaped = (data._shaped(photograph, kind) for kind in data.KINDS)
        assert as_it_is == photograph
        sizes = [Image.open(io.BytesIO(image)).size for image in shaped]
        assert sizes == [(500, 375), (1500, 1125)]


def test_a_ratio_is_the_median_of_rounds_side_by_side():
    """A machine that is slow for a while is so for both; one odd round decides nothing."""
    one, other = {"cpu_s": [2.0, 20.0, 4.0, 2.0, 9.0]}, {"cpu_s": [1.0, 10.0, 2.0, 1.0, 1.0]}
    assert data._ratio(one, other) == 2.0


def test_views_and_regions_are_made_by_every_decoder_there_is():
    ways = data._alone([jpeg(n) for n in range(3)])
    assert len(ways) == 2 * len(data._decoders())
    assert {way() for way in ways.values()} == {3}


def test_the_documentation_shows_the_results():
    results = json.loads((record.RESULTS / "data.json").read_text())
    text = (ROOT / "docs" / "data.md").read_text()
    shown = text.split("<!-- table: begin -->\n")[1].split("\n<!-- table: end -->")[0]
    assert shown == data.table(results)


def test_what_was_reached_stands_beside_the_goals():
    results = json.loads((record.RESULTS / "data.json").read_text())
    assert results["goals"] == data.goals(results)
