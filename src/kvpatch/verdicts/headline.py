"""The sentences that answer the protocol's question, and never say more than the verdicts allow: one thought each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from kvpatch.protocols.schema import Protocol
from kvpatch.specs.test_kinds import AGAINST, kind_named
from kvpatch.verdicts.prerequisites import PASSED, has_passed, manipulation_checks, nulls, primary
from kvpatch.verdicts.procedures import procedure_of
from kvpatch.verdicts.records import Verdict
from kvpatch.verdicts.strongest import LEAST_PAIRS, Strongest, rests_text, strongest

Names = Callable[[Sequence[Verdict]], str]
"""Says in brackets which verdicts a sentence rests on."""


def by_id(verdicts: Sequence[Verdict]) -> str:
    """Name each verdict by the id of its hypothesis: "transfer: supported, part: inconclusive"."""
    return ", ".join(f"{v.id}: {v.verdict}" for v in verdicts)


def by_word(verdicts: Sequence[Verdict]) -> str:
    """Count the verdicts word by word, for readers who don't know the ids: "2 contradicted, 1 supported"."""
    return ", ".join(f"{count} {word}" for word, count in Counter(v.verdict for v in verdicts).items())


def headline(protocol: Protocol, verdicts: Sequence[Verdict], *, is_checked: bool = True, names: Names = by_id) -> str:
    """Return the report's first sentences: the answer, then what it rests on and what stands beside it.

    is_checked: whether it was checked that the model is patched correctly; what the check found is in the verdicts.
    names: how the verdicts that the sentence rests on are told. The mode is the protocol's ("recursive" gives
    "recursive mode"). The strongest sentence it can return starts "Information sufficient for recursive-style output
    can be read from these cache slots".
    """
    verdict_of = {v.id: v for v in verdicts}
    asked = [h for h in protocol.hypotheses if h.id in verdict_of and verdict_of[h.id].verdict != "tautological"]
    if not verdict_of:
        return f'Nothing has been decided yet on "{protocol.title}".'
    if any(v.blocked_by == "instrument" for v in verdicts):
        return f"The instrument check failed on this model, so this run says nothing about {_mode(protocol)}."
    checks = [verdict_of[h.id] for h in manipulation_checks(asked)]
    if any(v.verdict not in PASSED for v in checks if not _has_needs(protocol, v)):
        return _no_mode(protocol, checks, names)
    main = [verdict_of[h.id] for h in primary(asked)]
    if not main:
        return _without_primary(protocol, [verdict_of[h.id] for h in asked], names)
    unread = [v for v in main if v.blocked_by is not None and _has_needs(protocol, v)]
    if unread and all(v.blocked_by == "prerequisite" for v in main):
        return _no_mode(protocol, checks, names)
    read = [v for v in main if v not in unread]
    controls = [verdict_of[h.id] for h in nulls(protocol.hypotheses) if h.id in verdict_of]
    basis = strongest(protocol, main, verdict_of)
    if not is_checked:
        basis = Strongest([], basis.moved, "that the model is patched correctly was not checked")
    told = _unread(unread, verdict_of, names) if read else ""
    return _strongest(protocol, main, basis, _controls(controls), names) or _transfer(
        protocol, read or main, told, basis, _controls(controls), names
    )


def is_strongest(protocol: Protocol, verdicts: Sequence[Verdict]) -> bool:
    """Whether the sentence is the strongest there is."""
    return headline(protocol, verdicts).startswith("Information sufficient for")


def _strongest(
    protocol: Protocol, main: Sequence[Verdict], basis: Strongest, controls: str, names: Names
) -> str | None:
    """The strongest sentence, where verdicts allow it. Others of a protocol without families must have been read."""
    if not basis.rests_on or (not protocol.families and any(v.blocked_by is not None for v in main)):
        return None
    others = [v for v in main if v.verdict not in PASSED]
    open_ones = f" Not passed beside it: {names(others)}." if others else ""
    return (
        f"Information sufficient for {_style(protocol)} can be read from these cache slots. "
        f"{_rests(protocol, basis.rests_on)}{controls}{open_ones}"
    )


def _rests(protocol: Protocol, on: Sequence[Verdict], *, names_readout: bool = True) -> str:
    """The sentence on what a claim rests on."""
    return f"It rests on {', and on '.join(rests_text(protocol, v, names_readout=names_readout) for v in on)}."


def _has_needs(protocol: Protocol, v: Verdict) -> bool:
    return protocol.hypothesis(v.id).needs is not None


def _mode(protocol: Protocol) -> str:
    return f"{protocol.mode_name} mode"


def _style(protocol: Protocol) -> str:
    return f"{protocol.mode_name}-style output"


def _no_mode(protocol: Protocol, first: Sequence[Verdict], names: Names) -> str:
    mode = _mode(protocol)
    failed = [v for v in first if v.verdict not in PASSED]
    told = names(failed)
    if all(v.n == 0 for v in failed):
        return f"Whether this model shows {mode} was not measured ({told}). So nothing about its transfer can be said."
    end = f"({told}). So nothing about transfer was or could be shown."
    if all(_is_seen(v) for v in failed):
        return f"This run saw {mode} under these prompts but could not establish it {end}"
    measures = "" if len(failed) == len(first) else " on every readout asked for"
    if any(v.verdict not in AGAINST for v in failed):
        return f"This run did not establish that the model shows {mode} under these prompts{measures} {end}"
    return f"This model does not show {mode} under these prompts{measures} {end}"


