"""Packing: bytes kept, reproducible, shuffled, and never half a set of shards."""

import hashlib
import os
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from rich.progress import Progress

from fd_scale.data import philox, sources
from fd_scale.data.decode import decode
from fd_scale.data.index import ShardSet
from fd_scale.data.pack import Encoding, pack
from fd_scale.errors import ShardError
from tests.data.pictures import encoded, image_folder, jpeg, picture


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples(folder: Path) -> dict[str, tuple[bytes, int | None]]:
    shards = ShardSet.open(folder)
    read = [shards.read(s, i) for s, count in enumerate(shards.counts) for i in range(count)]
    assert len({sample.key for sample in read}) == len(read)
    return {sample.key: (sample.image, sample.label) for sample in read}


def test_a_flat_folder_keeps_every_byte(tmp_path):
    source = image_folder(tmp_path / "in", 23)
    report = pack(source, tmp_path / "out", max_count=5)
    assert samples(tmp_path / "out") == {
        f"picture_{n:03d}": ((source / f"picture {n:03d}.JPEG").read_bytes(), None) for n in range(23)
    }
    shards = ShardSet.open(tmp_path / "out")
    assert shards.counts.tolist() == [5, 5, 5, 5, 3]
    assert (report.num_shards, report.num_samples, report.classes, report.skipped) == (5, 23, None, {})
    assert report.num_bytes == sum((tmp_path / "out" / name).stat().st_size for name in shards.names)


def test_class_folders_give_labels_in_sorted_order(tmp_path):
    source = image_folder(tmp_path / "in", 20, classes=3)
    deep = source / "class_1" / "deep.er"
    deep.mkdir()
    (deep / "x.y.png").write_bytes(b"not looked at")
    report = pack(source, tmp_path / "out")
    assert report.classes == ("class_0", "class_1", "class_2")
    assert ShardSet.open(tmp_path / "out").classes == report.classes
    packed = samples(tmp_path / "out")
    assert packed["class_1/deep_er/x_y"] == (b"not looked at", 1)
    assert {key.split("/")[0]: label for key, (_, label) in packed.items()} == {
        f"class_{n}": n for n in range(3)
    }


