"""Gates: what must hold before a contrast may be read. Conditions must be coherent; earlier gates must have
passed. What the report and the view show of either is asked here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import pandas as pd

from kvpatch.errors import StoreError
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol

COHERENT_SHARE = 0.9
PASSED = ("supported", "equivalent")
GateState = Literal["open", "closed", "undecided", "no gatekeeper"]


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


def needs_coherence(protocol: Protocol, condition: str) -> bool:
    """Whether a condition's outputs must be coherent for it to be read.

    Natural runs of the pair's own texts, full swaps among them, are the baseline that others are held against. A
    condition that the protocol does not have is no such run.
    """
    known = protocol.conditions.get(condition)
    return known is None or not known.is_text_of_pair


def is_incoherent(protocol: Protocol, condition: str, share: float) -> bool:
    """Whether a condition can't be read because too few of its outputs are coherent.

    share: of coherent outputs, as `coherence_shares` has it; NaN, where every trial is an error, is not too few.
    """
    return share < COHERENT_SHARE and needs_coherence(protocol, condition)


def incoherent_conditions(
    protocol: Protocol, hypothesis: Hypothesis, shares: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """Condition -> share, for those of the contrast that are too incoherent to be read."""
    found = {name: shares.get((hypothesis.phase, name), math.nan) for name in hypothesis.conditions}
    return {name: share for name, share in found.items() if is_incoherent(protocol, name, share)}


def instrument_holds(checks: Iterable[Mapping[str, Any]]) -> bool | None:
    """Whether gate 0 lets verdicts be read: no identity of a check failed; None where nothing was checked.

    checks: identities of the checks of every model of a run, each with `holds`.
    """
    found = [check.get("holds") for check in checks]
    return all(holds is not False for holds in found) if found else None


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


def gate_states(protocol: Protocol, verdict_of: Mapping[str, str]) -> dict[int, GateState]:
    """Gate -> its state, for every gate that has a hypothesis.

    "closed": a gatekeeper did not pass, so nothing behind the gate is read. "undecided": none did not pass, but one
    has no verdict. verdict_of: id -> verdict, of those that are decided.
    """
    states: dict[int, GateState] = {gate: "no gatekeeper" for gate in sorted({h.gate for h in protocol.hypotheses})}
    words: dict[int, list[str | None]] = {}
    for keeper in gatekeepers(protocol):
        words.setdefault(keeper.gate, []).append(verdict_of.get(keeper.id))
    for gate, found in words.items():
        if any(word is not None and word not in PASSED for word in found):
            states[gate] = "closed"
        else:
            states[gate] = "undecided" if None in found else "open"
    return states
