"""Cut rows into passes: of like length, of as many tokens as pay, and of fewer once memory has run out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvpatch.models.backbone import VOCABULARY_CHUNK, Backbone

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 16_384}
"""Tokens, padding counted, that one pass takes; bounds its memory, not its result. On a CPU larger activations leave
the cache and cost a third of the speed (benchmarks/LOG.md)."""
NARROW, LARGE_CARD = 1024, 32 << 30
"""A model of at most this width, on a card of at least so many bytes, has kernels so short that launching them takes
longer than running them."""
MORE_AT_ONCE = 4
"""So many times more tokens and rows such a model takes at once."""
FEWEST_TOKENS = 256


def tokens_at_once(backbone: Backbone) -> int:
    """Tokens that one pass takes on a model's device."""
    if backbone.kept.tokens_at_once:
        return backbone.kept.tokens_at_once
    return TOKENS_AT_ONCE.get(backbone.device.type, 4096) * (MORE_AT_ONCE if is_narrow(backbone) else 1)


def is_narrow(backbone: Backbone) -> bool:
    """Whether launching a model's kernels takes longer than running them, so that few large passes are fastest."""
    if backbone.device.type != "cuda" or backbone.config.hidden_size > NARROW:
        return False
    return torch.cuda.get_device_properties(backbone.device).total_memory >= LARGE_CARD


def run_in_passes(backbone: Backbone, lengths: Sequence[int], run: Callable[[int, int], None]) -> None:
    """Run rows [low, high) at a time, in order, so that a padded pass stays within `tokens_at_once`.

    Where memory runs out, what decoding keeps is freed, then a pass takes half the tokens, and the rows go on.

    Args:
        lengths: tokens of each row.
        run: runs one pass; may be asked again for rows it failed on.
    """
    low = 0
    while low < len(lengths):
        high = _end_of_pass(lengths, low, tokens_at_once(backbone))
        try:
            run(low, high)
            low = high
            continue
        except torch.OutOfMemoryError:
            if not _has_room_to_make(backbone):
                raise
        # Out here nothing holds on to what the failed pass had allocated.
        _make_room(backbone)


def _end_of_pass(lengths: Sequence[int], low: int, most: int) -> int:
    """One past the last row of the pass that starts at `low`; a row longer than a pass has one of its own."""
    widest, high = lengths[low], low + 1
    while high < len(lengths) and (high + 1 - low) * max(widest, lengths[high]) <= most:
        widest = max(widest, lengths[high])
        high += 1
    return high


def _has_room_to_make(backbone: Backbone) -> bool:
    return backbone.kept.runner is not None or tokens_at_once(backbone) > FEWEST_TOKENS


def _make_room(backbone: Backbone) -> None:
    if backbone.kept.runner is None:
        backbone.kept.tokens_at_once = tokens_at_once(backbone) // 2
    backbone.kept.runner = None
    torch.cuda.empty_cache()


def pass_bytes(backbone: Backbone) -> int:
    """Memory that one pass takes, about: hidden states, the MLP's inside, a slab, and logits of a stretch of the
    vocabulary."""
    config, geometry = backbone.config, backbone.geometry
    inner = int(getattr(config, "intermediate_size", 4 * config.hidden_size))
    slot = 2 * geometry.layers * geometry.kv_heads * geometry.head_dim
    size = backbone.head.weight.element_size()
    per_token = (8 * config.hidden_size + 3 * inner + 3 * slot) * size + 10 * min(VOCABULARY_CHUNK, geometry.vocabulary)
    return tokens_at_once(backbone) * per_token
