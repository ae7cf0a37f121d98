"""How far destroyed caches move a readout, and which contrasts may not be read in it because of that.

A readout that a destroyed cache moves by more than a quarter of the natural gap can't tell a mode from damage. A
contrast between about equally damaged conditions can be read in it all the same: both sides carry the damage. They
are so where both sides are made alike, or where their damage, as measured, explains next to nothing of the readout
(docs/decisions/018-about-equal.md).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from scipy import stats

from kvpatch.protocols.conditions import Condition
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.store.readout_calibration import ReadoutCalibration
from kvpatch.store.record import RunRecord
from kvpatch.verdicts.pairs import contrast_differences, pair_means, rows_of
from kvpatch.verdicts.wording import number

LEVEL = "mode_llr_level"
"""Column of how likely all given continuations are under a trial's cache, less the natural targets' mean, nats per
token: the first of the covariates in `mode_llr_damage`."""
LIMIT = 0.25
"""Share of the natural gap by which a destroyed cache may move a readout that is specific."""
EXPLAINED = 0.05
"""Share of the natural gap that unequal damage may explain, at most: a quarter of the usual equivalence margin."""
_NOT_THE_RECIPE = {"about", "from_", "text_of", "role", "min_kv_heads", "needs_template"}
"""What of a condition says nothing about how much a cache is damaged."""


@dataclass(frozen=True)
class Specificity:
    """How far caches move one readout of one model.

    model: its key in the protocol, None for the run's own; name: what it is called. gap, dz: of the natural source less
    the natural target. destroyed, neutral: condition -> its shift as a share of the gap. by_position: condition -> its
    shift at each position of the continuations.
    """

    model: str | None
    name: str
    readout: str
    pairs: int
    gap: float | None
    dz: float | None
    destroyed: dict[str, float]
    neutral: dict[str, float]
    by_position: dict[str, list[float | None]]

    @property
    def worst(self) -> tuple[str, float] | None:
        """The destroyed cache that moves it furthest, and its share; None where there is no gap to be a share of."""
        if self.gap is None or self.gap <= 0 or not self.destroyed:
            return None
        return max(self.destroyed.items(), key=lambda item: abs(item[1]))

    @property
    def is_specific(self) -> bool:
        """Whether no destroyed cache moves it by more than `LIMIT` of its gap."""
        return self.worst is not None and abs(self.worst[1]) <= LIMIT

    @property
    def sentence(self) -> str:
        """What is said beside the readout wherever it is shown."""
        if self.gap is None or self.gap <= 0:
            gap = "not known" if self.gap is None else number(self.gap)
            return (
                f"Specificity of {self.readout} on {self.name}: the natural gap of the {self.pairs} calibration pairs "
                f"is {gap}, not above 0, so that no share of it says how far damage moves the readout."
            )
        moved = ", ".join(f"{name} {share:.2f}" for name, share in (self.destroyed | self.neutral).items())
        dz = "" if self.dz is None else f", dz {number(self.dz)}"
        says = "none more than" if self.is_specific else "some more than"
        then = "" if self.is_specific else "; contrasts between unequally damaged conditions can't be read in it"
        return (
            f"Specificity of {self.readout} on {self.name}: as shares of the natural gap ({number(self.gap)}{dz}, "
            f"{self.pairs} calibration pairs) other caches move it by {moved}; of the destroyed ones "
            f"{says} {LIMIT}{then}."
        )


def specificities(record: RunRecord) -> list[Specificity]:
    """Of every model and likelihood readout of a run; none where the protocol's calibration destroys no cache."""
    found = [(None, record.model.name, record.readout_calibration)]
    found += [(key, other.model.name, other.readout_calibration) for key, other in record.other_models.items()]
    return [
        of
        for key, name, calibration in found
        if calibration is not None
        for of in specificities_of(calibration, key, name)
    ]


def specificities_of(calibration: ReadoutCalibration, key: str | None, name: str) -> list[Specificity]:
    """Of every likelihood readout of one model."""
    return [
        Specificity(
            model=key,
            name=name,
            readout=readout,
            pairs=calibration.pairs,
            gap=of.gap,
            dz=of.dz,
            destroyed={c: of.shares[c] for c in calibration.destroyed if c in of.shares},
            neutral={c: of.shares[c] for c in calibration.neutral if c in of.shares},
            by_position=of.by_position,
        )
        for readout, of in calibration.readouts.items()
    ]


