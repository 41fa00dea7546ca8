"""Hugging Face datasets: bytes kept, labels and class names taken, in other processes too."""

from pathlib import Path

import pytest

from fd_scale.data.index import ShardSet
from fd_scale.data.pack import pack
from fd_scale.data.sources import open_source
from fd_scale.errors import ShardError
from tests.data.pictures import encoded, jpeg, picture

datasets = pytest.importorskip(
    "datasets", reason="needs the package datasets: pip install 'fd-scale[datasets]'"
)

IMAGES = [jpeg(0), encoded(picture(1, 20, 30), "PNG"), jpeg(2)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A dataset as the hub keeps it: a folder of Parquet files."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"picture": [{"bytes": image, "path": None} for image in IMAGES], "label": [1, 0, 1]}
    (tmp_path / "rows").mkdir()
    table = pyarrow.table(rows, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "rows" / "train-00000.parquet")
    return tmp_path / "rows"


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_become_samples(folder, tmp_path, workers):
    found = open_source(f"hf:{folder}", image_column="picture")
    pack(found, tmp_path / "out", max_count=2, workers=workers)
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes == ("cat", "dog")
    read = [shards.read(shard, n) for shard, count in enumerate(shards.counts) for n in range(count)]
    assert {(sample.key, sample.image, sample.label) for sample in read} == {
        (f"train_{n}", image, label) for n, (image, label) in enumerate(zip(IMAGES, (1, 0, 1), strict=True))
    }


def test_wrong_names_are_refused(folder):
    with pytest.raises(ShardError, match=r"no column 'pictures'; did you mean picture\?.*--image-column"):
        open_source(f"hf:{folder}", image_column="pictures")
    with pytest.raises(ShardError, match=r"split 'nothing'"):
        open_source(f"hf:{folder}", split="nothing", image_column="picture")
