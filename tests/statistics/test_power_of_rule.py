"""Power of the whole rule, from assumptions or a pilot."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvpatch.cli.main as cli
from kvpatch.errors import ProtocolError
from kvpatch.protocols.load import load_protocol
from kvpatch.verdicts.power_of_rule import (
    Assumed,
    assumptions_of,
    assumptions_of_pilot,
    every_claim_holds,
    means_of,
    power_of_rule,
    read_assumptions,
)
from kvpatch.verdicts.simulated_cells import SD

Make = Callable[..., Any]
EXISTS = {"id": "exists", "contrast": "B - A", "test": "greater", "readout": "mode_llr", "family": "m", "needs": []}
PART = {
    "id": "part",
    "contrast": "X - N1",
    "test": "greater",
    "readout": "mode_llr",
    "family": "p",
    "needs": ["exists"],
}


@pytest.fixture
def protocol(make_protocol: Make) -> Any:
    return make_protocol(EXISTS, PART)


def test_a_prerequisite_of_little_power_takes_power_from_what_waits_for_it(protocol: Any):
    assumed = assumptions_of(protocol, Assumed(dz={"exists": 0.3, "part": 2.0}))
    found = {p.id: p for p in power_of_rule(protocol, assumed, [20], draws=100)}
    assert found["part"].alone == 1.0
    assert found["part"].whole == found["exists"].whole == pytest.approx(0.36, abs=0.15)
    assert found["part"].standard_error == pytest.approx(math.sqrt(0.36 * 0.64 / 100), abs=0.01)
    assert found["part"].is_true and not found["part"].is_planned


def test_progress_counts_every_simulated_run_and_a_seed_gives_the_same_power(protocol: Any):
    told: list[int] = []
    assumed = every_claim_holds(protocol, 0.5)
    first = power_of_rule(protocol, assumed, [None, 8], 30, 1, told.append)
    assert sum(told) == 2 * 2 * 30
    assert first == power_of_rule(protocol, assumed, [None, 8], 30, 1)
    assert [(p.n, p.is_planned) for p in first] == [(10, True)] * 2 + [(8, False)] * 2


def test_means_give_every_contrast_its_dz_and_move_the_side_that_is_added(make_protocol: Make):
    protocol = make_protocol(EXISTS, PART, {**PART, "id": "both", "contrast": "X - N1 - N2 + A"})
    found, off = means_of(protocol, {"exists": 1.5, "part": 0.8, "both": 0.4})
    means = found["mode_llr"]
    assert off == []
    assert means["B"] - means["A"] == pytest.approx(1.5)
    assert means["X"] - means["N1"] == pytest.approx(0.8)
    assert means["X"] - means["N1"] - means["N2"] + means["A"] == pytest.approx(0.4 * SD * 2)
    assert abs(means["N1"]) < 0.01


def test_dz_that_no_means_give_together_are_refused(make_protocol: Make):
    protocol = make_protocol(EXISTS, {**EXISTS, "id": "again", "test": "less"})
    with pytest.raises(ProtocolError, match="no means give these dz together: exists, again"):
        assumptions_of(protocol, Assumed(dz={"exists": 1.0, "again": 0.5}))


@pytest.mark.parametrize(
    ("assumed", "says"),
    [
        ({"dz": {"exist": 1.0}}, "no hypothesis 'exist' to assume a dz of"),
        ({"dz": {"exists": 1.0}, "means": {"mode_llr": {"B": 1.0}}}, "'mode_llr' is assumed by conditions"),
        ({"hits": {"recursive_score": {"Q": 0.5}}}, "no condition 'Q'"),
        ({"hits": {"recursive_score": {"B": 1.5}}}, "a share lies from 0 to 1, got 1.5"),
    ],
)
def test_what_can_not_be_assumed_is_refused(protocol: Any, assumed: dict[str, Any], says: str):
    with pytest.raises(ProtocolError, match=says):
        assumptions_of(protocol, Assumed.model_validate(assumed))


@pytest.mark.parametrize(
    ("text", "says"), [("dz: [1]", "dz: Input should be"), ("effect: 1", "effect: Extra"), ("{", "are no YAML")]
)
def test_a_file_that_assumes_nothing_known_is_refused_with_its_place(tmp_path: Path, text: str, says: str):
    path = tmp_path / "assumed.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ProtocolError, match=says):
        read_assumptions(path)
    with pytest.raises(ProtocolError, match="can't be read: No such file"):
        read_assumptions(tmp_path / "none.yaml")


def test_a_pilots_effects_hits_and_coherence_are_taken_for_the_truth(make_protocol: Make, make_trials: Make):
    rng = np.random.default_rng(5)
    names = {"A": 0.0, "B": 3.0, "X": 1.0, "N1": 0.0}
    trials = make_trials(
        {name: list(mean + rng.standard_normal(60)) for name, mean in names.items()}, incoherent={"X": 0.5}
    )
    trials["mode_llr"] = trials["score"]
    trials["recursive_score"] = np.where((trials["condition"] == "B") & (rng.random(len(trials)) < 0.5), 2.0, 0.0)
    protocol = make_protocol(EXISTS, PART, {**EXISTS, "id": "hits", "readout": "recursive_score"})
    found = assumptions_of_pilot(protocol, trials)
    means = found.means["mode_llr"]
    assert means["B"] - means["A"] == pytest.approx(3 / math.sqrt(2), rel=0.25)
    assert found.hits["recursive_score"]["A"] == 0 and found.hits["recursive_score"]["B"] == pytest.approx(0.5, abs=0.2)
    assert found.coherent["X"] == 0.5 and found.coherent["A"] == 1
    power_of_rule(protocol, found, [10], draws=2)


def test_what_is_assumed_by_default_is_every_claim(make_protocol: Make):
    correlates = {
        **PART, "id": "along", "test": "correlates", "direction": "negative",
        "against": {"contrast": "A", "readout": "mode_llr"}
    }  # fmt: skip
    same = {**PART, "id": "same", "contrast": "N2 - A", "test": "equivalent", "margin": {"value": 1}}
    found = every_claim_holds(make_protocol(EXISTS, PART, correlates, same), 0.5)
    means = found.means["mode_llr"]
    assert means["B"] - means["A"] == pytest.approx(0.5) and means["N2"] == pytest.approx(means["A"], abs=1e-6)
    assert found.correlations["along"] == pytest.approx(-0.2425, abs=1e-4)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["kvpatch", "power", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_command_shows_the_whole_rule_beside_the_test(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    assumed = tmp_path / "assumed.yaml"
    assumed.write_text("dz: {mode_exists_llr: 1.5, transfer_llr: 1.4}", "utf-8")
    asked = ("dec7", "--n", 10, "--phases", "4", "--draws", 2, "--assume", assumed)
    assert call(monkeypatch, *asked, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    ids = [h.id for h in load_protocol("dec7").hypotheses if h.phase == "4"]
    assert [entry["id"] for entry in found] == ids
    assert [row["n"] for row in found[0]["rule"]] == [10, 20, 50]
    assert call(monkeypatch, *asked, "--pilot", tmp_path) == 2
