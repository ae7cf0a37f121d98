"""Errors meant for a person: one line that says what was wrong and what would be right (exit code 2)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

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
    "uvicorn": "view",
    "huggingface_hub": "view",
    "tokenizers": "view",
    "wordfreq": "bank",
}
"""Which extra of kvpatch brings a package that the base install does without (pyproject.toml)."""


class KvpatchError(ValueError):
    """Something the user gave can't be used; the message is one line and says what would be right."""


class ModelError(KvpatchError):
    """A model can't be found, read, trusted or patched."""


class ProtocolError(KvpatchError):
    """A protocol file, a prompt bank or a request on them is wrong."""


class ProtocolMistakes(ProtocolError):
    """All that is wrong with a protocol file, one line each in `lines`."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


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
