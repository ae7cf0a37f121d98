"""What must hold before a contrast may be read. Conditions must be coherent; what the hypothesis needs, or earlier
gates where it names nothing, must have passed. What the report and the view show of either is asked here."""

from __future__ import annotations

import functools
import graphlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep

from kvpatch.errors import StoreError
from kvpatch.protocols.hypotheses import Hypothesis, waits_for
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.readouts import readouts

COHERENT_SHARE = 0.9
CERTAIN = 0.95
"""One-sided level at which a condition's share of coherent outputs must lie below `COHERENT_SHARE` to stop it."""
MOSTLY, ABOUT = 0.5, 0.2
"""Conditions are about equally coherent where each has at least the first share of its outputs coherent, and the 95%
interval of the largest difference between their shares ends below the second."""
PASSED = ("supported", "equivalent")
PRIMARY, NULLS = "primary", "nulls"
"""Families by which a protocol with `needs` says what answers its question, and what must leave the target as it is."""
GateState = Literal["open", "closed", "undecided", "no gatekeeper"]


@dataclass(frozen=True)
class Coherence:
    """How many of a condition's outputs are coherent.

    share: of the outputs, in [0, 1]; NaN where every trial is an error. highest: upper one-sided 95% Clopper-Pearson
    bound of the share, over pairs, since outputs of a pair are no independent ones; 1 where there is no pair. pairs:
    how many there are.
    """

    share: float
    highest: float
    pairs: int = 0

    @property
    def is_too_low(self) -> bool:
        """Whether the condition's outputs can't be read: their share of coherent ones is below 90% beyond chance."""
        return self.highest < COHERENT_SHARE


def coherence_shares(trials: pd.DataFrame) -> dict[tuple[str, str], Coherence]:
    """(phase, condition) -> how many of its trials are coherent, over the test split; errors left out.

    trials: prepared rows. A trial that was not judged is not coherent.

    Raises:
        StoreError: if there is no column `coherent`.
    """
    if "coherent" not in trials.columns:
        raise StoreError("the trials have no column 'coherent', which says whether a condition may be read")
    rows = trials[trials["split"] == "test"]
    judged: dict[tuple[str, str], dict[str, list[bool]]] = {}
    for phase, condition, pair, failed, coherent in zip(
        *(rows[name].tolist() for name in ("phase", "condition", "pair_id", "failed", "coherent")), strict=True
    ):
        found = judged.setdefault((phase, condition), {})
        if not failed:
            found.setdefault(pair, []).append(not pd.isna(coherent) and bool(coherent))
    return {key: _coherence(list(pairs.values())) for key, pairs in sorted(judged.items())}


def _coherence(pairs: list[list[bool]]) -> Coherence:
    """Of the outputs of each pair which are coherent. A pair counts once, by its share."""
    if not pairs:
        return Coherence(math.nan, 1.0)
    outputs = [good for pair in pairs for good in pair]
    good = math.fsum(sum(pair) / len(pair) for pair in pairs)
    return Coherence(sum(outputs) / len(outputs), coherence_of(good, len(pairs)).highest, len(pairs))


def coherence_of(good: float, pairs: int) -> Coherence:
    """How coherent a condition is of which `good` of so many pairs are, a pair counting by its share."""
    bad = pairs - good
    return Coherence(good / pairs, float(stats.beta.ppf(CERTAIN, good + 1, bad)) if bad > 1e-9 else 1.0, pairs)


def are_equally_coherent(found: Collection[Coherence]) -> bool:
    """Whether conditions are about equally coherent, so that what is incoherent stands on all sides of a contrast.

    The interval is Newcombe's (1998, method 10), as if the pairs were others in each condition, which makes it wider.
    """
    shares = [(of.share, of.pairs) for of in found]
    if len(shares) < 2 or not all(n > 0 and share >= MOSTLY for share, n in shares):
        return False
    return _largest_difference(min(shares), max(shares)) < ABOUT


@functools.lru_cache(maxsize=4096)
def _largest_difference(low: tuple[float, int], high: tuple[float, int]) -> float:
    """Upper end of the 95% interval of the difference of two shares, each with its number of pairs."""
    ends = confint_proportions_2indep(high[0] * high[1], high[1], low[0] * low[1], low[1], method="newcomb")
    return float(ends[1])


def reads_sampled_text(readout: str) -> bool:
    """Whether a readout is one of the text that a trial wrote, so that the text must be coherent for it to be read. A
    readout that the catalogue does not know is taken to be one."""
    known = readouts().get(readout)
    return known is None or known.is_of_sampled_text


def incoherent_conditions(hypothesis: Hypothesis, shares: Mapping[tuple[str, str], Coherence]) -> dict[str, float]:
    """Condition -> share, for those whose sampled texts the hypothesis reads and that are too incoherent to be read."""
    read = coherence_read(hypothesis, shares)
    return {name: of.share for name, of in read.items() if of.is_too_low}


def coherence_read(hypothesis: Hypothesis, shares: Mapping[tuple[str, str], Coherence]) -> dict[str, Coherence]:
    """Condition -> how coherent it is, for those whose sampled texts the hypothesis reads."""
    own = [hypothesis.readout, *(variable.readout for variable, _ in hypothesis.others())]
    names = [
        name
        for readout, (conditions, _) in zip(own, hypothesis.conditions_by_place(), strict=True)
        if reads_sampled_text(readout)
        for name in conditions
    ]
    if hypothesis.ranked_with is not None and reads_sampled_text(hypothesis.ranked_with):
        names += hypothesis.conditions
    found = {name: shares.get((hypothesis.phase, name)) for name in dict.fromkeys(names)}
    return {name: of for name, of in found.items() if of is not None}


