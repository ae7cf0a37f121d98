"""Rows as e4m3 numbers in Triton: a row's largest number, its scale, its numbers, in one pass over memory.

`store_row` is for kernels that make a row and give it on to a product: it rounds in registers what `rows_by_triton`
would read again. The numbers are the same to the bit.

This file is imported only where there is a CUDA device and Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpatch.models.e4m3 import INVERSE, LARGEST, NUMBERS, SMALLEST

_LARGEST = tl.constexpr(LARGEST)
_INVERSE = tl.constexpr(INVERSE)
_SMALLEST = tl.constexpr(SMALLEST)
_VECTORS = 16


@triton.jit
def store_row(x, numbers, scale, row, inner, BLOCK: tl.constexpr):
    """Write one row, x [BLOCK] in float32 and 0 from `inner` on, as e4m3 numbers [rows, inner] and its scale [rows]."""
    at = tl.arange(0, BLOCK)
    factor = tl.maximum(tl.max(tl.abs(x), axis=0), _SMALLEST) * _INVERSE
    # Division as IEEE 754 rounds it; Triton's own may be off by a unit in the last place.
    x = tl.div_rn(x, tl.zeros([BLOCK], tl.float32) + factor)
    x = tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)
    # By eights, as numbers of 16 bits are stored. Triton lays a kernel's rows out as its widest store likes them, and
    # by sixteens they would be summed in another order than in the kernel that leaves them whole.
    to = tl.max_contiguous(numbers + row * inner + at, 8)
    tl.store(to, x.to(tl.float8e4nv), mask=at < inner)
    tl.store(scale + row, factor)


@triton.jit
def _rows_kernel(x, numbers, scale, inner, BLOCK: tl.constexpr):
    """x [rows, inner]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    own = tl.load(x + row * inner + at, mask=at < inner, other=0.0).to(tl.float32)
    store_row(own, numbers, scale, row, inner, BLOCK)


def rows_by_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [rows, inner] as e4m3 numbers, and the scale of each row, [rows, 1], float32."""
    rows, inner = x.shape
    x = x.contiguous()
    numbers = torch.empty(rows, inner, dtype=NUMBERS, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        _rows_kernel[(rows,)](x, numbers, scale, inner, **row_of(inner))
    return numbers, scale


def row_of(inner: int) -> dict[str, int]:
    """How a kernel takes a row of so many numbers."""
    block = triton.next_power_of_2(inner)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


@triton.jit
def power_of(largest):
    """The scale of vectors with these largest numbers, as in `e4m3.vectors_by_torch`, and its inverse."""
    bits = tl.maximum(largest, _SMALLEST).to(tl.int32, bitcast=True)
    scale = ((bits + 0x1FFFFF) & 0x7F800000) - 0x04000000
    return scale.to(tl.float32, bitcast=True), (0x7F000000 - scale).to(tl.float32, bitcast=True)


@triton.jit
def _vectors_kernel(x, numbers, scale, vectors, dim, VECTORS: tl.constexpr, BLOCK: tl.constexpr):
    """x, numbers [vectors, dim]; scale [vectors]."""
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    at = tl.arange(0, BLOCK)
    inside = (vector < vectors)[:, None] & (at < dim)[None, :]
    to = vector[:, None] * dim + at[None, :]
    own = tl.load(x + to, mask=inside, other=0.0).to(tl.float32)
    factor, inverse = power_of(tl.max(tl.abs(own), axis=1))
    tl.store(numbers + to, (own * inverse[:, None]).to(tl.float8e4nv), mask=inside)
    tl.store(scale + vector, factor, mask=vector < vectors)


def vectors_by_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `e4m3.vectors_by_torch`, to the bit."""
    x = x.contiguous()
    dim = x.shape[-1]
    numbers = torch.empty(x.shape, dtype=NUMBERS, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if scale.numel():
        grid = (triton.cdiv(scale.numel(), _VECTORS),)
        block = triton.next_power_of_2(dim)
        _vectors_kernel[grid](x, numbers, scale, scale.numel(), dim, VECTORS=_VECTORS, BLOCK=block, num_warps=4)
    return numbers, scale
