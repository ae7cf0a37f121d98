"""Texts to read: for pairs chosen by rule, the prompts and what the conditions wrote, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher

import numpy as np
import pandas as pd
from markupsafe import Markup

from kvpatch.protocols.schema import Protocol
from kvpatch.report import tables
from kvpatch.report.text import Span, marked
from kvpatch.report.token_pairs import any_two, strip_html, token_pair
from kvpatch.specs.readouts import MODE
from kvpatch.specs.scripts import PIECE
from kvpatch.verdicts.prerequisites import decision_order, primary

Hits = Sequence[Mapping[str, int]]
"""The scorer's hits in a text, as they are stored: where each starts and ends."""
Marker = Callable[[str, str, Hits], list[Span]]
Reader = Callable[[pd.DataFrame], pd.DataFrame]
MAX_TEXT = 20_000
PAIRS, PAIRS_LATER = 9, 3
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
            name = phase["phase"]
            phase["pairs"] = [sample(groups[name, p], p, gap, protocol, mark) for p, gap in phase["pairs"]]
    return {"phases": chosen, "marked": mark is not None}


def _chosen(part: pd.DataFrame, phase: str, question: str, protocol: Protocol, is_first: bool) -> dict:
    """Return the pairs of a phase that are shown, and one row for each of their conditions: the first sample."""
    found = tables.example_pairs(part, protocol, PAIRS if is_first else PAIRS_LATER)
    rows = part[part["pair_id"].isin([pair for pair, _ in found.pairs])]
    if "sample" in rows:
        rows = rows.sort_values("sample", kind="stable")
    rows = rows.drop_duplicates(["pair_id", "condition"])
    total = part["pair_id"].nunique()
    head = {"phase": phase, "question": question, "pairs": found.pairs, "readout": found.readout}
    return {**head, "total": total, "rows": rows}


def side_by_side(protocol: Protocol, phase: str) -> list[str]:
    """Return the conditions to show first: the natural runs, then those that a phase's first hypotheses compare.

    For the first phase of dec7 these are A, B, C, N1, M1 and M1n.
    """
    natural = [n for n in (tables.natural_run(protocol, s) for s in ("target", "source")) if n is not None]
    asked = [h for h in protocol.hypotheses if h.phase == phase and not protocol.is_tautological(h)]
    compared = [name for h in decision_order(protocol) if h in asked for name in h.conditions]
    own = protocol.phases[phase].conditions if phase in protocol.phases else []
    return list(dict.fromkeys([*natural, *compared, *own]))[:MAX_SIDE_BY_SIDE]


def sample(part: pd.DataFrame, pair: str, gap: float | None, protocol: Protocol, mark: Marker | None) -> dict:
    """Return one pair: its prompts, the outputs to show side by side, and the other ones.

    Conditions that wrote the same text, word for word, share one output. part: a row a condition, of one pair and
    phase.
    """
    once = {row["condition"]: row for row in part.to_dict("records")}
    source, target = (first_text(part, f"{side}_text") for side in ("source", "target"))
    phase = str(next(iter(once.values()))["phase"])
    first, partners = side_by_side(protocol, phase), compared_with(protocol, phase)
    known = tables.conditions_of(part, protocol)
    names = [name for name in first if name in known] + [name for name in known if name not in first]
    outputs = []
    for alike in _alike(names, once):
        lead = alike[0]
        told = [{"name": n, "about": tables.about(protocol, n), "role": tables.role(protocol, phase, n)} for n in alike]
        partner = next((p for name in alike if (p := partners.get(name)) in once and p not in alike), None)
        against = None if partner is None else once[partner].get("text")
        shown = {"of": told, "partner": partner, **_output(once[lead], source, mark, against)}
        outputs.append(shown | {"beside": _beside_natural(lead, once, protocol)})
    prompts = {"source": shown_text(source, "", None), "target": shown_text(target, "", None)}
    beside = [o for o in outputs if any(of["name"] in first for of in o["of"])]
    others = [o for o in outputs if o not in beside]
    compared = [name for minus, plus in partners.items() for name in (plus, minus)]
    two = any_two({name: once[name] for name in names}, [*compared, *first])
    return {"pair": pair, "gap": gap, "prompts": prompts, "outputs": beside, "others": others, "two": two}


