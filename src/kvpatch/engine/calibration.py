"""How to run on this processor: threads and rows at a time, from a few timed decoding steps.

Only speed is chosen here: in float32 a trial's text does not depend on threads or rows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from kvpatch.engine.backend import fast_of
from kvpatch.engine.places import make_places
from kvpatch.engine.step import PlainOps, Sampling, decode_step
from kvpatch.models.backbone import Backbone

ROWS = (32, 64, 128)
"""Rows at a time that are tried. 256 gain less than a tenth and take twice the memory (benchmarks/LOG.md)."""
SLOTS = 96
"""Live slots of a timed row: a short prompt and half of what it writes."""
GAIN = 1.08
"""More rows, or other threads, must be this much faster to be taken."""


@dataclass(frozen=True)
class HowToRun:
    """Threads, rows decoded at a time, and the measured tokens a second."""

    threads: int
    rows: int
    tokens_a_second: float
    seconds: float


@torch.no_grad()
def calibrate(backbone: Backbone) -> HowToRun | None:
    """Find threads and rows for a model on a processor, and set the threads; None where its step is not the engine's
    own. Takes a few seconds."""
    fast = fast_of(backbone)
    if backbone.device.type != "cpu" or fast.network is None:
        return None
    start, before = time.monotonic(), torch.get_num_threads()
    best: HowToRun | None = None
    for threads in dict.fromkeys((before, max(1, before // 2))):
        torch.set_num_threads(threads)
        for rows in ROWS:
            rate = _rate(backbone, rows)
            if best is None or rate > GAIN * best.tokens_a_second:
                best = HowToRun(threads, rows, rate, 0.0)
            elif threads == best.threads:
                break  # rows past the best size gain nothing
    assert best is not None
    torch.set_num_threads(best.threads)
    return HowToRun(best.threads, best.rows, best.tokens_a_second, time.monotonic() - start)


def _rate(backbone: Backbone, rows: int) -> float:
    """Tokens a second of decoding steps."""
    fast = fast_of(backbone)
    assert fast.network is not None
    places = make_places(backbone, rows, SLOTS, 8, [])
    places.first.zero_()
    places.going.fill_(True)
    places.position.fill_(SLOTS)
    places.live = SLOTS + 8
    ops = PlainOps(backbone, fast.network, Sampling(0.7, 1.0, ()), SLOTS + 16)
    ops.reuse(fast.weights(backbone))
    decode_step(backbone, fast.network, ops, places)
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        decode_step(backbone, fast.network, ops, places)
        times.append(time.perf_counter() - begun)
    return rows / min(times)
