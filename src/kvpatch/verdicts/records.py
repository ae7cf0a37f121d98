"""The verdict: what is recorded of each hypothesis, and its canonical bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from kvpatch.specs.base import Frozen
from kvpatch.specs.test_kinds import Word
from kvpatch.verdicts.sensitivity import Sensitivity
from kvpatch.verdicts.texts import Decided, Evidence

SIGNIFICANT_DIGITS = 10


class Verdict(Frozen):
    """One hypothesis, measured and decided. A number that could not be had is None (null in JSON).

    Numbers are in the readout's unit, of its natural logarithm where `transform` is "log".
    """

    id: str
    claim: str
    phase: str
    contrast: str
    readout: str
    transform: str
    test: str
    family: str
    gate: int
    criterion: str | None
    expected: str | None = Field(default=None, description="what the plan said of it, where it said something")
    confirmatory: bool
    alpha: float
    n: int = Field(description="units: pairs, or groups of pairs that share a prompt")
    n_pairs: int = Field(description="pairs used")
    n_dropped: int = Field(description="pairs left out: a condition is missing, or a value is not finite")
    n_error_rows: int = Field(description="trials left out because they hold an error")
    estimate: float | None = Field(description="mean of the pair differences or slopes; or a correlation")
    ci_low: float | None = Field(description="BCa interval of the mean, lower end")
    ci_high: float | None = Field(description="BCa interval of the mean, upper end")
    ci_level: float = Field(description="0.95; 0.90 for an equivalence test")
    effect_size: float | None = Field(description="dz: mean over standard deviation of the pair differences; or r")
    rank_biserial: float | None = Field(description="matched-pairs rank-biserial correlation, -1 to 1")
    bayes_factor: float | None = Field(description="JZS Bayes factor BF10 of a mean effect over none, two-sided")
    p: float | None = Field(description="of the test: one-sided, or the larger of two for an equivalence test")
    p_adjusted: float | None = Field(description="p after correction within the family")
    p_margin: float | None = Field(description="one-sided against the margin, for much_greater and much_less")
    margin: float | None = Field(
        description="how large, or how small, the effect must be; the readout's unit. Of a test without a margin, in a "
        "protocol with families, up to where its effect counts as none"
    )
    transfer_fraction: float | None = Field(description="mean(X - A) / mean(B - A), for contrasts X - A")
    transfer_fraction_low: float | None = Field(description="95% Fieller interval, lower end")
    transfer_fraction_high: float | None = Field(description="95% Fieller interval, upper end")
    transfer_fraction_note: str | None = Field(description="why there is no transfer fraction, where one was asked")
    se_clustered: float | None = Field(
        default=None, description="standard error of the mean, clustered by the sources' and the targets' domains"
    )
    p_clustered: float | None = Field(
        default=None, description="two-sided p of the mean by that error; decides nothing"
    )
    clusters: dict[str, int] | None = Field(
        default=None, description="'sources' and 'targets' -> domains among the pairs"
    )
    coherence: dict[str, float | None] = Field(description="condition of the contrast -> share of coherent trials")
    sensitivity: Sensitivity = Field(description="analyses beside the test, which decide nothing")
    verdict: Word
    blocked_by: Literal["instrument", "gate", "prerequisite", "coherence", "specificity", "missing"] | None = Field(
        description="why not interpretable"
    )
    needs: list[str] = Field(default=[], description="hypotheses that must have passed before this one may be read")
    missing: str | None = Field(
        default=None, description="the first of `needs` that did not pass; `because` names them all"
    )
    because: str = Field(description="one plain sentence with the numbers")
    deviations: list[str] = Field(
        default=[], description="what of the protocol, or of so few pairs, makes this verdict cheaper than it looks"
    )
    smallest_p_adjusted: float | None = Field(
        default=None, description="the smallest adjusted p that so many pairs can give, whatever the data say"
    )
    family_error: float | None = Field(
        default=None,
        description="chance of any false claim among the family's confirmatory hypotheses, at most; null where its "
        "correction bounds none, or none of it is confirmatory",
    )
    experiment_error: float | None = Field(
        default=None, description="the same over all families of the protocol; null where nothing bounds it below 1"
    )
    evidence: Evidence = Field(
        description="'text' where every condition of the contrast equals a natural run, so that it is a manipulation "
        "check; else 'cache'"
    )
    evidence_from: Decided = Field(
        description="'caches' where stored comparisons of caches decided it; 'spelling' in runs that lack them"
    )


def verdicts_json(verdicts: Sequence[Verdict]) -> str:
    """Canonical JSON of the verdicts, in their order: the same verdicts give the same bytes anywhere.

    Sorted keys, floats at 10 significant digits, null for what is NaN or infinite, one newline at the end.
    """
    return canonical_json(verdicts)


def canonical_json(records: Sequence[Frozen]) -> str:
    """Canonical JSON of a list of records; see `verdicts_json`."""
    rows = [_canonical(record.model_dump(mode="python")) for record in records]
    return json.dumps(rows, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") + 0.0 if math.isfinite(value) else None
    return value
