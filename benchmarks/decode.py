"""Decode speed on a processor: ours against a token loop, batched `generate` and nnsight, in one process.

    python benchmarks/decode.py [--model smollm2-135m] [--rows 64 128 256] [--new-tokens 64] [--dtype auto]

All peers run in this call on the same prompts, prefill included; figures are tokens a second and ratios to a peer.
The peers run in float32, as researchers run them; ours in float32 and, with `--dtype auto`, in what the processor
multiplies fastest. The rows of ours are those the calibration finds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import kvpatch
from kvpatch.engine.calibration import calibrate
from kvpatch.engine.model import Model
from kvpatch.models.processor import fastest_type


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


def batched_generate(model: Model, prompts: list[list[int]], new_tokens: int) -> int:
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
    )
    return len(prompts) * new_tokens


def by_nnsight(model: Model, prompts: list[list[int]], new_tokens: int) -> int:
    """nnsight's traced generation, one prompt at a time."""
    from nnsight import LanguageModel

    traced: Any = LanguageModel(model.hf, tokenizer=model.tokenizer)
    for ids in prompts:
        with traced.generate(ids, max_new_tokens=new_tokens):
            traced.generator.output.save()
    return len(prompts) * new_tokens


def ours(model: Model, texts: list[str], new_tokens: int) -> int:
    """kvpatch: prefill and decode, sampling at temperature 0.7, every log-probability kept."""
    model.generate(model.prefill(texts), max_new_tokens=new_tokens, temperature=0.7, stop=False)
    return len(texts) * new_tokens


def rate(work: Callable[[], int]) -> float:
    """Tokens a second of one timed call."""
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 256], help="batches of `generate`")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--naive-prompts", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="of ours: float32 or auto")
    options = parser.parse_args()
    model = kvpatch.load(options.model, device="cpu")
    how = calibrate(model.backbone)
    most, new = max(options.rows), options.new_tokens
    texts = [f"Explain in {5 + i} words how bread number {i} rises." + " Please." * (i % 9) for i in range(most)]
    prompts = [list(model.encode(text).token_ids) for text in texts]
    print(f"{options.model}, {torch.get_num_threads()} threads, {new} new tokens, calibration: {how}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, kvpatch {kvpatch.__version__}")
    ours(model, texts[:4], 4)
    naive_loop(model, prompts[:1], 4)
    rates = {"naive loop": rate(lambda: naive_loop(model, prompts[: options.naive_prompts], new))}
    for rows in options.rows:
        rates[f"generate, batch {rows}"] = rate(lambda rows=rows: batched_generate(model, prompts[:rows], new))
    try:
        rates["nnsight"] = rate(lambda: by_nnsight(model, prompts[:1], new))
    except ImportError:
        print("nnsight is not installed")
    rows = how.rows if how else most
    mine = {"kvpatch, float32": rate(lambda: ours(model, texts[:rows], new))}
    if options.dtype == "auto" and (kind := fastest_type()) != torch.float32:
        model = kvpatch.load(options.model, device="cpu", dtype=kind)
        ours(model, texts[:4], 4)
        mine[f"kvpatch, {kind}"] = rate(lambda: ours(model, texts[:rows], new))
    for name, value in {**rates, **mine}.items():
        ratios = ", ".join(f"{name} is {own / value:.2f} times this" for name, own in mine.items())
        print(f"{name:26} {value:9.1f} tokens/s   {ratios}")
    best = max(value for name, value in rates.items() if name.startswith("generate"))
    for name, own in mine.items():
        ratios = f"{own / best:.2f} times the best `generate`, {own / rates['naive loop']:.1f} naive loops"
        print(f"{name}, {rows} rows: {ratios}")


if __name__ == "__main__":
    main()
