"""From a run directory to verdicts. Needs no torch, only the directory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from kvpatch.errors import ProtocolError
from kvpatch.files import MOST_JSON
from kvpatch.protocols.schema import Protocol
from kvpatch.protocols.stored import as_exploratory, stored_protocol
from kvpatch.store.columns import TRIAL_COLUMNS
from kvpatch.store.directory import Store
from kvpatch.store.objects import content_of
from kvpatch.store.readout_calibration import ReadoutCalibration
from kvpatch.store.record import RunRecord
from kvpatch.verdicts.answer import Answer, answer
from kvpatch.verdicts.chosen_heads import heads_column, with_heads
from kvpatch.verdicts.decide import Verdict, headline, verdicts, verdicts_json
from kvpatch.verdicts.effects import Effect, effects
from kvpatch.verdicts.plan_table import AnsweredRow, plan_table
from kvpatch.verdicts.prerequisites import instrument_holds
from kvpatch.verdicts.specificity import LEVEL

TEXTS = ("text", "source_text", "target_text", "mode_hits")
"""Columns that only a page with texts needs."""


def _light_columns() -> list[str]:
    heavy = {*TEXTS, "patch", *(name for name, (kind, _) in TRIAL_COLUMNS.items() if pa.types.is_list(kind))}
    return [name for name in TRIAL_COLUMNS if name not in heavy]


def light_rows(store: Store) -> pd.DataFrame:
    """Every trial without its texts and lists, which the statistics do not need: 200,000 trials stay small and quick.

    `source_tokens` is the length of `source_token_ids`; `output_token_ids` is a hash of the ids, to be compared only;
    `mode_llr_level` is the first of the covariates of damage.

    Raises:
        StoreError: where there are no trials, or a part is damaged.
    """
    light = _light_columns()
    table = store.read([*light, "source_token_ids", "output_token_ids", "mode_llr_damage"])
    rows = (
        table.select(light)
        .append_column("source_tokens", pc.list_value_length(table["source_token_ids"]))  # pyright: ignore
        .append_column(LEVEL, pc.list_element(table["mode_llr_damage"], 0))  # pyright: ignore
        .append_column("output_token_ids", pa.array(_hashes(table["output_token_ids"]), pa.string()))
    )
    # Rows are filtered by their words many times over, which Python's strings bear better than Arrow's.
    with pd.option_context("mode.string_storage", "python"):
        return rows.to_pandas()


def _hashes(lists: pa.ChunkedArray) -> list[str | None]:
    out: list[str | None] = []
    for chunk in lists.chunks:
        values, ends = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        for start, end, known in zip(ends[:-1], ends[1:], chunk.is_valid().to_pylist(), strict=True):
            out.append(hashlib.blake2b(values[start:end].tobytes(), digest_size=8).hexdigest() if known else None)
    return out


@dataclass(frozen=True)
class Outcome:
    """What a run directory says, read and decided once: its record, protocol, trials and verdicts.

    rows: as `light_rows` gives them, with single heads where a hypothesis is tested in chosen ones.
    """

    record: RunRecord
    protocol: Protocol
    rows: pd.DataFrame
    verdicts: list[Verdict]

    @property
    def incomplete(self) -> str | None:
        """What to say where trials that were planned are not stored: the run goes on, was broken off, or lost them."""
        planned = self.record.planned
        if len(self.rows) >= planned:
            return None
        return (
            f"{len(self.rows):,} of {planned:,} planned trials are stored, and what follows is of these alone; the "
            "same `kvpatch run` command computes the others"
        )

    @property
    def answer(self) -> str:
        """The one-sentence answer."""
        return headline(self.protocol, self.verdicts, is_checked=self.record.check is not None)

    @property
    def told(self) -> Answer:
        """The answer in words and numbers, for a page."""
        return answer(self.protocol, self.verdicts, is_checked=self.record.check is not None)

    @cached_property
    def plan_table(self) -> list[AnsweredRow]:
        """The plan's table: what it expected, row by row, and what this run says."""
        others = {key: other.model.name for key, other in self.record.other_models.items()}
        entries = [verdict.model_dump(mode="json") for verdict in self.verdicts]
        return plan_table(self.protocol, entries, {None: self.record.model.name, **others})

    @cached_property
    def effects(self) -> list[Effect]:
        """Every condition's difference from its natural run, for every phase that has trials."""
        parts = {str(name): part for name, part in self.rows.groupby("phase", sort=False)}
        with pd.option_context("mode.string_storage", "python"):
            return [
                e for name in self.protocol.phases if name in parts for e in effects(self.protocol, parts[name], name)
            ]


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
    rows = with_heads(light_rows(store), store, protocol)
    checks = (record.check, *(other.check for other in record.other_models.values()))
    instrument = instrument_holds(identity for check in checks for identity in check or ())
    with pd.option_context("mode.string_storage", "python"):
        found = verdicts(
            protocol,
            rows.filter(_needed(protocol)),
            instrument_ok=instrument,
            calibrations=_calibrations(record),
        )
    return Outcome(record, protocol, rows, found)


def _calibrations(record: RunRecord) -> dict[str | None, ReadoutCalibration]:
    """Model's key -> how its likelihood readouts were fitted, where they were."""
    of: dict[str | None, ReadoutCalibration | None] = {None: record.readout_calibration}
    of |= {key: other.readout_calibration for key, other in record.other_models.items()}
    return {key: calibration for key, calibration in of.items() if calibration is not None}


def _needed(protocol: Protocol) -> list[str]:
    """Columns that the protocol's hypotheses read."""
    keys = [
        "trial_id",
        "phase",
        "split",
        "condition",
        "pair_id",
        "source_id",
        "target_id",
        "source_domain",
        "target_domain",
        "sample",
        "coherent",
        "equals_text",
        "error",
        LEVEL,
    ]
    read = [name for h in protocol.hypotheses for name in h.readouts]
    return list(dict.fromkeys([*keys, *read, *map(heads_column, read)]))


def write_verdicts(store: Store, outcome: Outcome) -> str | None:
    """Store verdicts.json, where it does not say the same already; returns what to tell of one that said otherwise."""
    text, path = verdicts_json(outcome.verdicts), store.directory / "verdicts.json"
    try:
        before = content_of(path, MOST_JSON).decode(errors="replace")
    except FileNotFoundError:
        before = None
    except OSError:
        before = ""
    if before == text:
        return None
    store.write_text("verdicts.json", text)
    return None if before is None else f"verdicts.json {_change(before, text)}; it was written anew from the trials"


def _change(before: str, now: str) -> str:
    """What verdicts.json said otherwise than it does now."""
    try:
        old, new = ({entry["id"]: entry for entry in json.loads(content)} for content in (before, now))
    except (ValueError, TypeError, KeyError, RecursionError):
        return "could not be read"
    differ = [name for name in {**new, **old} if new.get(name) != old.get(name)]
    if not differ:
        return "had another layout"
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    return f"said otherwise of {', '.join(map(str, differ[:3]))}{more}"


def phase_effects(outcome: Outcome, phase: str | None = None) -> list[Effect]:
    """Effects of one phase, or of all that have trials.

    Raises:
        ProtocolError: for a phase the protocol does not have.
    """
    if phase is None:
        return outcome.effects
    phases = outcome.protocol.phases
    if phase not in phases:
        raise ProtocolError(f"no phase {phase!r} in {outcome.protocol.protocol}; it has {', '.join(phases)}")
    return effects(outcome.protocol, outcome.rows, phase)
