"""Effects: every condition less the natural run of the prompt it went into, against a slow pandas computation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kvpatch.protocols.schema import Protocol
from kvpatch.specs.readouts import shown
from kvpatch.verdicts.decide import verdicts
from kvpatch.verdicts.effects import Effect, effects

NAMES = ("A", "B", "C", "D", "N1", "N2", "X")
SCORE = (("score", "none"),)
READOUTS = [(readout.name, readout.transform) for readout in shown("effects", ())]


def trials(make_trials, seed: int = 0, pairs: int = 12, samples: int = 2, names=NAMES) -> pd.DataFrame:
    """Rows with every readout of the table, several samples a pair; rv_output spans decades."""
    rng = np.random.default_rng(seed)
    frame = make_trials({name: [0.0] * pairs for name in names}, {name: [0.0] * 4 for name in ("A", "B")})
    parts = [frame.assign(sample=i, trial_id=frame["trial_id"] + f"-{i}") for i in range(samples)]
    out = pd.concat(parts, ignore_index=True)
    for readout, transform in READOUTS:
        values = rng.normal(size=len(out)) + out["condition"].map({name: i for i, name in enumerate(NAMES)}).to_numpy()
        out[readout] = np.exp(values) if transform == "log" else values
    return out


def slowly(frame: pd.DataFrame, condition: str, natural: str, readout: str, transform: str) -> pd.Series:
    """Pair differences: log where asked, mean over samples, pairs that have both."""
    own = frame[(frame["split"] == "test") & (frame["phase"] == "1") & frame["error"].isna()]
    value = np.log(own[readout]) if transform == "log" else own[readout]
    means = value.groupby([own["pair_id"], own["condition"]]).mean().unstack()
    return (means[condition] - means[natural]).dropna()


def only(found: list[Effect], condition: str, readout: str) -> Effect:
    (one,) = [e for e in found if (e.condition, e.readout) == (condition, readout)]
    return one


NATURAL = {"C": "A", "D": "B", "N1": "A", "N2": "A", "X": "A"}


@pytest.mark.parametrize(("readout", "transform"), READOUTS)
@pytest.mark.parametrize("condition", NATURAL)
def test_estimate_equals_a_slow_computation(make_protocol, make_trials, condition, readout, transform):
    frame = trials(make_trials)
    found = only(effects(make_protocol(), frame, "1"), condition, readout)
    slow = slowly(frame, condition, NATURAL[condition], readout, transform)
    assert found.natural == NATURAL[condition]
    assert found.n == len(slow) == 12
    assert found.estimate == pytest.approx(slow.mean(), rel=1e-9)


def test_interval_is_the_bca_interval_over_pairs(make_protocol, make_trials):
    frame = trials(make_trials, pairs=30)
    found = only(effects(make_protocol(), frame, "1"), "X", "mode_llr")
    slow = slowly(frame, "X", "A", "mode_llr", "none").to_numpy()
    reference = stats.bootstrap((slow,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(1))
    low, high = reference.confidence_interval
    width = high - low
    assert found.ci_low == pytest.approx(low, abs=0.05 * width)
    assert found.ci_high == pytest.approx(high, abs=0.05 * width)


def test_condition_into_the_source_is_compared_with_b(make_protocol, make_trials):
    frame = make_trials({"A": [1.0] * 5, "B": [10.0] * 5, "C": [3.0] * 5, "D": [4.0] * 5})
    found = {e.condition: e for e in effects(make_protocol(), frame, "1", SCORE)}
    assert (found["D"].natural, found["D"].estimate) == ("B", -6.0)
    assert (found["C"].natural, found["C"].estimate) == ("A", 2.0)


def test_rv_output_is_a_log_ratio(make_protocol, make_trials):
    frame = trials(make_trials, samples=1)
    frame["rv_output"] = frame["condition"].map({"A": 0.5, "C": 1.0}).fillna(1.0)
    assert only(effects(make_protocol(), frame, "1"), "C", "rv_output").estimate == pytest.approx(np.log(2), rel=1e-9)


def test_natural_conditions_are_no_effects_and_the_order_is_the_protocol_s(make_protocol, make_trials):
    found = effects(make_protocol(), trials(make_trials), "1")
    assert list(dict.fromkeys(e.condition for e in found)) == ["C", "D", "N1", "N2", "X"]
    assert [e.readout for e in found[: len(READOUTS)]] == [readout for readout, _ in READOUTS]
    assert {e.about for e in found if e.condition == "X"} == {"body only"}


def test_a_second_natural_run_changes_nothing_and_is_no_effect(make_protocol, make_trials):
    frame = make_trials({"A": [1.0] * 5, "A2": [7.0] * 5, "C": [3.0] * 5})
    content = make_protocol().model_dump(mode="json", by_alias=True)
    content["conditions"]["A2"] = {"about": "natural target again"}
    content["phases"]["1"]["conditions"].append("A2")
    (found,) = effects(Protocol.model_validate(content), frame, "1", SCORE)
    assert (found.condition, found.natural, found.estimate) == ("C", "A", 2.0)


def test_the_text_a_swap_equals_is_an_effect_of_its_own(make_protocol, make_trials):
    content = make_protocol().model_dump(mode="json", by_alias=True)
    content["conditions"]["S1"] = {"about": "text of C", "text_of": "source"}
    content["phases"]["1"]["conditions"].append("S1")
    frame = make_trials({"A": [1.0] * 5, "S1": [3.0] * 5})
    (found,) = effects(Protocol.model_validate(content), frame, "1", SCORE)
    assert (found.condition, found.natural, found.estimate) == ("S1", "A", 2.0)


def test_conditions_without_trials_are_left_out(make_protocol, make_trials):
    frame = trials(make_trials, names=("A", "B", "C", "X"))
    assert {e.condition for e in effects(make_protocol(), frame, "1")} == {"C", "X"}
    elsewhere = frame.assign(phase=frame["phase"].where(frame["condition"] != "X", "2"))
    assert {e.condition for e in effects(make_protocol(), elsewhere, "1")} == {"C"}
    held_out = frame.assign(split=frame["split"].where(frame["condition"] != "X", "calibration"))
    assert {e.condition for e in effects(make_protocol(), held_out, "1")} == {"C"}


def test_calibration_and_other_phases_do_not_enter(make_protocol, make_trials):
    frame = trials(make_trials)
    others = frame.assign(phase="2", mode_llr=1000.0, trial_id="2" + frame["trial_id"])
    both = pd.concat([frame, others], ignore_index=True)
    assert effects(make_protocol(), both, "1") == effects(make_protocol(), frame, "1")


def test_failed_trials_and_pairs_without_the_condition_are_left_out(make_protocol, make_trials):
    frame = trials(make_trials, samples=1)
    lost = (frame["condition"] == "X") & frame["pair_id"].isin(["test-000", "test-001", "test-002"])
    frame.loc[lost & (frame["pair_id"] == "test-000"), ["error", "mode_llr"]] = ["the hook did not fire", 1e9]
    frame = frame[~(lost & (frame["pair_id"] != "test-000"))]
    found = only(effects(make_protocol(), frame, "1"), "X", "mode_llr")
    assert found.n == 12 - 3
    assert found.estimate == pytest.approx(slowly(frame, "X", "A", "mode_llr", "none").mean(), rel=1e-9)


def test_without_a_finite_value_there_is_no_number(make_protocol, make_trials):
    frame = trials(make_trials)
    frame.loc[frame["condition"] == "X", "rv_output"] = np.nan
    found = only(effects(make_protocol(), frame, "1"), "X", "rv_output")
    assert (found.n, found.estimate, found.ci_low, found.ci_high) == (0, None, None, None)


def test_two_pairs_give_an_estimate_and_no_interval(make_protocol, make_trials):
    frame = make_trials({"A": [1.0, 2.0], "C": [3.0, 6.0]})
    (found,) = effects(make_protocol(), frame, "1", SCORE)
    assert (found.n, found.estimate, found.ci_low, found.ci_high) == (2, 3.0, None, None)


def test_coherent_share_is_the_condition_s_own(make_protocol, make_trials):
    scores = {"A": [1.0] * 10, "C": [2.0] * 10, "X": [3.0] * 10}
    frame = make_trials(scores, incoherent={"X": 0.3})
    found = {e.condition: e.coherent for e in effects(make_protocol(), frame, "1", SCORE)}
    assert found == {"C": 1.0, "X": 0.7}


def test_the_gate_says_which_conditions_are_incoherent(make_protocol, make_trials):
    scores = {name: [1.0] * 10 for name in ("A", "C", "N1", "X")}
    frame = make_trials(scores, incoherent={"C": 0.5, "X": 0.4, "N1": 0.3})
    found = {e.condition: e.is_incoherent for e in effects(make_protocol(), frame, "1", SCORE)}
    assert found == {"C": True, "N1": False, "X": True}  # 7 of 10 may be 90% but for chance


def test_pairs_that_share_a_prompt_count_once_as_in_a_verdict(make_protocol, make_trials):
    frame = make_trials({"A": [0.0] * 6, "X": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]})
    frame["source_id"] = (
        frame["pair_id"].map({"test-000": "s", "test-001": "s", "test-002": "s"}).fillna(frame["source_id"])
    )
    protocol = make_protocol({"id": "h", "contrast": "X - A", "test": "greater"})
    (found,) = effects(protocol, frame, "1", SCORE)
    (verdict,) = verdicts(protocol, frame)
    assert (found.n, found.estimate) == (4, (2 + 4 + 5 + 6) / 4)
    told = (found.n, found.estimate, found.ci_low, found.ci_high)
    assert told == (verdict.n, verdict.estimate, verdict.ci_low, verdict.ci_high)


def test_order_of_rows_changes_nothing(make_protocol, make_trials):
    frame = trials(make_trials)
    shuffled = frame.sample(frac=1, random_state=3)
    assert effects(make_protocol(), shuffled, "1") == effects(make_protocol(), frame, "1")
