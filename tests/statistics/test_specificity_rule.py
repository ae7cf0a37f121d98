"""Specificity: how far destroyed caches move a readout, and which contrasts may be read in it all the same."""

from __future__ import annotations

import pytest

from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.load import load_protocol
from kvpatch.store.readout_calibration import FittedRule, ReadoutCalibration, ReadoutSpecificity
from kvpatch.verdicts.specificity import are_equally_damaged, specificities_of, unspecific

DEC7 = load_protocol("dec7")


def calibration(gap: float | None, **shares: float) -> ReadoutCalibration:
    rule = FittedRule(covariates=[], centre=0, at_rest=[], coefficients=[], is_weighted=False)
    of = ReadoutSpecificity(gap=gap, dz=0.9, shares=shares, by_position={})
    return ReadoutCalibration(
        fitted_on="", pairs=30, neutral=["N2"], destroyed=["E1", "F1"], items_sha256="", n_items=8, rule=rule,
        readouts={"mode_llr": of},
    )  # fmt: skip


def asked(contrast: str, phase: str = "1", **more) -> Hypothesis:
    given = {"id": "h", "claim": "?", "phase": phase, "contrast": contrast, "readout": "mode_llr", "test": "greater"}
    return Hypothesis.model_validate({**given, "family": "f", "gate": 2, **more})


@pytest.mark.parametrize(
    ("contrast", "equal"),
    [
        ("C - N1", True),
        ("B - A", True),
        ("C - A", True),
        ("M1 - M1n", True),
        ("body - body_n", True),
        ("C - E1", False),
        ("M4_V - M4_K", False),
        ("body - A", False),
        ("L_0_4 - L_24_32", False),
    ],
)
def test_contrasts_of_caches_made_in_one_way_are_equally_damaged(contrast: str, equal: bool):
    assert are_equally_damaged(DEC7, asked(contrast)) == equal


def test_an_unspecific_readout_blocks_contrasts_of_unequal_damage_alone_and_says_by_how_much():
    found = {None: calibration(0.2, N2=0.1, E1=1.35, F1=-0.2)}
    because = unspecific(DEC7, asked("C - E1"), found)
    assert because is not None and "E1, a destroyed cache, moves it by 1.35 of the natural gap" in because
    assert unspecific(DEC7, asked("C - N1"), found) is None
    assert unspecific(DEC7, asked("C - E1", readout="recursive_score"), found) is None


@pytest.mark.parametrize(("share", "blocks"), [(0.25, False), (-0.25, False), (0.2501, True), (-0.3, True)])
def test_a_quarter_of_the_gap_on_either_side_is_the_limit(share: float, blocks: bool):
    found = {None: calibration(0.2, N2=0.9, E1=share, F1=0.0)}
    assert (unspecific(DEC7, asked("C - E1"), found) is not None) == blocks


@pytest.mark.parametrize("gap", [None, 0.0, -0.1])
def test_without_a_gap_above_0_a_readout_is_not_specific(gap):
    (of,) = specificities_of(calibration(gap, N2=0.0, E1=0.0, F1=0.0), None, "m")
    assert not of.is_specific and "not above 0" in of.sentence


def test_what_was_not_measured_blocks_nothing_and_each_model_has_its_own():
    assert unspecific(DEC7, asked("C - E1"), {}) is None
    found = {None: calibration(0.2, E1=0.1, F1=0.1), "second": calibration(0.2, E1=2.0, F1=0.1)}
    assert unspecific(DEC7, asked("C - E1"), found) is None
    assert unspecific(DEC7, asked("C - E1", phase="7"), found) is not None


def test_the_sentence_gives_every_share_the_gap_and_its_dz():
    (of,) = specificities_of(calibration(0.2, N2=-0.1, E1=0.4, F1=0.1), None, "tiny")
    for part in ("mode_llr on tiny", "E1 0.40", "F1 0.10", "N2 -0.10", "0.2", "dz 0.9", "30 calibration pairs"):
        assert part in of.sentence
    assert "some more than 0.25" in of.sentence
