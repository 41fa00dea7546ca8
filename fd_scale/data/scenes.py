"""What can be learned with nothing downloaded? Procedural scenes: image, class, masks, boxes, depth, caption.

Six flat shapes stand on a textured floor before a textured wall, seen by a pinhole camera: size and height
in the picture follow from depth, near shapes hide far ones, light, fog and sensor noise are added. A scene
is a pure function of its seed, so a data set is a number of scenes and a seed. How shards are written is the
business of ``pack.py``.

Lengths in the picture are fractions of its side, so that one seed shows the same scene at every size (but
for the noise). Camera: x right, y down, z away from it; a floor point at depth z is in row
``horizon + drop / z``. Pictures are (3, H, W) floats in [0, 1] until they are developed.
Shape letters: H rows, W columns, K visible objects.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from fd_scale.data import philox
from fd_scale.data.manifest import Shard
from fd_scale.data.writer import MAX_COUNT, Sample, write_shards

Array = NDArray[np.floating[Any]]

SHAPES = ("disc", "square", "triangle", "star", "ring", "cross")
"""Class names; a label is an index into this."""
MAX_DEPTH_M = 10.0
"""Range of a depth head for these scenes. No surface is beyond 80 % of it, where a sigmoid would saturate."""
IGNORED = 255
"""Semantic label of fragments too small to be named."""
MIN_VISIBLE_PIXELS = 24
"""An object that shows fewer pixels than this is no instance, and its fragments are ``IGNORED``."""

_FOG_LENGTH_M = 12.0
_COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
"""The hue of each class, equally spaced from 0: what ``cue`` reveals."""


@dataclass(frozen=True)
class Scene:
    """One picture and all that is known of it. The K instances go from the nearest to the farthest."""

    image: NDArray[np.uint8]
    """(H, W, 3)."""
    label: int
    """Class of the nearest object, an index into ``SHAPES``."""
    semantic: NDArray[np.uint8]
    """(H, W): 0 background, 1 + class, or ``IGNORED``."""
    classes: NDArray[np.int64]
    """(K,): class of each instance."""
    masks: NDArray[np.bool_]
    """(K, H, W): visible pixels of each instance; no pixel belongs to two."""
    boxes: NDArray[np.float32]
    """(K, 4): tight x0, y0, x1, y1 of the visible pixels, the end exclusive."""
    depth: NDArray[np.float32]
    """(H, W): metres along the viewing axis."""
    caption: str
    """The objects from the nearest to the farthest, with colour and side."""


@dataclass(frozen=True)
class _Camera:
    """A pinhole camera over a floor, before a wall that faces it."""

    focal: float
    """Picture fractions per tangent of the viewing angle."""
    horizon: float
    """Row of the horizon; shifted as by a shift lens, so that upright things stay upright."""
    drop: float
    """Focal length times the height of the camera over the floor."""
    front_m: float
    """Depth at which a thing stands on the lower edge of the picture."""
    wall_m: float


@dataclass(frozen=True)
class _Object:
    """A flat shape that stands on the floor and faces the camera."""

    shape: int
    hue: float
    saturation: float
    value: float
    depth_m: float
    diameter: float
    x: float
    """Column of the centre."""
    angle: float


def scene(seed: int, size: int, cue: float = 0.5, num_objects: int | None = None) -> Scene:
    """The scene of a seed, ``size`` pixels square.

    ``cue`` in [0, 1] is the share of objects that wear the hue of their class, while the others wear any:
    colour alone then tells the class of ``cue + (1 - cue) / 6`` of them (0: shape alone tells; 1: colour
    suffices). ``num_objects`` is drawn from 1 to 4 when it is not given. Raises ``ValueError`` for arguments
    out of range.
    """
    _check(seed, size, cue, num_objects)
    rng = np.random.Generator(np.random.PCG64(seed))
    camera = _draw_camera(rng)
    count = int(rng.integers(1, 5)) if num_objects is None else num_objects
    objects = [_draw_object(rng, camera, cue) for _ in range(count)]
    objects.sort(key=lambda thing: -thing.depth_m)  # the painter's order
    image, depth = _draw_room(rng, camera, size)
    owner = np.zeros((size, size), np.int64)  # 0 for the room, else 1 + index of the object in front
    light = rng.uniform(-1, 1), rng.uniform(-1, 1)
    for index, thing in enumerate(objects):
        _paint(image, depth, owner, camera, thing, index, light)
    _develop(rng, image, depth)
    return _describe(image, depth, owner, objects)


def scene_seed(seed: int, number: int) -> int:
    """The seed of scene ``number`` of data set ``seed``; sets of different seeds have no scene in common."""
    return int.from_bytes(philox.key("fd.scene", seed, number)[:8], "little")


def write_scenes(
    out: Path,
    *,
    num_images: int,
    size: int,
    seed: int,
    cue: float = 0.5,
    num_objects: int | None = None,
    max_count: int = MAX_COUNT,
    progress: Progress | None = None,
) -> list[Shard]:
    """Write a data set of scenes as labelled JPEG shards into ``out``; its classes are ``SHAPES``.

    Scene ``number`` is that of ``scene_seed(seed, number)``, and its key ends in the number. A shard has at
    most ``max_count`` scenes. Raises ``ValueError`` for arguments out of range, and ``ShardError`` for an
    ``out`` that is in use.
    """
    if num_images < 1:
        raise ValueError(f"num_images={num_images} must be at least 1")
    samples = _samples(num_images, size=size, seed=seed, cue=cue, num_objects=num_objects)
    return write_shards(
        samples, out, max_count=max_count, classes=SHAPES, total=num_images, progress=progress
    )


def _samples(
    num_images: int, *, size: int, seed: int, cue: float, num_objects: int | None
) -> Iterator[Sample]:
    for number in range(num_images):
        drawn = scene(scene_seed(seed, number), size, cue, num_objects)
        members = {"jpg": _jpeg(drawn.image), "cls": str(drawn.label).encode()}
        yield f"scene-{seed}-{number:08d}", members


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    """At full resolution of colour: halving it would blur shapes that are a few pixels wide."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _check(seed: int, size: int, cue: float, num_objects: int | None) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} must be in [0, 2**64)")
    if size < 16:
        raise ValueError(f"size={size} must be at least 16 pixels, or shapes cannot be told apart")
    if not 0 <= cue <= 1:
        raise ValueError(f"cue={cue} must be in [0, 1]: the share of objects in the hue of their class")
    if num_objects is not None and num_objects < 1:
        raise ValueError(f"num_objects={num_objects} must be at least 1, or None for 1 to 4")