def unspecific(
    protocol: Protocol,
    hypothesis: Hypothesis,
    calibrations: Mapping[str | None, ReadoutCalibration],
    explained: Mapping[str, float] | None = None,
) -> str | None:
    """Why damage keeps a hypothesis from being read, as a sentence; None where it does not, or was not measured.

    calibrations: model's key -> what its calibration found. explained: hypothesis -> `explained_share`, where known.
    """
    key = protocol.phases[hypothesis.phase].model
    calibration = calibrations.get(key)
    if calibration is None or are_equally_damaged(protocol, hypothesis):
        return None
    name = protocol.models.get(key, key) if key is not None else "this model"
    for of in specificities_of(calibration, key, str(name)):
        if of.readout == hypothesis.readout and not of.is_specific:
            if of.worst is None:
                return of.sentence
            worst, share = of.worst
            could = (explained or {}).get(hypothesis.id)
            if could is not None and could <= EXPLAINED:
                return None
            told = "" if could is None else f": what differs in damage could explain up to {could:.2f} of that gap"
            return (
                f"{hypothesis.readout} does not tell a mode from damage here: {worst}, a destroyed cache, moves it by "
                f"{share:.2f} of the natural gap on the calibration pairs, where {LIMIT} is the most, and the "
                f"conditions of {hypothesis.contrast} are not equally damaged{told}."
            )
    return None


def explained_shares(
    protocol: Protocol,
    rows: pd.DataFrame,
    calibrations: Mapping[str | None, ReadoutCalibration],
    units: Mapping[str, Mapping[str, str]],
) -> dict[str, float]:
    """Hypothesis -> `explained_share`, for those whose readout is unspecific and whose conditions are not made alike.

    rows: prepared rows of all phases. units: phase -> pair -> unit.
    """
    found: dict[str, float] = {}
    if LEVEL not in rows.columns:
        return found
    levels = {key: _levels(protocol, rows, key, calibration.destroyed) for key, calibration in calibrations.items()}
    for h in protocol.hypotheses:
        key = protocol.phases[h.phase].model
        calibration = calibrations.get(key)
        if calibration is None or h.is_ordering or are_equally_damaged(protocol, h):
            continue
        for of in specificities_of(calibration, key, ""):
            if of.readout == h.readout and not of.is_specific:
                share = explained_share(h, of, rows, levels[key], units[h.phase])
                if share is not None:
                    found[h.id] = share
    return found


def explained_share(
    hypothesis: Hypothesis,
    of: Specificity,
    rows: pd.DataFrame,
    levels: Mapping[str, float],
    units: Mapping[str, str],
) -> float | None:
    """How much of the natural gap unequal damage could explain in a contrast, at most; None where that is not known.

    Damage shows in how likely all given continuations are, modes averaged. A destroyed cache changes that by `levels`
    nats and moves the readout by a share of the gap; a contrast whose sides differ by fewer nats is moved by as much
    less. Of the difference the end of its 95% interval counts that is further from 0, and of the destroyed caches the
    one by which the share comes out largest.
    """
    own = rows_of(rows, split="test", phase=hypothesis.phase)
    differences = contrast_differences(own, hypothesis.weights(), LEVEL, "none", units)
    beyond = {name: abs(share) for name, share in of.destroyed.items() if abs(share) > LIMIT}
    if differences.n < 2 or not beyond or not all(levels.get(name) for name in beyond):
        return None
    error = float(differences.values.std(ddof=1)) / math.sqrt(differences.n)
    most = abs(float(differences.values.mean())) + float(stats.t.ppf(0.975, differences.n - 1)) * error
    return max(share * most / abs(levels[name]) for name, share in beyond.items())


def _levels(protocol: Protocol, rows: pd.DataFrame, key: str | None, destroyed: Sequence[str]) -> dict[str, float]:
    """Destroyed condition -> how far it moves the level from the natural target's, in the first phase of the model that
    runs both."""
    natural = [name for name, c in protocol.conditions.items() if c.is_natural and c.into == "target" and not c.text_of]
    found: dict[str, float] = {}
    for phase, settings in protocol.phases.items():
        names = [name for name in destroyed if name not in found]
        if settings.model != key or not natural or not names:
            continue
        means = pair_means(rows_of(rows, split="test", phase=phase), [natural[0], *names], LEVEL)
        for name in names:
            shift = float((means[name] - means[natural[0]]).mean())
            if math.isfinite(shift):
                found[name] = shift
    return found


def are_equally_damaged(protocol: Protocol, hypothesis: Hypothesis) -> bool:
    """Whether damage cancels in a contrast: each way of making a cache stands on both sides of it equally often.

    Natural runs and full swaps of whole prompts are one such way, since all are texts.
    """
    own = hypothesis.conditions_by_place()[0][0]
    ways = {name: _way(protocol.conditions[name]) for name in own}
    if hypothesis.is_ordering or len(set(ways.values())) == 1:
        return len(set(ways.values())) == 1
    balance: Counter[str] = Counter()
    for name, weight in hypothesis.weights().items():
        balance[ways[name]] += weight
    return not any(balance.values())


def _way(condition: Condition) -> str:
    """How a condition makes its cache, whoever gives it."""
    if condition.change is None or (condition.patch is not None and condition.patch.is_full_swap):
        return "a text"
    return condition.model_dump_json(exclude=_NOT_THE_RECIPE)
