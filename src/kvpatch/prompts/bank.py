"""Prompt banks: prompts and held-out continuations, read from YAML.

A bank is a directory of YAML lists. An entry with `group` is a prompt, one with `mode` a continuation. Shipped banks
lie in `banks/`, written for this project and dedicated to the public domain (CC0).
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError, field_validator

from kvpatch.errors import MOST_MISTAKES, ProtocolError, ProtocolMistakes
from kvpatch.files import NotYaml, bytes_within, is_directory, read_yaml, yaml_nodes
from kvpatch.specs.base import Frozen, Mode
from kvpatch.specs.nearest import instead, nearest
from kvpatch.specs.refusals import sentence
from kvpatch.specs.scripts import joined, pieces


class Prompt(Frozen):
    """One prompt.

    `topic` is its subject, `domain` the field the subject lies in (continuations are written by domain); `partner_of`
    names the prompt that a foreign prompt is matched with, `paraphrase_of` the one that a paraphrase says over.
    `addressed` says whether the prompt speaks to the reader ("you", "your"), `act` what it does; a bank that states
    them can be balanced on them.
    """

    id: str
    group: str
    text: str
    topic: str
    domain: str
    level: str | None = None
    partner_of: str | None = None
    paraphrase_of: str | None = None
    addressed: bool | None = None
    act: Literal["write", "describe", "question"] | None = None

    @property
    def continuation_domain(self) -> str:
        """The domain of the continuations that are on this prompt's topic; a ladder has them for each subject."""
        return f"{self.domain}:{self.topic}" if self.level else self.domain

    @field_validator("text")
    @classmethod
    def _has_words(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("the text is empty; give it at least one word")
        return text


class Continuation(Frozen):
    """A held-out opening of a reply, in a mode or "plain", on a topic of the target's side, the source's or either.

    Continuations of one `item` are one sentence in several framings: in the mode or plain, in the first or the third
    `person`. Where a bank gives them, they make minimal pairs (BLiMP, Warstadt et al. 2020).
    """

    id: str
    mode: Mode
    topic_of: Literal["target", "source", "either"]
    domain: str
    text: str = Field(min_length=1)
    item: str | None = None
    person: Literal["first", "third"] | None = None


class Bank(Frozen):
    """All prompts and continuations of one bank."""

    name: str
    sha256: str
    prompts: tuple[Prompt, ...]
    continuations: tuple[Continuation, ...]

    @cached_property
    def by_id(self) -> dict[str, Prompt]:
        """Prompts by id."""
        return {prompt.id: prompt for prompt in self.prompts}

    def group(self, name: str) -> list[Prompt]:
        """Prompts of one group, or of one level, in the order of the files.

        Raises:
            ProtocolError: where the bank has no such group.
        """
        found = [prompt for prompt in self.prompts if name in (prompt.group, prompt.level)]
        if not found:
            groups = ", ".join(sorted({n for prompt in self.prompts for n in (prompt.group, prompt.level) if n}))
            raise ProtocolError(f"bank {self.name!r} has no group or level {name!r}; it has {groups}")
        return found

    @cached_property
    def continuations_of(self) -> dict[tuple[str, str | None, str], list[Continuation]]:
        """Continuations by mode, person and domain, in the order of the files."""
        out: dict[tuple[str, str | None, str], list[Continuation]] = {}
        for continuation in self.continuations:
            out.setdefault((continuation.mode, continuation.person, continuation.domain), []).append(continuation)
        return out

    @cached_property
    def persons(self) -> tuple[str | None, ...]:
        """The grammatical persons in which the bank has each continuation; (None,) where it does not say."""
        return tuple(sorted({c.person for c in self.continuations if c.person})) or (None,)

    @cached_property
    def partners(self) -> dict[str, Prompt]:
        """Foreign prompts by the id of the prompt they are matched with: a target's, or a source's."""
        return {prompt.partner_of: prompt for prompt in self.prompts if prompt.partner_of}


class BankMistakes(ProtocolMistakes):
    """All that is wrong with a bank. `groups` and `modes` are those that its entries name, the wrong ones too."""

    def __init__(self, lines: Sequence[str], groups: Collection[str], modes: Collection[str]) -> None:
        super().__init__(lines)
        self.groups, self.modes = sorted(groups), sorted(modes)


MOST_IN_ALL = 16 << 20
"""Bytes of a bank's files together; the largest that is shipped has 0.7 MB."""
ALIASES = {"recursion-2": "recursion"}
"""Other names of shipped banks. A bank's own name is its newest edition; an older one is kept under its number."""


def shipped_banks() -> list[str]:
    """Names of the banks that come with kvpatch, other names of the same bank among them."""
    own = (item.name for item in files("kvpatch.prompts").joinpath("banks").iterdir() if item.is_dir())
    return sorted([*own, *ALIASES])


def load_bank(name: str, folder: Path | None = None) -> Bank:
    """Load a bank from a directory, or a shipped one by name.

    Args:
        name: a directory of YAML files, or a shipped name.
        folder: what a directory is relative to (a protocol's `folder`); the working directory if None.
    Raises:
        ProtocolError: where it can't be found or an entry is wrong; the message names file and entry.
    """
    path = Path(folder or "", name)
    if is_directory(path):
        return _read(name, path)
    if name not in shipped_banks():
        where = f" in {folder}" if folder else ""
        told = instead(name, shipped_banks(), "shipped are")
        raise ProtocolError(f"no prompt bank {name!r}: neither a shipped bank nor a directory{where}; {told}")
    return _read_shipped(name)


@functools.cache
def _read_shipped(name: str) -> Bank:
    """A shipped bank, read once: it does not change while the program runs."""
    with as_file(files("kvpatch.prompts").joinpath("banks", ALIASES.get(name, name))) as folder:
        return _read(name, folder)


def _read(name: str, folder: Path) -> Bank:
    digest = hashlib.sha256()
    prompts: list[Prompt] = []
    continuations: list[Continuation] = []
    wrong: list[str] = []
    named: dict[str, set[str]] = {"group": set(), "level": set(), "mode": set()}
    read = 0
    for path in sorted(folder.glob("*.yaml")):
        try:
            raw = bytes_within(path)
        except OSError as error:
            raise ProtocolError(f"bank {name!r}: {path.name} can't be read: {error.strerror or error}") from error
        digest.update(raw)
        read += len(raw)
        if read > MOST_IN_ALL:
            raise ProtocolError(f"bank {name!r} has more than {MOST_IN_ALL:,} bytes in its files")
        for entry in _entries(path, raw, named):
            if isinstance(entry, str):
                wrong.append(entry)
            elif isinstance(entry, Continuation):
                continuations.append(entry)
            else:
                prompts.append(entry)
    counts = Counter(entry.id for entry in (*prompts, *continuations))
    wrong += [f"bank {name!r}: id {one!r} is used twice" for one in sorted(i for i, n in counts.items() if n > 1)]
    if wrong:
        raise BankMistakes(wrong, named["group"] | named["level"], named["mode"])
    if not prompts:
        raise ProtocolError(f"bank {name!r} holds no prompts")
    bank = Bank(name=name, sha256=digest.hexdigest(), prompts=tuple(prompts), continuations=tuple(continuations))
    if lost := [p for p in prompts if p.partner_of and p.partner_of not in bank.by_id]:
        told = "partner_of names no prompt"
        raise ProtocolMistakes(
            [f"bank {name!r}: {p.id}: {told} {p.partner_of!r}; {instead(p.partner_of or '', bank.by_id)}" for p in lost]
        )
    return bank


def _entries(path: Path, raw: bytes, named: dict[str, set[str]]) -> Iterator[Prompt | Continuation | str]:
    """The entries of a file; of one that is wrong, what is wrong with it, in one line.

    named: gets the groups, levels and modes that the entries name.
    """
    try:
        loaded = read_yaml(raw) or []
    except NotYaml as error:
        line = f", line {error.line}" if error.line else ""
        yield f"{path.name}{line}: not YAML: {error}"
        return
    if not isinstance(loaded, list):
        yield f"{path.name}: expected a list of prompts or continuations"
        return
    lines: list[int] = []
    wrong = 0
    for number, entry in enumerate(loaded, 1):
        kind = Continuation if isinstance(entry, dict) and "mode" in entry else Prompt
        for key, found in named.items() if isinstance(entry, dict) else ():
            found |= {entry[key]} if isinstance(entry.get(key), str) else set()
        try:
            yield kind.model_validate(entry)
        except ValidationError as error:
            wrong += 1
            if wrong > MOST_MISTAKES:  # which are counted, and not told
                yield f"{path.name}, entry {number}"
                continue
            lines = lines or _lines(raw)
            yield f"{path.name}, entry {number}, {_told(error, kind)} (line {lines[number - 1]})"


def _told(error: ValidationError, kind: type[Prompt | Continuation]) -> str:
    """What is wrong with an entry: each key, with what is expected there."""
    found: list[str] = []
    details = sorted(error.errors(), key=lambda each: each["type"] in ("missing", "extra_forbidden"))
    keys = list(kind.model_fields)
    missing = [str(each["loc"][0]) for each in details if each["type"] == "missing"]
    meant: set[str] = set()
    for each in details:
        key = ".".join(str(part) for part in each["loc"]) or "entry"
        if each["type"] == "extra_forbidden":
            near = nearest(key, [*missing, *keys])
            meant |= {near} if near else set()
            found.append(f"{key}: no such key; " + (f"did you mean {near!r}?" if near else f"it has {', '.join(keys)}"))
        elif each["type"] != "missing":
            found.append(f"{key}: {sentence(each)}")
    found += [f"{key}: this key is missing" for key in missing if key not in meant]
    return "; ".join(found)


def _lines(raw: bytes) -> list[int]:
    """The line on which each entry of a file begins."""
    node, _ = yaml_nodes(raw)
    return [entry.start_mark.line + 1 for entry in node.value] if isinstance(node, yaml.SequenceNode) else []


def shuffled_words(text: str, seed: int) -> str:
    """The words of a text in another order: its vocabulary without its sentences."""
    words = pieces(text)
    order = np.random.Generator(np.random.Philox(key=seed % 2**64)).permutation(len(words))
    return joined([words[i] for i in order])
