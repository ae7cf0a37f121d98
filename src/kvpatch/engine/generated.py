"""What a model wrote, as a notebook gets it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpatch.engine.attention import Attention
from kvpatch.errors import ModelError


@dataclass(frozen=True)
class Generated:
    """What the model wrote.

    Attributes:
        texts: one a row, without special tokens.
        token_ids: [batch, new_tokens], end token included; -1 after a row has stopped.
        logprobs: [batch, new_tokens] of the chosen tokens, under the model's own distribution (temperature 1), natural
            logarithm; NaN after a row has stopped.
        stopped: per row "eos" or "length".
        attention: statistics of every head over the tokens that were fed, where they were asked for.
    """

    texts: list[str]
    token_ids: Tensor
    logprobs: Tensor
    stopped: tuple[str, ...]
    attention: Attention | None = None


def end_tokens_of(hf: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a reply; see `Model.end_tokens`.

    Raises:
        ModelError: where what the settings name is no token id.
    """
    for config in (hf.generation_config, hf.config.get_text_config(), tokenizer):
        named = getattr(config, "eos_token_id", None)
        if isinstance(named, torch.Tensor):
            named = named.flatten().tolist()
        ends = list(named) if isinstance(named, (list, tuple, set)) else [] if named is None else [named]
        if wrong := [end for end in ends if isinstance(end, bool) or not isinstance(end, int)]:
            raise ModelError(f"the model names {wrong[0]!r} as the token that ends a reply; that is no token id")
        if known := [end for end in ends if end >= 0]:  # some configurations write -1 for none
            return known
    return []
