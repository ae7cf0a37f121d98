"""The one sentence that answers the protocol's question, and never says more than the verdicts allow."""

from __future__ import annotations

from collections.abc import Sequence

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.readouts import readouts
from kvpatch.specs.test_kinds import kind_named
from kvpatch.verdicts.prerequisites import PASSED
from kvpatch.verdicts.procedures import procedure_of
from kvpatch.verdicts.records import Verdict

LEAST_PAIRS = 10
"""Fewest pairs that the strongest sentence may rest on: the smallest n of the plan's own experiments."""


def headline(protocol: Protocol, verdicts: Sequence[Verdict]) -> str:
    """Return the report's first sentence.

    The mode is the protocol's ("recursive" gives "recursive mode"). The strongest sentence it can return starts
    "Information sufficient for recursive-style output can be read from these cache slots".
    """
    verdict_of = {v.id: v for v in verdicts}
    asked = [h for h in protocol.hypotheses if h.id in verdict_of and verdict_of[h.id].verdict != "tautological"]
    if not verdict_of:
        return f'Nothing has been decided yet on "{protocol.title}".'
    if any(v.blocked_by == "instrument" for v in verdicts):
        return f"The instrument check failed on this model, so this run says nothing about {_mode(protocol)}."
    first = [verdict_of[h.id] for h in _gate(asked, 1)]
    if any(v.verdict not in PASSED for v in first):
        return _no_mode(protocol, first)
    primary = [verdict_of[h.id] for h in _gate(asked, 2)]
    if not primary:
        return _without_primary(protocol, [verdict_of[h.id] for h in asked])
    return _transfer(protocol, primary, [v for v in verdicts if v.gate > 2])


def _gate(hypotheses: Sequence[Hypothesis], gate: int) -> list[Hypothesis]:
    """The gatekeepers of a gate, or its confirmatory hypotheses where it has none."""
    members = [h for h in hypotheses if h.gate == gate and h.confirmatory]
    return [h for h in members if h.is_gatekeeper] or members


def _mode(protocol: Protocol) -> str:
    return f"{protocol.mode_name} mode"


def _style(protocol: Protocol) -> str:
    return f"{protocol.mode_name}-style output"


def _named(verdicts: Sequence[Verdict]) -> str:
    return ", ".join(f"{v.id}: {v.verdict}" for v in verdicts)


def _no_mode(protocol: Protocol, first: Sequence[Verdict]) -> str:
    mode = _mode(protocol)
    failed = [v for v in first if v.verdict not in PASSED]
    told = _named(failed)
    if all(v.n == 0 for v in failed):
        return f"Whether this model shows {mode} was not measured ({told}), so nothing about its transfer can be said."
    end = f"({told}), so nothing about transfer was or could be shown"
    if all(_is_seen(v) for v in failed):
        return f"This run saw {mode} under these prompts but could not establish it {end}."
    measures = "" if len(failed) == len(first) else " on every readout asked for"
    if any(v.verdict != "not supported" for v in failed):
        return f"This run did not establish that the model shows {mode} under these prompts{measures} {end}."
    return f"This model does not show {mode} under these prompts{measures} {end}."


def _is_seen(v: Verdict) -> bool:
    """Whether the interval lies on the claim's side of 0, though the test was not passed."""
    if v.ci_low is None or v.ci_high is None:
        return False
    return v.ci_high < 0 if kind_named(v.test).side == -1 else v.ci_low > 0


