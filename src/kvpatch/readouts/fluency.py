"""Fluency of a generated continuation: repetition by token n-grams, and the limits of coherence.

Coherence gates a condition, never a trial: outputs outside the limits stay in the data, and a condition with
too many of them is not interpretable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

NGRAM_LENGTHS = (1, 2, 4, 8)


def repetition(token_ids: ArrayLike, n: int) -> float:
    """Share of the token n-grams that are repeats: 1 - distinct / all, in [0, 1).

    token_ids: integers, shape [tokens], of the output alone. 0.0 when there are fewer than n. The value grows
    with length (for n = 1 in any text), so compare outputs of equal length.
    Raises `ValueError` when n < 1 or token_ids are not integers in one dimension.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    return _repetition(_listed(token_ids), n)


def repetition_profile(token_ids: ArrayLike) -> dict[int, float]:
    """`repetition` for n = 1, 2, 4 and 8, keyed by n."""
    listed = _listed(token_ids)
    return {n: _repetition(listed, n) for n in NGRAM_LENGTHS}


def _listed(token_ids: ArrayLike) -> list[int]:
    ids = np.asarray(token_ids)  # [tokens]; a torch tensor too, whose elements would all hash differently
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"token_ids must be integers of shape [tokens], not {ids.dtype} {list(ids.shape)}")
    return ids.tolist()


def _repetition(listed: list[int], n: int) -> float:
    if len(listed) < n:
        return 0.0
    distinct = set(zip(*(listed[offset:] for offset in range(n)), strict=False))
    return 1 - len(distinct) / (len(listed) - n + 1)


@dataclass(frozen=True)
class CoherenceLimits:
    """The largest values a coherent output may have."""

    excess_context: float
    """Surprise less the expected surprise, under the unpatched prompt whose words the cache holds, nats per token."""
    repetition_4: float
    """4-gram repetition, in [0, 1]."""


def coherence_limits(excess_context: ArrayLike, repetition_4: ArrayLike, quantile: float = 0.95) -> CoherenceLimits:
    """The limits that the baseline's outputs set: a quantile of each readout, taken by itself.

    excess_context, repetition_4: one value an output of the baseline condition, shape [outputs]; NaN is left out.
    Quantiles interpolate linearly (NumPy's default). Each limit of a 95% quantile leaves up to 5% of the
    baseline outside, so the baseline itself may have as few as 90% of its outputs within both.
    Raises `ValueError` when a readout has no value, or an infinite one, or the quantile is outside [0, 1].
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be between 0 and 1, not {quantile}")
    return CoherenceLimits(
        excess_context=_quantile("excess_context", excess_context, quantile),
        repetition_4=_quantile("repetition_4", repetition_4, quantile),
    )


def _quantile(name: str, values: ArrayLike, quantile: float) -> float:
    array = np.asarray(values, dtype=np.float64).ravel()
    array = array[~np.isnan(array)]
    if not array.size:
        raise ValueError(f"{name} of the baseline has no value; coherence limits need at least one output")
    if np.isinf(array).any():
        raise ValueError(f"{name} of the baseline holds an infinite value")
    return float(np.quantile(array, quantile))


def is_coherent(excess_context: float, repetition_4: float, limits: CoherenceLimits) -> bool:
    """Whether one output is within both limits.

    A value on the limit is within: the limit of repetition may well be 0. An output that could not be
    measured (NaN, as excess_context of an empty one is) is not coherent.
    """
    return bool(excess_context <= limits.excess_context and repetition_4 <= limits.repetition_4)
