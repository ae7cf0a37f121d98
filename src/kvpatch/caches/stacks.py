"""Work on many layers of a cache at once.

A layer's keys of a small model are a few million numbers. A GPU is through with them before Python has started the next
operation, so on a GPU layers of one shape are worked on as one tensor. A processor gains nothing by that and takes them
one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

NUMBERS_AT_ONCE = 1 << 25
"""Numbers of one tensor that are worked on at a time; what is made of them on the way takes some times their memory."""
IS_WORTH_IT = ("cuda",)
"""Kinds of devices on which starting an operation takes longer than the operation on one layer."""


def over_layers(
    change: Callable[..., Tensor], *parts: Sequence[Tensor], of: Sequence[Hashable] | None = None
) -> tuple[Tensor, ...]:
    """Make one tensor of each layer's tensors.

    Args:
        change: takes a tensor of each part, [..., batch, kv_heads, slots, head_dim] with or without a dimension of
            layers in front, and gives one with the same dimensions in front. It must treat every layer alike.
        parts: one tensor per layer each: of one cache or of several.
        of: what else distinguishes the layers, given to `change` before the tensors; only those of which it is the same
            are worked on together.
    Returns:
        What `change` gave, one tensor per layer.
    """
    layers = range(len(parts[0]))
    keys = [None] * len(layers) if of is None else list(of)
    found: list[Any] = [None] * len(layers)
    for together in _groups(parts, keys):
        own = [[part[layer] for layer in together] for part in parts]
        before = () if of is None else (keys[together[0]],)
        if len(together) == 1:
            made = (change(*before, *(one for (one,) in own)),)
        else:
            made = change(*before, *map(stack_of, own)).unbind(0)
        for layer, one in zip(together, made, strict=True):
            found[layer] = one
    return tuple(found)


def _groups(parts: Sequence[Sequence[Tensor]], keys: Sequence[Hashable]) -> list[list[int]]:
    """Layers that are worked on together: of the same key, shapes, types and devices, on a GPU."""
    groups: dict[Hashable, list[int]] = {}
    for layer, (key, *tensors) in enumerate(zip(keys, *parts, strict=True)):
        is_apart = not all(tensor.device.type in IS_WORTH_IT for tensor in tensors)
        kinds = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        groups.setdefault((key, kinds, layer if is_apart else -1), []).append(layer)
    pieces = []
    for layers in groups.values():
        largest = max(part[layers[0]].numel() for part in parts)
        count = max(1, NUMBERS_AT_ONCE // max(1, largest))
        pieces += [layers[low : low + count] for low in range(0, len(layers), count)]
    return pieces


def stack_of(tensors: Sequence[Tensor]) -> Tensor:
    """[layers, ...]: a view where the tensors lie at equal distances in one piece of memory, else a copy."""
    first = tensors[0]
    memory = first.untyped_storage().data_ptr()
    steps = {two.storage_offset() - one.storage_offset() for one, two in pairwise(tensors)}
    is_even = len(steps) == 1 and all(
        one.untyped_storage().data_ptr() == memory and one.stride() == first.stride() for one in tensors
    )
    if not is_even or min(steps) < 0:
        return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (*steps, *first.stride()), first.storage_offset())
