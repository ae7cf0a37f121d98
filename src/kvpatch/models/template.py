"""Turn a prompt's words into tokens, and say of each token which part of the prompt it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvpatch.cache import Segment
from kvpatch.errors import ModelError, ProtocolError

_STAND_IN = "Zq7wordsZq7"


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt in tokens. All three have one entry a token; the last token is the pending one."""

    token_ids: tuple[int, ...]
    segments: tuple[int, ...]
    pieces: tuple[str, ...]

    def pick(self, tokens: Sequence[int]) -> EncodedPrompt:
        """A prompt of some of these tokens, by index."""
        return EncodedPrompt(
            tuple(self.token_ids[i] for i in tokens),
            tuple(self.segments[i] for i in tokens),
            tuple(self.pieces[i] for i in tokens),
        )

    @property
    def body_length(self) -> int:
        """Tokens of the user's words."""
        return sum(segment == Segment.body for segment in self.segments)


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode(tokenizer: Any, text: str, *, chat: bool | None = None, may_be_empty: bool = False) -> EncodedPrompt:
    """Tokenise one prompt.

    Args:
        tokenizer: a transformers tokenizer with character offsets ("fast").
        text: the user's words.
        chat: True renders them as the user's turn of the model's chat template, ready for the assistant's; False gives
            exactly `tokenizer(text)`; None is True where there is a template.
        may_be_empty: allow an empty text (the neutral scaffold), which only a template can carry.
    Raises:
        ProtocolError: for an empty text.
        ModelError: for a tokenizer without offsets, or `chat=True` without a template.
    """
    if not text.strip() and not (may_be_empty and chat is not False and has_template(tokenizer)):
        raise ProtocolError("a prompt is empty; give it at least one word")
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{type(tokenizer).__name__} gives no character offsets; save the model with a fast tokenizer")
    if chat is None:
        chat = has_template(tokenizer)
    if chat and not has_template(tokenizer):
        raise ModelError("this model has no chat template; use chat=False")
    if chat:
        rendered, start, end = _rendered(tokenizer, text)
        coded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    else:
        rendered, start, end = text, 0, len(text)
        coded = tokenizer(rendered, return_offsets_mapping=True)
    ids, offsets = coded["input_ids"], coded["offset_mapping"]
    if not ids:
        raise ProtocolError("a prompt has no tokens; give it at least one word")
    special = set(tokenizer.all_special_ids)
    segments, pieces, seen = [], [], 0
    for index, (token, (low, high)) in enumerate(zip(ids, offsets, strict=True)):
        pieces.append(rendered[seen : max(high, seen)])  # with the space that a word-level token leaves out
        seen = max(seen, high)
        segments.append(_segment(index, token, low, high, start, end, special, chat))
    return EncodedPrompt(tuple(ids), tuple(segments), tuple(pieces))


def _segment(index: int, token: int, low: int, high: int, start: int, end: int, special: set, chat: bool) -> int:
    if index == 0 and token in special:
        return Segment.bos
    if not chat:
        return Segment.body if high > low else Segment.template if index == 0 else Segment.trailer
    if low < end and high > start:
        return Segment.body
    return Segment.template if low < start or (low == start == end and high <= start) else Segment.trailer


def _rendered(tokenizer: Any, text: str) -> tuple[str, int, int]:
    """The whole turn as text, and where the user's words stand in it."""

    def turn(content: str) -> str:
        messages = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    before, _, after = turn(_STAND_IN).partition(_STAND_IN)
    rendered = turn(text)
    if rendered.startswith(before) and rendered.endswith(after) and len(rendered) >= len(before) + len(after):
        return rendered, len(before), len(rendered) - len(after)
    start = rendered.find(text.strip())
    if start < 0:
        raise ModelError("this model's chat template rewrites the user's words, so their slots can't be found")
    return rendered, start, start + len(text.strip())
