"""The plan's table, as the report shows it: its rows, kind by kind, and the questions with what bears on each."""

from __future__ import annotations

from collections.abc import Mapping

from kvpatch.protocols.plan_rows import RowKind
from kvpatch.protocols.schema import Protocol
from kvpatch.report.judgements import BADGES, Badge, badge
from kvpatch.verdicts.plan_table import AnsweredRow, RowWord, plan_table

HEADINGS: dict[RowKind, str] = {
    "intervention": "Earlier interventions",
    "premise": "Premises",
    "criterion": "Success criteria",
    "prediction": "Predictions",
    "question": "Questions",
}
ROW_BADGES: dict[RowWord, Badge] = {
    "supported": BADGES["supported"],
    "equivalent": BADGES["equivalent"],
    "partly supported": Badge("partly supported", "◐", "open", "some of its hypotheses passed, none is contradicted"),
    "contradicted": Badge("contradicted", "✕", "no", "the data speak against one of its hypotheses, or for a rival"),
    "inconclusive": BADGES["inconclusive"],
    "not interpretable": BADGES["not interpretable"],
    "not measured": Badge("not measured", "–", "void", "this run has no number on it"),
    "tautological": BADGES["tautological"],
    "answered": Badge("answered", "✓", "yes", "each of its hypotheses passed or is contradicted"),
    "partly answered": Badge("partly answered", "◐", "open", "some of its hypotheses passed or are contradicted"),
    "not answered": Badge("not answered", "⊘", "void", "none of its hypotheses passed or is contradicted"),
}


def plan_rows(verdicts: list[dict], rows: list[dict], protocol: Protocol, models: Mapping[str, dict]) -> list[dict]:
    """Return every row of the plan's table, with its badge and the verdict rows of the hypotheses that answer it.

    verdicts: the content of verdicts.json. rows: verdict rows. models: phase -> the record of its model.
    """
    names = {phase.model: models[name].get("name") for name, phase in protocol.phases.items()}
    answered = plan_table(protocol, verdicts, {key: str(name) for key, name in names.items() if name})
    known = {row["id"]: row for row in rows}
    return [_row(row, known) for row in answered]


def _row(row: AnsweredRow, known: Mapping[str, dict]) -> dict:
    findings = [
        {**f.model_dump(), "badge": badge(None if f.verdict == "no verdict" else f.verdict), "row": known[f.id]}
        for f in row.findings
    ]
    telling = None if row.telling is None else row.telling.model_dump()
    return {**row.model_dump(), "badge": ROW_BADGES[row.verdict], "findings": findings, "telling": telling}


def by_kind(rows: list[dict]) -> list[dict]:
    """Return the rows kind by kind, in the table's order, each kind with its heading."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return [{"heading": HEADINGS[kind], "rows": [row for row in rows if row["kind"] == kind]} for kind in kinds]
