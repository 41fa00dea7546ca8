"""Which tensors live when, and what does each operation cost? Kept while a program runs without storage.

The ledger sees every operation below autograd, of the forward pass, of the backward pass and of whatever is
recomputed in it, on tensors of the meta device or of a ``FakeTensorMode``. It follows each storage from the
operation that makes it until autograd and Python let go of it, so that views count once and nothing is
estimated. What an operation takes for itself while it runs is not seen.

PyTorch works the shapes of most results out in Python, and a network repeats itself: of operations on the
meta device that make new tensors, the result is worked out once per operation and form of its arguments.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Work:
    """What one operation asks of a device."""

    phase: str
    flops: int
    """Floating-point operations, a multiply-add being two."""
    moved_bytes: int
    """Its inputs read and its outputs written, once each."""
    fixed_bytes: int = 0
    """Of them those whose number does not grow with the images."""


@dataclass(frozen=True)
class _Result:
    """What an operation gives on arguments of one form, and costs: tensors of its own, each the whole of its
    storage."""

    forms: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...]
    is_tuple: bool
    cost: tuple[int, int, int]
    """Floating-point operations, bytes moved, and those that do not grow."""

    def make(self) -> Any:
        """The result without its values."""
        made = tuple(
            None if form is None else torch.empty_strided(form[0], form[1], dtype=form[2], device="meta")
            for form in self.forms
        )
        return made if self.is_tuple else made[0]


_RESULTS: dict[Any, _Result | None] = {}
"""By operation and form of its arguments; None where the result shares storage with an argument."""


@dataclass
class _Storage:
    """A storage that lives."""

    size_bytes: int
    label: str
    alive: weakref.ref[Any]


class Ledger(TorchDispatchMode):
    """Entered around a program. ``phase`` and ``label`` are set by whoever runs it.

    ``live_bytes`` is held now by storages that were made inside and not let go of. ``history`` is what came
    and what went, as (label, bytes), and ``phases`` the number of entries before each. ``images``: sizes that
    are multiples of it grow with the images; by default, all.
    """

    def __init__(self, images: int = 1) -> None:
        super().__init__()
        self.images = images
        self.phase, self.label = "", ""
        self.live_bytes = 0
        self.history: list[tuple[str, int]] = []
        self.phases: list[tuple[int, str]] = [(0, "")]
        self.work: Counter[Work] = Counter()
        self._live: dict[int, _Storage] = {}
        self._known: dict[int, weakref.ref[Any]] = {}
        self._by_label: Counter[str] = Counter()
        self._kinds: dict[OpOverload, bool] = {}
        self._functional: dict[OpOverload, bool] = {}

    @property
    def peak_bytes(self) -> int:
        """The most that was held at once."""
        return max(itertools.accumulate(size for _, size in self.history), default=0)

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Tensors from outside, such as parameters, which are not to be counted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def holding(self) -> dict[str, int]:
        """Bytes that live now, by label."""
        return {label: size for label, size in self._by_label.items() if size}

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Count a tensor's storage under another label from now on."""
        found = self._live.get(tensor.untyped_storage()._cdata)
        if found is not None:
            self._enter(found.label, -found.size_bytes)
            found.label = label
            self._enter(label, found.size_bytes)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Within, storages and work belong to ``phase``, and storages outside of labelled modules too."""
        before = (self.phase, self.label)
        self.phase = self.label = phase
        self.phases.append((len(self.history), phase))
        try:
            yield
        finally:
            self.phase, self.label = before
            self.phases.append((len(self.history), self.phase))

    @contextmanager
    def making(self, label: str) -> Iterator[None]:
        """Within, storages have ``label``, in whatever phase."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def labelled(self, module: nn.Module, label: str) -> list[torch.utils.hooks.RemovableHandle]:
        """From now on what ``module`` makes in its forward pass has ``label``, recomputed or not."""
        outer: list[str] = []

        def enter(*_: Any) -> None:
            outer.append(self.label)
            self.label = label

        def leave(*_: Any) -> None:
            self.label = outer.pop()

        return [
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        ]

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._computes(func):
            out = func(*args, **kwargs)
            for tensor in _tensors(out):
                self._note(tensor)
            return out
        key = _key(func, args, kwargs, self.images) if self._is_functional(func) else None
        known = None if key is None else _RESULTS.get(key)
        if known is not None:
            out, cost = known.make(), known.cost
        else:
            out = func(*args, **kwargs)
            cost = _cost(func, args, kwargs, out, self.images)
            if key is not None and key not in _RESULTS:
                _RESULTS[key] = _result(args, kwargs, out, cost)
        for tensor in _tensors(out):
            self._note(tensor)
        self.work[Work(self.phase, *cost)] += 1
        return out

    def _computes(self, func: OpOverload) -> bool:
        """Whether the operation runs a kernel; views and bare allocations do not."""
        known = self._kinds.get(func)
        if known is None:
            returns = func._schema.returns
            is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
            allocates = func.name().partition("::")[2].split(".")[0] in _ALLOCATIONS
            known = self._kinds[func] = not (is_view or allocates)
        return known

    def _is_functional(self, func: OpOverload) -> bool:
        """Whether it says of itself that it writes to no argument and gives views of none."""
        known = self._functional.get(func)
        if known is None:
            values = (*func._schema.arguments, *func._schema.returns)
            known = self._functional[func] = all(value.alias_info is None for value in values)
        return known

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        outside = self._known.get(key)
        if outside is not None and outside() is not None:
            return
        size, label = storage.nbytes(), self.label
        entry = _Storage(size, label, weakref.ref(storage, lambda _: self._gone(key)))
        self._live[key] = entry
        self._enter(label, size)

    def _gone(self, key: int) -> None:
        entry = self._live.pop(key)
        self._enter(entry.label, -entry.size_bytes)

    def _enter(self, label: str, size_bytes: int) -> None:
        self.history.append((label, size_bytes))
        self._by_label[label] += size_bytes
        self.live_bytes += size_bytes


