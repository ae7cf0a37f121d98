"""From a run directory to verdicts and report. Needs no torch, only the directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from kvpatch.errors import ProtocolError
from kvpatch.protocols.schema import Protocol, dumped_sha256
from kvpatch.readouts.behavior import copied_words
from kvpatch.report.page import render
from kvpatch.statistics.effects import Effect, effects
from kvpatch.statistics.verdicts import Verdict, headline, verdicts, verdicts_json
from kvpatch.store import RunRecord, Store


def stored_protocol(record: RunRecord, *, is_exploratory: bool = False) -> Protocol:
    """The protocol a run was made with.

    is_exploratory: also take one that was changed after the run; no claim of it is then confirmatory.

    Raises:
        ProtocolError: where what run.json holds no longer has the hash that was stored before the first trial.
    """
    protocol = Protocol.model_validate(record.protocol)
    found = dumped_sha256(record.protocol)
    if found != record.protocol_sha256 and not is_exploratory:
        raise ProtocolError(
            f"the protocol in run.json has hash {found[:12]}, and the run was made with "
            f"{record.protocol_sha256[:12]}: it was changed after the run, so its verdicts would not be confirmatory; "
            "--exploratory marks them so"
        )
    return as_exploratory(protocol) if is_exploratory else protocol


def as_exploratory(protocol: Protocol) -> Protocol:
    """The protocol with no confirmatory hypothesis."""
    marked = [h.model_copy(update={"confirmatory": False}) for h in protocol.hypotheses]
    return protocol.model_copy(update={"hypotheses": marked})


@dataclass(frozen=True)
class Outcome:
    """What a run directory says, read and decided once: its record, protocol, trials and verdicts."""

    record: RunRecord
    protocol: Protocol
    rows: pd.DataFrame
    verdicts: list[Verdict]

    @property
    def answer(self) -> str:
        """The one-sentence answer."""
        return headline(self.protocol, self.verdicts)

    @cached_property
    def effects(self) -> list[Effect]:
        """Every condition's difference from its natural run, for every phase that has trials."""
        present = set(self.rows["phase"])
        return [e for name in self.protocol.phases if name in present for e in effects(self.protocol, self.rows, name)]


def outcome_of(store: Store, *, is_exploratory: bool = False, protocol: Protocol | None = None) -> Outcome:
    """Read a run directory and decide every hypothesis from its stored trials.

    is_exploratory: take a changed protocol, and mark every verdict exploratory. protocol: in place of the stored one,
    which makes them exploratory too.

    Raises:
        ProtocolError: where the stored protocol was changed after the run.
        StoreError: where there are no trials, or a part is damaged.
    """
    record = store.read_record()
    if protocol is None:
        protocol = stored_protocol(record, is_exploratory=is_exploratory)
    elif not is_exploratory and protocol.sha256 != record.protocol_sha256:
        raise ProtocolError(
            f"{protocol.protocol} has hash {protocol.sha256[:12]}, and the run was made with "
            f"{record.protocol_sha256[:12]}, so its verdicts would not be confirmatory; --exploratory marks them so"
        )
    elif is_exploratory:
        protocol = as_exploratory(protocol)
    rows = store.read().to_pandas()
    checks = [check for check in (record.check, *(o.check for o in record.other_models.values())) if check is not None]
    instrument = all(i["holds"] is not False for check in checks for i in check) if checks else None
    return Outcome(record, protocol, rows, verdicts(protocol, rows, instrument_ok=instrument))


def write_verdicts(store: Store, outcome: Outcome) -> None:
    """Store verdicts.json, where it does not say the same already."""
    text, path = verdicts_json(outcome.verdicts), store.directory / "verdicts.json"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        store.write_text("verdicts.json", text)


def write_report(store: Store, outcome: Outcome, path: Path | None = None) -> Path:
    """Write the report; returns where it is."""
    found = zip(outcome.rows["text"], outcome.rows["mode_hits"], strict=True)
    hits = {text: spans for text, spans in found if spans is not None}

    def mark(text: str, source: str) -> list[tuple[int, int, str]]:
        marks = [(span["start"], span["end"], "hit") for span in hits.get(text, ())]
        return marks + [(start, end, "copied") for start, end in copied_words(text, source)]

    page = render(
        {**outcome.record.model_dump(mode="json"), "dropped_pairs": len(outcome.record.dropped_pairs)},
        outcome.protocol,
        outcome.rows,
        json.loads(verdicts_json(outcome.verdicts)),
        outcome.answer,
        mark,
        [effect.model_dump() for effect in outcome.effects],
    )
    if path is None:
        return store.write_text("report.html", page)
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def phase_effects(store: Store, phase: str | None = None) -> list[Effect]:
    """Effects of one phase, or of all that have trials.

    Raises:
        ProtocolError: for a phase the protocol does not have.
    """
    outcome = outcome_of(store)
    if phase is None:
        return outcome.effects
    phases = outcome.protocol.phases
    if phase not in phases:
        raise ProtocolError(f"no phase {phase!r} in {outcome.protocol.protocol}; it has {', '.join(phases)}")
    return effects(outcome.protocol, outcome.rows, phase)