def instrument_holds(checks: Iterable[Mapping[str, Any]]) -> bool | None:
    """Whether gate 0 lets verdicts be read: no identity of a check failed; None where nothing was checked.

    checks: identities of the checks of every model of a run, each with `holds`.
    """
    found = [check.get("holds") for check in checks]
    return all(holds is not False for holds in found) if found else None


def has_passed(word: str) -> bool:
    """Whether what waits for a hypothesis may be read. One that is tautological holds whatever the model does."""
    return word in (*PASSED, "tautological")


def decision_order(protocol: Protocol) -> list[Hypothesis]:
    """The hypotheses, each after all that it waits for: those with gates by gate, then those with `needs`."""
    by_gate = sorted((h for h in protocol.hypotheses if h.needs is None), key=lambda h: h.gate)
    waiting = waits_for(protocol.hypotheses)
    order = graphlib.TopologicalSorter(waiting).static_order()
    return by_gate + [protocol.hypothesis(name) for name in order if name in waiting]


def missing(hypothesis: Hypothesis, verdict_of: Mapping[str, str]) -> list[str]:
    """Ids of what the hypothesis needs and that did not pass. verdict_of: id -> verdict, decided so far."""
    return [name for name in hypothesis.needs or () if not has_passed(verdict_of[name])]


def prerequisites(protocol: Protocol) -> dict[str, list[str]]:
    """Id of each hypothesis that another one needs -> ids of those that need it; both in the protocol's order."""
    waiting = waits_for(protocol.hypotheses)
    found = {h.id: [name for name, needs in waiting.items() if h.id in needs] for h in protocol.hypotheses}
    return {name: needed_by for name, needed_by in found.items() if needed_by}


def all_needed(hypotheses: Sequence[Hypothesis], names: Iterable[str]) -> set[str]:
    """Ids of all that hypotheses need, and of what those need in turn."""
    waiting, found, left = waits_for(hypotheses), set[str](), list(names)
    while left:
        new = set(waiting.get(left.pop(), [])) - found
        found |= new
        left += new
    return found


def primary(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Those that answer a protocol's question: with `needs`, the confirmatory ones of the family "primary"; without,
    those of gate 2 that keep it, or all of its confirmatory ones where none does."""
    by_gate = _of_gate(hypotheses, 2)
    of_family = [h for h in hypotheses if h.needs is not None and h.family == PRIMARY and h.confirmatory]
    return [h for h in hypotheses if h in by_gate or h in of_family]


def manipulation_checks(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Those that say whether there is a mode to move: what the primary ones need, or those of gate 1."""
    own = {h.id for h in primary(hypotheses)}
    needed = {h.id for h in _of_gate(hypotheses, 1)} | all_needed(hypotheses, own) - own
    return [h for h in hypotheses if h.id in needed]


def nulls(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Controls that must leave the target as it is: tests of the family "nulls", or of gate 3, that certify absence."""
    of_role = [h for h in hypotheses if (h.gate == 3 if h.needs is None else h.family == NULLS)]
    return [h for h in of_role if h.kind.certifies_absence]


def _of_gate(hypotheses: Sequence[Hypothesis], gate: int) -> list[Hypothesis]:
    """The gatekeepers of a gate, or its confirmatory hypotheses where it has none and no hypothesis has `needs`."""
    members = [h for h in hypotheses if h.needs is None and h.gate == gate and h.confirmatory]
    keepers = [h for h in members if h.is_gatekeeper]
    return keepers or ([] if waits_for(hypotheses) else members)


def gatekeepers(protocol: Protocol) -> list[Hypothesis]:
    """Hypotheses that later gates wait for, by gate. One that turns out tautological is waited for no longer: it holds
    whatever the model does."""
    return sorted((h for h in protocol.hypotheses if h.is_gatekeeper), key=lambda h: h.gate)


def failed_gatekeeper(keepers: Iterable[Hypothesis], verdict_of: Mapping[str, str], gate: int) -> Hypothesis | None:
    """The first gatekeeper of an earlier gate that did not pass, or None. verdict_of: id -> verdict, decided
    so far."""
    for keeper in keepers:
        if keeper.gate < gate and not has_passed(verdict_of[keeper.id]):
            return keeper
    return None


def gate_states(protocol: Protocol, verdict_of: Mapping[str, str]) -> dict[int, GateState]:
    """Gate -> its state, for every gate that has a hypothesis without `needs`.

    "closed": a gatekeeper did not pass, so nothing behind the gate is read. "undecided": none did not pass, but one
    has no verdict. verdict_of: id -> verdict, of those that are decided.
    """
    states: dict[int, GateState] = {
        gate: "no gatekeeper" for gate in sorted({h.gate for h in protocol.hypotheses if h.needs is None})
    }
    words: dict[int, list[str | None]] = {}
    for keeper in gatekeepers(protocol):
        if verdict_of.get(keeper.id) == "tautological":
            continue
        words.setdefault(keeper.gate, []).append(verdict_of.get(keeper.id))
    for gate, found in words.items():
        if any(word is not None and word not in PASSED for word in found):
            states[gate] = "closed"
        else:
            states[gate] = "undecided" if None in found else "open"
    return states
