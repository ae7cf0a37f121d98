"""Phases 5 and 6 on a wired organism: its planted head stands out alone, and R_V set by hand is called a shadow."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import kvpatch as kv
from kvpatch.organisms.wired import KV_HEADS, QUERY_HEADS, Wiring, wire, write_directory
from kvpatch.protocols.load import load_protocol
from kvpatch.store.directory import Store
from kvpatch.validation.banks import Sizes, bank_entries, write_bank
from kvpatch.validation.recovery import decide
from kvpatch.verdicts.decide import Verdict
from kvpatch.verdicts.head_contrasts import head_differences, heads_standing_out

pytestmark = pytest.mark.model

WIRING = Wiring(3, 2, 5, "v")
PAIRS = 12
PHASES = {
    "1": ["A", "B", "C", "N1", "M1", "M1n"],
    "5": ["A", "B", "G1", "G2", "G1_turn", "G2_turn"],
    "6": ["A", "B", "C", "N1"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Verdict]]:
    """Trials, heads and verdicts of the conditions that these phases' claims need."""
    folder: Path = tmp_path_factory.mktemp("wired")
    model = kv.load(write_directory(wire(WIRING), folder / "model"), device="cpu")
    bank = write_bank(folder / "bank", bank_entries(WIRING.slot, 3, Sizes(pairs=PAIRS + 5, others=1, subjects=1)))
    base = load_protocol("validate")
    phases = {
        name: base.phases[name].model_copy(update={"n": PAIRS, "conditions": names, "controls": []})
        for name, names in PHASES.items()
    }
    asked = [
        h
        for h in base.hypotheses
        if h.phase in PHASES
        and (h.family in ("manipulation", "text", "primary") or h.family.startswith(("rv_by", "rv_sh")))
    ]
    changes = {
        "bank": str(bank),
        "models": {},
        "pairing": base.pairing.model_copy(update={"also": []}),
        "calibration": base.calibration.model_copy(update={"pairs": 5}),
        "phases": phases,
        "hypotheses": asked,
        "expected": {},
        "corrections": {},
        "families": {},
        "plan": [],
    }
    rows, found = decide(base.model_copy(update=changes), {None: model}, folder / "run", seed=0)
    assert rows["error"].isna().all()
    heads = Store(folder / "run").read_attention().to_pandas()
    return rows, heads, {v.id: v for v in found}


@pytest.mark.parametrize("contrast", ["C - N1", "B - A"])
def test_the_planted_head_stands_out_and_no_other(run, contrast: str):
    rows, heads, _ = run
    found = head_differences(rows, heads, phase="6", contrast=contrast, statistic="mass_marked")
    assert heads_standing_out(found) == [(WIRING.layer, WIRING.kv_head * QUERY_HEADS // KV_HEADS)]


def test_no_head_stands_out_by_what_was_not_planted(run):
    rows, heads, _ = run
    for statistic in ("entropy", "peak_mass", "induction"):
        found = head_differences(rows, heads, phase="6", contrast="C - N1", statistic=statistic)
        assert heads_standing_out(found) == []


def test_a_mode_that_does_not_depend_on_r_v_is_called_so(run):
    rows, _, verdicts = run
    moved = rows[rows["phase"] == "5"].pivot(index="pair_id", columns="condition", values="rv_prompt")
    assert ((moved["G1"] - moved["A"]).abs() > 1e-3).all()  # R_V was indeed set
    assert {name: verdicts[name].verdict for name in ("rv_shadow", "rv_shadow_back")} == {
        "rv_shadow": "equivalent",
        "rv_shadow_back": "equivalent",
    }
    assert {verdicts[name].verdict for name in ("rv_causes", "rv_causes_back")} == {"not supported"}