def _draw_camera(rng: np.random.Generator) -> _Camera:
    """Ranges are wide on purpose: with a nearly fixed camera the mean depth map alone is a strong guess."""
    horizon, front_m, wall_m = rng.uniform(0.15, 0.6), rng.uniform(0.8, 2.4), rng.uniform(4.5, 8.0)
    return _Camera(rng.uniform(0.9, 1.5), horizon, front_m * (0.97 - horizon), front_m, wall_m)


def _draw_object(rng: np.random.Generator, camera: _Camera, cue: float) -> _Object:
    """An object between a fifth and three quarters of the picture in size, as near as that allows."""
    shape = int(rng.integers(len(SHAPES)))
    reveals, any_hue, jitter = rng.uniform(), rng.uniform(), rng.uniform(-0.04, 0.04)
    hue = (shape / len(SHAPES) + jitter if reveals < cue else any_hue) % 1
    extent = camera.focal * rng.uniform(0.6, 1.0)  # focal length x metres: apparent size at a depth of 1 m
    nearest, farthest = max(camera.front_m, extent / 0.75), min(0.95 * camera.wall_m, extent / 0.22)
    depth_m = rng.uniform(nearest, farthest)
    return _Object(
        shape=shape,
        hue=hue,
        saturation=rng.uniform(0.55, 0.95),
        value=rng.uniform(0.6, 1.0),
        depth_m=depth_m,
        diameter=extent / depth_m,
        x=rng.uniform(0.15, 0.85),
        angle=rng.uniform(-0.4, 0.4),
    )


