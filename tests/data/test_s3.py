"""Shards in S3, from a server that speaks its protocol: indexed, read and refused like local ones.

Needs ``pip install s3fs 'moto[server]'``, which are no part of the extra ``dev``: both bring Amazon's
packages, of which there is a release a day, and pip tries hundreds of them beside everything else.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fd_scale.cli import app
from fd_scale.data import openers
from fd_scale.data.index import Access, ShardSet
from fd_scale.data.loader import TrainLoader
from fd_scale.data.pack import pack
from fd_scale.data.plan import Plan
from fd_scale.errors import ShardError
from fd_scale.run.sections import View
from tests.data.pictures import image_folder

boto3 = pytest.importorskip("boto3", reason="needs the packages moto[server] and s3fs")
pytest.importorskip("s3fs", reason="needs the package s3fs: pip install 'fd-scale[s3]'")
moto = pytest.importorskip("moto.server", reason="needs the package moto[server]")

BUCKET, IMAGES = "pictures", 22


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A bucket's client, with the shards of a folder in it; what finds the bucket is in the environment."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    openers._system.cache_clear()  # one of another test's server may be there
    pack(image_folder(tmp_path / "in", IMAGES), tmp_path / "local", max_count=8)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for shard in sorted((tmp_path / "local").glob("*.tar")):
        client.upload_file(str(shard), BUCKET, f"set/{shard.name}")
    yield client
    server.stop()


@pytest.fixture
def far(bucket, tmp_path) -> Path:
    """The index of the shards in the bucket."""
    names = [path.name for path in sorted((tmp_path / "local").glob("*.tar"))]
    words = ["shards", "index", *(f"s3://{BUCKET}/set/{name}" for name in names), "--out"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "far")])
    assert done.exit_code == 0, done.output
    return tmp_path / "far"


def digest(shards: ShardSet, *, workers: int) -> str:
    """SHA-256 of all pixels of an epoch, in the order of the plan."""
    plan = Plan(shards.counts, seed=3, global_batch=4, fingerprint="the same for both")
    loader = TrainLoader(
        shards, plan, View(), [16], rank=0, world_size=1, micro_batch=4, accumulation=1,
        stop_step=plan.steps_per_epoch, workers=workers,
    )  # fmt: skip
    pixels = [batch.pixels[16].numpy().tobytes() for batch in loader]
    assert loader.bad == 0
    return hashlib.sha256(b"".join(pixels)).hexdigest()


@pytest.mark.parametrize(("workers", "cached"), [(0, False), (2, False), (2, True)])
def test_the_same_pixels_as_from_local_shards(far, tmp_path, workers, cached):
    access = Access(cache=tmp_path / "cache", cache_bytes=2**30) if cached else Access()
    local = ShardSet.open(tmp_path / "local")
    assert digest(ShardSet.open(far, access=access), workers=workers) == digest(local, workers=0)
    assert len(list(tmp_path.glob("cache/*.tar"))) == (3 if cached else 0)


def test_what_is_missing_or_changed_is_refused_at_once(bucket, far, tmp_path):
    first, second, _ = sorted((tmp_path / "local").glob("*.tar"))
    bucket.delete_object(Bucket=BUCKET, Key=f"set/{first.name}")
    shutil.copy(second, tmp_path / "longer")
    with (tmp_path / "longer").open("ab") as file:
        file.write(bytes(512))
    bucket.upload_file(str(tmp_path / "longer"), BUCKET, f"set/{second.name}")
    with pytest.raises(ShardError, match="2 of 3 shards of") as refusal:
        ShardSet.open(far)
    assert f"s3://{BUCKET}/set/{first.name}" in str(refusal.value)
    assert f"s3://{BUCKET}/set/{second.name}" in str(refusal.value)
