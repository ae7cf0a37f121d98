"""Decoding on a processor: ours against a token loop, `generate` and nnsight, in one process.

    python benchmarks/decode.py [--model smollm2-135m] [--rows 64 128] [--new-tokens 64] [--dtype auto] [--peers]

All run in this call on the same prompts, prefill included; figures are tokens per second and ratios to a peer at the
same batch. Each is run once untimed and then `--repeats` times, of which the fastest counts. The peers run in float32,
as researchers run them; ours in float32 and, with `--dtype auto`, in what the processor multiplies fastest as well.
`--peers` adds `generate` with a static cache, compiled by torch.compile (which needs a C++ compiler and takes
minutes), and nnsight generating under a patch where it is installed, beside kvpatch under the same patch: the values of
one layer are those of another prompt.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers

import kvpatch as kv
from kvpatch.engine.calibration import calibrate
from kvpatch.engine.model import Model
from kvpatch.models.processor import fastest_type

LAYER = 20
"""Whose values are another prompt's, under a patch."""


def naive_loop(model: Model, prompts: list[list[int]], new_tokens: int) -> int:
    """What researchers write: one prompt at a time, `model(...)` on the last token and the past, argmax in Python."""
    with torch.no_grad():
        for ids in prompts:
            tokens = torch.tensor([ids], device=model.backbone.device)
            past = None
            for _ in range(new_tokens):
                out = model.hf(input_ids=tokens, past_key_values=past, use_cache=True)
                past = getattr(out, "cache", None) or out.past_key_values
                tokens = out.logits[:, -1:].argmax(dim=-1)
    return len(prompts) * new_tokens


def batched_generate(model: Model, prompts: list[list[int]], new_tokens: int, **settings: Any) -> int:
    """transformers' `generate`, all prompts in one left-padded batch, sampling at temperature 0.7."""
    longest = max(map(len, prompts))
    pad = model.end_tokens[0]
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.backbone.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.backbone.device)
    generate: Any = model.hf.generate
    generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        pad_token_id=pad,
        **settings,
    )
    return len(prompts) * new_tokens


def by_nnsight(model: Model, prompts: list[list[int]], new_tokens: int) -> int:
    """nnsight's traced generation of prompts of equal length, the values of a layer being another prompt's."""
    from nnsight import LanguageModel

    traced: Any = LanguageModel(model.hf, tokenizer=model.tokenizer)
    ids = torch.tensor(prompts)
    with torch.no_grad():
        state = model.hf.model(ids.flip(0), output_hidden_states=True).hidden_states[LAYER]
        block: Any = model.backbone.blocks[LAYER]
        values = block.self_attn.v_proj(block.input_layernorm(state))
    with traced.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False):
        traced.model.layers[LAYER].self_attn.v_proj.output[:] = values
        traced.generator.output.save()
    return len(prompts) * new_tokens


def ours(model: Model, texts: list[str], new_tokens: int) -> int:
    """kvpatch: prefill and decode, sampling at temperature 0.7, every log-probability kept."""
    model.generate(model.prefill(texts), max_new_tokens=new_tokens, temperature=0.7, stop=False)
    return len(texts) * new_tokens


def ours_patched(model: Model, texts: list[str], new_tokens: int) -> int:
    """The same from caches that hold another prompt's values in a layer."""
    cache = model.prefill(texts)
    mixed = kv.Patch(layers=[LAYER], parts="v").apply(cache[list(reversed(range(len(texts))))], cache)
    model.generate(mixed, max_new_tokens=new_tokens, temperature=0.7, stop=False)
    return len(texts) * new_tokens


def rate(work: Callable[[], int], repeats: int) -> float:
    """Tokens per second of the fastest of some timed calls, after one that is not timed."""
    work()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        rates.append(work() / (time.perf_counter() - start))
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--naive-prompts", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="of ours: float32 or auto")
    parser.add_argument("--peers", action="store_true", help="a compiled static cache and nnsight too")
    options = parser.parse_args()
    model = kv.load(options.model, device="cpu")
    how = calibrate(model.backbone)
    new, repeats = options.new_tokens, options.repeats
    texts = [f"Explain in {5 + i} words how bread number {i} rises." + " Please." * (i % 9) for i in range(512)]
    prompts = [list(model.encode(text).token_ids) for text in texts]
    print(f"{options.model}, {torch.get_num_threads()} threads, {new} new tokens, calibration: {how}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, kvpatch {kv.__version__}")
    naive = rate(lambda: naive_loop(model, prompts[: options.naive_prompts], new), repeats)
    print(f"naive loop: {naive:.1f} tokens/s")
    usual = Counter(map(len, prompts)).most_common(1)[0][0]
    equal = [text for text, ids in zip(texts, prompts, strict=True) if len(ids) == usual]

    def tell(name: str, rows: int, work: Callable[[], int], peer: float | None = None) -> float:
        try:
            found = rate(work, repeats)
        except Exception as problem:
            print(f"{name}: {type(problem).__name__}: {problem}".splitlines()[0])
            return float("nan")
        beside = "" if peer is None else f", {found / peer:.2f} times `generate` at this batch"
        print(f"{name}, {rows} rows: {found:.1f} tokens/s, {found / naive:.1f} naive loops{beside}", flush=True)
        return found

    generated = {
        rows: tell("generate", rows, lambda rows=rows: batched_generate(model, prompts[:rows], new))
        for rows in options.rows
    }

    def tell_ours(mine: Model, name: str) -> None:
        for rows in options.rows:
            tell(name, rows, lambda rows=rows: ours(mine, texts[:rows], new), generated[rows])

    tell_ours(model, "kvpatch, float32")
    if options.peers:
        for rows in (1, len(equal[: options.rows[0]])):
            ids = [list(model.encode(text).token_ids) for text in equal[:rows]]
            tell("nnsight under a patch", rows, lambda ids=ids: by_nnsight(model, ids, new))
            tell("kvpatch under the same patch", rows, lambda rows=rows: ours_patched(model, equal[:rows], new))
    if options.dtype == "auto" and (kind := fastest_type()) != torch.float32:
        tell_ours(kv.load(options.model, device="cpu", dtype=kind), f"kvpatch, {str(kind).removeprefix('torch.')}")
    if options.peers:
        first = options.rows[0]
        compiled = {"cache_implementation": "static"}
        tell("generate, static cache", first, lambda: batched_generate(model, prompts[:first], new, **compiled))
        model.hf.forward = torch.compile(model.hf.forward, dynamic=False)
        name = "generate, static cache, compiled"
        tell(name, first, lambda: batched_generate(model, prompts[:first], new, **compiled))


if __name__ == "__main__":
    main()
