"""What a chat template writes around the user's words, found by rendering stand-ins; a template at fault is refused.

A template is a program that others wrote. It may lose the words, write them twice, change them, or write today's date.
So the text around the words is learnt from words that no template can hold, and every prompt is compared with it.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from transformers.utils import chat_template_utils

from kvpatch.errors import ModelError
from kvpatch.models.load import template_sha256

_OTHER_TIMES = (datetime(2001, 1, 2, 3, 4, 5, 6), datetime(2037, 11, 28, 21, 48, 59, 800_000))
"""Two moments that have no part of date or time in common."""
_REPEATS = 16
"""Renderings of the same words at the same moment. A template that tosses a coin gets through once in 32,768 times."""
_ONE_AT_A_TIME = threading.Lock()
Messages = tuple[tuple[str, str], ...]
"""(role, content) of messages."""


@dataclass(frozen=True)
class Scaffold:
    """What a chat template writes around the user's words.

    Attributes:
        before: text before the words.
        after: text after the words, the beginning of the assistant's turn with it.
        template: the template's source.
        title: what an error calls the template.
        time: the moment at which every prompt is rendered, so that a run that lasts past midnight keeps one scaffold.
        depends_on_clock: whether another moment gives another text.
        earlier: (role, content) of the messages before the user's words, which stand in `before`.
    """

    before: str
    after: str
    template: str
    title: str
    time: Any
    depends_on_clock: bool
    earlier: Messages = ()

    @property
    def sha256(self) -> str:
        """Hash of the text before and after the words."""
        return hashlib.sha256(json.dumps([self.before, self.after]).encode()).hexdigest()

    def around(self, tokenizer: Any, words: str) -> tuple[str, int, int]:
        """The whole prompt as text, and the first and the last index (exclusive) of the user's words in it.

        Where the template trims outer blanks, the words are what it leaves of them.

        Raises:
            ModelError: where the template writes these words, or the text around them, otherwise than the scaffold.
        """
        text = _rendered(tokenizer, self.template, self.title, words, self.time, self.earlier)
        start, end = len(self.before), len(text) - len(self.after)
        if start <= end and text.startswith(self.before) and text.endswith(self.after):
            written = text[start:end]
            if written in words and written.strip() == words.strip():
                return text, start, end
        if not words.strip():  # a template that trims its whole turn trims its own blanks where there is no word
            before, after = self.before.rstrip(), self.after.lstrip()
            start, end = len(before), len(text) - len(after)
            if text.startswith(before) and text.endswith(after) and start <= end and not text[start:end].strip():
                return text, start, start
        raise _refusal(self.title, _change(text, self.before, words, self.after))


def scaffold_of(tokenizer: Any, model: str = "", earlier: Messages = (), time: Any = None) -> Scaffold:
    """Learn what the tokenizer's chat template writes around the user's words.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        model: the model's name, for messages; where there is none, the tokenizer's own.
        earlier: (role, content) of messages that come before the user's words, such as a system's.
        time: the moment at which it is rendered; now if None.
    Raises:
        ModelError: where the template drops what a system or an earlier user said, can't be rendered, or does not give
            the user's words once and unchanged, or gives another text each time.
    """
    template = _default_template(tokenizer)
    name = model or getattr(tokenizer, "name_or_path", "")
    title = f"the tokenizer's chat_template, sha256 {str(template_sha256(tokenizer))[:8]}" + (
        f", {name}" if name else ""
    )
    moment = chat_template_utils.datetime.now() if time is None else time

    def render(content: Any, at: Any = moment) -> str:
        return _rendered(tokenizer, template, title, content, at, earlier)

    short, long = _stand_ins(template)
    try:
        text = render(short)
    except ModelError as error:
        if _takes_parts(render, short):
            raise _refusal(title, _WANTS_PARTS) from error
        raise
    if any(render(short) != text for _ in range(_REPEATS - 1)):
        raise _refusal(title, "writes another text each time it is rendered")
    if (times := text.count(short)) > 1:
        raise _refusal(title, f"writes the user's words {times} times")
    if not times:
        raise _refusal(title, _loss(render, short, text))
    before, after = text.split(short)
    if (other := render(long)) != before + long + after:
        raise _refusal(title, _change(other, before, long, after))
    for role, content in earlier:
        if role != "assistant" and content.strip() not in before:
            raise _refusal(title, f"drops or rewrites the {role}'s words {_shown(content.strip())} before the user's")
    return Scaffold(before, after, template, title, moment, _depends_on_clock(render, short, text), earlier)


def _default_template(tokenizer: Any) -> str:
    """The template that a turn without tools is rendered with: the only one, or the one named "default"."""
    found = tokenizer.chat_template
    if isinstance(found, (list, tuple)):
        found = {entry["name"]: entry["template"] for entry in found}
    if not isinstance(found, Mapping):
        return found
    if "default" not in found:
        names = ", ".join(sorted(found))
        raise ModelError(
            f"the tokenizer has chat templates for {names}, and none is named default; set tokenizer.chat_template to "
            "one of them, or use chat=False"
        )
    return found["default"]


def _stand_ins(template: str) -> tuple[str, str]:
    """Two texts that stand for the user's words. Both hold the template's hash, so that the template can't hold them.

    The second has what a template may change: capitals, blanks, line breaks, quotes, marks, a letter with an accent.
    """
    unique = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    short = f"Words{unique}Abc"
    return short, f"('Some' \"more\" & {unique}Xy:\n\n\tTwo  blanks, <b>Élan</b> \\ {{{{ a }}}} {{% b %}} #End#)."


_WANTS_PARTS = "drops the user's words: it expects content as a list of parts"


def _takes_parts(render: Callable[[Any], str], words: str) -> bool:
    """Whether the template writes words that come as a list of parts."""
    try:
        return words in render([{"type": "text", "text": words}])
    except ModelError:
        return False


def _loss(render: Callable[[Any], str], words: str, text: str) -> str:
    """What happened to words that can't be found in the text."""
    if found := re.search(re.escape(words), text, re.IGNORECASE):
        return f"rewrites the user's words: {words!r} became {found[0]!r}"
    if render(words[::-1]) != text:
        return f"rewrites the user's words: {words!r} is not in what it writes"
    return _WANTS_PARTS if _takes_parts(render, words) else "drops the user's words"


