"""M2: add a direction to a finished cache; and M1 and T: one prompt's words before another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvpatch.caches.kvcache import KVCache, Segment, refuse_unlike
from kvpatch.caches.selection import Touched
from kvpatch.caches.stacks import over_layers
from kvpatch.engine.prefill import prefill
from kvpatch.errors import CacheError
from kvpatch.interventions.kinds import Fitting, Kind, Made, Trials
from kvpatch.interventions.splice import Taken
from kvpatch.models.template import EncodedPrompt
from kvpatch.specs.interventions import Joined


def join_prompts(giver: EncodedPrompt, receiver: EncodedPrompt, separator: Sequence[int], text: str) -> EncodedPrompt:
    """The giver's words and a separator put before the receiver's words, inside the receiver's own template.

    Joined token by token, so that the receiver's tokens stay exactly those of its own prompt.

    Raises:
        CacheError: where the giver has no words.
    """
    start = receiver.segments.index(Segment.body)
    words = [i for i, segment in enumerate(giver.segments) if segment == Segment.body]
    if not words:
        raise CacheError("the giver has no words to put before the receiver's; give it a prompt that has")
    body = [int(Segment.body)] * (len(words) + len(separator))
    return EncodedPrompt(
        (*receiver.token_ids[:start], *(giver.token_ids[i] for i in words), *separator, *receiver.token_ids[start:]),
        (*receiver.segments[:start], *body, *receiver.segments[start:]),
        (
            *receiver.pieces[:start],
            *(giver.pieces[i] for i in words),
            text,
            *[""] * (len(separator) - 1),
            *receiver.pieces[start:],
        ),
    )


def without_giver(joined: KVCache, natural: KVCache) -> KVCache:
    """Take the giver's slots out of joined caches and turn the rest to the receiver's own positions (M1).

    Args:
        joined: caches of `join_prompts`.
        natural: the receivers' own caches, whose tokens and positions the result has.
    Raises:
        CacheError: where the tokens kept are not the receiver's.
    """
    refuse_unlike(joined, natural, "a joined prompt and the receiver's own")
    index = torch.full(natural.positions.shape, -1)
    for row in range(natural.batch):
        length, whole = natural.row_lengths[row], joined.row_lengths[row]
        start = natural.row_segments[row].index(Segment.body)
        kept = [*range(start), *range(whole - (length - start), whole)]
        index[row, natural.slots - length :] = torch.tensor(kept) + joined.slots - whole
    index = index.to(natural.positions.device)
    tokens = torch.where(index >= 0, joined.token_ids.gather(1, index.clamp(min=0)), -1)
    if not torch.equal(tokens, natural.token_ids):
        raise CacheError("the slots kept of a joined prompt are not those of the receiver's own prompt")
    taken = Taken(index, joined.positions, natural.positions)
    return replace(
        natural,
        keys=over_layers(lambda rope, keys: taken.keys(keys, rope), joined.keys, of=joined.rope),
        values=over_layers(taken.values, joined.values),
    )


def joined_cache(spec: Joined, joined: KVCache, natural: KVCache) -> KVCache:
    """The cache a `Joined` asks for."""
    return joined if spec.keep == "all" else without_giver(joined, natural)


def touched_by_joining(cache: KVCache, natural: KVCache) -> Touched:
    """How much of every row the giver's words touched: all slots from where they stand on.

    With them kept (T) those are their own, the separator's and the receiver's behind them; with them taken out (M1) the
    receiver's from its first word on. Each of these was computed with the giver's words before it.

    Args:
        cache: what `joined_cache` gave. natural: the receivers' own caches.
    """
    starts = [segments.index(Segment.body) for segments in natural.row_segments]
    slots = tuple(length - start for length, start in zip(cache.row_lengths, starts, strict=True))
    return Touched(slots, cache.layers, cache.keys[0].shape[1])


def _prompts(spec: Joined, of: Trials | Fitting, separator: Sequence[int]) -> list[EncodedPrompt]:
    return [join_prompts(g, r, separator, spec.separator) for g, r in zip(of.givers, of.receivers, strict=True)]


def _build(spec: Joined, trials: Trials) -> Made:
    prompts = _prompts(spec, trials, trials.model.continuation_ids(spec.separator))
    cache = joined_cache(spec, prefill(trials.model.backbone, prompts), trials.own)
    return Made(cache, touched_by_joining(cache, trials.own))


def _refuse_prompts(spec: Joined, fitting: Fitting) -> None:
    prompts = _prompts(spec, fitting, fitting.continuation_ids(spec.separator))
    longest = max(len(prompt.token_ids) for prompt in prompts)
    # Slots that are taken out again have nothing to follow them.
    fitting.refuse_too_long("a joined prompt", longest, None if spec.keep == "all" else 0)


JOINED = Kind(Joined, _build, refuse_prompts=_refuse_prompts, runs_prompts=True, prompts_in_cache=2)
