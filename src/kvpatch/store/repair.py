"""Set aside what is damaged in a run directory, so that the same `kvpatch run` command computes it again.

Nothing is deleted: what is taken out lies in `set-aside/` within the run, under its old name and a number.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from kvpatch.errors import StoreError
from kvpatch.files import MOST_JSON, is_file, read_json
from kvpatch.specs.base import Frozen
from kvpatch.store.directory import SET_ASIDE, Store, explained
from kvpatch.store.objects import ObjectPath, Place, content_of, move
from kvpatch.store.parts import Part, entries, index_content, twice
from kvpatch.store.record import RunRecord, dumped_sha256
from kvpatch.store.session import write_object


class Repair(Frozen):
    """What a repair took out and why, and what the same `kvpatch run` command will compute again."""

    set_aside: dict[str, str]
    """File, as it was named within the run -> what was wrong with it."""
    bad_lines: int
    """Lines of parts.jsonl that named no part."""
    again: dict[str, int]
    """Phase -> trials that were stored in the parts that were set aside."""
    parts_again: list[str]
    command: list[str]
    """The command line of the run, as run.json has it; empty where run.json was damaged itself."""
    lacks_record: bool
    """Whether run.json was set aside."""

    @property
    def lines(self) -> list[str]:
        """The whole, a sentence each."""
        if not self.set_aside and not self.bad_lines:
            return ["nothing is damaged: every stored part is what was stored"]
        told = [f"{name}: {why}" for name, why in self.set_aside.items()]
        told.append(f"what was damaged is kept in {SET_ASIDE}")
        if self.bad_lines:
            told.append(f"{self.bad_lines} line{'s' * (self.bad_lines > 1)} of parts.jsonl named no stored part")
        if self.again:
            counts = ", ".join(f"{count} of phase {phase}" for phase, count in self.again.items())
            told.append(f"to be computed again: {sum(self.again.values())} trials ({counts})")
        again = " ".join(self.command) or "the same `kvpatch run` command as before"
        if self.again or self.bad_lines or self.lacks_record:
            told.append(f"what is missing is computed again by: {again}")
        if "verdicts.json" in self.set_aside:
            told.append("verdicts.json is written again by `kvpatch verdicts`")
        return told


def repair(store: Store) -> Repair:
    """Set aside every part of a run that is not what was stored, and what else of it can't be read.

    A part whose attention is damaged goes as a whole. Of a part that stands under two names, and of two entries for
    one file of which neither fits it, none stays: both are computed again.

    Raises:
        StoreError: where the directory is no run's, is in use, or can't be written.
    """
    if not (_is_there(store.directory / "run.json") or _is_file(store.index)):
        raise StoreError(f"{store.directory} is not a run directory: it has no run.json")
    with store.locked():
        record = _record(store)
        taken: dict[str, str] = {}
        with explained(store.directory):
            if record is None and _is_there(store.directory / "run.json"):
                _set_aside(store, "run.json", taken, "it can't be read, or its protocol was changed after the run")
            kept, dropped, bad = _sorted_out(store)
            is_torn = _is_file(store.index) and bool(bad or dropped)
            if is_torn:
                _set_aside(store, "parts.jsonl", taken, "it named parts that are not as they were stored", is_copy=True)
                store.write_index(kept)
            in_use = {part.part for part in kept}
            for part, why in dropped:
                for folder in ("trials", "attention"):
                    place = store.directory / folder / part.part
                    if part.part not in in_use and _is_there(place):
                        _set_aside(store, f"{folder}/{part.part}", taken, why)
                if part.part not in in_use:
                    taken.setdefault(f"trials/{part.part}", why)
            if not _is_json(store.directory / "verdicts.json"):
                _set_aside(store, "verdicts.json", taken, "it is not JSON")
    lost = {part.part: part for part, _ in dropped if part.part not in in_use}
    again: Counter[str] = Counter()
    for part in lost.values():
        again[part.phase] += part.rows
    return Repair(
        set_aside=taken,
        bad_lines=bad,
        again=dict(again),
        parts_again=sorted(lost),
        command=[] if record is None else record.command,
        lacks_record=record is None,
    )


def _record(store: Store) -> RunRecord | None:
    """run.json, where it can be read and its protocol is the one that the run was made with."""
    try:
        record = store.read_record()
    except StoreError:
        return None
    return record if dumped_sha256(record.protocol) == record.protocol_sha256 else None


def _sorted_out(store: Store) -> tuple[list[Part], list[tuple[Part, str]], int]:
    """Parts that stay, parts that go with what is wrong with them, and the number of lines that name none."""
    try:
        content = index_content(store.index)
    except FileNotFoundError:
        return [], [], 0
    named, bad = entries(content)
    good: list[Part] = []
    dropped: list[tuple[Part, str]] = []
    for part in named:
        try:
            store.check(part)
        except StoreError as error:
            dropped.append((part, _why(error)))
        else:
            good.append(part)
    kept, dropped = _without_copies(good, dropped)
    ids = [store.rows_of(part, ["trial_id"])["trial_id"] for part in kept]
    doubled = twice([part.part for part in kept], ids)
    gone = {*doubled, *doubled.values()}
    why = f"of the trials in {' and '.join(sorted(gone))} some stand there twice"
    dropped += [(part, why) for part in kept if part.part in gone]
    return [part for part in kept if part.part not in gone], dropped, bad


def _without_copies(good: Sequence[Part], dropped: list[tuple[Part, str]]) -> tuple[list[Part], list[tuple[Part, str]]]:
    """The same, where parts that stand under two names go too."""
    names: dict[str, set[str]] = {}
    for part in good:
        names.setdefault(part.sha256, set()).add(part.part)
    kept: dict[str, Part] = {}
    for part in good:
        if part.rows and len(names[part.sha256]) > 1:
            others = ", ".join(sorted(names[part.sha256] - {part.part}))
            dropped.append((part, f"it holds the same trials as {others}"))
        else:
            kept[part.part] = part
    return list(kept.values()), dropped


def _why(error: StoreError) -> str:
    """The reason within the store's message, which names the way on that is being taken here."""
    return str(error).partition("as it was stored: ")[2].removesuffix(")")


def _is_there(path: Place) -> bool:
    """Whether there is something of this name, a link that leads nowhere among it."""
    return path.is_file() if isinstance(path, ObjectPath) else os.path.lexists(path)


def _is_file(path: Place) -> bool:
    return path.is_file() if isinstance(path, ObjectPath) else is_file(path)


def _is_json(path: Place) -> bool:
    """Whether a file is JSON; also where there is none, since it is then written anew."""
    try:
        json.loads(content_of(path, MOST_JSON)) if isinstance(path, ObjectPath) else read_json(path)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _set_aside(store: Store, name: str, taken: dict[str, str], why: str, *, is_copy: bool = False) -> None:
    """Move a file of the run into its folder for what is damaged, where nothing is written over."""
    folder = store.directory / SET_ASIDE
    folder.mkdir(exist_ok=True)
    place, flat = store.directory / name, name.replace("/", "-")
    number = next(i for i in range(1, 1 << 30) if not _is_there(folder / f"{flat}.{i}"))
    if is_copy:
        with suppress(FileNotFoundError):
            content = index_content(place)
            if isinstance(folder, ObjectPath):
                write_object(folder / f"{flat}.{number}", content)
            else:
                (folder / f"{flat}.{number}").write_bytes(content)
    else:
        move(place, folder / f"{flat}.{number}")
    taken[name] = why
