"""Teachers in shares: the same maps bit for bit, as often as one likes, and no memory that grows."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fd_scale.engine.zero import shard_frozen
from fd_scale.run.world import World
from fd_scale.teachers.sharded import shard
from tests.spawn import spawn
from tests.teachers.tiny import CLIP_VISION, loaded, pixels, spec

# Small networks of which only norms, biases and tables are small enough to stay whole on every process.
FAMILIES = {
    "timm ViT": spec(
        "vit_tiny_patch16_224", input_size=256, arguments={"embed_dim": 512, "num_heads": 8, "depth": 1}
    ),
    "timm Swin V2": spec(
        "swinv2_tiny_window8_256", input_size=64, arguments={"depths": (1, 1, 1, 1), "window_size": 4}
    ),
    "open_clip": spec(
        "ViT-B-16-quickgelu",
        library="open_clip",
        input_size=64,
        arguments={**CLIP_VISION, "width": 384, "head_width": 64},
    ),
    "own Swin V2": spec("swinv2_tiny", library="models", input_size=64, arguments={"depths": (1, 1, 1, 1)}),
}


def maps(world: World, names: list[str]) -> dict[str, Any]:
    """How the maps of each teacher in shares compare with those of the whole one, on pixels of this rank."""
    results = {}
    for name in names:
        whole = loaded(FAMILIES[name])
        seen = pixels(whole.input_size, seed=world.rank)
        expected = whole.features(seen)
        held = sum(p.numel() for p in whole.network.parameters())
        shared = shard(whole, partial(shard_frozen, world=world, bf16=False))
        equal = []
        for _ in range(3):
            found = shared.features(seen)
            equal.append(torch.equal(found.tokens_BND, expected.tokens_BND))
        rest = sum(p.numel() for p in shared.network.parameters())
        forms = (found.grid, found.num_prefix_tokens) == (expected.grid, expected.num_prefix_tokens)
        results[name] = {"equal": equal, "forms": forms, "kept": rest / held}
    return results


def test_a_sharded_teacher_gives_the_same_maps() -> None:
    for rank in spawn(maps, 2, list(FAMILIES)):
        for name, found in rank.items():
            assert found["equal"] == [True] * 3, name
            assert found["forms"], name
            # What stays whole are norms, biases and tables, a few per cent of these small networks.
            assert found["kept"] < 0.1, name
