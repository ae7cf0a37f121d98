"""From a run directory to its report page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from kvpatch.readouts.behavior import copied_words
from kvpatch.report.figure import Figure
from kvpatch.report.head_maps import MAPPED
from kvpatch.report.head_tokens import stored_by_slot
from kvpatch.report.page import Live, context_of, render
from kvpatch.report.paper import figures_in
from kvpatch.report.token_pairs import TOKEN_TEXTS
from kvpatch.report.tokens import decoder
from kvpatch.store.directory import Store
from kvpatch.store.objects import Place
from kvpatch.store.record import ModelRecord
from kvpatch.verdicts.decide import verdicts_json
from kvpatch.verdicts.outcome import TEXTS, Outcome

TRAJECTORIES = ("rv_trajectory", "rv_forced_trajectory")


def mark(text: str, source: str, hits: Sequence[Mapping[str, int]]) -> list[tuple[int, int, str]]:
    """What to mark in an output: the scorer's hits, as they are stored, and words copied from the source."""
    marks = [(span["start"], span["end"], "hit") for span in hits if span["end"] <= len(text)]
    return marks + [(start, end, "copied") for start, end in copied_words(text, source)]


def report_page(store: Store, outcome: Outcome, live: Live | None = None) -> str:
    """The report as HTML. live: what to say where it is served while the run goes on."""
    with pd.option_context("mode.string_storage", "python"):
        return render(
            _shown(outcome),
            outcome.protocol,
            outcome.rows,
            json.loads(verdicts_json(outcome.verdicts)),
            outcome.told,
            mark,
            [effect.model_dump() for effect in outcome.effects],
            with_texts=lambda rows: with_tokens(store, outcome, rows),
            watched=(*watched_rows(store, outcome), stored_by_slot(store, _models(outcome))),
            live=live,
        )


def report_figures(store: Store, outcome: Outcome) -> dict[str, Figure]:
    """The figures of the report that have data, by id, in the page's order."""
    with pd.option_context("mode.string_storage", "python"):
        context = context_of(
            _shown(outcome),
            outcome.protocol,
            outcome.rows,
            json.loads(verdicts_json(outcome.verdicts)),
            outcome.told,
            [effect.model_dump() for effect in outcome.effects],
            watched_rows(store, outcome),
        )
    return {found.id: found for found in figures_in(context)}


def _shown(outcome: Outcome) -> dict[str, Any]:
    """run.json as the page reads it, and how many trials are stored."""
    record = outcome.record
    counts = {"dropped_pairs": len(record.dropped_pairs), "stored": len(outcome.rows), "planned": record.planned}
    return record.model_dump(mode="json") | counts


def write_report(store: Store, outcome: Outcome, path: Path | None = None) -> Place:
    """Write the report; returns where it is."""
    page = report_page(store, outcome)
    if path is None:
        return store.write_text("report.html", page)
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def with_columns(store: Store, rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The rows with further columns, such as texts, read from the parts that hold them."""
    wanted = pa.array(rows["trial_id"].unique(), pa.string())
    found = []
    for table in store.tables(["trial_id", *columns]):
        here = table.filter(pc.is_in(table["trial_id"], wanted))  # pyright: ignore[reportAttributeAccessIssue]
        if len(here):
            found.append(here)
    if not found:
        return rows.assign(**dict.fromkeys(columns))
    more = pa.concat_tables(found).to_pandas().drop_duplicates("trial_id", keep="last")
    return rows.merge(more, on="trial_id", how="left")


def with_tokens(store: Store, outcome: Outcome, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with their texts, and with the tokens that they wrote: ids, log-probabilities, and the text of each
    where the run's tokenizer is at hand."""
    rows = rows.drop(columns=["output_token_ids", "output_logprobs"], errors="ignore")  # hashes, of no use here
    found = with_columns(store, rows, (*TEXTS, "output_token_ids", "output_logprobs"))
    decoders = {model.name: decoder(model) for model in _models(outcome)}
    texts: list[list[str] | None] = []
    for name, ids in zip(found.get("model", [None] * len(found)), found["output_token_ids"], strict=True):
        decode = decoders.get(name)
        has_ids = isinstance(ids, list | np.ndarray)
        texts.append(None if decode is None or not has_ids else decode([int(i) for i in ids]))
    return found.assign(**{TOKEN_TEXTS: pd.Series(texts, index=found.index, dtype=object)})


def _models(outcome: Outcome) -> list[ModelRecord]:
    """The models that a run used."""
    return [outcome.record.model, *(other.model for other in outcome.record.other_models.values())]


def watched_rows(store: Store, outcome: Outcome) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows of the phases that read geometry or watch attention, with what the charts of those need; every head's
    attention while it read the fixed continuation)."""
    phases = outcome.protocol.phases
    asked = [name for name, phase in phases.items() if phase.geometry or phase.watched is not None]
    rows = outcome.rows[outcome.rows["phase"].isin(asked)]
    heads = store.read_attention(["trial_id", "stage", "layer", "head", *MAPPED], stage="forced")
    return with_columns(store, rows, TRAJECTORIES), heads.to_pandas()
