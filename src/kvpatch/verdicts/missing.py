"""Missing rows: whether enough of a contrast was measured to be read, and the worst that the rest could have been.

Which trials fail is not chance: those that run out of memory are the long ones, those without finite probabilities the
broken ones. Left out, they move a mean as an effect does.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping

import numpy as np
import pandas as pd

from kvpatch.protocols.conditions import ROLES
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.readout import Transform
from kvpatch.statistics.grid import Floats
from kvpatch.verdicts.pairs import rows_of

MOST_MISSING = 0.1
"""Share of a condition's planned rows that may lack a value."""
_KEY = ["pair_id", "sample"]


def missing_shares(
    rows: pd.DataFrame,
    conditions: Iterable[str],
    readout: str,
    transform: Transform = "none",
    partial: Container[str] = (),
    planned_pairs: Collection[str] = (),
) -> dict[str, float]:
    """Condition -> share of its planned samples without a value, for those of a contrast.

    rows: prepared test rows of one phase. Planned are the samples of a condition that are stored, done or failed, and
    as many again for each pair that another condition of the contrast has and it does not. A sample has a value where
    one of its rows did not fail and holds a finite number (above 0 for "log"). partial: conditions that are not planned
    for every pair (`partial_conditions`). planned_pairs: ids of pairs that every other condition is planned for, beside
    those that one of the contrast's has.
    """
    own = _of(rows, conditions)
    pairs = len(set(own["pair_id"]) | set(planned_pairs))
    has_value = _has_value(own, readout, transform)
    out = {}
    for name in conditions:
        is_own = own["condition"] == name
        met = own.loc[is_own, "pair_id"].nunique()
        if met:
            samples = len(own.loc[is_own].drop_duplicates(_KEY))
            planned = samples if name in partial else samples * pairs / met
            out[name] = 1 - len(own.loc[is_own & has_value].drop_duplicates(_KEY)) / planned
        elif pairs:
            out[name] = 1.0
    return out


def partial_conditions(protocol: Protocol) -> set[str]:
    """Conditions that take a prompt from a further group of the bank, which late pairs may lack."""
    return {name for name, c in protocol.conditions.items() if c.giver not in ROLES}


def too_many_missing(shares: Mapping[str, float]) -> dict[str, float]:
    """Those conditions that lack more than a tenth of their planned rows."""
    return {name: share for name, share in shares.items() if share > MOST_MISSING}


def filled(
    trials: pd.DataFrame,
    phase: str,
    signs: Mapping[str, float],
    readout: str,
    transform: Transform = "none",
    partial: Container[str] = (),
    planned_pairs: Collection[str] = (),
    *,
    toward: int,
) -> pd.DataFrame:
    """The trials with every missing value of a contrast at the worst or the best that was seen.

    trials: prepared rows of every split and phase. signs: condition -> a number whose sign says how the condition
    counts in what is averaged. partial, planned_pairs: as in `missing_shares`. toward: 1 for the fill that makes
    it as large as it can be, -1 as small. Where nothing was measured under any of the conditions, the trials come back
    as they are.
    Source: Manski 1990 (Am Econ Rev 80:319), with the range of the readout as it was seen in these conditions and in
    the calibration.
    """
    rows = rows_of(trials, split="test", phase=phase)
    own = _of(rows, signs)
    value = _has_value(own, readout, transform)
    held_out = rows_of(trials, split="calibration")
    near = held_out.loc[_has_value(held_out, readout, transform)]
    seen = pd.to_numeric(pd.concat([own.loc[value], near])[readout]).to_numpy(dtype=float)
    if not value.any():
        return trials
    have = set(own.loc[value, [*_KEY, "condition"]].itertuples(index=False, name=None))
    extra = []
    for name, sign in signs.items():
        mine = own.loc[own["condition"] == name]
        planned = set(mine[_KEY].itertuples(index=False, name=None))
        lost = set() if name in partial else (set(own["pair_id"]) | set(planned_pairs)) - set(mine["pair_id"])
        planned |= {(pair, 0) for pair in lost}
        end = float(seen.max() if sign * toward > 0 else seen.min())
        extra += [
            {"pair_id": pair, "sample": sample, "condition": name, readout: end}
            for pair, sample in sorted(planned)
            if (pair, sample, name) not in have
        ]
    is_empty = pd.Series(False, index=trials.index)
    is_empty.loc[own.index[~value]] = True
    made = pd.DataFrame(extra, columns=pd.Index([*_KEY, "condition", readout]))
    made = made.assign(phase=phase, split="test", failed=False)
    return pd.concat([trials.loc[~is_empty], made], ignore_index=True)


def _of(rows: pd.DataFrame, conditions: Iterable[str]) -> pd.DataFrame:
    own = rows.loc[rows["condition"].isin(list(conditions))]
    return own if "sample" in own.columns else own.assign(sample=0)


def _has_value(rows: pd.DataFrame, readout: str, transform: Transform) -> pd.Series:
    if readout not in rows.columns:
        return pd.Series(False, index=rows.index)
    value: Floats = np.asarray(pd.to_numeric(rows[readout], errors="coerce"), dtype=float)
    is_known = np.isfinite(value) & ((value > 0) if transform == "log" else True)
    return pd.Series(is_known & ~np.asarray(rows["failed"], dtype=bool), index=rows.index)
