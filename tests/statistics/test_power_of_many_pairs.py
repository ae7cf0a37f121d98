"""A run may have any number of pairs: power beyond 1,000 is that of the closed forms, and advice stops no run."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from conftest import build_protocol
from kvpatch.cli import main as cli
from kvpatch.planning.plan import PlanningModel, make_plan
from kvpatch.prompts.bank import Bank, Continuation, Prompt
from kvpatch.protocols.schema import Protocol
from kvpatch.verdicts import power as room
from kvpatch.verdicts import procedures
from kvpatch.verdicts.power import LARGEST_N, power
from kvpatch.verdicts.smallest import smallest_effects, warnings_before
from small import CONTINUATIONS, protocol_content, write_protocol

GREATER = {"id": "h", "contrast": "C - N1", "test": "greater", "alpha": 0.001}
SETS = 400
MANY = 1_050


def of(hypothesis: dict, n: int, **options):
    return power(build_protocol(hypothesis), n=n, **{"sets": SETS, **options})[0]


@pytest.mark.parametrize("n", [1_500, 20_000, 1_000_000])
def test_smallest_effect_is_that_of_the_one_sided_paired_t_test(n):
    found = of(GREATER, n)
    for share, dz in ((0.8, found.plain.dz_80), (0.9, found.plain.dz_90)):
        exact = TTestPower().solve_power(nobs=n, alpha=0.001, power=share, alternative="larger")
        assert dz == pytest.approx(exact, rel=0.06)
    assert any("beyond 1,000 pairs" in note for note in found.notes)


def test_much_greater_comes_down_to_the_margin_and_not_below():
    n = 4_000
    found = of({**GREATER, "test": "much_greater", "margin": {"dz": 0.5}}, n).plain
    needed = stats.nct.isf(0.0125, n - 1, 0.5 * math.sqrt(n))
    assert stats.nct.sf(needed, n - 1, found.dz_80 * math.sqrt(n)) == pytest.approx(0.8, abs=0.06)
    assert 0.5 < of({**GREATER, "test": "much_greater", "margin": {"dz": 0.5}}, 10**8).plain.dz_80 < 0.501


def test_certified_margin_is_that_of_two_one_sided_t_tests():
    n = 5_000
    rng = np.random.default_rng(0)
    needed = np.abs(rng.standard_normal(200_000)) / math.sqrt(n) + stats.t.ppf(0.95, n - 1) / math.sqrt(n)
    found = of({"id": "h", "contrast": "C - N1", "test": "equivalent", "margin": {"natural_gap": 0.2}}, n).plain
    assert found.dz_80 == pytest.approx(np.quantile(needed, 0.8), rel=0.05)


def test_correlation_is_that_of_fishers_z():
    n = 5_000
    hypothesis = {**GREATER, "test": "correlates", "direction": "positive", "alpha": 0.01}
    found = of({**hypothesis, "against": {"contrast": "B - A", "readout": "score"}}, n, sets=4_000)
    exact = math.tanh((stats.norm.isf(0.01) + stats.norm.ppf(0.8)) / math.sqrt(n - 3))
    assert found.plain.dz_80 == pytest.approx(exact, rel=0.05)
    assert not any("beyond" in note for note in found.notes)


@pytest.mark.parametrize("more", [{"test": "less"}, {"test": "trend", "contrast": "A < N1 < C"}])
def test_figures_go_on_without_a_step_where_simulation_ends(more):
    at, beyond = (of({**GREATER, **more}, n).plain.dz_80 for n in (LARGEST_N, LARGEST_N + 1))
    assert 0.999 * at < beyond < at


def test_pairs_for_a_small_effect_are_those_of_the_t_test():
    found = of(GREATER, 20, wanted_dz=0.05).plain
    exact = TTestPower().solve_power(effect_size=0.05, alpha=0.001, power=0.8, alternative="larger")
    assert exact > 6_000
    assert found.n_80 == pytest.approx(exact, rel=0.12)


# Advice


def test_phase_of_many_pairs_is_no_reason_for_a_warning(monkeypatch):
    monkeypatch.setattr(room, "QUICK_SETS", 100)
    protocol = build_protocol(GREATER)
    assert warnings_before(protocol, 2_000) == []
    assert smallest_effects(protocol, 2_000)[0].dz < 0.12


@pytest.mark.parametrize("error", [MemoryError("32 GB {x}"), ZeroDivisionError(), ValueError("line one\nline two")])
def test_what_can_not_be_computed_is_left_out_with_a_note(monkeypatch, error):
    def failing(question):
        raise error

    monkeypatch.setitem(procedures._OWN, "less", replace(procedures.procedure_of("less"), simulate=failing))
    protocol = build_protocol({**GREATER, "test": "less"}, {**GREATER, "id": "other", "family": "g"})
    lines = warnings_before(protocol, 12)
    reason = " ".join(str(error).split()) or "ZeroDivisionError"
    assert lines[0] == f"what h can see is not known: {reason}"
    assert lines[1].startswith("n=12: other (alpha 0.001) can see only effects of dz >= 1.")


def many_pairs() -> Bank:
    """A bank of 1,100 targets and sources."""
    prompts = []
    for i in range(1_100):
        target = Prompt(
            id=f"t{i}", group="plain", topic=f"dish{i}", domain="food", text=f"How long should dish{i} cook?"
        )
        source = Prompt(
            id=f"s{i}", group="recursive", topic=f"ship{i}", domain="sea", text=f"Describe how ship{i} sails."
        )
        prompts += [target, source]
    domains = {"target": "food", "source": "sea"}
    continuations = [
        Continuation.model_validate(
            {"id": f"{mode}-{side}-{i}", "mode": mode, "topic_of": side, "domain": domains[side], "text": text}
        )
        for (mode, side), texts in CONTINUATIONS.items()
        for i, text in enumerate(texts)
    ]
    return Bank(name="many", sha256="0" * 64, prompts=tuple(prompts), continuations=tuple(continuations))


def content(**changes) -> dict:
    found = protocol_content("bank", **changes)
    names = ["A", "B", "C"]
    found["conditions"] = {name: found["conditions"][name] for name in names}
    found["phases"] = {"1": {"question": "?", "n": MANY, "conditions": names}}
    found["hypotheses"] = [h for h in found["hypotheses"] if "N1" not in h["contrast"]]
    return found


def test_phase_of_more_than_a_thousand_pairs_is_planned():
    model = PlanningModel(body_length=lambda text: len(text.split()), key="k", kv_heads=2, has_template=True)
    plan = make_plan(Protocol.model_validate(content()), many_pairs(), {None: model}, seed=0)
    trials = [trial for batch in plan.batches if batch.phase == "1" for trial in batch.trials]
    assert len(trials) == 3 * MANY
    assert len({trial.trial_id for trial in trials}) == 3 * MANY


@pytest.mark.parametrize("asked", [[], ["--n", "4000"]])
def test_run_of_more_than_a_thousand_pairs_is_not_stopped_by_its_power(tmp_path, capsys, monkeypatch, asked):
    class Reached(Exception):
        """The models are about to be loaded."""

    def reached(*_, **__):
        raise Reached

    protocol = write_protocol(tmp_path, **{k: v for k, v in content().items() if k != "bank"})
    monkeypatch.setattr("kvpatch.cli.runs.host_of", reached)
    monkeypatch.setattr("kvpatch.protocols.names._too_few_prompts", lambda *_: iter(()))  # the bank is a small one
    monkeypatch.setenv("KVPATCH_DEBUG", "1")
    monkeypatch.setattr(room, "QUICK_SETS", 50)
    arguments = ["run", str(protocol), "--model", "m", "--out", str(tmp_path / "out"), *asked]
    monkeypatch.setattr(sys, "argv", ["kvpatch", *arguments])
    with pytest.raises(Reached):
        cli.main()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("asked", "words"), [(["--n", "0"], "n must be at least 1"), (["--phases", "9"], "no phase '9'")]
)
def test_request_that_can_not_be_run_is_still_refused_before_a_model_is_loaded(
    tmp_path, capsys, monkeypatch, asked, words
):
    monkeypatch.setattr("kvpatch.cli.runs.host_of", lambda *_, **__: pytest.fail("a model was loaded"))
    protocol = write_protocol(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kvpatch", "run", str(protocol), "--model", "m", "--out", "out", *asked])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
