"""Every peer and kvpatch on one card, in one process, with the card's own ceilings measured in the same call.

    python benchmarks/gpu.py --tokenizer DIR [--only ceilings,decode,...] [--shape 8b]

Random weights in a model's shape: speed only, no findings. The tokenizer is any chat tokenizer that is at hand. Each
section prints as it goes and survives the failure of another; the figures are ratios to a peer or to a ceiling.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "8b": (
        "LlamaConfig",
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rope_theta": 500_000.0,
            "eos_token_id": 128_009,
        },
    ),
    "smollm2": (
        "LlamaConfig",
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_theta": 100_000.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-270m": (
        "Gemma3TextConfig",
        {
            "vocab_size": 262_144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "max_position_embeddings": 32_768,
            "sliding_window": 512,
            "query_pre_attn_scalar": 256,
        },
    ),
    "tiny": (
        "LlamaConfig",
        {
            "vocab_size": 1024,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 1024,
            "initializer_range": 0.1,
        },
    ),
}
PROMPT, NEW = 80, 200
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""A CPU is for trying the script out (--smoke); its figures mean nothing."""
ACTIVITIES = [getattr(torch.profiler.ProfilerActivity, DEVICE.upper())]


def stand_in(*names: str) -> None:
    """Put an empty module in the place of one that is not installed; the sections here draw no report."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock()
            print(f"({name} is not installed: a stand-in takes its place; nothing here uses it)")


stand_in("altair", "altair.utils", "altair.utils.schemapi", "vl_convert", "duckdb", "polars")

# Imported here because some of them import what was stood in for above; pyproject.toml allows it.
from fp8_rates import compare, settle, timed
from growth import grow
from kvpatch.checks.identities import check
from kvpatch.engine import backend as fast_room
from kvpatch.engine import batching as places_room
from kvpatch.engine.decode import decode
from kvpatch.engine.model import Model
from kvpatch.engine.prefill import prefill
from kvpatch.engine.score import score
from kvpatch.engine.token_budget import tokens_at_once
from kvpatch.executors.local import LocalExecutor
from kvpatch.models.backbone import Backbone
from kvpatch.models.load import Loaded
from kvpatch.models.template import EncodedPrompt
from kvpatch.planned import plan_for
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.load import load_protocol
from kvpatch.specs.patch import Patch
from kvpatch.store.directory import Store


class Bench:
    """What the sections share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.copy_rate = self.matmul_rate = float("nan")
        self._models: dict[str, Model] = {}
        self._folder = Path(tempfile.mkdtemp())

    def model(self, shape: str, dtype: torch.dtype = torch.bfloat16) -> Model:
        """A randomly initialised model in a shape, with the tokenizer at hand."""
        dtype = torch.float32 if self.options.smoke else dtype
        key = f"{shape}-{dtype}"
        if key not in self._models:
            start = time.perf_counter()
            name, settings = SHAPES[shape]
            torch.manual_seed(0)
            torch.set_default_dtype(dtype)
            with torch.device(DEVICE):
                hf = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
            torch.set_default_dtype(torch.float32)
            hf.requires_grad_(False)
            tokenizer: Any = None
            if self.options.tokenizer:
                tokenizer = transformers.AutoTokenizer.from_pretrained(self.options.tokenizer)
            # A run hashes the files of the weights; these stand for them.
            home = self._folder / key
            home.mkdir(exist_ok=True)
            save_file({"stand_in": torch.zeros(1)}, home / "model.safetensors")
            self._models[key] = Model(Loaded(hf, tokenizer, f"{shape} shape", home, False))
            self._models[key].backbone.batch_invariant = not self.options.fast
            fast = fast_room.fast_of(self._models[key].backbone)
            print(
                f"{shape} shape, {dtype}: made in {time.perf_counter() - start:.1f} s; decoding step: {fast.ops}"
                f" (off by {fast.error:.1e} of the largest logit){'; ' + fast.note if fast.note else ''}"
            )
        return self._models[key]

    def floor(self, backbone: Backbone, batch: int, prompt: int, new: int) -> tuple[float, float, float]:
        """Least seconds of a mean decoding step: weights read or multiplied, live slots read; and both apart."""
        weights = sum(p.numel() for p in backbone.hf.parameters())
        geometry = backbone.geometry
        slot = 4 * geometry.layers * geometry.kv_heads * geometry.head_dim
        products = max(2 * weights / self.copy_rate, 2 * weights * batch / self.matmul_rate)
        slots = batch * (prompt + new / 2) * slot / self.copy_rate
        return products + slots, products, slots


