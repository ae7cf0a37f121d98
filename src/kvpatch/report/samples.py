"""Texts to read: for pairs chosen by rule, the prompts and what the conditions wrote, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from markupsafe import Markup

from kvpatch.protocols.schema import Protocol
from kvpatch.report import tables
from kvpatch.report.text import Span, marked
from kvpatch.verdicts.prerequisites import decision_order

Hits = Sequence[Mapping[str, int]]
"""The scorer's hits in a text, as they are stored: where each starts and ends."""
Marker = Callable[[str, str, Hits], list[Span]]
Reader = Callable[[pd.DataFrame], pd.DataFrame]
MAX_TEXT = 20_000
PAIRS, PAIRS_LATER = 9, 4
"""Pairs of the first phase, and of each later one."""
MAX_SIDE_BY_SIDE = 6


def samples(
    parts: list[tuple[str, str, pd.DataFrame]],
    protocol: Protocol,
    mark: Marker | None,
    with_texts: Reader | None = None,
) -> dict:
    """Return, for every phase, its chosen pairs.

    parts: (phase, question, trials). mark: (output, source, hits) -> spans to mark; None marks nothing. with_texts:
    adds the texts to the chosen rows; None where they are there.
    """
    chosen = [_chosen(part, phase, question, protocol, not i) for i, (phase, question, part) in enumerate(parts)]
    chosen = [phase for phase in chosen if phase["pairs"]]
    if chosen:
        rows = pd.concat([phase.pop("rows") for phase in chosen], ignore_index=True)
        rows = rows if with_texts is None else with_texts(rows)
        groups = {key: group for key, group in rows.groupby(["phase", "pair_id"], sort=False)}
        for phase in chosen:
            first, name = side_by_side(protocol, phase["phase"]), phase["phase"]
            phase["pairs"] = [sample(groups[name, p], p, gap, protocol, mark, first) for p, gap in phase["pairs"]]
    return {"phases": chosen, "marked": mark is not None}


def _chosen(part: pd.DataFrame, phase: str, question: str, protocol: Protocol, is_first: bool) -> dict:
    """Return the pairs of a phase that are shown, and one row for each of their conditions: the first sample."""
    pairs, by_gap = tables.example_pairs(part, protocol, PAIRS if is_first else PAIRS_LATER)
    rows = part[part["pair_id"].isin([pair for pair, _ in pairs])]
    if "sample" in rows:
        rows = rows.sort_values("sample", kind="stable")
    rows = rows.drop_duplicates(["pair_id", "condition"])
    total = part["pair_id"].nunique()
    return {"phase": phase, "question": question, "pairs": pairs, "by_gap": by_gap, "total": total, "rows": rows}


def side_by_side(protocol: Protocol, phase: str) -> list[str]:
    """Return the conditions to show first: the natural runs, then those that a phase's first hypotheses compare.

    For the first phase of dec7 these are A, B, C, N1, M1 and M1n.
    """
    natural = [n for n in (tables.natural_run(protocol, s) for s in ("target", "source")) if n is not None]
    asked = [h for h in protocol.hypotheses if h.phase == phase and not protocol.is_tautological(h)]
    compared = [name for h in decision_order(protocol) if h in asked for name in h.conditions]
    own = protocol.phases[phase].conditions if phase in protocol.phases else []
    return list(dict.fromkeys([*natural, *compared, *own]))[:MAX_SIDE_BY_SIDE]


def sample(
    part: pd.DataFrame, pair: str, gap: float | None, protocol: Protocol, mark: Marker | None, first: list[str]
) -> dict:
    """Return one pair: its prompts, the outputs to show side by side, and the other ones.

    part: a row a condition, of one pair and phase.
    """
    once = {row["condition"]: row for row in part.to_dict("records")}
    source, target = (first_text(part, f"{side}_text") for side in ("source", "target"))
    names = tables.conditions_of(part, protocol)
    roles = {name: tables.role(protocol, once[name]["phase"], name) for name in names}
    outputs = {name: _output(once[name], tables.about(protocol, name), roles[name], source, mark) for name in names}
    prompts = {"source": shown_text(source, "", None), "target": shown_text(target, "", None)}
    beside = [outputs[name] for name in first if name in outputs]
    others = [outputs[name] for name in names if name not in first]
    return {"pair": pair, "gap": gap, "prompts": prompts, "outputs": beside, "others": others}


def _output(row: dict, about: str, role: str, source: str, mark: Marker | None) -> dict:
    text, error, hits = row.get("text"), row.get("error"), row.get("mode_hits")
    return {
        "name": row["condition"],
        "about": about,
        "role": role,
        "text": shown_text(text, source, mark, hits) if isinstance(text, str) else None,
        "error": error if isinstance(error, str) and error.strip() else "",
        "coherent": None if pd.isna(row.get("coherent")) else bool(row.get("coherent")),
        "recursive_score": row.get("recursive_score"),
        "recursive_score_masked": row.get("recursive_score_masked"),
        "stopped": row.get("stopped") if isinstance(row.get("stopped"), str) else "",
    }


def first_text(part: pd.DataFrame, column: str) -> str:
    """Return the first text a column holds, or the empty string."""
    texts = [t for t in part[column] if isinstance(t, str)] if column in part else []
    return texts[0] if texts else ""


def shown_text(text: str, source: str, mark: Marker | None, hits: object = None) -> Markup:
    """Return a text as HTML, marked if a marker is given; cut, and saying so, past `MAX_TEXT` characters.

    hits: the scorer's, or anything that is no list where there are none.
    """
    known = list(hits) if isinstance(hits, list | np.ndarray) else []
    spans = mark(text[:MAX_TEXT], source, known) if mark is not None else []
    out = marked(text[:MAX_TEXT], spans)
    if len(text) > MAX_TEXT:
        out += Markup('<span class="cut"> … {} more characters not shown</span>').format(f"{len(text) - MAX_TEXT:,}")
    return out
