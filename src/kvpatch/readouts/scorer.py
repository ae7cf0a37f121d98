"""Scorers: how much of a text is in the protocol's mode. A lexicon, or a function of the user's own.

A protocol names its scorer under `readouts.lexicon`: a shipped lexicon ("recursion"), the path of a lexicon's YAML
file, or a function as `scorer.py:french` or `package.module:french`. Paths are relative to the protocol file. A
function takes the generated text and returns

    a list of (start, end)   the stretches in the mode, as indices into the text; scored per 100 words
    a number                 the score itself, per 100 words

It gets the text as `behavior.normalise` gives it, and must return the same for the same text. A function is code: it is
run by what runs trials, never by what reads a run directory.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import itertools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeGuard

from kvpatch.errors import ProtocolError, ProtocolMistakes
from kvpatch.files import MOST_BYTES, bytes_within
from kvpatch.readouts.behavior import (
    Lexicon,
    content_words,
    copied_words,
    lexicon_bytes,
    normalise,
    per_100_words,
    recursive_score,
    recursive_score_masked,
)
from kvpatch.specs.base import Frozen

ScoringFunction = Callable[[str], Any]
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Scored:
    """What a scorer found in one text.

    `score` and `masked` are per 100 words; `hits` the (start, end) of every hit in `normalise(text)`, disjoint and in
    order, None where a function gave only a number.
    """

    score: float
    masked: float
    hits: Spans | None


class Scorer(Frozen):
    """A scorer as plain data: it can be hashed, stored, and sent to another process, which scores the same with it.

    `content` is the text of the lexicon or of the .py file; a function of an installed module has none, and the module
    must be installed with the same content wherever it runs. `sha256` is of the file's bytes.
    """

    name: str
    kind: Literal["lexicon", "file", "module"]
    content: str
    function: str
    sha256: str

    def __hash__(self) -> int:
        return hash((self.name, self.sha256))

    def score(self, text: str, seen: str) -> Scored:
        """Score a generated text.

        Masked are a lexicon's hits that were copied from the prompts (`behavior.uncopied_hits`); a function's hits that
        hold a content word of theirs; and of a function that gives a number, the score is taken again of the text
        without the words that also stand in the prompts.

        Args:
            text: the generated text alone.
            seen: the prompts whose words don't count in the masked score.
        Raises:
            ProtocolError: where the function raises, or returns anything else.
        """
        prepared = _prepared(self)
        if isinstance(prepared, Lexicon):
            hits = tuple((hit.start, hit.end) for hit in prepared.hits(text))
            return Scored(recursive_score(text, prepared), recursive_score_masked(text, seen, prepared), hits)
        text = normalise(text)
        found = self._found(prepared, text)
        if isinstance(found, tuple):
            of_prompts = content_words(seen)
            own = [span for span in found if of_prompts.isdisjoint(content_words(text[slice(*span)]))]
            return Scored(per_100_words(len(found), text), per_100_words(len(own), text), found)
        rest = self._found(prepared, _without_copied(text, seen))
        if isinstance(rest, tuple):
            raise ProtocolError(f"scorer {self.name} returned a number for one text and a list for another")
        return Scored(found, rest, None)

    def _found(self, function: ScoringFunction, text: str) -> float | Spans:
        try:
            found = function(text)
        except (Exception, SystemExit) as error:
            raise _broken(self.name, error) from error
        if isinstance(found, Real) and not isinstance(found, bool) and math.isfinite(found):
            return float(found)
        if not _is_spans(found, len(text)):
            raise ProtocolError(
                f"scorer {self.name} must return a finite number, or a list of (start, end) within the text; "
                f"for a text of {len(text)} characters it returned {found!r:.80}"
            )
        spans = tuple(sorted((start, end) for start, end in found))
        if any(right[0] < left[1] for left, right in itertools.pairwise(spans)):
            raise ProtocolError(f"scorer {self.name} returned hits that overlap: {spans!r:.80}")
        return spans


def names_code(name: str) -> bool:
    """Whether a scorer's name is that of a function, which runs as code."""
    return _function_name(name) is not None


