"""The page says how specific the likelihood readouts are: in the strip, beside their charts, and by position."""

from __future__ import annotations

import pytest

from kvpatch.protocols.load import load_protocol
from kvpatch.report import specificity
from kvpatch.store.readout_calibration import FittedRule, ReadoutCalibration, ReadoutSpecificity

CURVES = {"B": [0.0, 0.2, 0.4, None], "E1": [0.1, 0.1, 0.1, 0.1]}


def run_of(share: float, gap: float | None = 0.2) -> dict:
    """run.json, as plain data, of a run on two models of which the second is specific."""

    def stored(of_e1: float, its_gap: float | None) -> dict:
        of = ReadoutSpecificity(gap=its_gap, dz=0.8, shares={"E1": of_e1}, by_position=CURVES)
        rule = FittedRule(covariates=[], centre=0, at_rest=[], coefficients=[], is_weighted=False)
        found = ReadoutCalibration(
            fitted_on="", pairs=30, neutral=[], destroyed=["E1"], items_sha256="", n_items=8, rule=rule,
            readouts={"mode_llr": of, "content_llr": of},
        )  # fmt: skip
        return found.model_dump(mode="json")

    second = {"model": {"name": "other"}, "readout_calibration": stored(0.1, 0.2)}
    return {
        "model": {"name": "own"},
        "readout_calibration": stored(share, gap),
        "other_models": {"second": second},
    }


@pytest.mark.parametrize(
    ("run", "word", "says"),
    [
        (run_of(0.1), "holds", "E1, a destroyed cache, moves it by 0.10 of the natural gap on own"),
        (run_of(1.35), "not specific", "E1, a destroyed cache, moves it by 1.35 of the natural gap on own"),
        (run_of(0.1, gap=-0.1), "not specific", "no natural gap above 0 on own"),
        ({}, "not recorded", "was not measured"),
    ],
)
def test_the_strip_says_whether_damage_moves_the_mode_readout(run: dict, word: str, says: str):
    entry = specificity.strip_entry(specificity.of_run(run))
    assert entry["badge"].word == word
    assert says in entry["says"]


def test_beside_a_chart_stands_the_specificity_on_the_phase_s_own_model():
    found, dec7 = specificity.of_run(run_of(1.35)), load_protocol("dec7")
    assert "on own" in specificity.said_of(found, dec7, "1", "mode_llr")
    assert "on other" in specificity.said_of(found, dec7, "7", "mode_llr")
    assert specificity.said_of(found, dec7, "1", "n_tokens") == ""
    assert specificity.said_of([], dec7, "1", "mode_llr") == ""


def test_the_curve_adds_up_over_positions_to_the_shift_itself():
    drawn = specificity.figures(specificity.of_run(run_of(0.1)))
    assert [figure.title for figure in drawn] == ["By position, own", "By position, other"]
    table = specificity._by_tokens(specificity.of_run(run_of(0.1))[0])
    of_b = table[table["condition"] == "B"]["nats"].tolist()
    assert of_b == pytest.approx([0.0, 0.05, 0.15, 0.15])
    assert table[table["condition"] == "E1"]["nats"].tolist()[-1] == pytest.approx(0.1)
