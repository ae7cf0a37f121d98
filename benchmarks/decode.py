"""Decode speed: ours against a token loop, one trial at a time, and against transformers' batched `generate`.

    python benchmarks/decode.py [--model smollm2-135m] [--batch 128] [--new-tokens 64]

All peers run in this process, in this call, on the same prompts; figures are tokens a second and ratios to a peer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import transformers

import kvpatch
from kvpatch.model import Model


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
    model.hf.generate(
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


def ours(model: Model, texts: list[str], new_tokens: int) -> int:
    """kvpatch: prefill and decode, sampling at temperature 0.7, every log-probability kept."""
    model.generate(model.prefill(texts), max_new_tokens=new_tokens, temperature=0.7, stop=False)
    return len(texts) * new_tokens


def rate(work: Callable[[], int], device: torch.device) -> float:
    """Tokens a second of one timed call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    tokens = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--naive-prompts", type=int, default=2)
    options = parser.parse_args()
    model = kvpatch.load(options.model)
    texts = [
        f"Explain in {5 + i} words how bread number {i} rises." + " Please." * (i % 9) for i in range(options.batch)
    ]
    prompts = [list(model.encode(text).token_ids) for text in texts]
    device, new = model.backbone.device, options.new_tokens
    ours(model, texts[:4], 4)
    naive_loop(model, prompts[:1], 4)
    rates = {
        "naive loop": rate(lambda: naive_loop(model, prompts[: options.naive_prompts], new), device),
        f"generate, batch {options.batch}": rate(lambda: batched_generate(model, prompts, new), device),
        f"kvpatch, batch {options.batch}": rate(lambda: ours(model, texts, new), device),
    }
    mine = list(rates.values())[-1]
    print(f"{options.model}, {model.backbone.dtype}, {device}, {torch.get_num_threads()} threads, {new} new tokens")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, kvpatch {kvpatch.__version__}")
    for name, value in rates.items():
        print(f"{name:24} {value:9.1f} tokens/s   kvpatch is {mine / value:6.2f} times this")


if __name__ == "__main__":
    main()
