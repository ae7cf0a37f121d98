"""Products by fp8 weights on a GPU whose rows do not depend on how many rows there are.

As in `exact_products`: our own kernel adds from the first number to the last, and torch's product is taken for a shape
where it gives our kernel's bits. Tensor cores sum such numbers in registers that are shorter than float32, and kernels
differ in when they move a sum to float32 and in which of the two scales comes first. So our kernel does either; once
per process the way is looked for that torch goes on this card, and all shapes keep to it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpatch.engine.tried import Tried
from kvpatch.models import fp8
from kvpatch.models.e4m3 import NUMBERS
from kvpatch.models.fp8 import Input, ScaledWeight, are_activations_whole, product_by_torch, rows_of, scaled_linear

WIDE = 512
"""Rows from which on our kernel takes larger tiles; a number's sum is the same in either."""
BLOCK_K = 128
"""Numbers of the inner dimension that are multiplied at a time; part of the sum's order."""
SHOWN_ON = (1024, 4096, 4096)
"""Rows, outputs and inner dimension of the products by which torch's way is found."""


@dataclass(frozen=True)
class Order:
    """How a product is summed and scaled.

    Attributes:
        promoted: after how many numbers of the inner dimension a sum goes on in float32; 0 for never.
        scaled_by: "weight" or "row" for the scale that the sum is multiplied by first, "both" for their product.
    """

    promoted: int
    scaled_by: str


SCALED_BY = ("weight", "row", "both")


def promotions() -> tuple[int, ...]:
    """Every `Order.promoted` that is looked for, the likeliest first."""
    return (0, 128, 32) if fp8.FAST_ACCUM else (128, 64, 32, 0)