def test_bytes_depend_on_source_and_seed_alone(tmp_path):
    source = image_folder(tmp_path / "in", 17, classes=2)
    pack(source, tmp_path / "first", max_count=4, seed=3)
    for path in source.rglob("*"):
        os.utime(path, (1, 1))
    moved = source.rename(tmp_path / "moved")
    pack(moved, tmp_path / "again", max_count=4, seed=3)
    pack(moved, tmp_path / "other", max_count=4, seed=4)
    assert digests(tmp_path / "first") == digests(tmp_path / "again")
    first, other = (ShardSet.open(tmp_path / name) for name in ("first", "other"))
    assert [first.key(0, i) for i in range(4)] != [other.key(0, i) for i in range(4)]
    assert samples(tmp_path / "first") == samples(tmp_path / "other")
    with tarfile.open(tmp_path / "first" / "shard-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_the_shuffle_is_over_the_whole_set(tmp_path):
    pack(image_folder(tmp_path / "in", 60), tmp_path / "out", max_count=10)
    shards = ShardSet.open(tmp_path / "out")
    first = [int(shards.key(0, i).removeprefix("picture_")) for i in range(10)]
    assert max(first) - min(first) > 30


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its files open
def test_webdataset_reads_the_shards_as_we_do(tmp_path):
    pack(image_folder(tmp_path / "in", 9, classes=2), tmp_path / "out", max_count=4)
    shards = ShardSet.open(tmp_path / "out")
    urls = [str(tmp_path / "out" / name) for name in shards.names]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    ours = [shards.read(s, i) for s, count in enumerate(shards.counts) for i in range(count)]
    assert [(s["__key__"], s["jpeg"], int(s["cls"])) for s in theirs] == [
        (s.key, s.image, s.label) for s in ours
    ]


def test_keys_are_plain_unique_and_short(tmp_path):
    source = tmp_path / "in"
    names = [
        "a.b.jpg",
        "a_b.jpg",
        "a b.png",
        "\u043a\u043b.jpg",
        "\u043a\u043b\u044e.jpg",
        f"{'n' * 200}.jpg",
        f"{'n' * 201}.jpg",
        "a.JPG",
    ]
    source.mkdir()
    for number, name in enumerate(names):
        (source / name).write_bytes(b"%d" % number)
    pack(source, tmp_path / "out")
    packed = samples(tmp_path / "out")
    assert {image for image, _ in packed.values()} == {b"%d" % n for n in range(len(names))}
    assert all(len(key) <= sources.KEY_LENGTH for key in packed)
    assert all(
        key.replace("_", "").replace("-", "").isalnum() and key.isascii() for key in packed if key.strip("_")
    )


def test_limit_keeps_the_first_of_the_shuffled_order(tmp_path):
    source = image_folder(tmp_path / "in", 12)
    pack(source, tmp_path / "all")
    report = pack(source, tmp_path / "some", limit=5)
    everything, some = (ShardSet.open(tmp_path / name) for name in ("all", "some"))
    assert report.num_samples == 5
    assert [some.key(0, i) for i in range(5)] == [everything.key(0, i) for i in range(5)]


def test_links_to_class_folders_are_followed_once(tmp_path):
    real = image_folder(tmp_path / "real", 3)
    source = tmp_path / "in"
    source.mkdir()
    (source / "linked").symlink_to(real)
    (real / "loop").symlink_to(source)
    assert pack(source, tmp_path / "out").num_samples == 3


def test_files_that_are_no_images_are_counted(tmp_path):
    source = image_folder(tmp_path / "in", 2)
    for name in ("notes.txt", "more.TXT", ".hidden.jpg", "Thumbs"):
        (source / name).write_bytes(b"")
    assert pack(source, tmp_path / "out").skipped == {".txt": 2, ".jpg": 1, "Thumbs": 1}


def test_folders_without_images_say_what_was_looked_for(tmp_path):
    with pytest.raises(ShardError, match="absent is not a folder of images"):
        pack(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(
        ShardError, match=r"no images in .*in: it holds no files at all; .*looked for: jpg, jpeg"
    ):
        pack(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "a.heic").write_bytes(b"")
    with pytest.raises(ShardError, match=r"it holds 1 \.heic; extensions looked for: jpg"):
        pack(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_beside_class_folders_are_refused(tmp_path):
    source = image_folder(tmp_path / "in", 4, classes=2)
    image_folder(source, 1)
    with pytest.raises(ShardError, match=r"1 images beside its 2 folders .*picture 000.JPEG, class_0/"):
        pack(source, tmp_path / "out")


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    source = image_folder(tmp_path / "in", 3)
    with pytest.raises(ShardError, match=r"in is not empty \(picture 000\.JPEG"):
        pack(source, source)
    pack(source, tmp_path / "out")
    with pytest.raises(ShardError, match=r"out is not empty \(index\.json\)"):
        pack(source, tmp_path / "out")
    with pytest.raises(ShardError, match=r"picture 000\.JPEG is a file"):
        pack(source, source / "picture 000.JPEG")


def test_a_pack_that_broke_off_is_no_set_and_starts_again(tmp_path):
    source = image_folder(tmp_path / "in", 9)
    listed = sources.image_folder(source)
    (source / "picture 003.JPEG").rename(tmp_path / "away")
    with pytest.raises(ShardError, match=r"picture 003\.JPEG cannot be read: No such file"):
        pack(listed, tmp_path / "out", max_count=1)
    with pytest.raises(ShardError, match=r"has no index\.json"):
        ShardSet.open(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.partial"))
    (tmp_path / "out" / "shard-000077.tar.partial").write_bytes(b"killed here")
    (tmp_path / "away").rename(source / "picture 003.JPEG")
    pack(source, tmp_path / "out", max_count=4)
    pack(source, tmp_path / "fresh", max_count=4)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


@pytest.mark.parametrize("wrong", [{"max_count": 0}, {"max_bytes": 0}])
def test_limits_must_be_positive(tmp_path, wrong):
    with pytest.raises(ShardError, match="must be at least 1"):
        pack(image_folder(tmp_path / "in", 1), tmp_path / "out", **wrong)


def test_progress_reaches_the_total(tmp_path):
    progress = Progress(disable=True)
    pack(image_folder(tmp_path / "in", 7), tmp_path / "out", max_count=3, progress=progress)
    assert [(task.completed, task.total) for task in progress.tasks] == [(7, 7)]


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
    source = image_folder(tmp_path / "in", 17, classes=2)
    one = pack(source, tmp_path / "one", max_count=4)
    two = pack(source, tmp_path / "two", max_count=4, workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert (one.num_bytes, one.num_samples) == (two.num_bytes, two.num_samples)


def broken_off(tmp_path: Path) -> Path:
    """A folder whose pack ended at its third shard of four, and the file that was missing is back."""
    source = image_folder(tmp_path / "in", 16)
    listed = sources.image_folder(source)
    order = philox.permutation(philox.key("fd.pack", 0), 16)
    missing = Path(listed.entries[order[9]].place)
    content, status = missing.read_bytes(), missing.stat()
    missing.unlink()
    with pytest.raises(ShardError, match="cannot be read"):
        pack(listed, tmp_path / "out", max_count=4)
    missing.write_bytes(content)
    os.utime(missing, ns=(status.st_atime_ns, status.st_mtime_ns))
    return source


def test_a_pack_goes_on_where_it_broke_off(tmp_path):
    source = broken_off(tmp_path)
    kept = tmp_path / "out" / "shard-000001.tar"
    before = kept.stat().st_mtime_ns
    report = pack(source, tmp_path / "out", max_count=4)
    assert report.num_resumed == 2
    assert kept.stat().st_mtime_ns == before
    fresh = pack(source, tmp_path / "fresh", max_count=4)
    assert fresh.num_resumed == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


@pytest.mark.parametrize("change", ["seed", "file", "tar", "encoding"])
def test_what_is_not_the_same_pack_starts_again(tmp_path, change):
    source = broken_off(tmp_path)
    options = {"max_count": 4}
    expected = 0
    if change == "seed":
        options["seed"] = 1
    elif change == "encoding":
        options["encoding"] = Encoding(quality=80)
    elif change == "file":
        os.utime(source / "picture 000.JPEG", (1, 1))
    else:
        os.truncate(tmp_path / "out" / "shard-000001.tar", 100)
        expected = 1  # the first shard is whole
    assert pack(source, tmp_path / "out", **options).num_resumed == expected
    pack(source, tmp_path / "fresh", **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_larger_pictures_are_shrunk_and_smaller_ones_keep_their_bytes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    large = encoded(picture(0, 90, 120), "JPEG", exif=exif, quality=95)
    files = {"large": large, "small": jpeg(1, 30, 60), "tall": encoded(picture(2, 200, 40), "PNG")}
    for name, content in files.items():
        (tmp_path / "in" / f"{name}.{'png' if name == 'tall' else 'jpg'}").write_bytes(content)
    pack(tmp_path / "in", tmp_path / "out", encoding=Encoding(short_side=30))
    packed = {key: image for key, (image, _) in samples(tmp_path / "out").items()}
    assert packed["small"] == files["small"]
    assert decode(packed["large"]).shape == (30, 40, 3)
    assert decode(packed["tall"]).shape == (150, 30, 3)
    assert decode(packed["large"], exif="apply").shape == (40, 30, 3), "the orientation is kept"
    reference = np.asarray(Image.open(BytesIO(large)).resize((40, 30), Image.Resampling.BICUBIC), dtype=float)
    # Quality 95 with halved colours on pictures with grain: a mean difference of 2.0 levels was seen.
    assert np.abs(decode(packed["large"]) - reference).mean() < 4


def test_every_picture_is_written_anew_when_a_quality_is_given(tmp_path):
    source = image_folder(tmp_path / "in", 3)
    pack(source, tmp_path / "out", encoding=Encoding(quality=50))
    packed = samples(tmp_path / "out")
    for n in range(3):
        original = (source / f"picture {n:03d}.JPEG").read_bytes()
        image, _ = packed[f"picture_{n:03d}"]
        assert len(image) < len(original)
        assert decode(image).shape == decode(original).shape


def test_what_cannot_be_decoded_is_left_out_and_named_only_where_it_must_be_decoded(tmp_path):
    source = image_folder(tmp_path / "in", 3)
    (source / "bad.jpg").write_bytes(b"<html>")
    assert pack(source, tmp_path / "kept").num_samples == 4
    report = pack(source, tmp_path / "out", encoding=Encoding(short_side=20))
    assert report.num_samples == 3
    (line,) = report.unreadable
    assert "bad.jpg" in line
    assert "<html>" in line
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "bad.jpg").write_bytes(b"<html>")
    with pytest.raises(ShardError, match=r"none of the samples of .*alone can be decoded:\n  .*bad\.jpg"):
        pack(alone, tmp_path / "nothing", encoding=Encoding(short_side=20))