def _draw_room(
    rng: np.random.Generator, camera: _Camera, size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Floor and wall: colours (3, H, W) and depth (H, W)."""
    y, x = _centres(0, size, size)[:, None], _centres(0, size, size)[None] - 0.5
    depth_rows = np.minimum(camera.drop / np.maximum(y - camera.horizon, 1e-3), camera.wall_m)
    is_floor = depth_rows[:, 0] < camera.wall_m
    # Metres on the floor, so that its pattern shrinks with distance; the wall's does not.
    across = np.where(is_floor[:, None], x * depth_rows / camera.focal, x * 2)
    along = np.where(is_floor[:, None], depth_rows, y * 2)
    image = np.empty((3, size, size), np.float32)
    for rows, cycles, reach_m in ((is_floor, (2.0, 7.0), 5.0), (~is_floor, (4.0, 14.0), np.inf)):
        # Greyer than the objects, or a small network would need minutes to find them.
        base = float(rng.uniform(0.25, 0.75)) + _tint(rng, -0.1, 0.1)
        contrast = float(rng.uniform(-0.2, 0.2)) + _tint(rng, -0.06, 0.06)
        pattern = _pattern(rng, across[rows], along[rows], cycles)
        pattern *= np.exp(-depth_rows[rows] / reach_m)  # faded before it could alias
        image[:, rows] = base + contrast * pattern
    return image, np.repeat(depth_rows, size, axis=1)


def _pattern(rng: np.random.Generator, across: Array, along: Array, cycles: tuple[float, float]) -> Array:
    """Soft stripes or checks of a random angle and frequency (radians per unit), in [-1, 1]."""
    frequency, angle, is_striped = rng.uniform(*cycles), rng.uniform(0, np.pi), rng.uniform() < 0.5
    first, second = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)
    cosine, sine = float(frequency * np.cos(angle)), float(frequency * np.sin(angle))
    stripes = np.sin(cosine * across + sine * along + first)
    return stripes if is_striped else stripes * np.sin(cosine * along - sine * across + second)


def _paint(
    image: Array,
    depth: Array,
    owner: NDArray[np.int64],
    camera: _Camera,
    thing: _Object,
    index: int,
    light: tuple[float, float],
) -> None:
    """Draw an object and its shadow over what stands behind it, in place, within its window alone."""
    size, radius = len(depth), thing.diameter / 2
    foot = camera.horizon + camera.drop / thing.depth_m
    rows = _window(foot - 2.2 * radius, foot + 0.5 * radius, size)
    columns = _window(thing.x - 1.4 * radius, thing.x + 1.4 * radius, size)
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    # In radii from the centre, which is one radius above the floor.
    y = ((_centres(rows.start, rows.stop, size) - foot + radius) / radius)[:, None]
    x = ((_centres(columns.start, columns.stop, size) - thing.x) / radius)[None]
    window = image[:, rows, columns]
    window *= 1 - 0.5 * np.exp(-30 * (y - 1) ** 2) * np.exp(-2.5 * x**2)
    cosine, sine = float(np.cos(thing.angle)), float(np.sin(thing.angle))
    inside = _INSIDE[SHAPES[thing.shape]](cosine * x + sine * y, cosine * y - sine * x)
    coverage = np.clip(inside * (radius * size) + 0.5, 0, 1)  # edges one pixel soft
    bevel = 0.7 + 0.3 * np.clip(inside * 6, 0, 1)
    shade = (1 + 0.25 * (light[0] * x + light[1] * y)) * bevel
    window += coverage * (_rgb(thing.hue, thing.saturation, thing.value) * shade - window)
    solid = coverage > 0.5
    depth[rows, columns][solid] = thing.depth_m
    owner[rows, columns][solid] = index + 1


def _develop(rng: np.random.Generator, image: Array, depth: Array) -> None:
    """Fog by depth, exposure and noise (of lightness, three times cheaper than of colour), in place."""
    fog = _tint(rng, 0.6, 0.9)
    image -= fog
    image *= np.exp(-depth / _FOG_LENGTH_M)
    image += fog
    image *= float(rng.uniform(0.75, 1.1))
    image += float(rng.uniform(0.01, 0.04)) * rng.standard_normal(depth.shape, dtype=np.float32)


def _describe(
    image: Array, depth: NDArray[np.float32], owner: NDArray[np.int64], objects: list[_Object]
) -> Scene:
    """All that follows from who owns which pixel; ``objects`` from the farthest to the nearest."""
    visible = np.bincount(owner.ravel(), minlength=len(objects) + 1)[1:]
    is_shown = visible >= MIN_VISIBLE_PIXELS
    names = [thing.shape + 1 if is_shown[index] else IGNORED for index, thing in enumerate(objects)]
    shown = [index for index in reversed(range(len(objects))) if is_shown[index]]
    masks = owner[None] == np.array(shown, np.int64)[:, None, None] + 1
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Scene(
        image=np.ascontiguousarray(pixels.transpose(1, 2, 0)),
        label=objects[-1].shape,
        semantic=np.array([0, *names], np.uint8)[owner],
        classes=np.array([objects[index].shape for index in shown], np.int64),
        masks=masks,
        boxes=np.array([_box(mask) for mask in masks], np.float32).reshape(-1, 4),
        depth=depth,
        caption=" in front of ".join(_phrase(thing) for thing in reversed(objects)),
    )


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _phrase(thing: _Object) -> str:
    colour = _COLOURS[round(thing.hue * len(_COLOURS)) % len(_COLOURS)]
    side = "on the left" if thing.x < 0.4 else "on the right" if thing.x > 0.6 else "in the middle"
    return f"a {colour} {SHAPES[thing.shape]} {side}"


def _centres(start: int, stop: int, size: int) -> NDArray[np.float32]:
    """Centres of the pixels from ``start`` to ``stop``, as fractions of the side."""
    return ((np.arange(start, stop) + 0.5) / size).astype(np.float32)


def _window(start: float, stop: float, size: int) -> slice:
    """The pixels that a range of fractions touches, within the picture."""
    return slice(max(0, int(np.floor(start * size))), min(size, int(np.ceil(stop * size))))


def _tint(rng: np.random.Generator, low: float, high: float) -> NDArray[np.float32]:
    """A random value per colour, (3, 1, 1)."""
    return rng.uniform(low, high, size=(3, 1, 1)).astype(np.float32)


def _rgb(hue: float, saturation: float, value: float) -> NDArray[np.float32]:
    """HSV to RGB, both in [0, 1]; (3, 1, 1)."""
    ramp = [min(max(abs((hue * 6 + turn) % 6 - 3) - 1, 0.0), 1.0) for turn in (0, 4, 2)]
    colour = [value * (1 - saturation + saturation * part) for part in ramp]
    return np.array(colour, np.float32)[:, None, None]


def _disc(u: Array, v: Array) -> Array:
    return 1 - np.hypot(u, v)


def _square(u: Array, v: Array) -> Array:
    return 0.85 - np.maximum(np.abs(u), np.abs(v))


def _triangle(u: Array, v: Array) -> Array:
    return np.minimum(0.85 - v, 0.4 + 0.5 * v - 0.866 * np.abs(u))


def _star(u: Array, v: Array) -> Array:
    """A pentagram: all that is within at least four of the five half-planes of its lines."""
    angles = (np.arange(5, dtype=np.float32) * (2 * np.pi / 5) + np.pi / 2)[:, None, None]
    planes = 0.31 - (np.cos(angles) * u + np.sin(angles) * v)
    return np.partition(planes, 1, axis=0)[1]


def _ring(u: Array, v: Array) -> Array:
    return 0.24 - np.abs(np.hypot(u, v) - 0.76)


def _cross(u: Array, v: Array) -> Array:
    across, along = np.abs(u), np.abs(v)
    return np.minimum(0.28 - np.minimum(across, along), 0.95 - np.maximum(across, along))


_INSIDE: dict[str, Callable[[Array, Array], Array]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
"""Distance to the nearest edge, positive inside, for a shape of about radius 1 around the origin, v down."""