class ScaledProducts:
    """Products by one model's fp8 weights."""

    def __init__(self) -> None:
        self._tried = Tried()

    def linear(self, x: Input, weight: ScaledWeight, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias of x [rows, inner], bfloat16 or rounded already, and weight [outputs, inner]."""
        if are_activations_whole():
            return scaled_linear(x, weight, bias)
        numbers, scale = rows_of(x)
        is_torch = self._is_torch_exact(len(numbers), weight)
        out = (product_by_torch if is_torch else ordered_scaled_product)(numbers, scale, weight)
        return out if bias is None else out.add_(bias)

    def agreement(self) -> dict[tuple[object, ...], bool]:
        """Of every shape that was tried, (rows, outputs, inner, `fp8.FAST_ACCUM`), whether torch's product is taken."""
        return dict(self._tried.found)

    def _is_torch_exact(self, rows: int, weight: ScaledWeight) -> bool:
        key = (rows, *weight.shape, fp8.FAST_ACCUM)
        return self._tried.holds(key, lambda: _torch_agrees(rows, *weight.shape, torch_order(), weight.numbers.device))


def torch_order() -> Order:
    """The way that torch's product goes on this card, as far as our kernel can go it; the likeliest where it can't."""
    return _torch_order(fp8.FAST_ACCUM)[0]


def is_order_known() -> bool:
    """Whether torch goes one of the ways that our kernel knows."""
    return _torch_order(fp8.FAST_ACCUM)[1]


@functools.cache
def _torch_order(is_fast: bool) -> tuple[Order, bool]:
    """First when sums go on in float32, by scales of 1, then which scale comes first. Where memory runs out nothing is
    found, and that is told: another order would give other bits than the same run gave before."""
    device, likeliest = torch.device("cuda", torch.cuda.current_device()), Order(promotions()[0], SCALED_BY[0])
    for promoted in promotions():
        if not _agrees(*SHOWN_ON, Order(promoted, SCALED_BY[0]), device, is_scaled=False):
            continue
        for by in SCALED_BY:
            if _agrees(*SHOWN_ON, Order(promoted, by), device):
                return Order(promoted, by), True
        return Order(promoted, SCALED_BY[0]), False
    return likeliest, False


def _torch_agrees(rows: int, outputs: int, inner: int, order: Order, device: torch.device) -> bool:
    """Whether torch's product may be taken for ours; not where there is no memory to try it."""
    try:
        return _agrees(rows, outputs, inner, order, device)
    except torch.OutOfMemoryError:
        return False


@torch.no_grad()
def _agrees(rows: int, outputs: int, inner: int, order: Order, device: torch.device, *, is_scaled: bool = True) -> bool:
    """Whether torch's product gives the bits of ours, on numbers that show it."""
    for is_mirrored in (True, False):
        numbers, scale, weight = _telling(rows, outputs, inner, device, is_mirrored=is_mirrored)
        if not is_scaled:
            scale, weight = torch.ones_like(scale), ScaledWeight(weight.numbers, torch.ones_like(weight.scale))
        own = ordered_scaled_product(numbers, scale, weight, order)
        if not torch.equal(product_by_torch(numbers, scale, weight), own):
            return False
    return True


def _telling(
    rows: int, outputs: int, inner: int, device: torch.device, *, is_mirrored: bool
) -> tuple[Tensor, Tensor, ScaledWeight]:
    """Rows, their scales and a weight. Mirrored, the second half takes back what the first one added: all that is left
    is what rounding left, in its order. The others show the order of the scales."""
    generator, half = torch.Generator(device).manual_seed(0), inner // 2

    def drawn(count: int, sign: float) -> Tensor:
        numbers = torch.randn(count, inner, generator=generator, device=device)
        if is_mirrored:
            numbers[:, inner - half :] = sign * numbers[:, :half]
        return numbers.to(NUMBERS)

    def scales(count: int) -> Tensor:
        return 0.5 + torch.rand(count, generator=generator, device=device)

    return drawn(rows, -1.0), scales(rows)[:, None], ScaledWeight(drawn(outputs, 1.0), scales(outputs))


def ordered_scaled_product(numbers: Tensor, scale: Tensor, weight: ScaledWeight, order: Order | None = None) -> Tensor:
    """The product by our own kernel, [rows, outputs], bfloat16. numbers, scale: as `fp8.rows_of` gives them."""
    order = torch_order() if order is None else order
    rows, inner = numbers.shape
    outputs = len(weight)
    out = torch.empty(rows, outputs, dtype=torch.bfloat16, device=numbers.device)
    block = (128, 128) if rows >= WIDE else (64, 128)
    grid = (triton.cdiv(rows, block[0]) * triton.cdiv(outputs, block[1]),)
    scaled_product_kernel[grid](
        numbers,
        weight.numbers,
        scale,
        weight.scale,
        out,
        rows,
        outputs,
        inner,
        BLOCK_M=block[0],
        BLOCK_N=block[1],
        BLOCK_K=BLOCK_K,
        GROUP=8,
        PROMOTED=order.promoted,
        BY_WEIGHT=order.scaled_by == "weight",
        BY_ROW=order.scaled_by == "row",
        num_warps=block[0] // 16,
        num_stages=3 if block[0] == 128 else 4,
    )
    return out


@triton.jit
def scaled_product_kernel(
    x,  # [tokens, inner], e4m3
    weight,  # [outputs, inner], e4m3
    x_scale,  # [tokens]
    weight_scale,  # [outputs]
    out,  # [tokens, outputs]
    tokens,
    outputs,
    inner,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROMOTED: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """x @ weight.T, each number summed over `inner` from its first to its last, whatever the number of tokens."""
    pid = tl.program_id(0)
    down, across = tl.cdiv(tokens, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    band = pid // (GROUP * across)
    high = min(down - band * GROUP, GROUP)
    m = ((band * GROUP + (pid % (GROUP * across)) % high) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = ((pid % (GROUP * across)) // high * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        inside = start + k < inner
        a = tl.load(
            x + m[:, None] * inner + start + k[None, :], mask=(m < tokens)[:, None] & inside[None, :], other=0.0
        )
        b = tl.load(
            weight + n[None, :] * inner + start + k[:, None], mask=(n < outputs)[None, :] & inside[:, None], other=0.0
        )
        if PROMOTED > 0:
            sums = tl.dot(a, b, sums, max_num_imprecise_acc=PROMOTED)
        else:
            sums = tl.dot(a, b, sums)
    of_rows = tl.load(x_scale + m, mask=m < tokens, other=0.0)[:, None]
    of_outputs = tl.load(weight_scale + n, mask=n < outputs, other=0.0)[None, :]
    if BY_WEIGHT:
        sums = sums * of_outputs * of_rows
    elif BY_ROW:
        sums = sums * of_rows * of_outputs
    else:
        sums = sums * (of_rows * of_outputs)
    to = out + m[:, None] * outputs + n[None, :]
    tl.store(to, sums.to(tl.bfloat16), mask=(m < tokens)[:, None] & (n < outputs)[None, :])
