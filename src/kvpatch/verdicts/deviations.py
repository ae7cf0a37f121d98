"""What makes a protocol's verdicts cheaper than they look, and how often the whole of it may err.

Nothing here stops a run or changes a verdict. A protocol that buys significance says so: before it is run, in run.json,
beside each verdict, and on the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from kvpatch.protocols.conditions import NATURAL_SOURCE, NATURAL_TARGET
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.base import Frozen
from kvpatch.specs.readouts import readouts
from kvpatch.verdicts.attainable import (
    can_pass,
    correction_of,
    planned_pairs,
    smallest_adjusted_p,
    smallest_p,
    strictest_alpha,
)
from kvpatch.verdicts.families import most_alpha
from kvpatch.verdicts.measure import measured_as
from kvpatch.verdicts.prerequisites import primary
from kvpatch.verdicts.procedures import procedure_of
from kvpatch.verdicts.records import Verdict
from kvpatch.verdicts.rounding import number
from kvpatch.verdicts.wording import NAMED

USUAL_ALPHA = 0.05
"""A larger alpha makes false claims more frequent than the field accepts."""


class Deviation(Frozen):
    """One way in which a protocol, or a run of so many pairs, departs from what a confirmatory analysis keeps to.

    hypotheses: ids of those it concerns. told: one plain sentence, with the numbers.
    """

    kind: Literal["several families", "alpha", "correction", "readout", "margin", "bound", "pairs"]
    hypotheses: list[str]
    told: str


def deviations(protocol: Protocol, pairs: Mapping[str, int]) -> list[Deviation]:
    """Every deviation of a protocol. pairs: hypothesis -> pairs planned, or measured; those without are not judged by
    their pairs."""
    confirmatory = [h for h in protocol.hypotheses if h.confirmatory]
    return [
        *_several_families(protocol, confirmatory),
        *_large_alphas(protocol),
        *_false_discovery_rates(protocol, confirmatory),
        *_readouts_without_meaning(protocol),
        *_missing_margins(protocol, confirmatory),
        *_too_few_pairs(protocol, pairs),
    ]


def _several_families(protocol: Protocol, confirmatory: Sequence[Hypothesis]) -> Iterator[Deviation]:
    """One contrast and readout, on either side and on any scale, claimed by hypotheses of several families."""
    same: dict[tuple[Any, ...], list[Hypothesis]] = {}
    for h in confirmatory:
        if h.kind.measures == "difference" and not protocol.is_tautological(h):
            weights = sorted(h.weights().items())
            turned = tuple((name, weight * weights[0][1]) for name, weight in weights)
            model = protocol.phases[h.phase].model
            same.setdefault((model, turned, h.readout, h.kind.certifies_absence), []).append(h)
    for members in same.values():
        families = list(dict.fromkeys(h.family for h in members))
        if len(families) > 1:
            first = members[0]
            yield Deviation(
                kind="several families",
                hypotheses=[h.id for h in members],
                told=f"{first.contrast} in {first.readout} is tested by {listed([h.id for h in members])} in the "
                f"families {listed(families)}; each family is corrected by itself, so one contrast has several "
                "chances.",
            )


def _large_alphas(protocol: Protocol) -> Iterator[Deviation]:
    over = [h for h in protocol.hypotheses if h.alpha > USUAL_ALPHA]
    if over:
        alphas = " and ".join(number(alpha) for alpha in sorted({h.alpha for h in over}))
        ids = [h.id for h in over]
        told = f"{listed(ids)} {_have(ids)} an alpha of {alphas}, above {number(USUAL_ALPHA)}."
        yield Deviation(kind="alpha", hypotheses=ids, told=told)


def _false_discovery_rates(protocol: Protocol, confirmatory: Sequence[Hypothesis]) -> Iterator[Deviation]:
    for family in dict.fromkeys(h.family for h in confirmatory):
        if correction_of(protocol, family) == "benjamini_hochberg":
            ids = [h.id for h in confirmatory if h.family == family]
            yield Deviation(
                kind="correction",
                hypotheses=ids,
                told=f"{listed(ids)} of family {family} {_are(ids)} confirmatory, and corrected by Benjamini-Hochberg, "
                "which bounds the share of false claims and not the chance of any; Holm bounds that.",
            )


def answering(protocol: Protocol) -> list[Hypothesis]:
    """The confirmatory hypotheses by which a protocol answers its question: its primary ones, or all where it names
    none."""
    return primary(protocol.hypotheses) or [h for h in protocol.hypotheses if h.confirmatory]


def _readouts_without_meaning(protocol: Protocol) -> Iterator[Deviation]:
    known = readouts()
    silent = [h for h in primary(protocol.hypotheses) if h.readout in known and not known[h.readout].may_be_evidence]
    for name in dict.fromkeys(h.readout for h in silent):
        ids = [h.id for h in silent if h.readout == name]
        yield Deviation(
            kind="readout",
            hypotheses=ids,
            told=f"{listed(ids)} {_answer(ids)} the question by {name} ({known[name].label}), which says nothing of "
            f"whether an output is in {protocol.mode_name} mode.",
        )


def _missing_margins(protocol: Protocol, confirmatory: Sequence[Hypothesis]) -> Iterator[Deviation]:
    lacking = [h for h in answering(protocol) if _margin_of(protocol, h) is None and h.kind.claims != "within"]
    if lacking:
        ids = [h.id for h in lacking]
        told = f"{listed(ids)} {_have(ids)} no margin, so that an effect of any size on the claim's side is a success."
        yield Deviation(kind="margin", hypotheses=ids, told=told)
    unbounded = [h.id for h in confirmatory if _margin_of(protocol, h) is None and not _has_natural_gap(protocol, h)]
    if unbounded:
        told = (
            f"{listed(unbounded)} {_have(unbounded)} no margin, and no natural gap stands in for one, so that no "
            "result could show that there is no effect to speak of."
        )
        yield Deviation(kind="bound", hypotheses=unbounded, told=told)


def _margin_of(protocol: Protocol, h: Hypothesis) -> object:
    return h.margin if h.of is None else protocol.hypothesis(h.of).margin


def _has_natural_gap(protocol: Protocol, h: Hypothesis) -> bool:
    """Whether the calibration measures what the mode moves in the readout, a share of which counts as no effect."""
    known = readouts().get(h.readout)
    is_measured = {NATURAL_TARGET, NATURAL_SOURCE} <= set(protocol.calibration.conditions)
    is_read = known is None or known.asks in (None, "semantic")
    takes_gap = h.kind.measures == "difference" or (h.is_ordering and bool(protocol.families))
    return takes_gap and h.kind.is_in_unit and is_measured and is_read


def _too_few_pairs(protocol: Protocol, pairs: Mapping[str, int]) -> Iterator[Deviation]:
    """Hypotheses that no data could pass, those of one family and number of pairs together."""
    smallest = smallest_adjusted_p(protocol, pairs)
    groups: dict[tuple[str, int, float, float], list[str]] = {}
    for h in protocol.hypotheses:
        n = pairs.get(h.id, 0)
        if n and h.id in smallest and not protocol.is_tautological(h) and not can_pass(protocol, h, n, smallest[h.id]):
            own = smallest_p(protocol, h, n)
            groups.setdefault((h.family, n, own, smallest[h.id]), []).append(h.id)
    for (family, n, own, least), ids in groups.items():
        alphas = " and ".join(number(a) for a in sorted({protocol.hypothesis(i).alpha for i in ids}, reverse=True))
        size = sum(h.family == family for h in protocol.hypotheses)
        corrected = "" if least == own else f", {number(least)} corrected for the {size} hypotheses of family {family}"
        needed = max(_needed(protocol, protocol.hypothesis(i)) for i in ids)
        told = (
            f"n={n}: {listed(ids)} can't pass, whatever the data say: the smallest p of {n} "
            f"{'pair' if n == 1 else 'pairs'} is {number(own)}{corrected}, and alpha is {alphas}; "
            + (f"{needed} pairs are needed." if needed < math.inf else "no number of pairs is enough.")
        )
        yield Deviation(kind="pairs", hypotheses=ids, told=told)


def _needed(protocol: Protocol, h: Hypothesis) -> float:
    """The pairs from which on a hypothesis can pass alone; infinite where its test never gives so small a p."""
    alpha = strictest_alpha(protocol, h)
    n = procedure_of(measured_as(protocol, h).test).needs_pairs(alpha)
    return n if smallest_p(protocol, h, n) < alpha else math.inf


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"; of many the first ones, and how many others there are."""
    if len(names) > NAMED:
        return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} others"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _have(ids: Sequence[str]) -> str:
    return "has" if len(ids) == 1 else "have"


