"""The answer in numbers: what the primary hypotheses measured, a sentence per readout, and whether a readout scored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from pydantic import Field

from kvpatch.protocols.conditions import NATURAL_SOURCE, NATURAL_TARGET
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.base import Frozen
from kvpatch.specs.readouts import readouts
from kvpatch.verdicts.headline import by_word, headline
from kvpatch.verdicts.pairs import pair_means, rows_of
from kvpatch.verdicts.prerequisites import primary
from kvpatch.verdicts.records import Verdict
from kvpatch.verdicts.rounding import number
from kvpatch.verdicts.wording import percent, quantity

WHY = {
    "instrument": "the check of the model failed",
    "gate": "a gate before it is closed",
    "prerequisite": "what it needs did not pass",
    "coherence": "the outputs of its conditions are not coherent",
    "specificity": "destroyed caches move the readout too",
    "missing": "too many rows are missing",
}
"""What blocked a verdict -> why it can't be read, for the middle of a sentence."""


def answering(protocol: Protocol, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts that answer the protocol's question: its primary ones that are no tautologies."""
    asked = {h.id for h in primary(protocol.hypotheses)}
    return [v for v in verdicts if v.id in asked and v.verdict != "tautological"]


def answer_in_numbers(protocol: Protocol, verdicts: Sequence[Verdict]) -> list[str]:
    """One sentence per readout of the primary hypotheses: each contrast with its size, unit, interval and verdict."""
    main, known = answering(protocol, verdicts), readouts()
    return [
        f"{known[name].label if name in known else name}: "
        f"{'; '.join(_told(protocol, v) for v in main if v.readout == name)}."
        for name in dict.fromkeys(v.readout for v in main)
    ]


def _told(protocol: Protocol, v: Verdict) -> str:
    lacks = WHY.get(v.blocked_by or "")
    word = v.verdict if lacks is None else f"{v.verdict}, since {lacks}"
    if v.estimate is None or not v.n:
        return f"{v.contrast} was not measured"
    size = quantity(v.estimate, protocol.hypothesis(v.id))
    if v.ci_low is not None and v.ci_high is not None:
        size += f" ({number(v.ci_low)} to {number(v.ci_high)})"
    return f"{v.contrast} is {size}, n = {v.n}: {word}"


class Answer(Frozen):
    """The answer to a protocol's question, for a page.

    full: the headline, which names hypotheses by their ids. short: the same with its verdicts counted. numbers: a
    sentence per readout of the primary hypotheses.
    """

    full: str
    short: str
    numbers: list[str] = Field(default=[], description="a sentence per readout")


def answer(protocol: Protocol, verdicts: Sequence[Verdict], *, is_checked: bool = True) -> Answer:
    """Return the answer that verdicts give. is_checked: as `headline.headline` has it."""
    return Answer(
        full=headline(protocol, verdicts, is_checked=is_checked),
        short=headline(protocol, verdicts, is_checked=is_checked, names=by_word),
        numbers=answer_in_numbers(protocol, verdicts),
    )


class FloorCheck(Frozen):
    """Whether a readout of the mode registers it at all where it should: in the natural runs of the source.

    condition: the natural source's name. than: what its value is held against: "0" for a count, and the natural target
    for a readout that has no floor. above: pairs of `n` in which it lies above.
    """

    readout: str
    label: str
    phase: str
    condition: str
    than: str
    above: int
    n: int

    @property
    def told(self) -> str:
        """ "B is above 0 in 37 of 100 pairs (37%)"."""
        return f"{self.condition} is above {self.than} in {self.above} of {self.n} pairs ({percent(self.share)})"

    @property
    def share(self) -> float:
        """Share of the pairs, NaN where there is none."""
        return self.above / self.n if self.n else math.nan


def floor_checks(protocol: Protocol, trials: pd.DataFrame) -> list[FloorCheck]:
    """Return the floor check of every readout of the mode that a primary hypothesis rests on.

    It is made in the first phase that has both natural runs, among those in which the readout is tested. trials:
    prepared rows.
    """
    natural, known = [NATURAL_SOURCE, NATURAL_TARGET], readouts()
    out: dict[str, FloorCheck] = {}
    for name, phase in dict.fromkeys((h.readout, h.phase) for h in primary(protocol.hypotheses)):
        readout = known.get(name)
        if readout is None or not readout.may_be_evidence or name in out or name not in trials.columns:
            continue
        rows = rows_of(trials, split="test", phase=phase)
        if not set(natural) <= set(rows["condition"].unique()):
            continue
        means = pair_means(rows, natural, name).to_numpy(dtype=float)
        means = means[~pd.isna(means).any(axis=1)]
        is_count = not (means < 0).any()
        out[name] = FloorCheck(
            readout=name,
            label=readout.label,
            phase=phase,
            condition=NATURAL_SOURCE,
            than="0" if is_count else NATURAL_TARGET,
            above=int((means[:, 0] > (0 if is_count else means[:, 1])).sum()),
            n=len(means),
        )
    return list(out.values())