def read_scorer(name: str, folder: Path | None = None) -> Scorer:
    """Read what a protocol names under `readouts.lexicon`; runs no code of a .py file.

    Args:
        name: a shipped lexicon, a YAML file, or a function as `file.py:function` or `package.module:function`.
        folder: what paths are relative to; the working directory if None.
    Raises:
        ProtocolError: where there is no such lexicon, file or module, or the lexicon is none, has an entry without an
            example, or does not hold to its examples.
    """
    function = _function_name(name)
    if function is None:
        content = lexicon_bytes(name, folder)
        lexicon = Lexicon.parse(content, name)
        patterns = (*lexicon.entries, *(cue for cue in lexicon.cues.cues if cue.pattern))
        untried = [part.id for part in patterns if not part.matches]
        if untried:
            told = (
                "it has no example; give at least one text under 'matches' in which its pattern must find a hit, so "
                "that a pattern that can't find any is seen before a run"
            )
            raise ProtocolMistakes([f"lexicon {name!r}, entry {entry!r}: {told}" for entry in untried])
        return Scorer(name=name, kind="lexicon", content=content.decode(), function="", sha256=_sha256(content))
    where = name.rpartition(":")[0]
    if not where.endswith(".py"):
        origin = _module_bytes(where, name)
        return Scorer(name=name, kind="module", content="", function=function, sha256=_sha256(origin))
    path = Path(folder or "", where)
    try:
        content = bytes_within(path)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ProtocolError(f"scorer {name}: {path} can't be read: {_reason(error)}") from error
    if len(content) > MOST_BYTES:
        raise ProtocolError(f"scorer {name}: {path} has more than {MOST_BYTES:,} bytes")
    return Scorer(name=name, kind="file", content=text, function=function, sha256=_sha256(content))


def _function_name(name: str) -> str | None:
    function = name.rpartition(":")[2]
    return function if ":" in name and function.isidentifier() else None


@functools.lru_cache(maxsize=8)
def _prepared(scorer: Scorer) -> Lexicon | ScoringFunction:
    """The lexicon or the function that a scorer stands for; a .py file runs once a process."""
    if scorer.kind == "lexicon":
        return Lexicon.parse(scorer.content.encode(), scorer.name)
    try:
        module = _run_file(scorer) if scorer.kind == "file" else _imported(scorer)
    except ProtocolError:
        raise
    except (Exception, SystemExit) as error:
        raise _broken(scorer.name, error) from error
    function = getattr(module, scorer.function, None)
    if not callable(function):
        raise ProtocolError(f"scorer {scorer.name}: there is no function {scorer.function!r} in it")
    return function


def _run_file(scorer: Scorer) -> ModuleType:
    """The module a .py file makes. It stands alone: nothing beside it can be imported, so that its hash says all."""
    module = ModuleType(f"kvpatch_scorer_{scorer.sha256[:12]}")
    sys.modules[module.__name__] = module  # dataclasses, among others, look their module up
    exec(compile(scorer.content, scorer.name.rpartition(":")[0], "exec"), module.__dict__)
    return module


def _imported(scorer: Scorer) -> ModuleType:
    where = scorer.name.rpartition(":")[0]
    if _sha256(_module_bytes(where, scorer.name)) != scorer.sha256:
        raise ProtocolError(f"scorer {scorer.name}: module {where} here is not the one the run was planned with")
    return importlib.import_module(where)


def _module_bytes(module: str, name: str) -> bytes:
    """Content of a module's own file; its package is imported to find it, the module is not."""
    try:
        found = importlib.util.find_spec(module)
        if found is None or not found.has_location or found.origin is None:
            raise ProtocolError(f"scorer {name}: no module {module!r} with a file of its own; a file ends in .py")
        return Path(found.origin).read_bytes()
    except ProtocolError:
        raise
    except (Exception, SystemExit) as error:
        raise _broken(name, error) from error


def _broken(name: str, error: BaseException) -> ProtocolError:
    line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
    return ProtocolError(f"scorer {name}{line}: {type(error).__name__}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    told = getattr(error, "strerror", None) or getattr(error, "msg", None) or error
    return " ".join(str(told).split())[:200] or "no message"


def _is_spans(found: Any, length: int) -> TypeGuard[list[tuple[int, int]]]:
    return isinstance(found, (list, tuple)) and all(
        isinstance(span, (list, tuple))
        and len(span) == 2
        and all(isinstance(at, int) and not isinstance(at, bool) for at in span)
        and 0 <= span[0] < span[1] <= length
        for span in found
    )


def _without_copied(normalised: str, seen: str) -> str:
    """The text without the words that also stand in the prompts."""
    out, at = [], 0
    for start, end in copied_words(normalised, seen):
        out.append(normalised[at:start])
        at = end
    return re.sub(r"\s+", " ", "".join([*out, normalised[at:]])).strip()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
