"""Gates: what must hold before a contrast may be read. Conditions must be coherent; earlier gates must have
passed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import pandas as pd

from kvpatch.errors import StoreError
from kvpatch.protocols.schema import Hypothesis, Protocol

COHERENT_SHARE = 0.9
PASSED = ("supported", "equivalent")


def coherence_shares(trials: pd.DataFrame) -> dict[tuple[str, str], float]:
    """(phase, condition) -> share of trials whose `coherent` is True, over the test split; errors left out.

    trials: prepared rows. NaN where every trial of a condition is an error. A trial that was not judged is
    not coherent.

    Raises:
        StoreError: if there is no column `coherent`.
    """
    if "coherent" not in trials.columns:
        raise StoreError("the trials have no column 'coherent', which says whether a condition may be read")
    rows = trials[trials["split"] == "test"]
    judged: dict[tuple[str, str], list[bool]] = {}
    for phase, condition, failed, coherent in zip(
        *(rows[name].tolist() for name in ("phase", "condition", "failed", "coherent")), strict=True
    ):
        found = judged.setdefault((phase, condition), [])
        if not failed:
            found.append(not pd.isna(coherent) and bool(coherent))
    return {key: sum(good) / len(good) if good else math.nan for key, good in sorted(judged.items())}


def incoherent_conditions(
    protocol: Protocol, hypothesis: Hypothesis, shares: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """Condition -> share, for those of the contrast under the limit of 0.9. Natural runs of the pair's own texts,
    full swaps among them, are the baseline."""
    return {
        name: share
        for name in hypothesis.conditions
        if not protocol.conditions[name].is_text_of_pair
        and (share := shares.get((hypothesis.phase, name), math.nan)) < COHERENT_SHARE
    }


def gatekeepers(protocol: Protocol) -> list[Hypothesis]:
    """Hypotheses that later gates wait for, by gate. Tautological ones never are: they hold whatever the
    model does."""
    keepers = [h for h in protocol.hypotheses if h.is_gatekeeper and not protocol.is_tautological(h)]
    return sorted(keepers, key=lambda h: h.gate)


def failed_gatekeeper(keepers: Iterable[Hypothesis], verdict_of: Mapping[str, str], gate: int) -> Hypothesis | None:
    """The first gatekeeper of an earlier gate that did not pass, or None. verdict_of: id -> verdict, decided
    so far."""
    for keeper in keepers:
        if keeper.gate < gate and verdict_of[keeper.id] not in PASSED:
            return keeper
    return None
