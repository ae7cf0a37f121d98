"""How much a trial depends on how it was computed: the same rows in other company, in other batches, on other threads.

In float32 it should not, but for rounding. In bfloat16 the sums of a product run in another order where the batch has
another shape, or where more threads share it, so that near-ties fall either way, and a text goes another way from
there on. A readout of a destroyed cache, whose attention hangs on small differences, moves further than one of a
natural cache. A run stores what was found at its own batch size and threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvpatch.caches.kvcache import KVCache
from kvpatch.engine.decode import decode
from kvpatch.engine.model import Model
from kvpatch.engine.prefill import prefill
from kvpatch.engine.score import score
from kvpatch.models.template import EncodedPrompt

FEWEST_ROWS, MOST_ROWS, NEW_TOKENS, FORCED = 8, 64, 24, 8
"""Rows and tokens that are looked at, at least and at most; a run with fewer rows per batch is measured on 8."""
_TEXTS = (
    "Watch how each of these words arrives, and say what it is like to be the one that is choosing them now.",
    "Explain how bread rises in a warm oven, and which of the usual steps a beginner can leave out safely.",
)


@dataclass(frozen=True)
class _Seen:
    """What some rows gave.

    texts: the tokens that each row wrote. first: [rows], log-probability of its first token. forced, forced_random:
    [rows], mean log-probability of a given text under its natural cache, and under one of Gaussian noise, nats.
    """

    texts: list[list[int]]
    first: Tensor
    forced: Tensor
    forced_random: Tensor


def noise_floor(
    model: Model,
    *,
    rows: int = FEWEST_ROWS,
    temperature: float = 0.7,
    new_tokens: int | None = None,
    other_threads: int | None = None,
) -> dict[str, Any]:
    """Compute the same trials in other ways.

    Args:
        rows: how many trials the run computes together; its threads are those that torch uses now.
        temperature: of the run.
        new_tokens: tokens that the run writes; `NEW_TOKENS` are looked at where it writes more, or where not given.
        other_threads: the other number of threads on a processor; one less where not given.
    Returns:
        For rows in another order ("other_mates"), in two batches of half the size ("other_batch_shape"), and on a
        processor on another number of threads ("other_threads"): the share of texts that stay the same, and the largest
        change of a first log-probability, of the mean log-probability of a given text under a natural cache, and of
        that under a random one, in nats.
    """
    count = min(MOST_ROWS, max(FEWEST_ROWS, rows))
    prompts = [model.encode(f"{_TEXTS[i % 2]} {'Go on. ' * (i % 3)}{i if i > 1 else ''}") for i in range(count)]
    order, half = list(range(count)), count // 2
    length = min(NEW_TOKENS, new_tokens or NEW_TOKENS)
    base = _seen(model, prompts, order, None, temperature, length)
    given = [text[:FORCED] for text in base.texts]

    def again(*batches: Sequence[int]) -> _Seen:
        parts = [_seen(model, prompts, list(batch), given, temperature, length) for batch in batches]
        return _in_order([i for batch in batches for i in batch], parts)

    first = again(order)
    others = {"other_mates": again(order[::-1]), "other_batch_shape": again(order[:half], order[half:])}
    found: dict[str, Any] = {"rows": count, "new_tokens": length}
    before = torch.get_num_threads()
    # With one thread float32 is left out unless asked for: its sums do not depend on threads
    # (docs/decisions/009-products.md), and a second thread on a busy machine costs more than all the rest.
    is_asked = other_threads is not None or before > 1 or not model.backbone.is_exact
    if model.backbone.device.type == "cpu" and is_asked:
        other = other_threads or (before - 1 if before > 1 else 2)
        found |= {"threads": before, "other_number_of_threads": other}
        try:
            torch.set_num_threads(other)
            others["other_threads"] = again(order)
        finally:
            torch.set_num_threads(before)
    for name, seen in others.items():
        same = sum(one == two for one, two in zip(first.texts, seen.texts, strict=True))
        found[f"texts_equal_{name}"] = same / count
        for what in ("first", "forced", "forced_random"):
            change = (getattr(seen, what) - getattr(first, what)).abs()
            found[f"{what}_logprob_{name}"] = float(torch.nan_to_num(change, nan=math.inf).max())
    return found


@torch.no_grad()
def _seen(
    model: Model,
    prompts: Sequence[EncodedPrompt],
    rows: list[int],
    given: Sequence[list[int]] | None,
    temperature: float,
    new_tokens: int,
) -> _Seen:
    """Prefill, decode and force some of the prompts as one batch. given: the text to force on each prompt; where None,
    what the rows write now."""
    cache = prefill(model.backbone, [prompts[i] for i in rows])
    written = decode(model.backbone, cache, max_new_tokens=new_tokens, temperature=temperature, seeds=rows)
    texts = [ids[:length] for ids, length in zip(written.token_ids.tolist(), written.lengths, strict=True)]
    wanted = [[texts[at][:FORCED] if given is None else given[i]] for at, i in enumerate(rows)]
    forced, random = (
        score(model.backbone, of, wanted).logprobs[:, 0].nanmean(dim=1).double().cpu()
        for of in (cache, _random(cache, rows))
    )
    return _Seen(texts, written.logprobs[:, 0].double().cpu(), forced, random)


def _random(cache: KVCache, rows: Sequence[int]) -> KVCache:
    """The cache with Gaussian numbers of its own size in every slot; a row's are the same in any company."""

    def noise(like: Tensor, layer: int) -> Tensor:
        made = []
        for at, row in enumerate(rows):
            generator = torch.Generator().manual_seed(1000 * row + layer)
            drawn = torch.randn(cache.row_lengths[at], *like.shape[1::2], generator=generator)  # [slots, heads, dim]
            whole = torch.zeros(like.shape[1:])
            whole[:, like.shape[2] - len(drawn) :] = drawn.transpose(0, 1)
            made.append(whole)
        return torch.stack(made).to(like) * _size(like, cache)

    return replace(
        cache,
        keys=tuple(noise(keys, 2 * i) for i, keys in enumerate(cache.keys)),
        values=tuple(noise(values, 2 * i + 1) for i, values in enumerate(cache.values)),
    )


def _size(like: Tensor, cache: KVCache) -> Tensor:
    """Root mean square of each row's real numbers, [rows, 1, 1, 1]."""
    counts = torch.tensor(cache.row_lengths, device=like.device) * like.shape[1] * like.shape[3]
    real = (cache.positions >= 0)[:, None, :, None].to(like.device)
    return (torch.where(real, like, 0).float().square().sum((1, 2, 3)) / counts).sqrt().to(like)[:, None, None, None]


def _in_order(rows: Sequence[int], parts: Sequence[_Seen]) -> _Seen:
    """The parts as one, its rows sorted by their numbers."""
    places = sorted(range(len(rows)), key=rows.__getitem__)
    texts = [text for part in parts for text in part.texts]
    numbers = [
        torch.cat([getattr(part, name) for part in parts])[places] for name in ("first", "forced", "forced_random")
    ]
    return _Seen([texts[place] for place in places], *numbers)