def _transfer(protocol: Protocol, primary: Sequence[Verdict], later: Sequence[Verdict]) -> str:
    mode, told = _mode(protocol), _named(primary)
    passed = [v for v in primary if v.verdict in PASSED]
    strong = [v for v in primary if _carries_the_claim(v)]
    if len(passed) == len(primary) and not strong:
        texts = sum(v.evidence == "text" for v in primary)
        which = f"{texts} of {len(primary)} compare texts, which checks the manipulation alone; " if texts else ""
        return (
            f"What passed does not show that {mode} can be read from the cache ({told}): {which}none is a directional "
            f"test of a readout of the mode, on at least {LEAST_PAIRS} pairs, of a cache that no text equals."
        )
    if len(passed) == len(primary):
        rests = "; ".join(f"{v.contrast} in {v.readout}, n = {v.n}" for v in strong)
        return (
            f"Information sufficient for {_style(protocol)} can be read from these cache slots ({rests})"
            f"{_controls(later)}."
        )
    blocked = [v for v in primary if v.blocked_by == "coherence"]
    if blocked:
        return (
            f"Whether {mode} moves with the cache can't be read from this run: the outputs of a condition it"
            f" needs are not coherent ({told})."
        )
    if passed:
        return f"The evidence that {mode} moves with the cache is incomplete, so it is not shown ({told})."
    if all(v.verdict == "not supported" for v in primary):
        return f"In this model {mode} was not seen to move with the cache; the data speak against it ({told})."
    if any(v.verdict == "not supported" for v in primary):
        return f"The transfer of {mode} with the cache is not shown; part of the data speak against it ({told})."
    return f"This run can't tell whether {mode} moves with the cache ({told})."


def _carries_the_claim(v: Verdict) -> bool:
    """Whether the strongest sentence may rest on a verdict that passed: never on texts, on an equivalence, on a readout
    that is none of the mode, such as length, or on a handful of pairs."""
    readout = readouts().get(v.readout)
    is_of_mode = readout is not None and readout.may_be_evidence
    return v.evidence == "cache" and kind_named(v.test).claims == "beyond" and is_of_mode and v.n >= LEAST_PAIRS


def _controls(later: Sequence[Verdict]) -> str:
    """What has to be said beside the strongest sentence: controls that were not shown to be inert."""
    nulls = [v for v in later if v.gate == 3 and kind_named(v.test).certifies_absence]
    open_ones = [v.id for v in nulls if v.verdict != kind_named(v.test).passes]
    if not open_ones:
        return ""
    return f"; {len(open_ones)} of {len(nulls)} control caches were not shown to leave the target as it is"


def _without_primary(protocol: Protocol, asked: Sequence[Verdict]) -> str:
    if not asked:
        return (
            f'Every contrast of "{protocol.title}" is true by construction, so this run is no evidence on'
            f" where {_mode(protocol)} is."
        )
    held = sum(v.verdict in PASSED for v in asked)
    return f'Of the {len(asked)} hypotheses of "{protocol.title}", {held} held ({_named(asked)}).'


def few_pairs(verdicts: Sequence[Verdict]) -> str | None:
    """How many hypotheses had fewer pairs than their alpha needs, whatever the data say; None where none had."""
    short, total = sum(0 < v.n < procedure_of(v.test).needs_pairs(v.alpha) for v in verdicts), len(verdicts)
    open_ = sum(v.verdict in ("inconclusive", "not interpretable") for v in verdicts)
    if not short:
        return None
    which = f"{short} of {total} {'hypothesis' if total == 1 else 'hypotheses'}"
    their = "its" if short == 1 else "their"
    still_open = f"{open_} are open" if open_ > 1 else f"{open_ or 'none'} is open"
    return (
        f"n is too small for {_extent(short, total)}: {which} had fewer pairs than {their} alpha needs at all, and "
        f"{still_open}. kvpatch power says how many pairs see what."
    )


def _extent(count: int, total: int) -> str:
    """How many verdicts of all a count is, in words. count: at least 1."""
    if count == total:
        return "the only verdict" if total == 1 else "all verdicts"
    if 2 * count > total:
        return "most verdicts"
    if 2 * count == total:
        return "half of the verdicts"
    if count == 1:
        return "one verdict"
    return "a few verdicts" if 4 * count <= total else "some verdicts"
