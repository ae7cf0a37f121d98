"""fp8 weights against bfloat16 on a GPU: single products, decoding, prefill and scoring, each a ratio in one process.

`python benchmarks/gpu.py --only fp8 --batch 256 512 768 1024` runs it on the 8B shape. Random weights: speed only.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kvpatch.engine import backend as fast_room
from kvpatch.engine import batching as places_room
from kvpatch.engine.decode import decode
from kvpatch.engine.model import Model
from kvpatch.engine.prefill import prefill
from kvpatch.engine.score import score
from kvpatch.engine.token_budget import tokens_at_once
from kvpatch.models import fp8
from kvpatch.models.template import EncodedPrompt

READ = 600
"""Prompts that are read at once."""


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any]) -> float:
    settle()
    start = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - start


def prompts_of(batch: int, tokens: int) -> list[EncodedPrompt]:
    rows = torch.randint(10, 1000, (batch, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return [EncodedPrompt(tuple(row), (2,) * len(row), ("",) * len(row)) for row in rows]


def in_fp8(model: Model) -> Model:
    """A copy of a model with fp8 weights, on the same device."""
    hf = copy.deepcopy(model.hf).bfloat16()
    fp8.make_fp8(hf, model.backbone.device)
    made = Model(replace(model.loaded, hf=hf))
    made.backbone.batch_invariant = model.backbone.batch_invariant
    fast = fast_room.fast_of(made.backbone)
    gigabytes = sum(p.numel() * p.element_size() for p in hf.parameters()) / 1e9
    print(
        f"fp8: {gigabytes:.1f} GB of weights; decoding step: {fast.ops} (off by {fast.error:.1e}), batch-invariant: "
        f"{fast.is_batch_invariant} {fast.note}"
    )
    return made


def single_products(model: Model, made: Model, batches: Sequence[int]) -> None:
    """Microseconds of one layer's four products by batch: bfloat16, torch's fp8 with and without its short sums, our
    own fp8 kernel, and what making the rows' numbers takes."""
    from kvpatch.engine.scaled_products import is_order_known, ordered_scaled_product, torch_order

    for is_fast in (False, True):
        fp8.FAST_ACCUM = is_fast
        known = "" if is_order_known() else " (the likeliest: torch goes none that our kernel knows)"
        print(f"fast accumulation {is_fast}: torch's order is {torch_order()}{known}")
    fp8.FAST_ACCUM = False
    plain, networks = model.backbone, [fast_room.fast_of(m.backbone).network for m in (model, made)]
    assert networks[0] is not None and networks[1] is not None
    for batch in batches:
        for name in ("qkv", "out", "gate_up", "down"):
            whole, weight = (getattr(network.layers[0], name) for network in networks)
            x = torch.randn(batch, whole.shape[1], dtype=torch.bfloat16, device=plain.device)
            numbers, scale = fp8.rows_of(x)
            ways: dict[str, Callable[[], Any]] = {
                "bfloat16": lambda x=x, whole=whole: torch.nn.functional.linear(x, whole),
                "rows": lambda x=x: fp8.rows_of(x),
                "torch": lambda n=numbers, s=scale, w=weight: fp8.product_by_torch(n, s, w),
                "ours": lambda n=numbers, s=scale, w=weight: ordered_scaled_product(n, s, w),
            }
            found = {way: _microseconds(work) for way, work in ways.items()}
            fp8.FAST_ACCUM = True
            found |= {f"{way}, fast": _microseconds(ways[way]) for way in ("torch", "ours")}
            fp8.FAST_ACCUM = False
            print(
                f"batch {batch}, {name} {list(whole.shape)}: " + ", ".join(f"{w} {t:.0f} us" for w, t in found.items())
            )


def _microseconds(work: Callable[[], Any], times: int = 20) -> float:
    """Median of a few runs of five calls; a graph would hide the launches that a decoding step does not have."""
    for _ in range(3):
        work()
    return 1e6 * statistics.median(timed(lambda: [work() for _ in range(5)]) / 5 for _ in range(times))