def _beside_natural(name: str, once: dict[str, dict], protocol: Protocol) -> dict | None:
    """A condition's output token by token beside the natural run of the target; None of that run itself, and where
    tokens are not stored."""
    natural = tables.natural_run(protocol, "target")
    if natural is None or natural == name or natural not in once:
        return None
    found = token_pair(once[name], once[natural], (name, natural))
    if found is None:
        return None
    sides = zip(found.names, (found.one, found.other), strict=True)
    strips = [(of, strip_html(tokens, found.shared, found.is_text)) for of, tokens in sides]
    return {"told": found.told, "strips": strips}


def _alike(names: list[str], once: dict[str, dict]) -> list[list[str]]:
    """The names, those whose outputs are the same text together, in their order. One without a text stands alone."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        text, error = once[name].get("text"), once[name].get("error")
        failed = isinstance(error, str) and bool(error.strip())
        key = (text,) if isinstance(text, str) and not failed else (name, "")
        found.setdefault(key, []).append(name)
    return list(found.values())


def compared_with(protocol: Protocol, phase: str) -> dict[str, str]:
    """Return, by condition, the one that the phase's primary hypotheses compare it with: of "M1 - M1n", M1n -> M1."""
    out: dict[str, str] = {}
    for h in primary(protocol.hypotheses):
        if h.phase == phase and h.kind.measures == "difference":
            plus = [name for name, weight in h.weights().items() if weight > 0]
            minus = [name for name, weight in h.weights().items() if weight < 0]
            if len(plus) == len(minus) == 1:
                out.setdefault(minus[0], plus[0])
    return out


def changed_words(text: str, other: object) -> list[Span]:
    """Return where a text has words that the other one lacks at that place; none where there is no other text."""
    if not isinstance(other, str):
        return []
    words, others = list(PIECE.finditer(text)), PIECE.findall(other)
    found = SequenceMatcher(None, others, [word[0] for word in words], autojunk=False).get_opcodes()
    return [
        (words[start].start(), words[end - 1].end(), "changed")
        for tag, _, _, start, end in found
        if tag != "equal" and end > start
    ]


def _output(row: dict, source: str, mark: Marker | None, against: object) -> dict:
    text, error, hits = row.get("text"), row.get("error"), row.get("mode_hits")
    return {
        "text": shown_text(text, source, mark, hits, against) if isinstance(text, str) else None,
        "error": error if isinstance(error, str) and error.strip() else "",
        "coherent": None if pd.isna(row.get("coherent")) else bool(row.get("coherent")),
        "mode": row.get(MODE),
        "recursive_score": row.get("recursive_score"),
        "recursive_score_masked": row.get("recursive_score_masked"),
        "stopped": row.get("stopped") if isinstance(row.get("stopped"), str) else "",
    }


def first_text(part: pd.DataFrame, column: str) -> str:
    """Return the first text a column holds, or the empty string."""
    texts = [t for t in part[column] if isinstance(t, str)] if column in part else []
    return texts[0] if texts else ""


def shown_text(text: str, source: str, mark: Marker | None, hits: object = None, against: object = None) -> Markup:
    """Return a text as HTML, marked if a marker is given; cut, and saying so, past `MAX_TEXT` characters.

    hits: the scorer's, or anything that is no list where there are none. against: a text that this one is compared
    with, so that words it lacks are marked too.
    """
    known = list(hits) if isinstance(hits, list | np.ndarray) else []
    spans: list[Span] = []
    if mark is not None:
        spans = [*mark(text[:MAX_TEXT], source, known), *changed_words(text[:MAX_TEXT], against)]
    out = marked(text[:MAX_TEXT], spans)
    if len(text) > MAX_TEXT:
        out += Markup('<span class="cut"> … {} more characters not shown</span>').format(f"{len(text) - MAX_TEXT:,}")
    return out
