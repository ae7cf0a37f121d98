"""What a model wrote, as a notebook gets it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvpatch.engine.attention import Attention


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
