"""Rows as e4m3 numbers by one Triton kernel: a row's largest number, its scale, its numbers, in one pass over memory.

This file is imported only where there is a CUDA device and Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpatch.models.e4m3 import INVERSE, LARGEST, NUMBERS, SMALLEST


@triton.jit
def _rows_kernel(
    x,  # [rows, inner]
    numbers,  # [rows, inner], e4m3
    scale,  # [rows]
    inner,
    LARGEST: tl.constexpr,
    INVERSE: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < inner
    own = tl.load(x + row * inner + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(own), axis=0)
    factor = tl.maximum(largest, SMALLEST) * INVERSE
    # Division as IEEE 754 rounds it; Triton's own may be off by a unit in the last place.
    own = tl.div_rn(own, tl.zeros([BLOCK], tl.float32) + factor)
    own = tl.minimum(tl.maximum(own, -LARGEST), LARGEST)
    tl.store(numbers + row * inner + at, own.to(tl.float8e4nv), mask=inside)
    tl.store(scale + row, factor)


def rows_by_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [rows, inner] as e4m3 numbers, and the scale of each row, [rows, 1], float32."""
    rows, inner = x.shape
    x = x.contiguous()
    numbers = torch.empty(rows, inner, dtype=NUMBERS, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(inner)
        _rows_kernel[(rows,)](
            x,
            numbers,
            scale,
            inner,
            LARGEST=LARGEST,
            INVERSE=INVERSE,
            SMALLEST=SMALLEST,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return numbers, scale
