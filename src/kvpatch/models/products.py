"""Matrix products on a processor: oneDNN in place of torch's choice for float32.

torch gives float32 products to MKL, which on processors that are not Intel's runs at half the speed of oneDNN, and
whose sums depend on how many rows a product has. oneDNN comes with torch, and a row's numbers are its own. bfloat16
products are oneDNN's already; with weights that were laid out for them once they take half the time.

`fast_products` is for code of others, a model's own forward pass: it stands between every torch function and its
caller. `LaidOut` is for the engine's own step, which calls it by name and pays for nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from kvpatch.models.fp8 import Input, ScaledWeight, Weight, scaled_linear

PACKED_SHARE = 0.25
"""Weights are laid out anew where they take no more than this share of the free memory."""


class OneDnnProducts(TorchFunctionMode):
    """While entered, `linear` of float32 on a processor is oneDNN's. Only for code that wants no gradients.

    packed: weights in oneDNN's own layout, by `_place` of the plain ones.
    """

    def __init__(self, packed: dict[tuple[object, ...], Tensor]) -> None:
        super().__init__()
        self.packed = packed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.linear or not _is_plain(args[0]) or kwargs:
            return func(*args, **(kwargs or {}))
        x, weight, *bias = args
        weight = self.packed.get(_place(weight), weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias[0] if bias else None, "none", [], "")


class LaidOut:
    """oneDNN's products by a model's weights, called directly. Only for code that wants no gradients.

    Args:
        weight: any of the model's weights; tells device and type. In another type than float32 and bfloat16, and on a
            GPU, products are torch's own.
        reused: see `fast_products`.
    """

    def __init__(self, weight: Tensor, reused: Iterable[Weight] = ()) -> None:
        self._is_own = weight.device.type == "cpu" and weight.dtype in _types_of_onednn()
        self._packed = _laid_out(list(reused)) if self._is_own else {}

    def linear(self, x: Input, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias of x [..., inner], rounded already at most for a `ScaledWeight`, and weight [outputs,
        inner]."""
        if isinstance(weight, ScaledWeight):
            return scaled_linear(x, weight, bias, whole=self._packed.get(_place(weight.numbers)))
        assert isinstance(x, Tensor)
        if not self._is_own or not x.numel():
            return F.linear(x, weight, bias)
        packed = self._packed.get(_place(weight))
        if packed is None and weight.dtype != torch.float32:
            return F.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, weight if packed is None else packed, bias, "none", [], "")


def _types_of_onednn() -> tuple[torch.dtype, ...]:
    """The types whose products oneDNN carries out in the processor's own instructions."""
    if not torch.backends.mkldnn.is_available():
        return ()
    is_bfloat16_there = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if is_bfloat16_there else (torch.float32,)


def _laid_out(weights: Sequence[Weight]) -> dict[tuple[object, ...], Tensor]:
    """Weights in oneDNN's own layout by `_place` of the plain ones, of 8 floating bits by that of their numbers, which
    are laid out as float32; none where memory is short."""
    sizes = [4 * w.numbers.numel() if isinstance(w, ScaledWeight) else w.nbytes for w in weights]
    if sum(sizes) > PACKED_SHARE * psutil.virtual_memory().available:
        return {}
    plain = ((w.numbers, w.numbers.float()) if isinstance(w, ScaledWeight) else (w, w) for w in weights)
    return {_place(own): torch.ops.mkldnn._reorder_linear_weight(w, None) for own, w in plain}


def _place(weight: Tensor) -> tuple[object, ...]:
    """Address, shape and strides: a square weight and its transpose may share the first two."""
    return weight.data_ptr(), weight.shape, weight.stride()


def _is_plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and not torch.is_grad_enabled()


@contextlib.contextmanager
def fast_products(weight: Tensor, reused: Iterable[Tensor] = ()) -> Iterator[None]:
    """Run products as fast as the processor allows; on a GPU, or in another type, nothing changes.

    Args:
        weight: any of the model's weights; tells device and type.
        reused: weights of many products to come, which are laid out anew first, once, where memory allows. They must
            not change meanwhile.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        yield
        return
    with OneDnnProducts(_laid_out(list(reused))):
        yield
