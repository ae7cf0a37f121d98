"""How often each test says yes where there is nothing: 2,000 simulated runs under each null.

    python benchmarks/false_positives.py [--draws 2000]

A row is a kind of test, the differences it sees, and n. Its rate may not exceed the nominal one by more than two
standard errors. Differences of two exchangeable conditions are symmetric whatever the readout looks like ("score": a
quarter of the outputs has any hit, then a gamma-distributed rate). At a margin they need not be: "tail" is exponential,
with its long tail away from the claim. Clustering is this design's: five samples a pair, prompts used again.
Rows marked "stress" go beyond the nulls and are shown for what they are.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvpatch.statistics.clustering import two_way_clustered
from kvpatch.statistics.correlation import partial_correlation
from kvpatch.statistics.hurdle import hurdle
from kvpatch.statistics.multiplicity import adjusted
from kvpatch.statistics.paired_tests import sign_flip
from kvpatch.statistics.simulation import critical_of, passes_dz
from kvpatch.statistics.trend import ordered_trend, slopes
from kvpatch.verdicts.pairs import contrast_differences, independent_units, prepare

Floats = NDArray[np.float64]
SD_OF_SCORES = math.sqrt(2 * (0.25 * 6 - 0.25))


@dataclass(frozen=True)
class Row:
    """One null: how often `decide` may say yes, and on what."""

    test: str
    differences: str
    n: int
    nominal: float
    decide: Callable[[np.random.Generator, int], NDArray[np.bool_]]
    is_stress: bool = False


def noise(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Differences with mean 0 and standard deviation 1."""
    if kind == "normal":
        return rng.standard_normal(shape)
    if kind == "score":
        one, two = (rng.gamma(2, 1, shape) * (rng.random(shape) < 0.25) for _ in range(2))
        return (one - two) / SD_OF_SCORES
    if kind == "tail":
        return 1 - rng.exponential(size=shape)
    raise ValueError(kind)


def greater(kind: str, n: int, alpha: float) -> Row:
    def decide(rng: np.random.Generator, draws: int) -> NDArray[np.bool_]:
        found = critical_of(noise(kind, rng, (draws, n)), (alpha,))
        return (found.above[alpha] < 0) & (found.low[0.95] > 0)

    return Row("greater", kind, n, alpha, decide, is_stress=kind == "tail")


def at_fixed_margin(kind: str, n: int) -> Row:
    def decide(rng: np.random.Generator, draws: int) -> NDArray[np.bool_]:
        half = 0.0125  # p counts twice (tests.past_margin)
        found = critical_of(noise(kind, rng, (draws, n)), (half,))
        return (found.above[half] < 0) & (found.above_t[half] < 0) & (found.low[0.95] > 0)

    return Row(
        "much greater, true mean at its fixed margin", kind, n, 0.025, decide, is_stress=kind == "tail" and n < 50
    )


def at_dz_margin(kind: str, n: int) -> Row:
    def decide(rng: np.random.Generator, draws: int) -> NDArray[np.bool_]:
        return passes_dz(noise(kind, rng, (draws, n)) + 0.5, 0.5)

    return Row("much greater, true dz at its margin of 0.5", kind, n, 0.025, decide, is_stress=kind == "tail")


def equivalent(kind: str, n: int) -> Row:
    def decide(rng: np.random.Generator, draws: int) -> NDArray[np.bool_]:
        found = critical_of(noise(kind, rng, (draws, n)), (0.05,))  # the mean lies at the upper margin of 2 sd
        lower, upper = (
            np.maximum(by[0.05], by_t[0.05])
            for by, by_t in ((found.above, found.above_t), (found.below, found.below_t))
        )
        return (lower < 4) & (upper < 0) & (found.high[0.90] < 0) & (found.low[0.90] > -4)

    return Row("equivalent, true mean at the margin", kind, n, 0.05, decide, is_stress=kind == "tail" and n < 50)


def five_samples(n: int) -> Row:
    """Pairs with an effect of their own on the difference, five samples of each, taken as one pair mean."""

    def decide(rng: np.random.Generator, draws: int) -> NDArray[np.bool_]:
        pairs = rng.standard_normal((draws, n, 1)) + rng.standard_normal((draws, n, 5))
        found = critical_of(pairs.mean(axis=2), (0.05,))
        return (found.above[0.05] < 0) & (found.low[0.95] > 0)

    return Row("greater", "five samples a pair", n, 0.05, decide)


