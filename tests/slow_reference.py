"""Natural and patched caches of any causal model by transformers alone, slowly, for models that differ in all but that.

The model itself runs with eager attention, its own masks and transformers' own cache, one row at a time. A patch is an
assignment of slots. Keys at other positions are made by running the model at these positions, so that no rotation is
written here.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import kvpatch as kv
from kvpatch.engine.score import score
from kvpatch.errors import KvpatchError
from tiny import prompt_of

BOUND = 1e-4
LENGTHS = (9, 24, 45)
"""Tokens of the rows; zoo's windows are 16 tokens."""
AFTER = 4
"""Tokens that follow each cache."""


class Slow:
    """transformers alone: eager attention where the class has it, transformers' cache, one row at a time."""

    def __init__(self, hf: Any) -> None:
        with contextlib.suppress(Exception):
            hf.set_attn_implementation("eager")
        self.hf = hf
        names = inspect.signature(hf.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        takes = [*names, *(n for m in hf.modules() for n in inspect.signature(m.forward).parameters)]
        self.takes_positions = "position_ids" in takes

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int], start: int = 0) -> DynamicCache:
        cache = DynamicCache()
        at = {"position_ids": torch.arange(start, start + len(tokens))[None]} if start else {}
        self.hf(input_ids=torch.tensor([list(tokens)]), use_cache=True, **{self.cache_name: cache}, **at)
        return cache

    @torch.no_grad()
    def follow(self, cache: DynamicCache, tokens: Sequence[int]) -> Tensor:
        start = cache.layers[0].keys.shape[2]
        at = {"position_ids": torch.arange(start, start + len(tokens))[None]} if self.takes_positions else {}
        out = self.hf(input_ids=torch.tensor([list(tokens)]), use_cache=True, **{self.cache_name: cache}, **at)
        return out[0][0].float()

    @torch.no_grad()
    def plain(self, tokens: Sequence[int]) -> Tensor:
        return self.hf(input_ids=torch.tensor([list(tokens)]), use_cache=False)[0][0].float()


def random_tokens(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(10, 380, (length,), generator=generator).tolist()


def _off(found: Tensor, expected: Tensor) -> float:
    off = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    return off if off == off else float("inf")


def compare(model: kv.Model, slow: Slow) -> tuple[dict[str, float], dict[str, str]]:
    """Largest difference of a logit for each way to patch, and what kvpatch refuses."""
    targets, sources = ([random_tokens(seed, n) for n in LENGTHS] for seed in (1, 2))
    after = [random_tokens(3, AFTER + i) for i in range(len(LENGTHS))]
    target = model.prefill([prompt_of(row) for row in targets])
    source = model.prefill([prompt_of(row) for row in sources])
    layers = [model.geometry.layers // 2]
    slots = [1, 2, 5]
    ways: dict[str, dict[str, Any]] = {
        "natural": {},
        "whole": {"align": "replace"},
        "k in place": {"layers": layers, "slots": slots, "parts": "k", "align": "start"},
        "v in place": {"layers": layers, "slots": slots, "parts": "v", "align": "start"},
        "kv in place": {"layers": layers, "slots": slots, "align": "start"},
        "moved": {"align": "append"},
    }
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, way in ways.items():
        try:
            cache = kv.Patch(**way).apply(source, target) if way else target
        except KvpatchError as error:
            refused[name] = str(error)
            continue
        found = score(model.backbone, cache, [[row] for row in after], keep_logits=AFTER).logits
        assert found is not None
        worst = 0.0
        for number, (own, other, new) in enumerate(zip(targets, sources, after, strict=True)):
            expected = _expected(slow, name, (own, other), new, (layers, slots))
            if expected is None:
                refused[name] = "not compared: the class takes no positions, or it counts where a prompt begins"
                break
            worst = max(worst, _off(found[number], expected[:AFTER]))
        else:
            errors[name] = worst
    return errors, refused


def _expected(
    slow: Slow, name: str, prompts: tuple[list[int], list[int]], new: list[int], where: tuple[list[int], list[int]]
) -> Tensor | None:
    """Logits [tokens, vocabulary] after a patch, by transformers alone."""
    own, other = prompts
    fed = [own[-1], *new]
    if name == "natural":
        return slow.plain([*own, *new])[len(own) - 1 :]
    if name == "whole":
        return slow.plain([*other[:-1], *fed])[len(own) - 1 :]
    cache = slow.prefill(own[:-1])
    if name == "moved":
        if not slow.takes_positions:
            return None
        behind, here = slow.prefill(other[:-1], start=len(own) - 1), slow.prefill(other[:-1])
        if _off(behind.layers[-1].values, here.layers[-1].values) > BOUND:
            return None  # where a prompt begins counts, so what was cached elsewhere is no prompt that begins here
        for mine, theirs in zip(cache.layers, behind.layers, strict=True):
            mine.keys = torch.cat([mine.keys, theirs.keys], dim=2)
            mine.values = torch.cat([mine.values, theirs.values], dim=2)
    else:
        taken = slow.prefill(other[:-1])
        for layer in where[0]:
            mine, theirs = cache.layers[layer], taken.layers[layer]
            if "k" in name.split()[0]:
                mine.keys[:, :, where[1]] = theirs.keys[:, :, where[1]]
            if "v" in name.split()[0]:
                mine.values[:, :, where[1]] = theirs.values[:, :, where[1]]
    return slow.follow(cache, fed)
