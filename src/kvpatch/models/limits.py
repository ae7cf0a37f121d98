"""The limits that a model's configuration names: lengths at which it may begin to do something else.

A window, a chunk of attention, the original context of scaled RoPE. What depends on the length shows past a limit only,
so the second opinion and `kvpatch check` compare logits on both sides of each (`lengths_around`).

One limit ends the context here: rotary frequencies that change with the length of the whole pass. Past it a row's
keys would depend on its batch mates, and cached keys would have been turned by other frequencies than new ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

WORDS = re.compile(
    r"window|chunk|local|original_max_position|block_size|topk_tokens|index_topk|sparse.*(size|len)|max_seq_len"
)
"""Names of settings that may be limits, in tokens."""
OTHER = re.compile(r"pattern|expert")
"""Names among them that count layers or experts."""
SHORT = (9, 33)
"""Lengths that are compared whatever the limits are."""
PAST = 8
"""Tokens that a prompt goes past a limit: one slot out of many, seen or not, might be lost among the others."""


def named_limits(config: Any, context: int) -> dict[int, str]:
    """Limits within a context that a configuration names, in tokens, each with the name of its setting."""
    found: dict[int, str] = {}

    def look(settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            if isinstance(value, Mapping):
                look(value)
            elif type(value) is int and 1 < value < context and WORDS.search(name) and not OTHER.search(name):
                found.setdefault(value, name)

    look(config.to_dict())
    return dict(sorted(found.items()))


def lengths_around(limits: Iterable[int], context: int) -> list[int]:
    """Lengths of prompts, in tokens and rising, that lie on both sides of every limit and within the context."""
    wanted = {*SHORT, *(length for limit in limits for length in (limit, limit + PAST))}
    return sorted({min(length, context) for length in wanted})


def rotary_switch(config: Any) -> int | None:
    """The most tokens for which the rotary frequencies are those of short texts; None where they do not depend on the
    length. Two kinds do: "longrope", which takes its long factors for all tokens of a pass that reaches past the
    original context, and "dynamic", which stretches its frequencies past the context."""
    ends = []
    for settings in _rotary_settings(config):
        kind = str(settings.get("rope_type") or settings.get("type") or "default")
        if kind in ("longrope", "su") or "dynamic" in kind:
            context = getattr(config, "max_position_embeddings", None)
            original = settings.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            end = context if "dynamic" in kind else original or context
            ends += [int(end)] if end else []
    return min(ends, default=None)


def _rotary_settings(config: Any) -> list[Mapping[str, Any]]:
    """The rotary settings of a model, or of each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [s for s in settings.values() if isinstance(s, Mapping)]
    return nested or [settings]


def rotaries_that_grow(decoder: nn.Module) -> list[Any]:
    """Modules that keep the frequencies of the longest pass they have seen ("dynamic")."""
    return [
        module
        for module in decoder.modules()
        if "dynamic" in str(getattr(module, "rope_type", "")) and hasattr(module, "original_max_seq_len")
    ]


def reset_rotaries(modules: Iterable[Any]) -> None:
    """Give such modules the frequencies of short texts again, whatever was run before."""
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            if getattr(module, name) > module.original_max_seq_len:
                prefix = name.removesuffix("max_seq_len_cached")
                original: Tensor = getattr(module, f"{prefix}original_inv_freq")
                at = getattr(module, f"{prefix}inv_freq").device
                module.register_buffer(f"{prefix}inv_freq", original.to(at).clone(), persistent=False)
                setattr(module, name, module.original_max_seq_len)