def prompts_used_again(n: int, sources: int, *, is_two_way: bool) -> Row:
    """Every source serves n / sources targets, and has an effect of its own."""

    def decide(rng: np.random.Generator, draws: int) -> NDArray[np.bool_]:
        names = [f"s{i % sources}" for i in range(n)]
        trials = prepare(
            pd.DataFrame(
                {
                    "pair_id": [f"p{i}" for i in range(n)] * 2,
                    "phase": "1",
                    "condition": ["C"] * n + ["N1"] * n,
                    "source_id": names * 2,
                    "target_id": [f"t{i}" for i in range(n)] * 2,
                }
            )
        )
        units = independent_units(trials)
        effects = rng.standard_normal((draws, sources))[:, np.arange(n) % sources] + rng.standard_normal((draws, n))
        if is_two_way:
            targets = [f"t{i}" for i in range(n)]
            found = (two_way_clustered(values, names, targets) for values in effects)
            return np.array([f is not None and f.p < 0.05 for f in found])
        out = []
        for values in effects:
            rows = trials.assign(value=np.r_[values, np.zeros(n)])
            unit = contrast_differences(rows, {"C": 1, "N1": -1}, "value", units=units).values
            out.append(sign_flip(unit, "greater") < 0.05)
        return np.array(out)

    what = f"{sources} sources over all targets"
    if is_two_way:
        return Row("two-way clustered errors", what, n, 0.05, decide, is_stress=True)
    return Row("greater", what, n, 0.05, decide)


def ordering(name: str, peak: int, kind: str, n: int) -> Row:
    def decide(rng: np.random.Generator, draws: int) -> NDArray[np.bool_]:
        tables = rng.standard_normal((draws, n, 1)) + noise(kind, rng, (draws, n, 5))
        p = np.array([ordered_trend(table, peak) for table in tables])
        low = critical_of(np.stack([slopes(table, peak) for table in tables]), (0.05,)).low[0.95]
        return (p < 0.05) & (low > 0)

    return Row(name, kind, n, 0.05, decide)


def correlated(kind: str, n: int) -> Row:
    """Two readouts that share a covariate and nothing else."""

    def decide(rng: np.random.Generator, draws: int) -> NDArray[np.bool_]:
        out = []
        for _ in range(draws):
            length = rng.standard_normal((n, 1))
            x, y = length[:, 0] + noise(kind, rng, (n,)), length[:, 0] + noise(kind, rng, (n,))
            found = partial_correlation(x, y, length)
            out.append(found.p_greater < 0.05 and found.interval.low > 0)
        return np.array(out)

    return Row("correlates, length held constant", kind, n, 0.05, decide)


def two_steps(step: str, n: int) -> Row:
    def decide(rng: np.random.Generator, draws: int) -> NDArray[np.bool_]:
        out = []
        for _ in range(draws):
            first, second = rng.gamma(2, 1, (2, n)) * (rng.random((2, n)) < 0.4)
            found = hurdle(first, second, "greater")
            p = None if found is None else found.p_any if step == "any hit" else found.p_rate
            out.append(p is not None and p < 0.05)
        return np.array(out)

    return Row(f"hurdle, {step}", "score", n, 0.05, decide)


def family(size: int, n: int) -> Row:
    def decide(rng: np.random.Generator, draws: int) -> NDArray[np.bool_]:
        out = []
        for _ in range(draws):
            shared = rng.standard_normal(n)
            p = [sign_flip(shared + rng.standard_normal(n), "greater", resamples=2_000) for _ in range(size)]
            out.append(min(adjusted(p, "holm")) < 0.05)
        return np.array(out)

    return Row(f"any of {size} in a family (Holm)", "normal, correlated", n, 0.05, decide)


def rows() -> Iterator[Row]:
    for alpha in (0.05, 0.01, 0.001):
        for kind in ("normal", "score", "tail"):
            for n in (20, 50, 100):
                yield greater(kind, n, alpha)
    for kind in ("normal", "score", "tail"):
        for n in (12, 20, 50, 100):
            yield at_fixed_margin(kind, n)
            yield at_dz_margin(kind, n)
            yield equivalent(kind, n)
    for n in (20, 50):
        yield five_samples(n)
        yield ordering("trend over five levels", 4, "normal", n)
        yield ordering("trend over five levels", 4, "score", n)
        yield ordering("umbrella, peak at the fourth level", 3, "score", n)
        yield correlated("normal", n)
        yield correlated("score", n)
        yield two_steps("any hit", n)
        yield two_steps("rate", n)
    yield prompts_used_again(50, 5, is_two_way=False)
    yield prompts_used_again(60, 20, is_two_way=False)
    yield prompts_used_again(50, 5, is_two_way=True)
    yield prompts_used_again(60, 20, is_two_way=True)
    yield family(10, 20)


def main() -> int:
    """Print the table; 1 where a row that is no stress test errs too often."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=2_000)
    draws = parser.parse_args().draws
    table = Table(title=f"false positives, {draws} draws a row")
    for column in ("test", "differences", "n", "nominal", "limit", "found", ""):
        table.add_column(column)
    bad = 0
    for number, row in enumerate(track(list(rows()), description="simulating", console=Console(stderr=True))):
        rate = float(row.decide(np.random.default_rng([20251207, number]), draws).mean())
        limit = row.nominal + 2 * math.sqrt(row.nominal * (1 - row.nominal) / draws)
        is_over = rate > limit
        bad += is_over and not row.is_stress
        word = "over" if is_over else "holds"
        marked = f"{word} (stress)" if row.is_stress else word
        table.add_row(row.test, row.differences, str(row.n), f"{row.nominal:g}", f"{limit:.4f}", f"{rate:.4f}", marked)
    Console(width=130).print(table)
    print(f"{bad} rows over their limit" if bad else "no row over its limit")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
