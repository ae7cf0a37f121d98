"""Rows of numbers in 8 floating bits, float8_e4m3fn, each row over its own largest number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest number of e4m3."""
INVERSE = 1 / LARGEST
SMALLEST = 1e-12
"""What a row's largest number is taken for at least, so that a row of zeros has a scale."""


@dataclass(frozen=True)
class Rounded:
    """Rows that were made in e4m3: number [i, j] stands for numbers[i, j] * scale[i, 0].

    numbers, scale: [rows, inner], and [rows, 1] in float32, as `rows_by_torch` gives them.
    """

    numbers: Tensor
    scale: Tensor


def rows_by_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [rows, inner] as e4m3 numbers, and the scale of each row, [rows, 1], float32."""
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST) * INVERSE
    return (x / scale).clamp(-LARGEST, LARGEST).to(NUMBERS), scale


def vectors_by_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., dim] as e4m3 numbers [..., dim] and scales [...], float32: of each vector the least power of two by
    which none of its numbers is too large. So a number times its scale has four digits, which bfloat16 holds."""
    x = x.float()
    bits = x.abs().amax(dim=-1).clamp(min=SMALLEST).view(torch.int32)
    # The exponent, one more where what follows it is past that of 448 = 1.75 * 2^8, less 8.
    scale = ((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23)
    inverse = (0x7F000000 - scale).view(torch.float32)
    return (x * inverse[..., None]).to(NUMBERS), scale.view(torch.float32)
