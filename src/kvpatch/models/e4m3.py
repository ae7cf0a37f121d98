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
