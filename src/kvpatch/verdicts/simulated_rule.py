"""The whole rule on simulated runs: how often each hypothesis is supported, and how often something false is.

Power of a test is not power of the rule. Every simulated run has pairs, conditions, calibration pairs and coherence of
its own, and is decided as a run is (`rule.decide_all`): prerequisites, families, the graph, coherence and all. That a
model passes its check, that no row is missing and that readouts are specific is taken for granted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kvpatch.errors import ProtocolError
from kvpatch.protocols.conditions import NATURAL_SOURCE, NATURAL_TARGET
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Protocol
from kvpatch.statistics.grid import Floats, on_grid
from kvpatch.statistics.trend import order_scores, slopes
from kvpatch.verdicts.floors import Floor, floor_of_values
from kvpatch.verdicts.headline import is_strongest
from kvpatch.verdicts.many import Samples, carry_out_all
from kvpatch.verdicts.margins import Bound, gap_of
from kvpatch.verdicts.measure import Bounds, Measured, bounds_of, measured_as
from kvpatch.verdicts.pairs import PairDifferences
from kvpatch.verdicts.prerequisites import PASSED, Coherence, coherence_of
from kvpatch.verdicts.procedures import Figures
from kvpatch.verdicts.records import Verdict
from kvpatch.verdicts.rule import Circumstances, decide_all
from kvpatch.verdicts.rules import Decision
from kvpatch.verdicts.simulated_cells import Assumptions, Cells, true_contrast, true_means
from kvpatch.verdicts.texts import Evidence, Texts

CHUNK = 250
"""Simulated runs at once, which bounds the memory."""
MOST_PAIRS = 100_000
"""Each of which is drawn; a bank has hundreds."""
GAP = {NATURAL_SOURCE: 1, NATURAL_TARGET: -1}
NOT_READ = "the simulation does not read it on the calibration pairs"


@dataclass(frozen=True)
class SimulatedRule:
    """What the rule said of simulated runs.

    words: hypothesis -> verdict -> in how many runs. is_true: hypothesis -> whether its claim is true under the
    assumptions. false_in: family -> runs in which it made a false claim: "supported", or "equivalent", of what is not
    true. any_false: runs in which a confirmatory hypothesis did. strongest: runs with the strongest headline.
    """

    draws: int
    words: Mapping[str, Mapping[str, int]]
    is_true: Mapping[str, bool]
    false_in: Mapping[str, int]
    any_false: int
    strongest: int

    def passed(self, name: str) -> float:
        """The share of runs in which a hypothesis was supported, or equivalent where that is its claim."""
        return sum(self.words[name].get(word, 0) for word in PASSED) / self.draws


def refuse_uncountable(protocol: Protocol, n: int | None, draws: int) -> None:
    """Refuse a simulation of nothing, and of more pairs than can be drawn; see `simulate_rule`.

    Raises:
        ProtocolError: with what would be right.
    """
    if draws < 1 or (n is not None and n < 1):
        raise ProtocolError(f"a simulation needs at least 1 pair and 1 draw, got n={n} and draws={draws}")
    if (most := max((phase.n for phase in protocol.phases.values()), default=0) if n is None else n) > MOST_PAIRS:
        raise ProtocolError(
            f"the whole rule is simulated pair by pair, with at most {MOST_PAIRS:,} of them, not {most:,}; --draws 0 "
            "leaves it out"
        )


def simulate_rule(
    protocol: Protocol, assumptions: Assumptions, n: int | None = None, draws: int = 2_000, seed: int = 0
) -> SimulatedRule:
    """Decide simulated runs of a protocol by its whole rule.

    assumptions: what is true. n: pairs of every phase; None for each phase's own. draws: simulated runs; the same seed
    gives the same ones.

    Raises:
        ProtocolError: for an n or a number of draws below 1, more than `MOST_PAIRS` pairs, or assumptions that the
            protocol can't have.
    """
    refuse_uncountable(protocol, n, draws)
    assumptions.refuse_unknown(protocol)
    words: dict[str, Counter[str]] = {h.id: Counter() for h in protocol.hypotheses}
    is_true = truths(protocol, assumptions)
    false_in, any_false, strongest = Counter({h.family: 0 for h in protocol.hypotheses}), 0, 0
    for chunk, start in enumerate(range(0, draws, CHUNK)):
        cells = Cells(protocol, assumptions, n, min(CHUNK, draws - start), seed + 1_000_003 * chunk)
        for decided in _decided(protocol, cells):
            wrong = [h for h in protocol.hypotheses if decided[h.id].verdict in PASSED and not is_true[h.id]]
            false_in.update({h.family for h in wrong})
            any_false += any(h.confirmatory for h in wrong)
            strongest += is_strongest(protocol, list(decided.values()))
            for name, verdict in decided.items():
                words[name][verdict.verdict] += 1
    return SimulatedRule(draws, words, is_true, false_in, any_false, strongest)


def truths(protocol: Protocol, assumptions: Assumptions) -> dict[str, bool]:
    """Hypothesis -> whether its claim is true under the assumptions. At the edge of a margin it is not."""
    cells = Cells(protocol, assumptions, None, 1, 0)
    return {h.id: _is_true(cells, measured_as(protocol, h)) for h in protocol.hypotheses}


def _is_true(cells: Cells, h: Hypothesis) -> bool:
    side = h.claimed_side
    if h.kind.measures == "correlation":
        effect, spread, side = cells.assumptions.correlations.get(h.id, 0.0), math.nan, side
    elif h.is_ordering:
        names, peak = h.order()
        effect, spread = float(true_means(cells, h) @ order_scores(len(names), peak)), math.nan
    else:
        effect, spread = true_contrast(cells, h.weights(), h.readout)
    if h.kind.certifies_absence:
        return abs(effect) < _true_margin(cells, h, spread)
    bound = _true_margin(cells, h, spread) if h.kind.beyond_margin else 0.0
    return abs(effect) > bound if h.kind.claims == "apart" else side * effect > bound


def _true_margin(cells: Cells, h: Hypothesis, spread: float) -> float:
    """The margin of a hypothesis, were the natural gap and the standard deviation known."""
    if h.margin is None:
        return 0.0
    gap = abs(true_contrast(cells, GAP, h.readout)[0])
    parts = (h.margin.value, (h.margin.natural_gap or 0) * gap, (h.margin.dz or 0) * spread if h.margin.dz else 0)
    return max(part or 0.0 for part in parts)


def _decided(protocol: Protocol, cells: Cells) -> list[dict[str, Verdict]]:
    """Hypothesis -> verdict, for each simulated run of a chunk; of a verdict what a headline reads."""
    measured = {h.id: _measured(protocol, cells, h) for h in protocol.hypotheses}
    read = dict.fromkeys((h.phase, name) for h in protocol.hypotheses for name in h.conditions)
    counts = {key: cells.coherent(*key) for key in read}
    known = {(good, cells.pairs(phase)) for (phase, _), found in counts.items() for good in found}
    coherence: dict[tuple[int, int], Coherence] = {key: coherence_of(*key) for key in known}
    texts = Texts(protocol, {})
    evidence: dict[str, Evidence] = {h.id: texts.evidence(h) for h in protocol.hypotheses}
    conditions = {h.id: h.conditions for h in protocol.hypotheses}
    out = []
    for draw in range(cells.draws):
        shares = {key: coherence[found[draw], cells.pairs(key[0])] for key, found in counts.items()}
        around = Circumstances(texts, shares, instrument_ok=True)
        numbers = {name: of[draw] for name, of in measured.items()}
        decided = decide_all(protocol, numbers, around).decisions
        found = {}
        for h in protocol.hypotheses:
            of = {name: shares[h.phase, name].share for name in conditions[h.id]}
            found[h.id] = _verdict(numbers[h.id], decided[h.id], of, evidence[h.id])
        out.append(found)
    return out


def _verdict(m: Measured, decision: Decision, shares: dict[str, float], evidence: Evidence) -> Verdict:
    h = m.hypothesis
    return Verdict.model_construct(
        **{key: getattr(h, key) for key in ("id", "contrast", "readout", "test", "alpha")},
        n=m.differences.n,
        n_pairs=m.differences.n_pairs,
        n_dropped=m.differences.n_dropped,
        ci_low=m.interval.low,
        ci_high=m.interval.high,
        coherence=shares,
        verdict=decision.word,
        blocked_by=decision.blocked_by,
        needs=h.needs or [],
        evidence=evidence,
    )


def _measured(protocol: Protocol, cells: Cells, h: Hypothesis) -> list[Measured]:
    """The numbers of a hypothesis in each simulated run of a chunk."""
    asked = measured_as(protocol, h)
    differences, table, columns = _values(cells, asked)
    rows = [on_grid(row) for row in differences]
    n = differences.shape[1]
    ids = tuple(map(str, range(n)))
    found = [PairDifferences(row, ids, 0, 0, n) for row in rows]
    bounds = [bounds_of(asked, of, gap) for of, gap in zip(found, _gaps(cells, asked), strict=True)]
    samples = Samples(asked, np.array(rows), table, [b.margin.value for b in bounds], [b.fixed for b in bounds])
    floors = _floors(cells, asked, columns)
    tested = zip(found, bounds, carry_out_all(samples), floors, strict=True)
    return [_one(h, asked, of, bound, figures, floor) for of, bound, figures, floor in tested]


def _one(
    h: Hypothesis, asked: Hypothesis, found: PairDifferences, bounds: Bounds, figures: Figures, floor: Floor
) -> Measured:
    estimate = float(found.values.mean()) if figures.estimate is None else figures.estimate
    return Measured(
        hypothesis=h,
        kind=asked.kind,
        differences=found,
        estimate=estimate,
        interval=figures.interval,
        dz=math.nan,
        rank_biserial=math.nan,
        bayes_factor=math.nan,
        p=figures.p,
        p_margin=figures.p_margin,
        margin=bounds.margin,
        small=math.nan if bounds.small.value is None else bounds.small.value,
        transfer=None,
        absent=(),
        floor=floor,
        no_small=bounds.small.reason,
    )


def _values(cells: Cells, h: Hypothesis) -> tuple[Floats, Floats, Floats]:
    """What is averaged [draws, n]; what the test is computed from [draws, n, columns]; each condition [draws, n, k]."""
    if h.is_ordering:
        names, peak = h.order()
        table = np.stack([cells.values(h.phase, name, h.readout) for name in names], axis=2)
        return np.array([slopes(of, peak) for of in table]), table, table
    weights = h.weights()
    columns = np.stack([cells.values(h.phase, name, h.readout) for name in weights], axis=2)
    own = columns @ np.array(list(weights.values()), dtype=float)
    if h.kind.measures != "correlation":
        return own, own[:, :, None], columns
    r = cells.assumptions.correlations.get(h.id, 0.0)
    spread = true_contrast(cells, weights, h.readout)[1] or 1.0
    noise = cells.noise(f"against/{h.id}", (own.shape[1], 1 + len(h.controlling)))
    against = r * (own - own.mean(axis=1, keepdims=True)) / spread + math.sqrt(1 - r * r) * noise[:, :, 0]
    return own, np.concatenate([own[:, :, None], against[:, :, None], noise[:, :, 1:]], axis=2), columns


def _gaps(cells: Cells, h: Hypothesis) -> list[Bound]:
    """The natural gap in each simulated run, as the calibration pairs show it."""
    if not h.kind.is_in_unit or (h.is_ordering and not cells.protocol.families):
        return [Bound(None, NOT_READ)] * cells.draws
    of = [cells.calibration(h.phase, name, h.readout) for name in (NATURAL_SOURCE, NATURAL_TARGET)]
    return [gap_of(on_grid(row), h.readout) for row in of[0] - of[1]]


def _floors(cells: Cells, h: Hypothesis, columns: Floats) -> list[Floor]:
    """What the readout can say where it hardly scored; only readouts of hits can be rare."""
    if h.readout not in cells.assumptions.hits or h.kind.measures != "difference":
        return [Floor()] * cells.draws
    held_out = [cells.calibration(h.phase, name, h.readout) for name in GAP]

    def known(draw: int) -> Floats:
        values = np.concatenate([of[draw] for of in held_out])
        return values[values > 0]

    weights = h.weights()
    return [
        floor_of_values(
            on_grid(values.ravel()).reshape(values.shape), weights, h.transform, lambda draw=draw: known(draw)
        )
        for draw, values in enumerate(columns)
    ]
