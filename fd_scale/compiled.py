"""Compiling a network block by block: what pays in a step without tying the whole of it to one graph.

Blocks of one shape share their compiled code, whichever of them came first, so that a deep network costs
little more than one block; checkpointing and sharding go on outside. Whether to compile is the scale's.
"""

from __future__ import annotations

from torch import nn

from fd_scale.errors import RecipeError

LISTS = ("blocks", "resblocks")
"""The attributes under which timm, open_clip and ``models`` keep a network's (or a stage's) blocks."""


def compile_blocks(network: nn.Module) -> int:
    """Have every block compiled by ``torch.compile`` at its first call, for static shapes; their number.

    Raises ``RecipeError`` for a network in which no list of blocks is found.
    """
    blocks = [
        block
        for name, module in network.named_modules()
        if name.rpartition(".")[2] in LISTS and isinstance(module, nn.ModuleList | nn.Sequential)
        for block in module
    ]
    if not blocks:
        raise RecipeError(
            f"{type(network).__name__} has no list of blocks to compile ({', '.join(LISTS)}): set "
            "fd_scale.compile to false in the scale file"
        )
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)
