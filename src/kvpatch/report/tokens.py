"""Token ids as text, where the tokenizer of the run is on this machine. Needs neither torch nor transformers."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvpatch.files import cache_directory, known_tokenizer
from kvpatch.store.record import ModelRecord

Decode = Callable[[Sequence[int]], list[str]]


def decoder(record: ModelRecord) -> Decode | None:
    """Return ids -> the text of each; None where the tokenizer with the record's hash is not here, the packages that
    read it (an extra of the view and of runs) are not, or the record's name can be no file's."""
    try:
        return _decoder(record.name, record.tokenizer_sha256)
    except (ImportError, OSError, ValueError, NotImplementedError):
        return None


@functools.lru_cache(maxsize=16)
def _decoder(name: str, wanted: str) -> Decode | None:
    from tokenizers import Tokenizer

    for path in _candidates(name, wanted):
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception:  # the library raises plain Exception for a file it can't read
            continue
        if hashlib.sha256(tokenizer.to_str().encode()).hexdigest() == wanted:
            return functools.partial(_decoded, tokenizer)
    return None


def _candidates(name: str, wanted: str) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache

    out = [Path(name) / "tokenizer.json"] if Path(name).is_dir() else []
    out += known_tokenizer(wanted)
    if "/" not in name:
        out += sorted(cache_directory().glob(f"models/{name}-*/tokenizer.json"))
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        found = try_to_load_from_cache(name, "tokenizer.json")
        out += [Path(found)] if isinstance(found, str) else []
    return out


def _decoded(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token: what the ids up to it say, less what the ids before it said; the last one of a character of
    several tokens shows it whole."""
    out, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:end]), skip_special_tokens=False)
        if text.endswith("\ufffd"):
            out.append("")
            continue
        out.append(text[len(before) :])
        before = text
    return out
