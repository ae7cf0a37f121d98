"""One number per row of a cache, over the bits of what it holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpatch.caches.stacks import over_layers


def checksums_of(keys: Sequence[Tensor], values: Sequence[Tensor], is_real: Tensor) -> list[str]:
    """What `KVCache.checksums` says of these keys and values; is_real: [batch, slots], False where padded."""
    device = is_real.device
    # Slots count from the end, so that padding on the left does not move them.
    from_end = torch.arange(is_real.shape[1], 0, -1, device=device) * 0x5851F42D4C957F2

    def summed(tensor: Tensor, number: Tensor) -> Tensor:
        *_, heads, _, dim = tensor.shape
        place = torch.arange(1, heads * dim + 1, device=tensor.device).view(heads, 1, dim) * 0x9E3779B97F4A7C1
        of_slot = from_end.to(tensor.device) + number.to(tensor.device)[..., None] * 0x14057B7EF767814
        place = place + of_slot[..., None, None, :, None]
        # The fold is what makes the hash more than a weighted sum, in which swapped slots could cancel out.
        mixed = _fold_((_bits(tensor) ^ place).mul_(0x2545F4914F6CDD1D))
        return (mixed.sum(dim=(-3, -1)) * is_real.to(tensor.device)).sum(dim=-1)

    numbers = torch.arange(2 * len(keys), device=device).unbind()
    sums = [*over_layers(summed, keys, numbers[0::2]), *over_layers(summed, values, numbers[1::2])]
    total = torch.stack([of_layer.to(device) for of_layer in sums]).sum(dim=0)
    return [f"{value % 2**64:016x}" for value in total.tolist()]


def _bits(tensor: Tensor) -> Tensor:
    """The bits of every number as int64, those of float64 folded so that a product spreads the highest too."""
    size = tensor.element_size()
    bits = tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).to(torch.int64)
    return _fold_(bits.clone()) if size == 8 else bits


def _fold_(x: Tensor) -> Tensor:
    """The upper half of every int64 mixed into its lower half, in place (the shift keeps the sign: masked off)."""
    return x.bitwise_xor_((x >> 32).bitwise_and_(0xFFFFFFFF))