def decoding(model: Model, batch: int, prompt: int, new: int) -> float:
    """Tokens a second, after one run that captures the graph; NaN where memory runs out."""
    backbone = model.backbone
    backbone.kept.tokens_at_once = tokens_at_once(backbone)
    try:
        cache = prefill(backbone, prompts_of(batch, prompt))
        settings: dict[str, Any] = {"temperature": 0.7, "seeds": range(batch), "places": batch}

        def work() -> None:
            decode(backbone, cache, max_new_tokens=new, **settings)

        work()
        return batch * new / timed(work)
    except torch.OutOfMemoryError as error:
        print(f"  batch {batch}: {str(error).splitlines()[0]}")
        return float("nan")
    finally:
        places_room.release(backbone)


def reading(model: Model, prompt: int) -> dict[str, float]:
    """Tokens a second of prefill and of scoring."""
    backbone, prompts = model.backbone, prompts_of(READ, prompt)
    prefill(backbone, prompts)
    found = {"prefill": READ * prompt / timed(lambda: prefill(backbone, prompts))}
    cache = prefill(backbone, prompts)
    forced = [[list(range(20, 44)), *[list(range(20, 28))] * 16]] * READ
    score(backbone, cache[[0]], forced[:1])
    found["scoring"] = READ * sum(map(len, forced[0])) / timed(lambda: score(backbone, cache, forced))
    return found


def compare(model: Model, batches: Sequence[int], prompt: int, new: int, seconds: float) -> None:
    """Print all of it for a bfloat16 model and a copy in fp8, the largest batch first; begin nothing after so many
    seconds."""
    start = time.perf_counter()

    def is_late(what: str) -> bool:
        late = time.perf_counter() - start > seconds
        if late:
            print(f"{what}: no time left")
        return late

    made = in_fp8(model)
    if model.backbone.device.type == "cuda":
        single_products(model, made, (max(batches),))
    rates: dict[int, tuple[float, float]] = {}
    for batch in sorted(batches, reverse=True):
        if not is_late(f"batch {batch}"):
            before, after = rates[batch] = decoding(model, batch, prompt, new), decoding(made, batch, prompt, new)
            print(
                f"decoding, {batch} rows: bfloat16 {before:,.0f} tokens/s, fp8 {after:,.0f}, "
                f"ratio {after / before:.2f}",
                flush=True,
            )
    known = [rate for rate in rates.values() if rate[0] == rate[0] and rate[1] == rate[1]]
    if not known:
        return
    best, best_fp8 = max(before for before, _ in known), max(after for _, after in known)
    print(f"each at its best batch: bfloat16 {best:,.0f} tokens/s, fp8 {best_fp8:,.0f}, ratio {best_fp8 / best:.2f}")
    if not is_late("prefill and scoring"):
        read = reading(model, prompt), reading(made, prompt)
        for name in read[0]:
            one, two = (of[name] for of in read)
            print(f"{name}: bfloat16 {one:,.0f} tokens/s, fp8 {two:,.0f}, ratio {two / one:.2f}", flush=True)
    _tell_shapes(made)
    if not is_late("fast accumulation"):
        batch = max(rates, key=lambda batch: rates[batch][1])
        fp8.FAST_ACCUM = True
        try:
            fast = decoding(made, batch, prompt, new)
        finally:
            fp8.FAST_ACCUM = False
        print(f"fp8 with fast accumulation, {batch} rows: {fast:,.0f} tokens/s, ratio {fast / best:.2f}")


def _tell_shapes(made: Model) -> None:
    """For which shapes torch's product is taken, and for which our own."""
    reader = fast_room.fast_of(made.backbone).reader
    if reader is not None and reader.products.is_exact:
        tried = reader.products.scaled.agreement()
        ours = sorted(key[:3] for key, is_torch in tried.items() if not is_torch)
        print(f"torch's product is taken for {len(tried) - len(ours)} of {len(tried)} shapes; ours for {ours[:12]}")
