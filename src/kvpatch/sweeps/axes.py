"""What a sweep goes over: its axes, and the patch of each of its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.selection import chosen_heads, chosen_layers
from kvpatch.errors import CacheError, ProtocolError
from kvpatch.specs.arguments import plain, shown
from kvpatch.specs.nearest import instead
from kvpatch.specs.patch import Patch

NAMES = ("layers", "slots", "kv_heads", "parts")
"""Axes in the order in which they become dimensions."""
EACH = "each"


@dataclass(frozen=True)
class Axis:
    """One dimension of a sweep.

    Attributes:
        name: a field of `Patch`.
        labels: what stands at each place: real numbers of layers, slots of the target and KV heads; else words.
        settings: what `Patch` is given at each place.
    """

    name: str
    labels: tuple[int | str, ...]
    settings: tuple[Any, ...]


@dataclass(frozen=True)
class Plan:
    """A sweep laid out: the axes, what is the same in all cells (field -> label), and the cells' patches, the last axis
    running fastest."""

    axes: tuple[Axis, ...]
    fixed: Mapping[str, int | str]
    patches: tuple[Patch, ...]


def plan_of(over: Any, patch: Patch, source: KVCache, target: KVCache) -> Plan:
    """Lay a sweep out on one source and one target.

    Args:
        over: field of `Patch` -> "each", several values (an axis), or one value (the same in all cells).
        patch: what `over` does not name.
    Raises:
        ProtocolError: for an unknown axis, or none.
        CacheError: for a layer, slot or KV head that there is not, or a patch that changes the number of slots.
    """
    if not isinstance(over, Mapping) or not over:
        raise ProtocolError(f'over must name what to sweep, such as {{"layers": "each"}}, got {shown(over)}')
    for name in over:
        if name not in NAMES:
            raise ProtocolError(f"a sweep can't go over {shown(name)}; {instead(str(name), NAMES)}")
    if patch.align in ("replace", "append"):
        raise CacheError(
            f"a sweep can't take align={patch.align!r}, which changes the number of slots; use 'end', "
            "'start' or 'stretch'"
        )
    axes: list[Axis] = []
    common: dict[str, Any] = {}
    for name in (name for name in NAMES if name in over):
        values = _values(name, over[name], patch, source, target)
        if isinstance(values, Axis):
            axes.append(values)
        else:
            common[name] = values.value
    if not axes:
        raise ProtocolError(f'a sweep needs an axis of several values, got {shown(dict(over))}; "each" takes all')
    for axis in axes:
        if not axis.labels:
            raise ProtocolError(f"the axis {axis.name!r} is empty; give it at least one value")
    own = {name: getattr(patch, name) for name in Patch.model_fields} | common
    names = [axis.name for axis in axes]
    patches = tuple(
        Patch(**(own | dict(zip(names, cell, strict=True)))) for cell in product(*(axis.settings for axis in axes))
    )
    for one in patches:
        _refuse_missing(one, target)
    return Plan(tuple(axes), {name: _label(name, value, target) for name, value in common.items()}, patches)


@dataclass(frozen=True)
class _One:
    """A value that all cells share."""

    value: Any


def _values(name: str, given: Any, patch: Patch, source: KVCache, target: KVCache) -> Axis | _One:
    counts = {"layers": target.layers, "slots": target.slots, "kv_heads": target.keys[0].shape[1]}
    if name == "slots" and isinstance(given, str) and given == EACH:
        return _each_slot(patch, source, target)
    listed = plain(given)
    if isinstance(listed, str) and listed == EACH:
        listed = ["k", "v"] if name == "parts" else range(counts[name])
    if isinstance(listed, slice):
        if name == "parts":
            raise ProtocolError(f"parts must be 'k', 'v' or 'kv', got {shown(given)}")
        try:
            listed = range(counts[name])[listed]
        except TypeError:
            raise CacheError(f"{name} must be cut by whole numbers, got {given}") from None
    if isinstance(listed, (list, tuple, range)):
        items = [plain(item) for item in listed]
        return Axis(name, tuple(_label(name, item, target) for item in items), tuple(items))
    if isinstance(listed, (set, frozenset, dict)):
        raise ProtocolError(f"{name} of a sweep must be in an order, got {shown(given)}; give a list")
    return _One(listed)


def _each_slot(patch: Patch, source: KVCache, target: KVCache) -> Axis:
    """Every slot of the target that has a partner in the source. Prompts of unequal length are paired as `align` pairs
    them: from the end, or from the start."""
    own, other = target.row_lengths[0], source.row_lengths[0]
    both = min(own, other)
    if patch.align == "start":
        return Axis("slots", tuple(range(both)), tuple(range(both)))
    return Axis("slots", tuple(range(own - both, own)), tuple(slot - own for slot in range(own - both, own)))


def _label(name: str, item: Any, target: KVCache) -> int | str:
    """A number from 0 on where one thing is meant; else what was written."""
    count = {"layers": target.layers, "slots": target.row_lengths[0], "kv_heads": target.keys[0].shape[1]}.get(name)
    if isinstance(item, int) and not isinstance(item, bool) and count:
        return item % count if -count <= item < count else item
    if item is None:
        return "all"
    return item if isinstance(item, str) else repr(item)


def _refuse_missing(patch: Patch, target: KVCache) -> None:
    chosen_layers(patch.layers, target.layers)
    chosen_heads(patch.kv_heads, target.keys[0].shape[1])


def token_labels(cache: KVCache, slots: Sequence[int | str]) -> list[str]:
    """The text of the token in each of these slots; words as they are."""
    pieces = cache.pieces[0]
    return [pieces[slot] if isinstance(slot, int) and slot < len(pieces) else str(slot) for slot in slots]
