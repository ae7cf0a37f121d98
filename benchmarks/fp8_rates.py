"""fp8 weights, with and without an fp8 cache, against bfloat16 on a GPU: decoding, single products, prefill and
scoring, each a ratio in one process.

`python benchmarks/gpu.py --only fp8 --batch 1024 1536 768 2048` runs it on the 8B shape, batches in the order that they
are given. Random weights: speed only.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kvpatch.caches.kvcache import KVCache
from kvpatch.engine import backend as fast_room
from kvpatch.engine import batching as places_room
from kvpatch.engine.batching import Request
from kvpatch.engine.model import Model
from kvpatch.engine.places import make_places
from kvpatch.engine.prefill import prefill
from kvpatch.engine.score import score
from kvpatch.engine.step import Sampling
from kvpatch.models import fp8
from kvpatch.models.template import EncodedPrompt

READ = 600
"""Prompts that are read at once."""
DRAWN = 128
"""Prompts that a batch's rows are made of, over and over, so that reading them takes little of the time."""
WAYS = ("bfloat16", "fp8", "fp8 + cache")


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


def in_fp8(model: Model) -> dict[str, Model]:
    """The ways that are compared: a model, a copy of it with fp8 weights on the same device, and the same copy whose
    decoding holds an fp8 cache."""
    hf = copy.deepcopy(model.hf).bfloat16()
    fp8.make_fp8(hf, model.backbone.device)
    ways = {"bfloat16": model} | {name: Model(replace(model.loaded, hf=hf)) for name in WAYS[1:]}
    for name, made in ways.items():
        made.backbone.batch_invariant = model.backbone.batch_invariant
        if name == WAYS[2]:
            fast_room.hold_cache_in(made.backbone, "fp8")
        fast = fast_room.fast_of(made.backbone)
        gigabytes = sum(p.numel() * p.element_size() for p in made.hf.parameters()) / 1e9
        print(
            f"{name}: {gigabytes:.1f} GB of weights; decoding step: {fast.ops} (off by {fast.error:.1e}), "
            f"batch-invariant: {fast.is_batch_invariant} {fast.note}",
            flush=True,
        )
    return ways


def single_products(model: Model, made: Model, batches: Sequence[int]) -> None:
    """Microseconds of one layer's four products by batch: bfloat16, torch's fp8 with short sums and long ones, our
    own fp8 kernel, and what making the rows' numbers takes."""
    from kvpatch.engine.scaled_products import is_order_known, ordered_scaled_product, torch_order

    chosen = fp8.FAST_ACCUM
    for is_fast in (not chosen, chosen):
        fp8.FAST_ACCUM = is_fast
        known = "" if is_order_known() else " (the likeliest: torch goes none that our kernel knows)"
        print(f"fast accumulation {is_fast}: torch's order is {torch_order()}{known}")
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
            fp8.FAST_ACCUM = not chosen
            other = "long sums" if chosen else "fast"
            found |= {f"{way}, {other}": _microseconds(ways[way]) for way in ("torch", "ours")}
            fp8.FAST_ACCUM = chosen
            print(
                f"batch {batch}, {name} {list(whole.shape)}: " + ", ".join(f"{w} {t:.0f} us" for w, t in found.items())
            )


def _microseconds(work: Callable[[], Any], times: int = 20) -> float:
    """Median of a few runs of five calls; a graph would hide the launches that a decoding step does not have."""
    for _ in range(3):
        work()
    return 1e6 * statistics.median(timed(lambda: [work() for _ in range(5)]) / 5 for _ in range(times))


def attention(ways: dict[str, Model], batch: int, prompt: int, step: int) -> None:
    """Microseconds of one layer's attention by what slots hold; of 8 bits for several ways to walk them."""
    from kvpatch.engine import fused

    kept = fused.SLOTS_IN_8_BITS
    tried: list[dict[str, int]] = [
        {"BLOCK": block, "num_warps": warps, "num_stages": stages} | ({"maxnreg": most} if most else {})
        for block, warps, stages, most in (
            (64, 2, 2, 0),
            (32, 2, 3, 0),
            (32, 1, 2, 0),
            (32, 1, 4, 0),
            (16, 1, 3, 0),
        )
    ]
    for name, settings in ((WAYS[0], [kept]), (WAYS[2], [kept, *tried])):
        backbone = ways[name].backbone
        fast = fast_room.fast_of(backbone)
        if fast.ops != "fused" or fast.network is None:
            continue
        places = make_places(backbone, batch, prompt, step + 1, [])
        places.first.zero_()
        places.step.fill_(step)
        places.position.fill_(prompt + step)
        places.going.fill_(True)
        places.keys[0].write((), torch.randn_like(places.keys[0].numbers, dtype=torch.bfloat16))
        places.values[0].write((), torch.randn_like(places.values[0].numbers, dtype=torch.bfloat16))
        ops = fast.make_ops(backbone, Sampling(0.0, 1.0, ()), prompt + step + 1)
        weights = fast.network.layers[0]
        qkv = torch.randn(batch, weights.qkv.shape[0], device=backbone.device).bfloat16()
        for fused.SLOTS_IN_8_BITS in settings:
            took = _microseconds(lambda o=ops, w=weights, q=qkv, p=places: o.attend(0, w, q, p))
            how = "" if name == WAYS[0] else f" {fused.SLOTS_IN_8_BITS}"
            print(
                f"attention of a layer, {batch} rows of {prompt + step} slots, {name}{how}: {took:.0f} us", flush=True
            )
        del places
    fused.SLOTS_IN_8_BITS = kept


