"""Which number type a processor multiplies fastest. The type is part of what a run is, so it is only chosen where
"auto" was asked for."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from kvpatch.models.products import fast_products

BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@torch.no_grad()
def fastest_type(width: int = 1024, rows: int = 128) -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware and wins by it, else float32."""
    if not _multiplies_bfloat16():
        return torch.float32
    times = {}
    for kind in (torch.float32, torch.bfloat16):
        x, weight = (torch.randn(n, width).to(kind) for n in (rows, 4 * width))
        with fast_products(weight):
            F.linear(x, weight)
            begun = time.perf_counter()
            for _ in range(4):
                F.linear(x, weight)
            times[kind] = time.perf_counter() - begun
    return torch.bfloat16 if 1.3 * times[torch.bfloat16] < times[torch.float32] else torch.float32


def _multiplies_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return platform.machine().lower() == "arm64"
    return not BFLOAT16_FLAGS.isdisjoint(flags)
