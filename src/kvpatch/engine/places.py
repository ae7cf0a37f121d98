"""Places: where rows stand while they are decoded, and the slots that hold their keys and values.

Slots hold numbers in the model's own type, or in 8 floating bits with one scale per row, KV head and slot. Those are
rounded when they are written, whether a cache moves in or a step writes a new token, and each by its own numbers alone.
On a processor, which turns 8 bits into others slowly, they are held in bfloat16, which has the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvpatch.caches.kvcache import PAD
from kvpatch.models.backbone import Backbone
from kvpatch.models.e4m3 import NUMBERS
from kvpatch.models.fp8 import as_held, in_8_bits
from kvpatch.models.hf import LayerEdit


@dataclass
class Slots:
    """Keys or values of one layer, for every place.

    numbers: [places, kv_heads, capacity, head_dim]; number [p, h, s, d] stands for numbers[p, h, s, d] * scale[p, h, s]
        where there is a scale, [places, kv_heads, capacity] in float32.
    is_rounded: whether they hold numbers of 8 bits times their scale; so do those with a scale.
    """

    numbers: Tensor
    scale: Tensor | None = None
    is_rounded: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return self.numbers.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def write(self, at: tuple[Any, ...], new: Tensor) -> None:
        """Write into the slots that `at` chooses, an index of the first three axes."""
        if self.scale is None:
            self.numbers[at] = (as_held(new) if self.is_rounded else new).to(self.numbers.dtype)
            return
        numbers, self.scale[at] = in_8_bits(new)
        self.numbers.view(torch.uint8)[at] = numbers.view(torch.uint8)  # torch moves few numbers of 8 floating bits

    def read(self, at: tuple[Any, ...]) -> Tensor:
        """What slots hold, in the type they have, of 8 floating bits in float32."""
        if self.scale is None:
            return self.numbers[at]
        return self.numbers.view(torch.uint8)[at].view(NUMBERS).float() * self.scale[at][..., None]


@dataclass
class Places:
    """Where rows stand while they are decoded: buffers that change in place.

    Slots [0, area) of a place hold its row's cache, right-aligned: the first real one is `first`. The token fed at step
    s goes to slot area + s, so that rows that began at different times share a slab. The last slot is where places
    without a row, and rows that have stopped, write; nothing reads it.
    """

    area: int
    limit: int  # most tokens a row may write
    keys: list[Slots]  # by layer, after RoPE; `make_places` says how they lie
    values: list[Slots]
    slot_positions: Tensor  # [places, capacity], int32; -1 where not real. Windows count in them.
    first: Tensor  # [places], int32
    step: Tensor  # [places], int32: tokens the row has written
    feed: Tensor  # [places], int64: the token fed next
    position: Tensor  # [places], int64: the position it is fed at
    seeds: Tensor  # [places], int64
    going: Tensor  # [places], bool
    token_ids: Tensor  # [places, limit], int64; -1 where not written
    logprobs: Tensor  # [places, limit], float32; NaN where not written
    ends: Tensor  # [end tokens], int64
    steering: dict[int, LayerEdit] = field(default_factory=dict)  # by layer; each steers [places, kv_heads, head_dim]
    live: int = 0  # slots [0, live) hold everything real: attention need not look further

    def __len__(self) -> int:
        return self.first.shape[0]

    @property
    def capacity(self) -> int:
        """Slots of a place."""
        return self.area + self.limit + 1


def make_places(
    backbone: Backbone,
    count: int,
    area: int,
    limit: int,
    end_tokens: Sequence[int],
    steered_layers: Sequence[int] = (),
) -> Places:
    """Empty places for rows whose caches have up to `area` slots and that write up to `limit` tokens.

    Keys that are multiplied as matrices are held in float32, their numbers the model's own, and so that the slots of a
    dimension are neighbours.
    """
    geometry, device = backbone.geometry, backbone.device
    shape = (count, geometry.kv_heads, area + limit + 1, geometry.head_dim)

    def counted(dtype: torch.dtype, value: int = 0) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=device)

    def slots(*, are_multiplied: bool) -> Slots:
        if holds_bytes(backbone):
            numbers = torch.zeros(shape, dtype=torch.uint8, device=device).view(NUMBERS)
            return Slots(numbers, torch.zeros(shape[:3], device=device))
        if are_multiplied:
            numbers = torch.zeros((*shape[:2], shape[3], shape[2]), device=device).mT
        else:
            numbers = torch.zeros(shape, dtype=backbone.dtype, device=device)
        return Slots(numbers, is_rounded=backbone.rounds_cache)

    steer = torch.zeros(count, geometry.kv_heads, geometry.head_dim, dtype=backbone.dtype, device=device)
    return Places(
        area=area,
        limit=limit,
        keys=[slots(are_multiplied=multiplies_keys(backbone)) for _ in range(geometry.layers)],
        values=[slots(are_multiplied=False) for _ in range(geometry.layers)],
        slot_positions=torch.full((count, shape[2]), PAD, dtype=torch.int32, device=device),
        first=counted(torch.int32, area),
        step=counted(torch.int32),
        feed=counted(torch.int64),
        position=counted(torch.int64),
        seeds=counted(torch.int64),
        going=counted(torch.bool),
        token_ids=torch.full((count, limit), PAD, dtype=torch.int64, device=device),
        logprobs=torch.full((count, limit), float("nan"), device=device),
        ends=torch.tensor(list(end_tokens), dtype=torch.int64, device=device),
        steering={layer: LayerEdit(steer=steer.clone()) for layer in steered_layers},
    )


def multiplies_keys(backbone: Backbone) -> bool:
    """Whether `PlainOps` multiplies queries and keys as matrices, which on a CPU takes half to three quarters of the
    time of torch's attention."""
    return (
        backbone.device.type == "cpu"
        and backbone.dtype in (torch.float32, torch.bfloat16)
        and not holds_bytes(backbone)
    )


def holds_bytes(backbone: Backbone) -> bool:
    """Whether slots that are rounded to 8 bits are held in them: on a GPU."""
    return backbone.rounds_cache and backbone.device.type != "cpu"


def bytes_per_slot(backbone: Backbone) -> int:
    """Memory that one slot of one place takes, keys and values of all layers."""
    geometry = backbone.geometry
    of_head = geometry.head_dim + 4 if holds_bytes(backbone) else geometry.head_dim * backbone.dtype.itemsize
    return 2 * geometry.layers * geometry.kv_heads * of_head
