"""Scenes: pure in their seed, right in perspective, consistent in all that is told of them."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fd_scale.data import scenes
from fd_scale.data.index import ShardSet
from fd_scale.data.scenes import (
    IGNORED,
    MAX_DEPTH_M,
    MIN_VISIBLE_PIXELS,
    SHAPES,
    scene,
    scene_seed,
    write_scenes,
)
from fd_scale.errors import ShardError

COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")

# Areas in radii squared, by school geometry from the shapes' dimensions.
AREAS = {
    "disc": math.pi,
    "square": 1.7**2,
    "triangle": 1.65**2 / math.sqrt(3),  # equilateral, of height 1.65
    "star": 1.122570 * (0.31 / math.cos(math.radians(72))) ** 2,  # a pentagram, by its circumradius
    "ring": math.pi * (1 - 0.52**2),
    "cross": 2 * 1.9 * 0.56 - 0.56**2,
}


def named_by_colour(caption: str) -> bool:
    """Whether the nearest object wears the hue of its class."""
    _, colour, shape, *_ = caption.split()
    return COLOURS.index(colour) == SHAPES.index(shape)


def test_a_scene_is_a_function_of_its_seed():
    first, again, other = scene(7, 48), scene(7, 48), scene(8, 48)
    for name in ("image", "semantic", "classes", "masks", "boxes", "depth"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.label, first.caption) == (again.label, again.caption)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("seed", [0, 3, 2**64 - 1])
def test_a_seed_shows_the_same_scene_at_every_size(seed):
    small, large = scene(seed, 40), scene(seed, 120)
    assert (small.label, small.caption) == (large.label, large.caption)
    # Every third pixel of the large one has the centre of a pixel of the small one; edges may round apart.
    sampled = large.depth[1::3, 1::3]
    assert np.mean(np.isclose(small.depth, sampled, rtol=1e-5)) > 0.99  # seen 1.0


def test_the_cue_changes_colours_alone():
    plain, coloured = scene(11, 64, cue=0.0), scene(11, 64, cue=1.0)
    np.testing.assert_array_equal(plain.semantic, coloured.semantic)
    np.testing.assert_array_equal(plain.depth, coloured.depth)
    assert not np.array_equal(plain.image, coloured.image)


@pytest.mark.parametrize("cue", [0.0, 0.5, 1.0])
def test_colour_alone_tells_as_many_classes_as_promised(cue):
    count = 600
    told = np.mean([named_by_colour(scene(seed, 16, cue, 1).caption) for seed in range(count)])
    expected = cue + (1 - cue) / 6
    # Four standard errors; exactly 1 where colour suffices.
    assert told == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / count))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_their_areas(shape):
    step = 0.00213  # no edge lies on the grid
    v, u = np.mgrid[-1.3:1.3:step, -1.3:1.3:step]
    area = np.count_nonzero(scenes._INSIDE[shape](u, v) > 0) * step**2
    assert area == pytest.approx(AREAS[shape], rel=2e-3)  # half a step along an edge; worst seen 1.0e-3


@pytest.mark.parametrize("seed", range(8))
def test_the_floor_is_a_plane_and_the_wall_upright(seed):
    """For a pinhole camera the inverse depth of a plane is linear in the row."""
    drawn = scene(seed, 101, num_objects=1)
    empty = np.flatnonzero((drawn.semantic == 0).all(axis=0))[0]
    column = drawn.depth.astype(np.float64)[:, empty]
    is_floor = column < column[0]
    inverse = 1 / column[is_floor]
    assert is_floor.sum() > 30
    # Float32 depths; worst seen 1e-7.
    np.testing.assert_allclose(np.diff(inverse), np.diff(inverse).mean(), atol=1e-6)
    assert np.unique(column[~is_floor]).size == 1


def test_things_stand_on_the_floor_and_shrink_with_depth():
    """A disc's lowest point is where the floor has its depth; size times depth keeps to the sizes."""
    size, seen = 160, 0
    for seed in range(250):
        drawn = scene(seed, size, num_objects=1)
        x0, y0, x1, y1 = drawn.boxes[0]
        if drawn.label != SHAPES.index("disc") or x0 == 0 or y0 == 0 or x1 == size or y1 == size:
            continue
        seen += 1
        depth_m = drawn.depth[drawn.masks[0]][0]
        floor = drawn.depth[:, 0 if x0 > 8 else -1]
        foot = np.flatnonzero(floor <= depth_m)[0]
        assert abs(foot - y1) <= 1.5  # rows are whole; worst seen 1
        assert 0.9 * 0.6 - 0.1 < (x1 - x0) / size * depth_m < 1.5 * 1.0 + 0.1  # focal length x diameter
    assert seen > 20


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), size=st.sampled_from([16, 33, 64]), count=st.integers(1, 6))
def test_all_that_is_told_of_a_scene_agrees(seed, size, count):
    drawn = scene(seed, size, num_objects=count)
    assert drawn.image.shape == (size, size, 3)
    assert drawn.image.dtype == drawn.semantic.dtype == np.uint8
    assert drawn.depth.dtype == np.float32
    assert drawn.depth.min() > 0
    assert drawn.depth.max() <= 0.8 * MAX_DEPTH_M
    assert len(drawn.masks) == len(drawn.classes) == len(drawn.boxes) <= count
    assert drawn.masks.sum(axis=0).max(initial=0) <= 1
    depths = [np.unique(drawn.depth[mask]) for mask in drawn.masks]
    assert all(len(depth) == 1 for depth in depths)
    assert sorted(depths) == depths
    for mask, label, box in zip(drawn.masks, drawn.classes, drawn.boxes, strict=True):
        assert mask.sum() >= MIN_VISIBLE_PIXELS
        assert set(drawn.semantic[mask]) == {1 + label}
        pixels = [(x, y) for y in range(size) for x in range(size) if mask[y, x]]
        x, y = zip(*pixels, strict=True)
        assert box.tolist() == [min(x), min(y), max(x) + 1, max(y) + 1]
    beside = drawn.semantic[~drawn.masks.any(axis=0)]
    assert set(beside.tolist()) <= {0, IGNORED}
    assert drawn.caption.count(" in front of ") == count - 1
    assert drawn.caption.split()[2] == SHAPES[drawn.label]


