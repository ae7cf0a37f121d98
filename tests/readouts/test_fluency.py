"""Fluency readouts: repetition counts repeated n-grams, and coherence limits are the baseline's quantiles."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpatch.readouts.fluency import CoherenceLimits, coherence_limits, is_coherent, repetition, repetition_profile

token_lists = st.lists(st.integers(0, 3), max_size=40)
lengths = st.sampled_from([1, 2, 4, 8])
finite = st.floats(-1e6, 1e6)


# --- repetition ---


def repetition_by_comparing(token_ids: list[int], n: int) -> float:
    """Share of the n-grams that equal an earlier one, each compared with all before it."""
    ngrams = [token_ids[at : at + n] for at in range(len(token_ids) - n + 1)]
    repeats = sum(ngram in ngrams[:at] for at, ngram in enumerate(ngrams))
    return repeats / len(ngrams) if ngrams else 0.0


@given(token_lists, lengths)
def test_repetition_equals_a_count_by_comparing_each_ngram_with_all_before(token_ids: list[int], n: int):
    assert repetition(token_ids, n) == pytest.approx(repetition_by_comparing(token_ids, n))


@given(token_lists, lengths)
def test_repetition_lies_between_0_and_1(token_ids: list[int], n: int):
    assert 0.0 <= repetition(token_ids, n) < 1.0


@given(
    st.lists(st.integers(), unique=True, max_size=40).filter(lambda ids: all(abs(i) < 2**62 for i in ids)),
    lengths,
)
def test_distinct_tokens_have_no_repetition(token_ids: list[int], n: int):
    assert repetition(token_ids, n) == 0.0


@given(st.integers(1, 50), lengths)
def test_one_token_over_and_over_repeats_all_but_one_ngram(count: int, n: int):
    ngrams = count - n + 1
    assert repetition([7] * count, n) == (1 - 1 / ngrams if ngrams > 0 else 0.0)


@given(token_lists, lengths, st.permutations(range(4)))
def test_repetition_does_not_depend_on_which_tokens_they_are(token_ids: list[int], n: int, renamed: list[int]):
    assert repetition([renamed[token] for token in token_ids], n) == repetition(token_ids, n)


def test_longer_ngrams_see_only_longer_repeats():
    assert repetition([1, 2, 3, 1, 2, 4], 1) == pytest.approx(2 / 6)
    assert repetition([1, 2, 3, 1, 2, 4], 2) == pytest.approx(1 / 5)
    assert repetition([1, 2, 3, 1, 2, 4], 4) == 0.0


def test_fewer_tokens_than_n_have_no_repetition():
    assert repetition([], 1) == 0.0
    assert repetition([5, 5, 5], 4) == 0.0


def test_arrays_and_tensors_count_as_lists_do():
    """Elements of a tensor hash by identity; read one by one, no two n-grams would be equal."""
    token_ids = [1, 2, 1, 2, 1, 2, 1, 2]
    expected = repetition(token_ids, 2)
    assert expected > 0
    assert repetition(np.array(token_ids, dtype=np.int32), 2) == expected
    assert repetition(tuple(token_ids), 2) == expected
    torch = pytest.importorskip("torch")
    assert repetition(torch.tensor(token_ids), 2) == expected


@pytest.mark.parametrize("token_ids", [[[1, 2], [3, 4]], [0.5, 1.0], "text", ["a", "b"], 3])
def test_what_is_not_a_row_of_integers_is_refused(token_ids):
    with pytest.raises(ValueError, match="token_ids must be integers"):
        repetition(token_ids, 1)


@pytest.mark.parametrize("n", [0, -1])
def test_ngrams_of_no_length_are_refused(n: int):
    with pytest.raises(ValueError, match="n must be at least 1"):
        repetition([1, 2, 3], n)


@given(token_lists)
def test_profile_holds_the_lengths_1_2_4_8(token_ids: list[int]):
    assert repetition_profile(token_ids) == {n: repetition(token_ids, n) for n in (1, 2, 4, 8)}


# --- coherence ---


def test_limits_are_the_95th_percentiles_interpolated_linearly():
    limits = coherence_limits(np.arange(101) / 10, np.arange(101) / 100)
    assert (limits.excess_context, limits.repetition_4) == pytest.approx((9.5, 0.95))
    assert coherence_limits([1.0, 2.0], [0.0, 0.0]).excess_context == pytest.approx(1.95)


@given(st.lists(finite, min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles_equal_the_textbook_interpolation_between_sorted_values(values: list[float], quantile: float):
    ordered, place = sorted(values), quantile * (len(values) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    expected = below + (above - below) * (place - math.floor(place))
    limits = coherence_limits(values, [0.0], quantile)
    assert limits.excess_context == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_nan_is_left_out_of_the_limits_each_readout_by_itself():
    limits = coherence_limits([math.nan, 1.0, 3.0, math.nan], [0.25, math.nan], quantile=0.5)
    assert limits == CoherenceLimits(excess_context=2.0, repetition_4=0.25)


@pytest.mark.parametrize(
    ("excess_context", "repetition_4", "reason"),
    [
        ([], [0.1], "excess_context of the baseline has no value"),
        ([1.0], [], "repetition_4 of the baseline has no value"),
        ([math.nan], [0.1], "excess_context of the baseline has no value"),
        ([1.0, math.inf], [0.1], "infinite"),
    ],
)
def test_limits_of_an_empty_or_infinite_baseline_are_refused(excess_context, repetition_4, reason: str):
    with pytest.raises(ValueError, match=reason):
        coherence_limits(excess_context, repetition_4)


@pytest.mark.parametrize("quantile", [-0.1, 1.1, 95, math.nan])
def test_quantiles_outside_0_to_1_are_refused(quantile: float):
    with pytest.raises(ValueError, match="quantile must be between 0 and 1"):
        coherence_limits([1.0], [0.0], quantile)


@pytest.mark.parametrize(
    ("excess_context", "repetition_4", "expected"),
    [
        (1.0, 0.0, True),
        (2.0, 0.5, True),
        (2.0001, 0.0, False),
        (1.0, 0.5001, False),
        (3.0, 0.9, False),
        (math.nan, 0.0, False),
        (1.0, math.nan, False),
        (math.inf, 0.0, False),
    ],
)
def test_an_output_is_coherent_when_both_readouts_are_within_their_limits(excess_context, repetition_4, expected: bool):
    assert is_coherent(excess_context, repetition_4, CoherenceLimits(2.0, 0.5)) is expected


def test_outputs_without_repetition_are_coherent_where_the_baseline_has_none():
    limits = coherence_limits([1.0, 1.5, 2.0], [0.0, 0.0, 0.0])
    assert is_coherent(1.0, 0.0, limits)
    assert not is_coherent(1.0, 0.01, limits)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), min_size=1, max_size=200))
def test_at_least_about_90_percent_of_the_baseline_is_coherent_by_its_own_limits(outputs):
    """5% may lie beyond each limit, and interpolation may push one output more beyond each."""
    excess_context, repetition_4 = zip(*outputs, strict=True)
    limits = coherence_limits(excess_context, repetition_4)
    coherent = sum(is_coherent(nll, repeats, limits) for nll, repeats in outputs)
    assert coherent >= 0.9 * len(outputs) - 2


def test_numpy_scalars_give_a_plain_bool():
    assert is_coherent(np.float64(1.0), np.float64(0.0), CoherenceLimits(2.0, 0.5)) is True