def _is_seen(v: Verdict) -> bool:
    """Whether the interval lies on the claim's side of 0, though the test was not passed."""
    if v.ci_low is None or v.ci_high is None:
        return False
    return v.ci_high < 0 if kind_named(v.test).side == -1 else v.ci_low > 0


_UNREAD = {
    "coherence": "outputs that are not coherent",
    "specificity": "a readout that is not specific",
    "missing": "too many missing rows",
}


def _unread(verdicts: Sequence[Verdict], verdict_of: Mapping[str, Verdict], names: Names) -> str:
    """Which primary hypotheses could not be read, and for want of what; "" where all could."""
    if not verdicts:
        return ""
    needed = dict.fromkeys(name for v in verdicts for name in v.needs)
    lacks = [verdict_of[name] for name in needed if not has_passed(verdict_of[name].verdict)]
    others = dict.fromkeys(_UNREAD[v.blocked_by] for v in verdicts if v.blocked_by in _UNREAD)
    if names is not by_id:
        lacking = [f"what {'it needs' if len(verdicts) == 1 else 'they need'}: {names(lacks)}"] if lacks else []
        return f" {len(verdicts)} more can't be read ({', '.join([*lacking, *others])})."
    why = ", ".join([f"{v.id}: {v.verdict}" for v in lacks] + list(others))
    return f" {', '.join(v.id for v in verdicts)} can't be read ({why})."


def _transfer(
    protocol: Protocol, primary: Sequence[Verdict], unread: str, basis: Strongest, controls: str, names: Names
) -> str:
    """What primary hypotheses say that could be read, short of the strongest sentence. unread: what is said of the
    others, each of which names its prerequisites. controls: what is said of control caches."""
    mode, told = _mode(protocol), names(primary)
    passed = [v for v in primary if v.verdict in PASSED]
    moved, lacks = basis.moved, f" What is missing: {basis.lacks}." if basis.lacks else ""
    if len(passed) == len(primary) and not moved:
        texts = sum(v.evidence == "text" for v in primary)
        which = f" {texts} of {len(primary)} compare texts, which checks the manipulation alone." if texts else ""
        return (
            f"What passed ({told}) does not show that {mode} can be read from the cache.{lacks}{which} It takes a "
            "directional test of a readout of the mode, on a cache that no text equals. It takes at least "
            f"{LEAST_PAIRS} pairs, and a mode that was shown to exist.{unread}"
        )
    if len(passed) == len(primary):
        readable = " and ".join(dict.fromkeys(v.readout for v in moved))
        rests = _rests(protocol, moved, names_readout=False)
        return f"In {readable} alone, {mode} was seen to move with the cache. {rests}{controls}{unread or lacks}"
    blocked = [v for v in primary if v.blocked_by == "coherence"]
    if blocked:
        return (
            f"Whether {mode} moves with the cache can't be read from this run. The outputs of a condition that "
            f"it needs are not coherent ({told}).{unread}"
        )
    if passed:
        return f"The evidence that {mode} moves with the cache is incomplete, so it is not shown ({told}).{unread}"
    if all(v.verdict in AGAINST for v in primary):
        return f"In this model {mode} was not seen to move with the cache. The data speak against it ({told}).{unread}"
    if any(v.verdict in AGAINST for v in primary):
        return (
            f"The transfer of {mode} with the cache is not shown. Part of the data speak against it ({told}).{unread}"
        )
    return f"This run can't tell whether {mode} moves with the cache ({told}).{unread}"


def _controls(inert: Sequence[Verdict]) -> str:
    """What has to be said beside the strongest sentence: controls that were not shown to be inert."""
    open_ones = [v.id for v in inert if v.verdict != kind_named(v.test).passes]
    if not open_ones:
        return ""
    were = "was" if len(open_ones) == 1 else "were"
    return f" {len(open_ones)} of {len(inert)} control caches {were} not shown to leave the target as it is."


def _without_primary(protocol: Protocol, asked: Sequence[Verdict], names: Names) -> str:
    if not asked:
        return (
            f'Every contrast of "{protocol.title}" is true by construction, so this run is no evidence on'
            f" where {_mode(protocol)} is."
        )
    held = sum(v.verdict in PASSED for v in asked)
    return f'Of the {len(asked)} hypotheses of "{protocol.title}", {held} held ({names(asked)}).'


def few_pairs(verdicts: Sequence[Verdict]) -> str | None:
    """How many hypotheses had fewer pairs than their alpha, and the correction in their family, need, whatever the data
    say; None where none had."""
    short, total = sum(_had_too_few(v) for v in verdicts), len(verdicts)
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


def _had_too_few(v: Verdict) -> bool:
    is_hopeless = v.smallest_p_adjusted is not None and v.smallest_p_adjusted >= v.alpha
    return v.n > 0 and (is_hopeless or v.n < procedure_of(v.test).needs_pairs(v.alpha))


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
