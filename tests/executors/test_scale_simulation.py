"""The simulation of many GPUs gives back what is known of one, and says which part is at its limit."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

PLACE = Path(__file__).parents[2] / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale", PLACE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scale"]


def test_phase_1_on_one_gpu_takes_what_was_measured(scale):
    """660 trials: 33.1 s on one H200, of them 24 s of scoring and 4 s of decoding (LOG.md, 2026-11-29)."""
    outcome = scale.Simulation(660, 1, replace(scale.EIGHT, load=0.0), scale.Work()).run()
    assert outcome.seconds == pytest.approx(33.1 * 720 / 660, rel=0.25)  # batches are whole: six of 120
    assert outcome.spent["scoring"] == pytest.approx(24 / 33, abs=0.1)


def test_every_worker_s_time_is_accounted_for(scale):
    for gpus in (1, 8, 64):
        outcome = scale.Simulation(60_000, gpus, scale.EIGHT, scale.Work()).run()
        assert sum(outcome.spent.values()) == pytest.approx(1.0, abs=1e-6)
        assert outcome.gpu_hours == pytest.approx(outcome.seconds * gpus / 3600)


@pytest.mark.parametrize(
    ("slow", "saturated"),
    [({}, "GPUs"), ({"driver": 50.0}, "driver"), ({"store": 0.2}, "store"), ({"bandwidth": 2e3}, "index")],
    ids=["nothing", "driver", "store", "index"],
)
def test_what_is_made_slow_is_what_saturates(scale, slow, saturated):
    rates = replace(scale.EIGHT, load=0.0, **slow)
    work = scale.Work(tokens=20.0, scored=20.0) if slow else scale.Work()
    outcome = scale.Simulation(12_000, 8, replace(rates, trial_bytes=1.0), work).run()
    assert outcome.saturated == saturated
    assert max(outcome.busy.values()) <= 1 + 1e-9


def test_the_command_tells_every_size_and_where_each_figure_is_from():
    words = [sys.executable, str(PLACE), "--trials", "20000", "--gpus", "1", "8"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "8B on 1 GPUs" in told and "70B on 8 GPUs" in told and "GPU-hours" in told
    assert "measured" in told and "assumed" in told
    found = json.loads(subprocess.run([*words, "--json"], capture_output=True, text=True, check=True).stdout)
    assert [(each["shape"], each["gpus"]) for each in found] == [("8B", 1), ("8B", 8), ("70B", 8)]
