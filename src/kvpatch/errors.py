"""Errors meant for a person: one line that says what was wrong and what would be right (exit code 2)."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

EXTRA_OF = {
    "torch": "run",
    "transformers": "run",
    "accelerate": "run",
    "safetensors": "run",
    "gguf": "run",
    "psutil": "run",
    "xarray": "run",
    "tqdm": "run",
    "starlette": "view",
    "anyio": "view",
    "uvicorn": "view",
    "huggingface_hub": "view",
    "tokenizers": "view",
    "wordfreq": "bank",
    "polars": "polars",
    "ray": "ray",
    "obstore": "remote",
    "boto3": "remote",
}
"""Which extra of kvpatch brings a package that the base install does without (pyproject.toml)."""


_NAMED = {
    # What turns the direction of a line.
    0x061C: "ALM", 0x200E: "LRM", 0x200F: "RLM",
    0x202A: "LRE", 0x202B: "RLE", 0x202C: "PDF", 0x202D: "LRO", 0x202E: "RLO",
    0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI",
    # What has no width, so that two words may look the same. The joiners of scripts and of emoji stay.
    0x00AD: "SHY", 0x180E: "MVS", 0x200B: "ZWSP", 0x2060: "WJ", 0xFEFF: "BOM",
    **{code: f"U+{code:04X}" for code in (*range(0x2061, 0x2066), *range(0x206A, 0x2070), *range(0xFFF9, 0xFFFC))},
    **{code: f"U+{code:04X}" for code in (0xE0001, *range(0xE0020, 0xE0080))},
}  # fmt: skip
_VISIBLE: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\u2426"),
    0x2028: "\u2424",
    0x2029: "\u2424",
    **{code: f"\u27e8{name}\u27e9" for code, name in _NAMED.items()},
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
    0xFFFE: "\ufffd",
    0xFFFF: "\ufffd",
}
HIDING = re.compile("[" + "".join(map(chr, (code for code in _VISIBLE if code >= 0x7F))) + "]")
"""A character that JSON leaves as it is, and that `visible` shows as a symbol."""


def visible(value: str) -> str:
    """Return the text with every character that would hide, reorder or break something shown as a symbol.

    Controls become their pictures (U+2400 block); marks, embeddings, overrides and isolates of direction, and spaces
    and marks without width, their names in angle brackets; lone surrogates U+FFFD. Newline and tab stay.

    >>> visible("a\\x00b\\u202ec\\u200f")
    'a␀b⟨RLO⟩c⟨RLM⟩'
    """
    return value.translate(_VISIBLE)


def all_visible(value: Any) -> Any:
    """The same of every string in plain data: dictionaries, their keys among them, lists and what they hold."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {all_visible(key): all_visible(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [all_visible(inner) for inner in value]
    return value


def as_html(value: str) -> str:
    """A text to stand in a page, visible and escaped."""
    return html.escape(visible(value))


MOST_QUOTED = 200
"""Characters of what a user gave that a message quotes at most."""
MOST_IN_ALL = 4_000
"""Characters of a message."""
_QUOTED = re.compile(rf"""(?<!\w)(['"])((?:(?!\1).){{{MOST_QUOTED}}})(?:(?!\1).)+\1(?!\w)""", re.DOTALL)
_UNBROKEN = re.compile(rf"(\S{{{2 * MOST_QUOTED}}})\S+")


def quoted_briefly(message: str) -> str:
    """The message with what it quotes cut to 200 characters, an unbroken run to 400, and nothing in it that would hide,
    reorder or break the line it is printed on.

    >>> len(quoted_briefly(f"no model {'x' * 9000!r}: give another"))
    226
    """
    if len(message) > MOST_QUOTED:
        message = _QUOTED.sub(lambda found: f"{found[1]}{found[2]}…{found[1]}", message[: 100 * MOST_IN_ALL])
        message = _UNBROKEN.sub(lambda found: f"{found[1]}…", message)
        message = message if len(message) <= MOST_IN_ALL else f"{message[:MOST_IN_ALL]}…"
    return visible(message)


MOST_MISTAKES = 50
"""Mistakes of one file that are told at once."""


class KvpatchError(ValueError):
    """Something the user gave can't be used; the message is one line and says what would be right."""

    def __init__(self, message: str = "") -> None:
        super().__init__(quoted_briefly(message))


class ModelError(KvpatchError):
    """A model can't be found, read, trusted or patched."""


class ProtocolError(KvpatchError):
    """A protocol file, a prompt bank or a request on them is wrong."""


class ProtocolMistakes(ProtocolError):
    """All that is wrong with a protocol file, one line each in `lines`."""

    def __init__(self, lines: Sequence[str]) -> None:
        shown = [quoted_briefly(line) for line in lines[:MOST_MISTAKES]]
        if len(lines) > MOST_MISTAKES:
            shown.append(f"and {len(lines) - MOST_MISTAKES} more mistakes in this file")
        ValueError.__init__(self, "\n".join(shown))  # each line is short, and all of them may be long
        self.lines = tuple(shown)


class StoreError(KvpatchError):
    """A run directory can't be written, belongs to something else, or holds a damaged file."""


class ExtensionError(KvpatchError):
    """Something that another package, or a notebook, adds to kvpatch can't be used."""


class CacheError(KvpatchError):
    """A selection, alignment or cache operation does not fit the caches it was given."""


class EmptySelection(CacheError):
    """A selection finds nothing, so that what was asked for would change nothing.

    Attributes:
        without_row: the message as it reads where the row is known otherwise.
    """

    def __init__(self, message: str, without_row: str | None = None) -> None:
        super().__init__(message)
        self.without_row = message if without_row is None else without_row


class SpecError(CacheError, ProtocolError):
    """What is said of a selection or an intervention, in Python or in a protocol, can't be meant."""


class MissingExtra(KvpatchError, ImportError):
    """Something was asked for that needs a package of an extra, and the extra is not installed."""


def is_installed(package: str) -> bool:
    """Whether a package of an extra can be imported; nothing is imported to find out."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # a finder that refuses it, or a module without a spec
        return False


def missing_extra(error: ImportError) -> MissingExtra | None:
    """What to tell a person of a failed import: which extra to install.

    None where no extra helps: the package belongs to none, or it is installed and broken.
    """
    asked = [error.name.partition(".")[0]] if error.name else list(EXTRA_OF)
    package = next((name for name in asked if name in EXTRA_OF and not is_installed(name)), None)
    if package is None:
        return None
    extra = EXTRA_OF[package]
    return MissingExtra(f"this needs {package}, which is not installed: pip install 'kvpatch[{extra}]'")
