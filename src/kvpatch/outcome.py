"""From a run directory to verdicts and report. Needs no torch, only the directory."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from kvpatch.errors import ProtocolError
from kvpatch.protocols.schema import Protocol, dumped_sha256
from kvpatch.readouts.behavior import Lexicon, copied_words
from kvpatch.report.page import render
from kvpatch.statistics.effects import Effect, effects
from kvpatch.statistics.verdicts import Verdict, headline, verdicts, verdicts_json
from kvpatch.store import RunRecord, Store


def stored_protocol(record: RunRecord) -> Protocol:
    """The protocol a run was made with.

    Raises:
        ProtocolError: where what run.json holds no longer has the hash that was stored before the first trial.
    """
    protocol = Protocol.model_validate(record.protocol)
    found = dumped_sha256(record.protocol)
    if found != record.protocol_sha256:
        raise ProtocolError(
            f"the protocol in run.json has hash {found[:12]}, and the run was made with "
            f"{record.protocol_sha256[:12]}: it was changed after the run, so its verdicts would not be confirmatory"
        )
    return protocol


def decide(store: Store, protocol: Protocol) -> list[Verdict]:
    """Verdicts, recomputed from the stored trials.

    Raises:
        ProtocolError: for a protocol other than the stored one.
    """
    record = store.read_record()
    if protocol.sha256 != stored_protocol(record).sha256:
        raise ProtocolError("the run was made with another protocol; its hash was stored before the first trial")
    instrument = None if record.check is None else all(i["holds"] is not False for i in record.check)
    return verdicts(protocol, _rows(store, record), instrument_ok=instrument)


def write_verdicts(store: Store, protocol: Protocol | None = None) -> list[Verdict]:
    """Compute verdicts.json, and store it where it is not there already."""
    found = decide(store, protocol or stored_protocol(store.read_record()))
    text, path = verdicts_json(found), store.directory / "verdicts.json"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        store.write_text("verdicts.json", text)
    return found


def write_report(store: Store, path: Path | None = None) -> Path:
    """Write the report; returns where it is."""
    record = store.read_record()
    protocol = stored_protocol(record)
    found = decide(store, protocol)
    lexicon = Lexicon.load(protocol.readouts.lexicon)

    def mark(text: str, source: str) -> list[tuple[int, int, str]]:
        hits = [(hit.start, hit.end, "hit") for hit in lexicon.hits(text)]
        return hits + [(start, end, "copied") for start, end in copied_words(text, source)]

    page = render(
        {**record.model_dump(mode="json"), "dropped_pairs": len(record.dropped_pairs)},
        protocol,
        _rows(store, record),
        json.loads(verdicts_json(found)),
        headline(protocol, found),
        mark,
        [effect.model_dump() for effect in phase_effects(store)],
    )
    if path is None:
        return store.write_text("report.html", page)
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def phase_effects(store: Store, phase: str | None = None) -> list[Effect]:
    """Every condition's difference from its natural run, for one phase or all that have trials.

    Raises:
        ProtocolError: for a phase the protocol does not have.
    """
    record = store.read_record()
    protocol = stored_protocol(record)
    if phase is not None and phase not in protocol.phases:
        raise ProtocolError(f"no phase {phase!r} in {protocol.protocol}; it has {', '.join(protocol.phases)}")
    rows = _rows(store, record)
    names = [phase] if phase else [name for name in protocol.phases if (rows["phase"] == name).any()]
    return [effect for name in names for effect in effects(protocol, rows, name)]


def answer(store: Store) -> str:
    """The one-sentence answer of a run."""
    protocol = stored_protocol(store.read_record())
    return headline(protocol, decide(store, protocol))


def _rows(store: Store, record: RunRecord) -> pd.DataFrame:
    return store.read().to_pandas()