def decoding(model: Model, cache: KVCache, batch: int, new: int) -> float:
    """Tokens a second of so many rows, made of those of a cache; NaN where memory runs out. The graph is captured
    before."""
    backbone = model.backbone
    request = Request(
        limit=new,
        sampling=Sampling(0.7, 1.0, ()),
        seeds=torch.arange(batch, device=backbone.device),
        keep_values=(),
        steering={},
        on_step=None,
    )
    try:
        rows = cache[[row % cache.batch for row in range(batch)]]
        fast = fast_room.fast_of(backbone)
        places_room._runner(backbone, fast, rows, request, batch, is_exact=True)
        return batch * new / timed(lambda: places_room.decode_in_places(backbone, fast, rows, request, batch))
    except torch.OutOfMemoryError as error:
        print(f"  batch {batch}: {str(error).splitlines()[0]}")
        return float("nan")
    finally:
        backbone.kept.most_rows = None
        places_room.release(backbone)


def tell_what_fits(ways: dict[str, Model], prompt: int, new: int) -> None:
    """The most rows that the planner would put into the memory that is free now, all three models in it."""
    told = []
    for name, model in ways.items():
        backbone = model.backbone
        of_place = places_room.bytes_per_place(backbone, prompt, new)
        most = int((1 - places_room.LEFT_FREE) * places_room.free_bytes(backbone) / of_place)
        told.append(f"{name} {most:,} ({of_place / 1e6:.1f} MB a row)")
    print(f"rows that fit beside both sets of weights: {', '.join(told)}", flush=True)


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
    """Print all of it for a bfloat16 model and the ways of `in_fp8`; begin nothing after so many seconds."""
    start = time.perf_counter()

    def is_late(what: str) -> bool:
        late = time.perf_counter() - start > seconds
        if late:
            print(f"{what}: no time left")
        return late

    ways = in_fp8(model)
    caches = {name: prefill(ways[name].backbone, prompts_of(DRAWN, prompt)) for name in WAYS[:2]}
    caches[WAYS[2]] = caches[WAYS[1]]  # of one set of weights
    if model.backbone.device.type == "cuda":
        tell_what_fits(ways, prompt, new)
        attention(ways, min(1024, max(batches)), prompt, new // 2)
    rates: dict[int, dict[str, float]] = {}
    for batch in batches:
        if is_late(f"batch {batch}"):
            continue
        found = rates[batch] = {name: decoding(ways[name], caches[name], batch, new) for name in WAYS}
        told = [
            f"{name} {rate:,.0f} tokens/s ({1e3 * batch / rate:.1f} ms a step, {rate / found[WAYS[0]]:.2f})"
            for name, rate in found.items()
        ]
        print(f"decoding, {batch} rows: {', '.join(told)}", flush=True)
    best = {name: max((of[name] for of in rates.values() if of[name] == of[name]), default=0.0) for name in WAYS}
    if not all(best.values()):
        return
    told = [f"{name} {rate:,.0f} tokens/s ({rate / best[WAYS[0]]:.2f})" for name, rate in best.items()]
    print(f"each at its best batch: {', '.join(told)}", flush=True)
    _tell_shapes(ways[WAYS[1]])
    if model.backbone.device.type == "cuda" and not is_late("single products"):
        single_products(model, ways[WAYS[1]], (max(batches),))
    if not is_late("prefill and scoring"):
        read = reading(model, prompt), reading(ways[WAYS[1]], prompt)
        for name in read[0]:
            one, two = (of[name] for of in read)
            print(f"{name}: bfloat16 {one:,.0f} tokens/s, fp8 {two:,.0f}, ratio {two / one:.2f}", flush=True)
    if not is_late("the other way to sum"):
        batch, chosen = max(rates, key=lambda batch: rates[batch][WAYS[1]]), fp8.FAST_ACCUM
        fp8.FAST_ACCUM = not chosen
        try:
            other = decoding(ways[WAYS[1]], caches[WAYS[1]], batch, new)
        finally:
            fp8.FAST_ACCUM = chosen
        ratio = other / best[WAYS[0]]
        print(f"fp8, fast accumulation {not chosen}, {batch} rows: {other:,.0f} tokens/s, ratio {ratio:.2f}")


def _tell_shapes(made: Model) -> None:
    """For which shapes torch's product is taken, and for which our own."""
    reader = fast_room.fast_of(made.backbone).reader
    if reader is not None and reader.products.is_exact:
        tried = reader.products.scaled.agreement()
        ours = sorted(key[:3] for key, is_torch in tried.items() if not is_torch)
        print(f"torch's product is taken for {len(tried) - len(ours)} of {len(tried)} shapes; ours for {ours[:12]}")
