"""Random numbers from a counter: each depends on a key and its own number alone, on every device alike.

The generator is the finaliser "lowbias32" (C. Wellons, hash-prospector) of a counter, xor a key. 23 bits of it become a
uniform number strictly between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN = -1640531527  # 2**32 / golden ratio, as int32


def int64_seeds(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Seeds of any size as int64, [rows]: what an unsigned number of 64 bits is read as."""
    return torch.tensor([(seed + 2**63) % 2**64 - 2**63 for seed in seeds], device=device)


def keys_of(seeds: Tensor, stream: Tensor | int) -> Tensor:
    """One int32 key for each seed (int64, any value) and stream (int32, or a number)."""
    low, high = mix_((seeds & 0xFFFFFFFF).to(torch.int32)), (seeds >> 32).to(torch.int32)
    return mix_(mix_(low ^ high) ^ mix_(torch.zeros_like(low) + (stream + 1) * GOLDEN))


def mix_(x: Tensor) -> Tensor:
    """lowbias32 on int32, in place; torch's shift keeps the sign, so the shifted-in bits are masked off."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= -2073254261  # 0x846CA68B
    x ^= (x >> 16) & 0xFFFF
    return x


def uniform(bits: Tensor) -> Tensor:
    """Uniform float32 numbers of mixed bits."""
    # 23 bits and a half fit float32's mantissa. With 24 the last value would round to 1, whose logarithm is 0.
    return ((bits >> 9) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)


def normal(seeds: Tensor, stream: Tensor | int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers.

    Args:
        seeds: [rows], int64, any value.
        stream: number of the stream, or several (int32, [streams]); a seed gives other numbers in every stream.
        shape: of one row's numbers; a row's numbers depend on its seed, the stream and their place alone.
    Returns:
        [rows, *shape], or [streams, rows, *shape], float32 (Box and Muller 1958, one number of each pair).
    """
    if isinstance(stream, Tensor):
        stream = stream[..., None]
    counter = torch.arange(math.prod(shape), dtype=torch.int32, device=seeds.device) * GOLDEN
    radius = uniform(mix_(counter ^ keys_of(seeds, 2 * stream)[..., None])).log_().mul_(-2.0).sqrt_()
    angle = uniform(mix_(counter ^ keys_of(seeds, 2 * stream + 1)[..., None])).mul_(2 * math.pi)
    return radius.mul_(angle.cos_()).unflatten(-1, shape)
