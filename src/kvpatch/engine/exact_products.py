"""Matrix products on a GPU whose rows do not depend on how many rows there are.

cuBLAS chooses a kernel by the shape of a product, and some kernels add up parts of the inner dimension apart (split K),
so that a row's last bits depend on its mates' number. `kernels` of ours add from the first to the last, always. On the
cards that were tried most kernels of cuBLAS do so too, to the bit, and are faster. So each shape is tried once: where
cuBLAS gives our kernel's bits it is taken, else our kernel is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kvpatch.engine.reading_kernels import product_kernel
from kvpatch.engine.scaled_products import ScaledProducts
from kvpatch.engine.tried import Tried
from kvpatch.models.fp8 import Input, ScaledWeight, Weight, scaled_linear

MIRRORED_AT_MOST = 1 << 27
"""Numbers of the largest weight that a trial makes one of its own size for."""
WIDE = 512
"""Rows from which on our kernel takes larger tiles; a number's sum is the same in either."""


class Products:
    """Products of one model. With `is_exact` False all are left to torch, which is "fast" and nothing is promised."""

    def __init__(self, *, is_exact: bool) -> None:
        self.is_exact = is_exact
        self.scaled = ScaledProducts()
        self._tried = Tried()

    def linear(self, x: Input, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias of x [rows, inner], rounded already at most for a `ScaledWeight`, and weight [outputs,
        inner]."""
        if isinstance(weight, ScaledWeight):
            return self.scaled.linear(x, weight, bias) if self.is_exact else scaled_linear(x, weight, bias)
        if not self.is_exact:
            return F.linear(x, weight, bias)
        out = F.linear(x, weight) if self._is_torch_exact(len(x), weight) else ordered_product(x, weight)
        return out if bias is None else out.add_(bias)

    def _is_torch_exact(self, rows: int, weight: Tensor) -> bool:
        key = (rows, *weight.shape, weight.dtype)
        return self._tried.holds(key, lambda: _torch_agrees(rows, weight))


@torch.no_grad()
def _torch_agrees(rows: int, weight: Tensor) -> bool:
    """Whether torch's product gives the bits of ours, on numbers that show it."""
    outputs, inner = weight.shape
    generator = torch.Generator(weight.device).manual_seed(0)

    def drawn(count: int, size: int) -> Tensor:
        return torch.randn(count, size, generator=generator, device=weight.device).to(weight.dtype)

    try:
        half = inner // 2
        x = drawn(rows, inner)
        if outputs * inner <= MIRRORED_AT_MOST:
            # The second half takes back what the first one added: all that is left is what rounding left, in its order.
            weight = drawn(outputs, inner)
            weight[:, inner - half :] = weight[:, :half]
            x[:, inner - half :] = -x[:, :half]
        return torch.equal(F.linear(x, weight), ordered_product(x, weight))
    except torch.OutOfMemoryError:
        return False


def ordered_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T by our own kernel, [rows, outputs]."""
    rows, inner = x.shape
    outputs = len(weight)
    out = x.new_empty(rows, outputs)
    is_wide, is_single = rows >= WIDE, x.dtype == torch.float32
    block = (64, 64, 32) if is_single else (128, 128, 64) if is_wide else (64, 64, 64)
    grid = (triton.cdiv(rows, block[0]) * triton.cdiv(outputs, block[1]),)
    product_kernel[grid](
        x.contiguous(),
        weight,
        out,
        rows,
        outputs,
        inner,
        BLOCK_M=block[0],
        BLOCK_N=block[1],
        BLOCK_K=block[2],
        GROUP=8,
        PRECISION="ieee" if is_single else "tf32",
        num_warps=4,
        num_stages=3 if is_single else 4,
    )
    return out
