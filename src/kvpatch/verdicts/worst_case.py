"""A contrast with many missing rows counts only where no value of theirs could have changed its verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.statistics.trend import order_scores
from kvpatch.verdicts.measure import Measured, measure, measured_as
from kvpatch.verdicts.missing import MOST_MISSING, filled, missing_shares, partial_conditions, too_many_missing
from kvpatch.verdicts.pairs import rows_of
from kvpatch.verdicts.rules import Decision
from kvpatch.verdicts.wording import percent


def lacking(protocol: Protocol, rows: pd.DataFrame, m: Measured) -> dict[str, float]:
    """Condition -> share of its planned rows that lack a value, for those of a hypothesis that lack too many.

    rows: prepared test rows of its phase. Empty where nothing was measured, or nothing scored, which is said instead.
    """
    h = m.hypothesis
    if m.differences.n == 0 or m.floor.constant is not None:
        return {}
    partial = partial_conditions(protocol)
    rows = _with_every_pair(protocol, rows, h)
    own = list(h.order()[0]) if h.is_ordering else list(h.weights())
    shares = missing_shares(rows, own, h.readout, h.transform, partial)
    for variable, _ in h.others():
        found = missing_shares(rows, list(variable.weights()), variable.readout, variable.transform, partial)
        shares |= {name: max(share, shares.get(name, 0.0)) for name, share in found.items()}
    if h.ranked_with is not None:
        found = missing_shares(rows, own, h.ranked_with, partial=partial)
        shares = {name: max(share, found.get(name, 0.0)) for name, share in shares.items()}
    return too_many_missing(shares)


def planned_pairs(protocol: Protocol, rows: pd.DataFrame) -> list[str]:
    """Ids of the pairs that any condition of a phase has: a pair that lacks both sides of a contrast counts too.
    Empty for a protocol without families, which counts the pairs of each contrast alone.

    rows: prepared test rows of the phase.
    """
    return sorted(rows["pair_id"].unique()) if protocol.families else []


def _with_every_pair(protocol: Protocol, trials: pd.DataFrame, h: Hypothesis) -> pd.DataFrame:
    """The trials, and for each planned pair that has no row of a hypothesis at all one row that failed."""
    rows = rows_of(trials, split="test", phase=h.phase)
    whole = [name for name in h.conditions if name not in partial_conditions(protocol)]
    seen = set(rows.loc[rows["condition"].isin(h.conditions), "pair_id"])
    lost = [pair for pair in planned_pairs(protocol, rows) if pair not in seen]
    if not whole or not lost:
        return trials
    made = pd.DataFrame({"pair_id": lost, "condition": whole[0], "phase": h.phase, "split": "test", "failed": True})
    return pd.concat([trials, made.assign(sample=0)], ignore_index=True)


def decided_at_worst(
    protocol: Protocol,
    trials: pd.DataFrame,
    m: Measured,
    units: Mapping[str, str],
    lacks: Mapping[str, float],
    found: Decision,
    decide: Callable[[Measured], Decision],
) -> Decision:
    """The decision of a hypothesis that lacks many rows: the one found, if it holds at either end, or none.

    trials: prepared rows of every split and phase. lacks: as `lacking` gives it, not empty. found: the decision without
    the missing rows. decide: how one is reached from numbers. Correlations and chosen heads have no worst case that is
    simple to say.
    """
    h = m.hypothesis
    told = " and ".join(f"{percent(share)} of the rows of {name}" for name, share in lacks.items())
    start = f"{told} in phase {h.phase} lack a value of what is compared"
    if m.kind.measures in ("correlation", "ranks", "heads"):
        because = f"{start}, where at most {MOST_MISSING:.0%} may: which trials fail is not chance."
        return Decision("not interpretable", because, "missing")
    asked = measured_as(protocol, h)
    if asked.is_ordering:
        names, peak = asked.order()
        signs = dict(zip(names, order_scores(len(names), peak).tolist(), strict=True))
    else:
        signs = {name: float(weight) for name, weight in asked.weights().items()}
    partial = partial_conditions(protocol)
    trials = _with_every_pair(protocol, trials, h)
    words = []
    for toward in (-1, 1):
        whole = filled(trials, h.phase, signs, h.readout, h.transform, partial, toward=toward)
        words.append(decide(measure(protocol, whole, h, units)).word)
    if set(words) == {found.word}:
        same = f"{start}; the verdict is the same with these at the lowest and at the highest value that was seen."
        return Decision(found.word, f"{found.because} {same}", found.blocked_by)
    because = (
        f"{start}, where at most {MOST_MISSING:.0%} may: with these at the worst value that was seen the verdict would "
        f"be {words[0]}, and at the best {words[1]}."
    )
    return Decision("not interpretable", because, "missing")