def _change(text: str, before: str, words: str, after: str) -> str:
    """How the text differs from the words between what stands before and after them."""
    start, end = len(before), len(text) - len(after)
    if not (start <= end and text.startswith(before) and text.endswith(after)):
        return f"writes other text around {_shown(words)} than around other words"
    written = text[start:end]
    if not written.strip():
        return f"drops the user's words: {_shown(words)}"
    same = next((i for i, (a, b) in enumerate(zip(words, written, strict=False)) if a != b), len(written))
    left = max(words.rfind(" ", 0, same) + 1, same - 20)
    return f"rewrites the user's words: {words[left : same + 20]!r} became {written[left : same + 20]!r}"


def _shown(words: str) -> str:
    return repr(words if len(words) <= 40 else words[:40] + "...")


def _depends_on_clock(render: Callable[[Any, Any], str], words: str, text: str) -> bool:
    try:
        return any(render(words, time) != text for time in _OTHER_TIMES)
    except ModelError:  # a template that refuses a date has read it
        return True


def _rendered(tokenizer: Any, template: str, title: str, content: Any, time: Any, earlier: Messages = ()) -> str:
    """One user's turn and what came before it, ready for the assistant's, rendered at a given moment."""
    messages = [{"role": role, "content": said} for role, said in (*earlier, ("user", content))]
    try:
        with _clock_stopped(time):
            return tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
    except Exception as error:  # whatever a program of others may raise
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        roles = ", ".join(role for role, _ in earlier)
        what = f"messages of {roles}, user" if earlier else "a user's turn on its own"
        raise _refusal(title, f"can't render {what}: {said}") from error


@contextmanager
def _clock_stopped(time: Any) -> Iterator[None]:
    """Let `strftime_now`, the only clock that transformers gives a template, tell this moment."""
    with _ONE_AT_A_TIME:
        clock = chat_template_utils.datetime
        setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda *_: time))  # noqa: B010
        try:
            yield
        finally:
            setattr(chat_template_utils, "datetime", clock)  # noqa: B010


def _refusal(title: str, fault: str) -> ModelError:
    return ModelError(f"the chat template {fault} ({title}); use chat=False or another template")