_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias"}


def _cost(func: OpOverload, args: Any, kwargs: dict[str, Any], out: Any, images: int) -> tuple[int, int, int]:
    """Floating-point operations, bytes moved, and those that do not grow with the images."""
    count = flop_registry.get(func._overloadpacket)
    flops = 0 if count is None else int(count(*args, **kwargs, out_val=out))
    read = {id(tensor): tensor for tensor in (*_tensors(args), *_tensors(kwargs.values()))}
    moved = [_bytes(tensor) for tensor in (*read.values(), *_tensors(out))]
    return flops, sum(moved), sum(size for size in moved if size % images)


def _key(func: OpOverload, args: Any, kwargs: dict[str, Any], images: int) -> Any:
    """The operation and the form of its arguments; None where a tensor is not a plain one on the meta
    device."""
    try:
        return func, images, _form((args, kwargs), {})
    except _NotOnMetaError:
        return None


def _form(value: Any, seen: dict[int, int]) -> Any:
    """All of an argument that decides a result's shape and cost; ``seen`` numbers tensors, since one that
    occurs twice is read once."""
    if isinstance(value, Tensor):
        if not value.is_meta or type(value) not in (Tensor, nn.Parameter):
            raise _NotOnMetaError
        return seen.setdefault(id(value), len(seen)), value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple([_form(part, seen) for part in value])
    if isinstance(value, dict):
        return tuple([(name, _form(part, seen)) for name, part in value.items()])
    return type(value), value


class _NotOnMetaError(Exception):
    """A tensor whose kind may decide more than its form says."""


def _result(args: Any, kwargs: dict[str, Any], out: Any, cost: tuple[int, int, int]) -> _Result | None:
    """What to remember of an operation; None for tensors that are not storages of their own."""
    parts = out if isinstance(out, tuple) else (out,)
    if not all(part is None or (type(part) is Tensor and part.device.type == "meta") for part in parts):
        return None
    taken = {t.untyped_storage()._cdata for t in (*_tensors(args), *_tensors(kwargs.values()))}
    forms: list[tuple[torch.Size, tuple[int, ...], torch.dtype] | None] = []
    for part in parts:
        if part is None:
            forms.append(None)
            continue
        alike = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device="meta")
        storage = part.untyped_storage()
        if storage._cdata in taken or storage.nbytes() != alike.untyped_storage().nbytes():
            return None
        taken.add(storage._cdata)
        forms.append((part.shape, part.stride(), part.dtype))
    return _Result(tuple(forms), isinstance(out, tuple), cost)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Iterable) and not isinstance(values, str):
        for value in values:
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, list | tuple):
                yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    """What a kernel touches of a tensor: an expanded one is read from cache after the first time."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride else 1
    return numel * tensor.element_size()