def median_of(work: Callable[[], Any], times: int = 10) -> float:
    work()
    return statistics.median(timed(work) for _ in range(times))


def random_prompts(batch: int, tokens: int, vocabulary: int) -> list[EncodedPrompt]:
    rows = torch.randint(10, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return [prompt_of(row) for row in rows]


def prompt_of(row: list[int]) -> EncodedPrompt:
    return EncodedPrompt(tuple(row), (2,) * len(row), ("",) * len(row))


def forget_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak() -> str:
    if DEVICE != "cuda":
        return "memory not measured"
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"


# --- sections -------------------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """Copy and matmul rates of the card, and of the products one step of the 8B shape is made of."""
    scale = 64 if bench.options.smoke else 1
    x = torch.empty(2**30 // scale, dtype=torch.bfloat16, device=DEVICE).normal_()
    bench.copy_rate = 2 * x.numel() * 2 / median_of(functools.partial(torch.empty_like(x).copy_, x))
    a, b = (torch.randn(8192 // scale, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    bench.matmul_rate = 2 * a.shape[0] ** 2 * 8192 / median_of(lambda: a @ b.T)
    print(f"copy {bench.copy_rate / 1e12:.2f} TB/s (read + written), matmul {bench.matmul_rate / 1e12:.0f} TFLOP/s")


def products(bench: Bench) -> None:
    """Seconds of one decoding step's matrix products alone, by batch."""
    network = fast_room.fast_of(bench.model("8b").backbone).network
    assert network is not None
    head = bench.model("8b").backbone.head.weight
    for batch in bench.options.batch:
        x = torch.randn(batch, head.shape[1], dtype=torch.bfloat16, device=DEVICE)
        mixed = torch.randn(batch, network.layers[0].out.shape[1], dtype=torch.bfloat16, device=DEVICE)
        inner = torch.randn(batch, network.layers[0].down.shape[1], dtype=torch.bfloat16, device=DEVICE)

        def step(x=x, mixed=mixed, inner=inner) -> None:
            for layer in network.layers:
                nn.functional.linear(x, layer.qkv)
                nn.functional.linear(mixed, layer.out)
                nn.functional.linear(x, layer.gate_up)
                nn.functional.linear(inner, layer.down)
            nn.functional.linear(x, head)

        seconds = median_of(step, 5)
        weights = sum(p.numel() for p in bench.model("8b").backbone.hf.parameters()) - network.embedding.numel()
        rate = 2 * weights * batch / seconds
        print(f"batch {batch}: products alone {seconds * 1e3:.2f} ms = {rate / 1e12:.0f} TFLOP/s")


def same_texts(bench: Bench) -> None:
    """Greedy and sampled texts of the graph path against the model's own forward pass, float32, mixed lengths."""
    model = bench.model("tiny", torch.float32)
    backbone = model.backbone
    lengths = [1 + (7 * i) % 90 for i in range(96)]
    prompts = [random_prompts(1, n, 1024)[0] for n in lengths]
    prompts = [
        EncodedPrompt(tuple((t + i) % 1000 for t in p.token_ids), p.segments, p.pieces) for i, p in enumerate(prompts)
    ]
    cache = prefill(backbone, prompts)
    known = backbone.kept.backend
    for temperature in (0.0, 0.8):
        backbone.kept.backend = fast_room.Fast(None, "model", "")
        free = decode(backbone, cache, max_new_tokens=48, temperature=temperature, seeds=range(96))
        ends = sorted({int(free.token_ids[row, 5 + row % 30]) for row in range(0, 96, 3)})
        settings = {"max_new_tokens": 48, "temperature": temperature, "seeds": range(96), "end_tokens": ends}
        own = decode(backbone, cache, **settings, keep_values=[1])
        for ops in dict.fromkeys([known.ops, "plain"]):
            backbone.kept.backend = replace(known, ops=ops)
            for places in (96, 40):
                out = decode(backbone, cache, **settings, keep_values=[1], places=places)
                same = bool((out.token_ids == own.token_ids).all())
                off = float((out.logprobs - own.logprobs).nan_to_num().abs().max())
                values = float((out.values[1] - own.values[1]).abs().max())
                print(
                    f"temperature {temperature}, {ops}, {places} places: texts {'equal' if same else 'DIFFER'}, "
                    f"{sum(n < 48 for n in out.lengths)} early stops, log-probabilities off by {off:.1e}, "
                    f"values by {values:.1e}"
                )
    backbone.kept.backend = known


def noise(bench: Bench) -> None:
    """bfloat16: the same rows among other mates, with the same number of places and with another."""
    backbone = bench.model("8b").backbone
    cache = prefill(backbone, random_prompts(256, PROMPT, 1000))
    settings = {"max_new_tokens": 32, "temperature": 0.7}
    whole = decode(backbone, cache, **settings, seeds=range(256), places=256)
    turned = decode(backbone, cache[list(range(255, -1, -1))], **settings, seeds=range(255, -1, -1), places=256)
    fewer = decode(backbone, cache, **settings, seeds=range(256), places=128)
    for name, out, rows in (
        ("same places, other order", turned, list(range(255, -1, -1))),
        ("half the places", fewer, list(range(256))),
    ):
        same = (out.token_ids[rows] == whole.token_ids).all(dim=1).float().mean()
        first = float((out.logprobs[rows][:, 0] - whole.logprobs[:, 0]).abs().max())
        print(
            f"{name}: {100 * float(same):.1f}% of 256 texts of 32 tokens equal; first log-probability "
            f"off by {first:.1e}"
        )


def invariant(bench: Bench) -> None:
    """8B shape, bfloat16: tokens, log-probabilities and scores of the same trials in batches of other sizes, orders and
    places, to the bit."""
    backbone, count = bench.model("8b").backbone, bench.options.trials
    lengths = torch.randint(PROMPT - 40, PROMPT + 40, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [
        prompt_of(list(p.token_ids[:length]))
        for p, length in zip(random_prompts(count, 2 * PROMPT, 1000), lengths, strict=True)
    ]
    rows = list(range(count))
    ways: dict[str, tuple[list[list[int]], int | None]] = {
        f"{size} at a time": ([rows[low : low + size] for low in range(0, count, size)], None)
        for size in bench.options.sizes
    }
    ways |= {"in another order": ([rows[::-1]], None), "in 300 places": ([rows], 300), "in 44 places": ([rows], 44)}
    for temperature in bench.options.temperatures:
        expected: list[torch.Tensor] = []
        for name, (batches, places) in {f"{count} at a time": ([rows], count), **ways}.items():
            start = time.perf_counter()
            found = torch.empty(count, 3, bench.options.new, dtype=torch.float64)
            given = expected[0] if expected else torch.zeros_like(found)
            for batch in batches:
                cache = prefill(backbone, [prompts[i] for i in batch])
                out = decode(
                    backbone,
                    cache,
                    max_new_tokens=bench.options.new,
                    temperature=temperature,
                    seeds=batch,
                    places=places,
                )
                forced = [[given[i, 0].long().tolist(), given[i, 0, : 1 + i % 8].long().tolist()] for i in batch]
                scores = score(backbone, cache, forced).logprobs[:, 0]
                found[batch] = torch.stack(
                    [out.token_ids.double(), out.logprobs.double(), scores.double()], dim=1
                ).cpu()
            if not expected:  # the scores of the first way were of other tokens
                expected = [found]
                cache = prefill(backbone, prompts)
                forced = [[found[i, 0].long().tolist(), found[i, 0, : 1 + i % 8].long().tolist()] for i in rows]
                found[:, 2] = score(backbone, cache, forced).logprobs[:, 0].double().cpu()
            same = (found == expected[0]).all(dim=2).float().mean(dim=0).tolist()
            print(
                f"temperature {temperature}, {name}: equal to the bit are the tokens of {100 * same[0]:.2f}% of "
                f"{count} trials, log-probabilities {100 * same[1]:.2f}%, scores {100 * same[2]:.2f}%; "
                f"{time.perf_counter() - start:.1f} s",
                flush=True,
            )
    places_room.release(backbone)


def decoding(bench: Bench) -> None:
    """Decode tokens a second of the 8B shape, against the floor."""
    backbone = bench.model("8b").backbone
    backbone.kept.tokens_at_once = tokens_at_once(backbone)
    for batch in bench.options.batch:
        try:
            forget_peak()
            cache = prefill(backbone, random_prompts(batch, PROMPT, 1000))
            settings: dict[str, Any] = {"temperature": 0.7, "seeds": range(batch), "places": batch}
            work = functools.partial(decode, backbone, cache, max_new_tokens=NEW, **settings)
            first = timed(work)
            seconds = min(timed(work) for _ in range(2))
            floor, multiplied, read = bench.floor(backbone, batch, PROMPT, NEW)
            step = seconds / NEW
            print(
                f"batch {batch}: {batch * NEW / seconds:,.0f} tokens/s, step {step * 1e3:.2f} ms = "
                f"{step / floor:.2f} times the floor of {floor * 1e3:.2f} ({multiplied * 1e3:.2f} products + "
                f"{read * 1e3:.2f} slots); capture and first call {first - seconds:+.1f} s; {peak()}"
            )
        except torch.OutOfMemoryError as error:
            print(f"batch {batch}: {str(error).splitlines()[0]}")
        places_room.release(backbone)


def profile(bench: Bench) -> None:
    """Where a decoding step's time goes, kernel by kernel."""
    backbone = bench.model("8b").backbone
    batch = bench.options.best
    cache = prefill(backbone, random_prompts(batch, PROMPT, 1000))
    settings: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0.7, "seeds": range(batch), "places": batch}
    decode(backbone, cache, **settings)
    with torch.profiler.profile(activities=ACTIVITIES) as seen:
        decode(backbone, cache, **settings)
        settle()
    kernel_table(seen, f"decode, batch {batch}")
    with torch.profiler.profile(activities=ACTIVITIES) as seen:
        score(backbone, cache, [[list(range(20, 44)), *[list(range(20, 28))] * 16]] * batch)
        settle()
    kernel_table(seen, f"score, batch {batch}")
    with torch.profiler.profile(activities=ACTIVITIES) as seen:
        prefill(backbone, random_prompts(200, PROMPT, 1000))
        settle()
    kernel_table(seen, "prefill, 200 prompts")
    places_room.release(backbone)


KINDS = {
    "attention": ("attend", "fmha", "flash", "sdpa", "attention"),
    "products": ("nvjet", "gemm", "cutlass", "xmma"),
}
"""What a kernel is, by what its name holds."""


def kernel_table(seen: Any, title: str) -> None:
    rows = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in rows) or 1
    print(f"{title}: {total / 1e6:.3f} s on the device")
    shares = {"products": 0.0, "attention": 0.0}
    for event in rows:
        kind = next((kind for kind, names in KINDS.items() if any(n in event.key.lower() for n in names)), event.key)
        shares[kind] = shares.get(kind, 0.0) + 100 * event.self_device_time_total / total
    largest = max((kind for kind in shares if kind not in KINDS), key=lambda kind: shares[kind], default="nothing")
    print(
        f"  products {shares['products']:.1f}%, attention {shares['attention']:.1f}%; the largest of the rest "
        f"{shares.get(largest, 0):.1f}%: {largest[:60]}"
    )
    for event in rows[:14]:
        share = 100 * event.self_device_time_total / total
        mean = event.self_device_time_total / event.count
        print(f"  {share:5.1f}%  {event.count:6d} x {mean:8.1f} us  {event.key[:90]}")


def plain(bench: Bench) -> None:
    """The same step without Triton: torch operations in graphs, one for each length bucket."""
    backbone = bench.model("8b").backbone
    known, batch = fast_room.fast_of(backbone), bench.options.best
    cache = prefill(backbone, random_prompts(batch, PROMPT, 1000))
    settings: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0.7, "seeds": range(batch), "places": batch}
    try:
        backbone.kept.backend = fast_room.Fast(known.network, "plain", "")
        first = timed(lambda: decode(backbone, cache, **settings))
        seconds = timed(lambda: decode(backbone, cache, **settings))
        print(f"torch operations in graphs: {batch * NEW / seconds:,.0f} tokens/s; capture {first - seconds:+.1f} s")
    finally:
        backbone.kept.backend = known
        places_room.release(backbone)


def compiled(bench: Bench) -> None:
    """The same, compiled by torch.compile, with what compiling costs."""
    step = places_room.decode_step
    places_room.decode_step = torch.compile(step, dynamic=False)
    try:
        plain(bench)
    finally:
        places_room.decode_step = step


def reading(bench: Bench) -> None:
    """Prefill and teacher-forced scoring of the 8B shape, against the matmul ceiling."""
    backbone = bench.model("8b").backbone
    weights = sum(p.numel() for p in backbone.hf.parameters())
    prompts = random_prompts(600, PROMPT, 1000)
    prefill(backbone, prompts[:8])
    seconds = timed(lambda: prefill(backbone, prompts))
    ceiling = bench.matmul_rate / 2 / weights
    print(f"prefill: {600 * PROMPT / seconds:,.0f} tokens/s; the products' ceiling is {ceiling:,.0f}")
    cache = prefill(backbone, prompts)
    for name, rows in (
        ("16 of 8 tokens and one of 24", [[list(range(20, 44)), *[list(range(20, 28))] * 16]] * 600),
        ("one of 200 tokens", [[list(range(20, 220))]] * 600),
    ):
        tokens = 600 * sum(map(len, rows[0]))
        score(backbone, cache[[0]], rows[:1])
        seconds = timed(lambda rows=rows: score(backbone, cache, rows))
        print(f"score, {name}: {tokens / seconds:,.0f} tokens/s")


def peers(bench: Bench) -> None:
    """What researchers do, and kvpatch: a token loop, batched `generate`, the same with a static cache and compiled,
    nnsight generating under a patch; prompts read anew in each. Values of one layer are another prompt's where a patch
    is made."""
    model = bench.model("8b")
    hf: Any = model.hf
    prompts = random_prompts(512, PROMPT, 1000)
    ids = torch.tensor([p.token_ids for p in prompts], device=DEVICE)

    def loop(count: int) -> None:
        tokens, past = ids[:1], None
        for _ in range(count):
            out = hf(input_ids=tokens, past_key_values=past, use_cache=True)
            past = out.past_key_values
            tokens = out.logits[:, -1:].argmax(dim=-1)

    def generate(rows: int, new: int, **settings: Any) -> None:
        some = ids[:rows]
        settings |= {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "top_k": 0, "temperature": 0.7}
        hf.generate(some, attention_mask=torch.ones_like(some), pad_token_id=0, **settings)

    def patched(rows: int) -> None:
        cache = prefill(model.backbone, prompts[:rows])
        mixed = Patch(layers=[20], parts="v").apply(cache[list(reversed(range(rows)))], cache)
        decode(model.backbone, mixed, max_new_tokens=NEW, temperature=0.7, seeds=range(rows))

    with torch.no_grad():
        loop(4)
        naive = NEW / timed(lambda: loop(NEW))
        print(f"naive loop, one prompt: {naive:,.1f} tokens/s")
        for rows in (100, 512):
            rate = rows * NEW / timed(lambda rows=rows: generate(rows, NEW))
            print(f"generate, batch {rows}: {rate:,.0f} tokens/s, {rate / naive:,.0f} naive loops")
        for rows in (100, 512):
            patched(rows)
            rate = rows * NEW / timed(lambda rows=rows: patched(rows))
            print(f"kvpatch under a patch, batch {rows}: {rate:,.0f} tokens/s, {rate / naive:,.0f} naive loops")
        _nnsight(model, ids, naive)
        start = time.perf_counter()
        try:
            generate(100, NEW, cache_implementation="static")
        except Exception as problem:
            print(f"generate with a static cache: {type(problem).__name__}: {problem}".splitlines()[0])
            return
        made = time.perf_counter() - start
        rate = 100 * NEW / timed(lambda: generate(100, NEW, cache_implementation="static"))
        print(f"generate, static cache and compiled, batch 100: {rate:,.0f} tokens/s (compiled in {made:.0f} s)")


def _nnsight(model: Any, ids: torch.Tensor, naive: float) -> None:
    """nnsight generating from one prompt, and from 100, while values of one layer are those of another prompt."""
    try:
        import nnsight
    except ImportError as problem:
        print(f"nnsight can't be imported: {problem}")
        return
    traced: Any = nnsight.LanguageModel(model.hf, tokenizer=model.tokenizer)
    put = torch.randn(PROMPT, model.hf.config.num_key_value_heads * 128, device=DEVICE, dtype=torch.bfloat16)
    for rows, new in ((1, 64), (100, 64)):

        def run(rows: int = rows, new: int = new) -> None:
            with traced.generate(ids[:rows], max_new_tokens=new, min_new_tokens=new, do_sample=False):
                traced.model.layers[20].self_attn.v_proj.output[:] = put
                traced.generator.output.save()

        try:
            run()
            rate = rows * new / timed(run)
        except Exception as problem:
            print(f"nnsight: {type(problem).__name__}: {problem}".splitlines()[0])
            return
        print(f"nnsight under a patch, batch {rows}: {rate:,.1f} tokens/s, {rate / naive:,.1f} naive loops")


def experiment(bench: Bench, shape: str, name: str, new: int, phases: dict[str, int], **settings: Any) -> None:
    """Plan and execute phases of dec7 as written to disk; statistics and report are not in it."""
    with_controls = settings.get("with_controls", False)
    model = bench.model(shape)
    second = bench.model(settings["second"]) if "second" in settings else model
    start = time.perf_counter()
    protocol = load_protocol("dec7")
    chosen = {
        key: protocol.phases[key].model_copy(update={"n": n} | ({} if with_controls else {"controls": []}))
        for key, n in phases.items()
    }
    generation = protocol.generation.model_copy(update={"max_new_tokens": new})
    protocol = protocol.model_copy(update={"phases": chosen, "hypotheses": [], "generation": generation})
    keys = {None: model} | ({"second": second} if any(p.model for p in chosen.values()) else {})
    planned = time.perf_counter()
    plan, _ = plan_for(keys, protocol, load_bank(protocol.bank), seed=0, n=None, phases=None)
    began = time.perf_counter()
    forget_peak()
    tokens, marks = [0], {}

    def on_batch(batch: Any, written: int) -> None:
        tokens[0] += written
        marks[batch.phase] = time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "run")
        with store.locked():
            LocalExecutor(keys).run(plan, store, on_tokens=lambda rows: None, on_batch=on_batch)
        rows = store.read()
        errors = rows.num_rows - rows["error"].null_count
        mean = sum(rows["n_tokens"].to_pylist()) / rows.num_rows
        distinct = len(set(rows["content_id"].to_pylist()))
    settle()
    ended = time.perf_counter()
    print(
        f"{name}: {rows.num_rows} trials ({distinct} distinct, mean {mean:.0f} tokens), {ended - began:.1f} s to run "
        f"and store + {began - planned:.1f} s to plan + {planned - start:.1f} s to read the protocol; {tokens[0]:,} "
        f"tokens written; {errors} errors; {peak()}"
    )
    print("   done at " + ", ".join(f"{phase} {at:.1f} s" for phase, at in marks.items()))


def identities(bench: Bench) -> None:
    """`kvpatch check` on the shapes used here, in bfloat16."""
    for shape in ("8b", "smollm2"):
        start = time.perf_counter()
        found = check(bench.model(shape))
        bad = [f"{i.identity} ({i.error:.1e} > {i.bound:.1e})" for i in found if i.holds is False]
        print(f"{shape}: {len(found)} identities in {time.perf_counter() - start:.1f} s; failing: {bad or 'none'}")


PLANNED = {"1": 100, "2": 50, "3": 50, "4": 20, "5": 100, "6": 50, "7": 50}


def phase1(bench: Bench) -> None:
    """Phase 1 whole on the 8B shape: 600 trials of 200 tokens (and 60 of calibration), every readout, rows written."""
    experiment(bench, "8b", "warm-up, n=8", NEW, {"1": 8})
    experiment(bench, "8b", "Phase 1", NEW, {"1": 100})


def phases(bench: Bench) -> None:
    """All seven phases on the 8B shape (the seventh on the same model), as the experiment's plan counts them."""
    experiment(bench, "8b", "all seven phases", NEW, PLANNED)


def phase1_profile(bench: Bench) -> None:
    """Where the time of Phase 1 goes on the device, kernel by kernel, and how much of it the device is idle."""
    start = time.perf_counter()
    with torch.profiler.profile(activities=ACTIVITIES) as seen:
        experiment(bench, "8b", "Phase 1, profiled, n=40", NEW, {"1": 40})
    print(f"   {time.perf_counter() - start:.1f} s in all, profiler included")
    kernel_table(seen, "Phase 1, n=40")


def host_profile(bench: Bench) -> None:
    """Where the host's time goes in Phase 1 on the small shape."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.enable()
    experiment(bench, "smollm2", "SmolLM2 shape, phase 1 with controls, profiled", 64, {"1": 50}, with_controls=True)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def dec7(bench: Bench) -> None:
    """All of dec7 with its controls and interventions, SmolLM2 shape, the second model in the Gemma-3-270m shape."""
    n = {**PLANNED, "interventions": 50}
    experiment(bench, "smollm2", "warm-up", 64, {"1": 10}, with_controls=True)
    experiment(bench, "smollm2", "dec7", 64, n, with_controls=True, second="gemma3-270m")


def growth(bench: Bench) -> None:
    """Time a trial and a token as pairs and new tokens grow, 8B shape: past the first batch from 100 pairs on."""
    grow(bench.model("8b"), (25, 50, 100, 200, 400), (32, 64, 128))


def fp8(bench: Bench) -> None:
    """The 8B shape in fp8 against itself in bfloat16."""
    compare(bench.model("8b"), bench.options.batch, PROMPT, NEW, bench.options.seconds)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "ceilings": ceilings,
    "same_texts": same_texts,
    "products": products,
    "decoding": decoding,
    "reading": reading,
    "profile": profile,
    "noise": noise,
    "invariant": invariant,
    "identities": identities,
    "phase1": phase1,
    "phases": phases,
    "phase1_profile": phase1_profile,
    "dec7": dec7,
    "growth": growth,
    "fp8": fp8,
    "host_profile": host_profile,
    "plain": plain,
    "peers": peers,
    "compiled": compiled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="directory of a chat tokenizer; without it no whole phases are run")
    parser.add_argument("--only", default=",".join(s for s in SECTIONS if s not in ("compiled", "host_profile")))
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 512, 640, 768, 1024])
    parser.add_argument("--best", type=int, default=640, help="batch of the sections that take one")
    parser.add_argument("--trials", type=int, default=1024, help="of the section invariant")
    parser.add_argument("--new", type=int, default=24, help="tokens that its trials write")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 7, 44, 256], help="its batches")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 0.0])
    parser.add_argument("--fast", action="store_true", help="without batch invariance")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes everywhere, to try the script out")
    parser.add_argument("--seconds", type=float, default=560, help="start no section after this")
    options = parser.parse_args()
    start = time.perf_counter()
    if options.smoke:
        globals()["NEW"] = 6
        SHAPES["8b"] = SHAPES["smollm2"] = ("LlamaConfig", SHAPES["tiny"][1] | {"vocab_size": 49_152})
        SHAPES["gemma3-270m"] = ("Gemma3TextConfig", SHAPES["gemma3-270m"][1] | {"vocab_size": 49_152})
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, transformers {transformers.__version__}, Python {sys.version[:7]}")
    print(json.dumps({"command": sys.argv}))
    bench = Bench(options)
    for name in dict.fromkeys(["ceilings", *options.only.split(",")]):
        if time.perf_counter() - start > options.seconds:
            print(f"== {name}: no time left")
            continue
        print(f"== {name} (at {time.perf_counter() - start:.0f} s)", flush=True)
        try:
            SECTIONS[name](bench)
        except Exception:
            traceback.print_exc(limit=-6, file=sys.stdout)
            gc.collect()
        sys.stdout.flush()


if __name__ == "__main__":
    main()