def test_the_nearest_object_is_seen_and_gives_the_label():
    drawn = [scene(seed, 64) for seed in range(300)]
    assert all(one.classes[0] == one.label for one in drawn)
    assert {one.label for one in drawn} == set(range(len(SHAPES)))
    assert {one.caption.count(" in front of ") for one in drawn} == {0, 1, 2, 3}


def test_small_fragments_are_ignored():
    found = [
        one for one in (scene(seed, 64, num_objects=4) for seed in range(200)) if IGNORED in one.semantic
    ]
    assert found
    for one in found:
        fragments = one.semantic == IGNORED
        assert not (fragments & one.masks.any(axis=0)).any()
        # Up to three objects may be hidden but for fragments.
        assert fragments.sum() < 3 * MIN_VISIBLE_PIXELS


def test_the_mean_depth_map_is_a_poor_guess():
    """The camera varies so widely that half of the spread of depth is left when the mean map is known."""
    depth = np.stack([scene(seed, 32).depth for seed in range(200)])
    assert (depth - depth.mean(axis=0)).std() > 0.5 * depth.std()  # seen 0.62


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1, "size": 64}, r"seed=-1 must be in \[0, 2\*\*64\)"),
        ({"seed": 0, "size": 15}, "size=15 must be at least 16 pixels"),
        ({"seed": 0, "size": 64, "cue": 1.5}, r"cue=1.5 must be in \[0, 1\]"),
        ({"seed": 0, "size": 64, "num_objects": 0}, "num_objects=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        scene(**arguments)


def test_shards_hold_the_scenes_and_their_labels(tmp_path):
    lines = write_scenes(
        tmp_path / "out", num_images=11, size=33, seed=5, cue=0.3, num_objects=2, max_count=4
    )
    shards = ShardSet.open(tmp_path / "out")
    assert [line.num_samples for line in lines] == shards.counts.tolist() == [4, 4, 3]
    assert shards.classes == SHAPES
    read = [shards.read(s, i) for s, count in enumerate(shards.counts) for i in range(count)]
    for number, sample in enumerate(read):
        drawn = scene(scene_seed(5, number), 33, 0.3, 2)
        assert (sample.key, sample.label) == (f"scene-5-{number:08d}", drawn.label)
        decoded = np.asarray(Image.open(io.BytesIO(sample.image))).astype(int)
        assert np.abs(decoded - drawn.image).mean() < 4  # of 255, what JPEG takes; worst seen 2.2


def test_sets_of_different_seeds_have_no_scene_in_common():
    numbers = {scene_seed(seed, number) for seed in range(20) for number in range(500)}
    assert len(numbers) == 20 * 500


def test_shards_go_into_a_folder_of_their_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ShardError, match=r"is not empty \(thesis.txt\)"):
        write_scenes(tmp_path, num_images=1, size=16, seed=0)
    with pytest.raises(ValueError, match="num_images=0 must be at least 1"):
        write_scenes(tmp_path / "new", num_images=0, size=16, seed=0)
