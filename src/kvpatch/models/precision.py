"""The type of a model's weights: floating types of torch, fp8, or 8 and 4 bits where bitsandbytes is installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from kvpatch.errors import MissingExtra, ModelError
from kvpatch.models.fp8 import FP8
from kvpatch.models.processor import fastest_type
from kvpatch.specs.arguments import shown

QUANTISED = ("int8", "int4")
"""Weights of 8 and of 4 bits by bitsandbytes. What is multiplied with them is float16 for 8 bits, else the usual type
of the device."""


@dataclass(frozen=True)
class Precision:
    """How weights are read.

    Attributes:
        dtype: the floating type, of all weights that are not quantised.
        quantised: "int8" or "int4", empty for neither; "fp8" for weights that are read in bfloat16 and then made so.
    """

    dtype: torch.dtype
    quantised: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """What `from_pretrained` is to be given."""
        if self.quantised not in QUANTISED:
            return {"dtype": self.dtype}
        from transformers import BitsAndBytesConfig

        how: dict[str, Any] = {"load_in_8bit": True}
        if self.quantised == "int4":
            how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": self.dtype}
        return {"dtype": self.dtype, "quantization_config": BitsAndBytesConfig(**how)}


def precision_of(dtype: str | torch.dtype | None, device: str) -> Precision:
    """What a type that was asked for means on a kind of device.

    Args:
        dtype: a type of torch or its name, "auto", "fp8", "int8", "int4"; None for float32 on a CPU and bfloat16
            elsewhere.
        device: "cpu" or another kind.
    Raises:
        ModelError: for a type that there is not. MissingExtra: where bitsandbytes is needed and missing.
    """
    usual = torch.float32 if device == "cpu" else torch.bfloat16
    if isinstance(dtype, str) and dtype == FP8:
        return Precision(torch.bfloat16, FP8)
    if isinstance(dtype, str) and dtype in QUANTISED:
        if find_spec("bitsandbytes") is None:
            raise MissingExtra(
                f"{dtype} weights need bitsandbytes, which is not installed: pip install 'kvpatch[quantised]'"
            )
        # bitsandbytes' 8-bit products take float16 alone, and cast anything else with a warning for each.
        return Precision(torch.float16 if dtype == "int8" else usual, str(dtype))
    is_auto = isinstance(dtype, str) and dtype == "auto"
    if dtype is None or (is_auto and device != "cpu"):
        return Precision(usual)
    if is_auto:
        return Precision(fastest_type())
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ModelError(
            f"no dtype {shown(dtype)}; use float32, bfloat16, float16 or auto, fp8, or int8 or int4 with bitsandbytes"
        )
    return Precision(found)
