"""Are test images among the training images? Found by key, and confirmed by the images' own bytes.

Keys name a sample within its set, so equal keys alone prove nothing: two folders of one layout have them all
in common. Images that were encoded anew are not found.
"""

from __future__ import annotations

from collections.abc import Iterator

from fd_scale.data.index import ShardSet

CONFIRM = 256
"""Samples with a common key whose bytes are compared."""

Place = tuple[int, int]
"""Position of a shard, and of a sample in it."""


def warning(train: ShardSet, test: ShardSet) -> str | None:
    """One sentence when images of ``test`` are in ``train`` as well, or None.

    Reads all keys, and the bytes of up to ``CONFIRM`` samples whose keys are in both.
    """
    asked = dict(_keys(test))
    common = [(key, place, asked[key]) for key, place in _keys(train) if key in asked]
    looked_at = common[:: max(1, len(common) // CONFIRM)][:CONFIRM]
    same = [key for key, known, wanted in looked_at if _image(train, known) == _image(test, wanted)]
    if not same:
        return None
    share = len(same) / len(looked_at)
    return (
        f"the test shards overlap the training shards: {len(common):,} of {test.num_samples:,} test samples "
        f"have a key of the training set, and {share:.0%} of the {len(looked_at)} looked at are the same "
        f"image ({', '.join(same[:3])}); accuracies will be too high"
    )


def _keys(shards: ShardSet) -> Iterator[tuple[str, Place]]:
    for shard, count in enumerate(shards.counts.tolist()):
        for index in range(count):
            yield shards.key(shard, index), (shard, index)


def _image(shards: ShardSet, place: Place) -> bytes:
    return shards.read(*place, label=False).image