def _are(ids: Sequence[str]) -> str:
    return "is" if len(ids) == 1 else "are"


def _answer(ids: Sequence[str]) -> str:
    return "answers" if len(ids) == 1 else "answer"


def family_errors(protocol: Protocol) -> dict[str, float | None]:
    """Family -> the chance of any false claim among its confirmatory hypotheses, at most; None where its correction
    bounds none. Families of exploratory hypotheses alone claim nothing, and are left out unless they pass alpha on."""
    out: dict[str, float | None] = {}
    passing = {name for name, family in protocol.families.items() if family.passes_to}
    for h in protocol.hypotheses:
        if (h.confirmatory or h.family in passing) and correction_of(protocol, h.family) == "holm":
            out[h.family] = max(h.alpha, out.get(h.family) or 0.0)
        elif h.confirmatory:
            out[h.family] = None
    return out


def experiment_error(protocol: Protocol) -> float | None:
    """The chance of any false claim among all confirmatory hypotheses, at most: the sum over families, whatever ties
    their tests (Bonferroni). None where a family bounds none, or the sum reaches 1."""
    found = list(family_errors(protocol).values())
    known = [error for error in found if error is not None]
    total = math.fsum(known)  # the same in any order of the families
    return total if len(known) == len(found) and total < 1 else None


