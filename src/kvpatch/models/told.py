"""What transformers and safetensors raise when a model's files are wrong, told to a person in one line.

Their first line often says least ("You set `ignore_mismatched_sizes` to `False`", "'bogus'"). What is wrong, in which
file, and what to do is said here where it is known; anything else is told to its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers

from kvpatch.errors import ModelError
from kvpatch.files import read_json

LONGEST = 400
"""Characters of another library's message that are told; from its beginning and its end."""


def one_line(error: Exception) -> str:
    """What an error says, on one line, to its end; its kind where it says nothing."""
    if isinstance(error, ModelError):
        return str(error)
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    if isinstance(error, KeyError):
        text = f"it has no {text}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 130]} ... {text[-125:]}"


def why_unread(error: Exception, where: Path) -> str:
    """Why the files of a model can't be read: what is wrong, in which file, and what to do.

    Args:
        where: the model's directory.
    """
    if isinstance(error, ModelError):
        return str(error)
    text = " ".join(str(error).split())
    config = where / "config.json"
    settings = _settings(config)
    if settings is None:
        return f"{config.name} is no JSON object; give the config.json that was saved with the model"
    if "does not recognize this architecture" in text:
        return (
            f"config.json names the model_type {settings.get('model_type')!r}, which transformers "
            f"{transformers.__version__} does not know: a newer transformers may, or the model brings its own code "
            "(trust_remote_code=True runs it, if you trust it)"
        )
    if "model_type" not in settings and ("model_type" in text or "Unrecognized model" in text):
        return "config.json does not say its model_type; give the config.json that was saved with the model"
    if isinstance(error, KeyError) and error.args and (named := _setting_of(error.args[0], settings)):
        return (
            f"config.json says {named}: {error.args[0]!r}, which transformers {transformers.__version__} does not "
            "know; correct it"
        )
    if isinstance(error, AttributeError) and "module 'torch'" in text:
        kind = settings.get("dtype") or settings.get("torch_dtype")
        return f"config.json says dtype: {kind!r}, which torch does not know; write float32, bfloat16 or float16"
    if "backend tokenizer" in text or ("tokenizer" in text.lower() and not _has_tokenizer(where)):
        return (
            "it has no tokenizer that can be read: none of tokenizer.json, tokenizer.model, vocab.json and vocab.txt "
            "is whole and there; save the model's tokenizer into the same directory"
        )
    if "trust_remote_code" in text:
        return (
            "the model brings code of its own, which runs on this machine when it is loaded; trust_remote_code=True "
            "runs it, if you trust it"
        )
    if isinstance(error, (TypeError, ArithmeticError, LookupError, AttributeError)) and settings:
        return (
            f"transformers can't make a model of its config.json ({type(error).__name__}: {one_line(error)}); a "
            "setting there is missing or of the wrong kind: give the config.json that was saved with the model"
        )
    return one_line(error)


def _has_tokenizer(where: Path) -> bool:
    return any((where / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))


def _settings(config: Path) -> Mapping[str, Any] | None:
    """What a configuration file says; None where it is no JSON object, nothing where it is not there."""
    try:
        found = read_json(config)
    except OSError:
        return {}
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _setting_of(value: object, settings: Mapping[str, Any]) -> str:
    """The name of the setting that has a value; nested names are joined by dots."""

    def look(inside: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, own in inside.items():
            if isinstance(own, Mapping):
                yield from look(own, f"{prefix}{name}.")
            elif own == value or (isinstance(own, list) and value in own):
                yield f"{prefix}{name}"

    return next(look(settings, ""), "")


def damage(path: Path, error: Exception) -> str:
    """What is wrong with a safetensors file that can't be opened."""
    text = " ".join(str(error).split())
    if re.search("incomplete|not fully covered|too large|too small|invalid header", text, re.IGNORECASE):
        return f"{path.name} is cut short or damaged ({text}); fetch it again"
    return f"{path.name} can't be read ({text}); fetch it again"
