"""Turn a prompt's words into tokens, and say of each token which part of the prompt it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kvpatch.caches.kvcache import Segment
from kvpatch.errors import ModelError, ProtocolError
from kvpatch.models.scaffold import Messages, Scaffold, scaffold_of
from kvpatch.specs.arguments import shown, unicode_text


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


def conversation(messages: object) -> tuple[Messages, str]:
    """Chat messages as what comes before the last user's words, and those words.

    Args:
        messages: a list of {"role": ..., "content": ...}, the last one the user's.
    Raises:
        ProtocolError: for anything else.
    """
    wanted = 'give a list of {"role": "system" or "user" or "assistant", "content": text} that ends with the user\'s'
    found: list[tuple[str, str]] = []
    for message in messages if isinstance(messages, (list, tuple)) else [messages]:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ProtocolError(f"a chat message must have a role and a content, got {shown(message)}; {wanted}")
        if not all(isinstance(part, str) for part in message.values()):
            raise ProtocolError(f"role and content of a chat message must be text, got {shown(message)}; {wanted}")
        found.append((message["role"], message["content"]))
    if not found or found[-1][0] != "user":
        last = f"the last message is the {found[-1][0]}'s" if found else "there is no message"
        raise ProtocolError(f"{last}; {wanted}")
    return tuple(found[:-1]), found[-1][1]


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def settings_of(tokenizer: Any) -> tuple[object, ...]:
    """What may change in a tokenizer that decides how a prompt is rendered and tokenised; equal where nothing has."""
    return (
        id(tokenizer),
        str(tokenizer.chat_template),
        str(tokenizer.special_tokens_map),
        len(tokenizer),
        tuple(tokenizer("")["input_ids"]),  # what it adds of its own
        getattr(tokenizer, "split_special_tokens", None),
    )


def encode(
    tokenizer: Any,
    text: str,
    *,
    chat: bool | None = None,
    may_be_empty: bool = False,
    scaffold: Scaffold | None = None,
) -> EncodedPrompt:
    """Tokenise one prompt.

    The body is every token that holds a character of the user's words, so that a token which joins the end of the
    template with the first word belongs to the body. Where the template trims the words, the body is the trimmed words.
    A special token that the user wrote is that special token, as transformers has it, and body. Where nothing follows
    the words, the pending token is the last one of the body.

    Args:
        tokenizer: a transformers tokenizer with character offsets ("fast").
        text: the user's words.
        chat: True renders them as the user's turn of the model's chat template, ready for the assistant's; False gives
            exactly `tokenizer(text)`; None is True where there is a template.
        may_be_empty: allow an empty text (the neutral scaffold), which only a template can carry.
        scaffold: what the template writes around words, where it is known already.
    Raises:
        ProtocolError: for a text that is empty, or of which the tokenizer leaves nothing.
        ModelError: for a tokenizer without offsets, `chat=True` without a template, or a template that does not write
            the user's words once and unchanged.
    """
    if not text.strip() and not (may_be_empty and chat is not False and has_template(tokenizer)):
        raise ProtocolError("a prompt is empty; give it at least one word")
    unicode_text("a prompt", text, error=ProtocolError)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{type(tokenizer).__name__} gives no character offsets; save the model with a fast tokenizer")
    if chat is None:
        chat = has_template(tokenizer)
    if chat and not has_template(tokenizer):
        raise ModelError("this model has no chat template; use chat=False")
    if chat:
        rendered, start, end = (scaffold or scaffold_of(tokenizer)).around(tokenizer, text)
    else:
        rendered, start, end = text, 0, len(text)
    coded = tokenizer(rendered, add_special_tokens=not chat, return_offsets_mapping=True)
    ids = coded["input_ids"]
    if not ids:
        raise ProtocolError("a prompt has no tokens; give it at least one word")
    is_written = [sequence is not None for sequence in coded.sequence_ids(0)]  # False: the tokenizer added it
    last = max((index for index, written in enumerate(is_written) if written), default=-1)
    offsets = [*coded["offset_mapping"][: last + 1], *[(len(rendered),) * 2] * (len(ids) - last - 1)]
    pieces, spans = _pieces(rendered, offsets, start, end)
    segments = _segments(spans, is_written, start, end, Segment.body if end == len(rendered) else Segment.trailer)
    if ids[0] in tokenizer.all_special_ids and not (is_written[0] and segments[0] == Segment.body):
        segments[0] = Segment.bos
    if not chat and len(ids) > 1 and ids[0] == tokenizer.bos_token_id:
        segments[0] = Segment.bos  # also where the user wrote it
    if Segment.body not in segments and rendered[start:end].strip():
        raise ProtocolError(f"the tokenizer leaves nothing of the prompt {text[:40]!r}; give it other words")
    return EncodedPrompt(tuple(ids), tuple(int(segment) for segment in segments), tuple(pieces))


def _pieces(
    rendered: str, offsets: Sequence[tuple[int, int]], start: int, end: int
) -> tuple[list[str], list[tuple[int, int]]]:
    """The text of each token, and the characters it holds.

    The texts join to the whole: characters that a tokenizer leaves out go to the token after them, but never past the
    first or the last of the user's words.
    """
    cuts, spans, seen = [0], [], 0
    for low, high in offsets:
        reach = max(high, seen)
        # A blank whose offsets were trimmed away stands where no token has been yet.
        spans.append((low, high) if high > low else (seen, reach))
        if len(spans) > 1:
            cuts[-1] = max([seen, *(edge for edge in (start, end) if seen < edge <= low)])
        cuts.append(reach)
        seen = reach
    cuts[-1] = len(rendered)
    return [rendered[low:high] for low, high in pairwise(cuts)], spans


def _segments(
    spans: Sequence[tuple[int, int]], is_written: Sequence[bool], start: int, end: int, following: Segment
) -> list[Segment]:
    """The segment of each token: body where it holds a character between start and end.

    A token without a character, such as a mark for the beginning of a word, goes with the token after it; `following`
    is for the last. What the tokenizer added of its own is template or trailer.
    """
    segments: list[Segment] = []
    added = Segment.trailer
    for (low, high), written in zip(reversed(spans), reversed(is_written), strict=True):
        if not written:
            segments.append(added)
            continue
        added = Segment.template
        if high > low:
            is_body = low < end and high > start and start < end
            following = Segment.body if is_body else Segment.template if low < start else Segment.trailer
        segments.append(following)
    return segments[::-1]