def error_statement(protocol: Protocol) -> str:
    """How often the whole experiment may make a false claim, as one or two sentences."""
    errors = family_errors(protocol)
    if not errors:
        return "Every hypothesis is exploratory: nothing bounds how often one of these verdicts is a false claim."
    count = sum(h.confirmatory for h in protocol.hypotheses)
    open_ones = [name for name, error in errors.items() if error is None]
    total = sum(error for error in errors.values() if error is not None)
    over = f"{count} confirmatory hypotheses in {len(errors)} {'family' if len(errors) == 1 else 'families'}"
    if open_ones:
        told = (
            f"Over {over}, nothing bounds the chance of a false claim below 1: Benjamini-Hochberg gives "
            f"{listed(open_ones)} no bound on it."
        )
    elif total >= 1:
        told = (
            f"Over {over}, nothing bounds the chance of a false claim below 1: the families' alphas sum to "
            f"{number(total)}."
        )
    else:
        each = listed([number(a) for a in sorted({e for e in errors.values() if e is not None})])
        passed = ", and what others pass to it" if any(f.passes_to for f in protocol.families.values()) else ""
        told = (
            f"Over {over}, the chance of any false claim is at most {number(total)}, the sum of the families' alphas "
            f"({each}); within a family it is at most its alpha{passed}."
        )
    rest = len(protocol.hypotheses) - count
    if rest:
        told += f" {rest} exploratory {'hypothesis is' if rest == 1 else 'hypotheses are'} no part of that."
    return told


def stated(
    protocol: Protocol, n: int | None, phases: Sequence[str] | None, grown_from: Sequence[int | None] = ()
) -> dict[str, Any]:
    """What run.json and the plan say of a protocol as a whole: `deviations`, and `error_statement`.

    grown_from: every n that the run had before.
    """
    found = [d.told for d in deviations(protocol, planned_pairs(protocol, n, phases))]
    if grown_from:
        before = ", then ".join("the planned n" if was is None else f"n={was}" for was in grown_from)
        found.append(
            f"The run had {before} before it grew. Whoever looks at verdicts and goes on makes false claims likelier "
            "than the stated alpha."
        )
    return {"deviations": found, "error_statement": error_statement(protocol)}


def beside_verdicts(protocol: Protocol, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts, each with the deviations that concern it, the smallest p that its pairs could give, and the bounds
    on false claims of its family and of the experiment."""
    pairs = {v.id: v.n for v in verdicts}
    found, smallest = deviations(protocol, pairs), smallest_adjusted_p(protocol, pairs)
    own, most, whole = family_errors(protocol), most_alpha(protocol), experiment_error(protocol)
    errors = {family: None if error is None else max(error, most[family]) for family, error in own.items()}
    return [
        v.model_copy(
            update={
                "deviations": [d.told for d in found if v.id in d.hypotheses],
                "smallest_p_adjusted": smallest.get(v.id),
                "family_error": errors.get(v.family),
                "experiment_error": whole,
            }
        )
        for v in verdicts
    ]
