"""A kind of test from outside the package: from its registration to verdict, power table and report."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kvpatch.cli import main as cli
from kvpatch.errors import ExtensionError
from kvpatch.protocols.load import parse_protocol
from kvpatch.protocols.schema import Protocol
from kvpatch.report import forest
from kvpatch.report.judgements import verdict_rows
from kvpatch.report.questions import attacks
from kvpatch.specs import extensions
from kvpatch.specs import test_kinds as catalogue
from kvpatch.specs.test_kinds import TestKind, Words, kinds
from kvpatch.statistics.intervals import Interval
from kvpatch.statistics.paired_tests import sign_flip
from kvpatch.verdicts import procedures
from kvpatch.verdicts.decide import verdicts, verdicts_json
from kvpatch.verdicts.headline import headline
from kvpatch.verdicts.power import power
from kvpatch.verdicts.procedures import Figures, Procedure, Sample
from kvpatch.verdicts.records import Verdict
from kvpatch.verdicts.smallest import smallest_effects, warnings_before
from kvpatch.view.estimates import estimates

SIGN = TestKind(
    "sign",
    Words("mostly > 0", finding="{contrast} in {readout} has a median of {estimate}", scale="Median over pairs."),
    side=1,
    is_mean=False,
)


def sign_test(sample: Sample) -> Figures:
    """More pairs above 0 than below; the estimate is the median, its interval by order statistics."""
    values = np.sort(sample.differences)
    above, other = int((values > 0).sum()), int((values != 0).sum())
    p = float(stats.binomtest(above, other, alternative="greater").pvalue) if other else 1.0
    k = int(stats.binom.ppf(0.025, len(values), 0.5))
    ends = (float(values[k - 1]), float(values[-k])) if k else (math.nan, math.nan)
    return Figures(p, Interval(*ends, 0.95), estimate=float(np.median(values)))


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_FROM_OUTSIDE", {})
    monkeypatch.setattr(procedures, "_FROM_OUTSIDE", {})
    monkeypatch.setattr(extensions, "_CALLED", set())


@pytest.fixture
def sign() -> None:
    catalogue.register(SIGN)
    procedures.register("sign", Procedure(sign_test))


def content(*hypotheses: dict[str, Any]) -> dict[str, Any]:
    defaults = {"claim": "it holds", "phase": "1", "contrast": "C - N1", "readout": "mode_llr", "family": "f"}
    names = {"A": "target", "B": "source"}
    conditions = {name: {"about": name, "into": into} for name, into in names.items()}
    conditions["C"] = {"about": "body", "from": "source", "patch": {"slots": "body"}}
    conditions["N1"] = {"about": "foreign", "from": "foreign", "patch": {"align": "replace"}}
    return {
        "protocol": "toy",
        "title": "A toy",
        "question": "Does it hold?",
        "conditions": conditions,
        "phases": {"1": {"question": "?", "n": 12, "conditions": list(conditions)}},
        "hypotheses": [{"id": f"h{i}", "gate": 1, **defaults, **h} for i, h in enumerate(hypotheses)],
    }


def trials(differences: Sequence[float]) -> pd.DataFrame:
    rows = []
    for i, value in enumerate(differences):
        for condition, llr in (("A", 0.0), ("B", 1.0), ("C", value), ("N1", 0.0)):
            for split in ("test", "calibration") if condition in "AB" else ("test",):
                rows.append(
                    {
                        "trial_id": f"{split}{i}{condition}",
                        "split": split,
                        "phase": "1" if split == "test" else split,
                        "condition": condition,
                        "pair_id": f"{split}{i:02}",
                        "mode_llr": llr,
                        "coherent": True,
                        "error": None,
                    }
                )
    return pd.DataFrame(rows)


def decided(differences: Sequence[float], *hypotheses: dict[str, Any]) -> list[Verdict]:
    return verdicts(Protocol.model_validate(content(*hypotheses)), trials(differences))


MOSTLY_ABOVE = [2.0, 3.0, 1.0, 4.0, 2.5, 2.0, 1.5, 3.5, 2.0, -0.5, 5.0, 2.0]


def test_a_kind_from_outside_gets_a_verdict_in_its_own_words(sign: None):
    v = decided(MOSTLY_ABOVE, {"test": "sign"})[0]
    assert v.p == pytest.approx(stats.binomtest(11, 12, alternative="greater").pvalue)
    assert v.estimate == 2.0 and (v.ci_low, v.ci_high) == (1.5, 3.5)
    assert v.verdict == "supported"
    assert v.because.startswith(
        "C - N1 in mode_llr has a median of 2 nats over 12 pairs (95% interval 1.5 to 3.5), above 0"
    )
    assert json.loads(verdicts_json([v]))[0]["test"] == "sign"
    assert decided([-x for x in MOSTLY_ABOVE], {"test": "sign"})[0].verdict == "not supported"
    assert decided([math.nan] * 3, {"test": "sign"})[0].because.startswith("Nothing was measured")


def test_the_example_of_the_documentation_is_right():
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text("utf-8")
    section = text[text.index("## A kind of test") :]
    names: dict[str, Any] = {"__name__": "kvpatch_sign"}
    exec(section.split("```python\n")[1].split("```")[0], names)
    names["add"]()
    assert decided(MOSTLY_ABOVE, {"test": "sign"})[0].because in " ".join(section.split())


def test_it_stands_in_the_report_and_the_view(sign: None):
    protocol = Protocol.model_validate(content({"test": "sign"}))
    found = verdicts(protocol, trials(MOSTLY_ABOVE))
    rows = verdict_rows(json.loads(verdicts_json(found)), protocol)
    assert rows[0]["test"] == "mostly > 0"
    assert list(forest.hypothesis_charts(rows, protocol)) == ["mode_llr"]
    assert forest.hypothesis_figures(rows, protocol)[0].about.startswith("Median over pairs.")
    assert headline(protocol, found)
    assert estimates(protocol, trials(MOSTLY_ABOVE))[0]["path"] == []  # whose intervals are those of a mean


def test_a_repetition_of_it_is_measured_and_said_as_it_is(sign: None):
    repeated = {"id": "again", "test": "replicates", "of": "h0"}
    v = decided(MOSTLY_ABOVE, {"test": "sign"}, repeated)[1]
    assert v.estimate == 2.0
    assert v.verdict == "supported" and "has a median of 2 nats" in v.because
    protocol = Protocol.model_validate(content({"test": "sign"}, repeated))
    assert [entry.plain for entry in power(protocol, sets=100)] == [None, None]


def test_what_is_not_simulated_is_named_so_in_the_power_table(sign: None):
    protocol = Protocol.model_validate(content({"test": "sign"}))
    assert power(protocol)[0].notes == ["test 'sign' is not simulated"]
    assert smallest_effects(protocol) == [] and warnings_before(protocol) == []


def test_what_is_simulated_has_figures():
    catalogue.register(replace(SIGN, words=replace(SIGN.words, power="dz is that of the median")))
    procedures.register("sign", Procedure(sign_test, lambda q: np.full(q.sets, 0.7)))
    entry = power(Protocol.model_validate(content({"test": "sign"})), n=12)[0]
    assert entry.plain is not None and entry.plain.dz_80 == pytest.approx(0.7)
    assert entry.notes == ["dz is that of the median"]


def test_a_procedure_says_how_many_pairs_it_needs():
    catalogue.register(SIGN)
    procedures.register("sign", Procedure(sign_test, needs_pairs=lambda alpha: 40))
    v = decided(MOSTLY_ABOVE, {"test": "sign"})[0]
    assert v.verdict == "inconclusive" and v.because.endswith("but p below 0.05 needs at least 40 pairs.")


# Rules that no kind of ours asks for

DIFFERS = TestKind("differs", Words("≠ 0"), claims="apart")


def two_sided(sample: Sample) -> Figures:
    values = sample.differences
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Figures(sign_flip(values), Interval(float(values.mean() - half), float(values.mean() + half), 0.95))


@pytest.mark.parametrize(
    ("scale", "shift", "word", "told"),
    [
        (0.1, 2.0, "supported", "above 0"),
        (0.1, -2.0, "supported", "below 0"),
        (
            0.01,
            0.0,
            "not supported",
            "so an effect beyond 0.2 nats on either side, 20% of the natural gap, is ruled out",
        ),
        (3.0, 0.0, "inconclusive", "the interval does not lie wholly beyond 0"),
    ],
)
def test_a_claim_without_a_side_is_decided_on_both(scale: float, shift: float, word: str, told: str):
    catalogue.register(DIFFERS)
    procedures.register("differs", Procedure(two_sided))
    v = decided(shift + scale * stats.norm.ppf((np.arange(12) + 0.5) / 12), {"test": "differs"})[0]
    assert v.verdict == word and told in v.because


def test_an_absence_certified_from_outside_counts_as_a_control():
    near = TestKind("near", Words("near 0"), claims="within", needs=frozenset({"margin"}), level=0.9)
    catalogue.register(near)
    procedures.register("near", Procedure(lambda sample: replace(two_sided(sample), interval=Interval(-0.1, 0.1, 0.9))))
    protocol = Protocol.model_validate(content({"test": "near", "margin": {"value": 0.5}, "gate": 3}))
    found = verdicts(protocol, trials(MOSTLY_ABOVE))
    assert found[0].verdict == "equivalent"
    rows = verdict_rows(json.loads(verdicts_json(found)), protocol)
    assert forest.margin_ends(rows[0]) == (-0.5, 0.5)
    foreign = next(each for each in attacks(rows, [], protocol, 12, True) if each["claim"].startswith("Any foreign"))
    assert foreign["answer"] == "1 of 1 control shown to leave the target as it is."


def test_an_estimate_on_another_scale_is_not_held_against_the_readouts_margins():
    """A share of pairs less a half is at most 0.5, which is no 20% of a gap in nats."""
    share = replace(
        SIGN,
        id="share",
        is_in_unit=False,
        words=Words("mostly > 0", "{contrast} lies above 0 by a share of 1/2 and {number}", limit="{number}"),
    )
    catalogue.register(share)
    procedures.register("share", Procedure(lambda sample: Figures(0.4, Interval(-0.1, 0.15, 0.95), estimate=0.02)))
    assert decided(MOSTLY_ABOVE, {"test": "share"})[0].verdict == "inconclusive"
    v = decided(MOSTLY_ABOVE, {"test": "share", "margin": {"value": 0.2}})[0]
    assert v.verdict == "not supported" and "beyond 0.2, the margin" in v.because and "nats" not in v.because


def test_rewording_a_kind_changes_nothing_but_the_words(monkeypatch: pytest.MonkeyPatch):
    hypotheses = (
        {"test": "equivalent", "margin": {"value": 4.0}, "gate": 3},
        {"test": "much_less", "contrast": "N1 - C", "margin": {"value": 1.0}},
    )
    protocol = Protocol.model_validate(content(*hypotheses))

    def logic() -> list[Any]:
        found = verdicts(protocol, trials(MOSTLY_ABOVE))
        rows = verdict_rows(json.loads(verdicts_json(found)), protocol)
        told = [each["answer"] for each in attacks(rows, [], protocol, 12, True)]
        return [[v.verdict for v in found], [forest.margin_ends(row) for row in rows], told]

    before = logic()
    assert before[:2] == [["equivalent", "supported"], [(-4.0, 4.0), (-1.0, None)]]
    for name in ("equivalent", "much_less"):
        other = replace(catalogue._OWN[name], words=Words("-within > 0", "{contrast}: {number}", scale="?", axis="y"))
        monkeypatch.setitem(catalogue._OWN, name, other)
    assert logic() == before


# Registration


def test_protocol_and_schema_know_it_once_it_is_registered():
    text = json.dumps(content({"test": "sign"}))
    with pytest.raises(ValueError, match=r"Input should be 'greater', .* or 'replicates', not 'sign'"):
        parse_protocol(text, "toy.yaml")
    catalogue.register(SIGN)
    assert parse_protocol(text, "toy.yaml").hypotheses[0].kind == SIGN
    assert Protocol.model_json_schema()["$defs"]["Hypothesis"]["properties"]["test"]["enum"][-1] == "sign"
    with pytest.raises(ValueError, match=r"not 'sing'; did you mean 'sign'\?"):
        parse_protocol(text.replace('"sign"', '"sing"'), "toy.yaml")


def test_what_it_needs_is_asked_of_a_protocol():
    catalogue.register(replace(SIGN, id="three", least_conditions=3))
    with pytest.raises(ValueError, match="contrast 'C - N1' needs at least three conditions"):
        parse_protocol(json.dumps(content({"test": "three"})), "toy.yaml")
    catalogue.register(replace(SIGN, id="past", needs=frozenset({"margin"}), beyond_margin=True))
    with pytest.raises(ValueError, match="test 'past' needs a margin"):
        parse_protocol(json.dumps(content({"test": "past"})), "toy.yaml")


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"id": "My test"}, "test kind 'My test': an id has small letters"),
        ({"side": None}, "'side' is 1 or -1 for a difference"),
        ({"measures": "slope", "side": None}, "'order' goes with what measures a slope"),
        ({"measures": "mean"}, "measures can't be 'mean'; it may be 'difference', 'slope', 'correlation'"),
        ({"needs": frozenset({"readout"})}, "needs can't be 'readout'"),
        ({"beyond_margin": True}, "needs 'margin'"),
        ({"level": 95}, "lies between 0 and 1, not at 95"),
        ({"words": Words("> 0", "{mean} of it")}, "words.finding may hold {contrast}"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict[str, Any], told: str):
    with pytest.raises(ExtensionError) as error:
        replace(SIGN, **parts)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_an_id_is_taken_once(sign: None):
    catalogue.register(SIGN)
    procedures.register("sign", Procedure(sign_test))  # as a cell of a notebook that is run again
    for kind in (replace(SIGN, level=0.9), replace(SIGN, id="greater")):
        with pytest.raises(ExtensionError, match="there is another test kind"):
            catalogue.register(kind)
    for name in ("sign", "greater"):
        with pytest.raises(ExtensionError, match="there is another procedure of test kind"):
            procedures.register(name, Procedure(two_sided))


def test_a_kind_without_a_procedure_is_refused_by_name():
    catalogue.register(SIGN)
    protocol = Protocol.model_validate(content({"test": "greater"}, {"test": "sign"}))
    with pytest.raises(ExtensionError, match="test kind 'sign' has no procedure"):
        procedures.refuse_unknown(protocol.hypotheses)


@pytest.mark.parametrize(
    ("test", "told"),
    [
        (lambda sample: 1 / 0, "failed: ZeroDivisionError: division by zero"),
        (lambda sample: 0.03, "must return the Figures of a test with an Interval, got 0.03"),
        (lambda sample: Figures(3.0, Interval(0, 1, 0.95)), "must return a p from 0 to 1, got 3.0"),
        (lambda sample: Figures(None, Interval(0, 1, 0.95)), "must return a p from 0 to 1, got None"),
        (
            lambda sample: Figures(0.3, Interval(2, 1, 0.95)),
            "must return an interval whose low end is not above its high one, got 2 to 1",
        ),
        (lambda sample: Figures(0.3, Interval(0, 1, 0.9)), "must return an interval of level 0.95, got 0.9"),
    ],
)
def test_a_procedure_that_fails_is_named(test: Any, told: str):
    catalogue.register(SIGN)
    procedures.register("sign", Procedure(test))
    with pytest.raises(ExtensionError) as error:
        decided(MOSTLY_ABOVE, {"test": "sign"})
    assert str(error.value) == f"test 'sign' of hypothesis 'h0' {told}"


# Installed packages


def installed(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `toy-kinds` with an entry point, as an installer leaves it."""
    info = folder / "toy_kinds-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-kinds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{catalogue.GROUP}]\ntoy = toy_kinds:add\n")
    (folder / "toy_kinds.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "toy_kinds", raising=False)


GOOD = """
from kvpatch.specs import test_kinds
from kvpatch.specs.test_kinds import TestKind, Words
from kvpatch.statistics.intervals import Interval
from kvpatch.verdicts import procedures

def add():
    test_kinds.register(TestKind("mine", Words("> 0"), side=1))
    procedures.register("mine", procedures.Procedure(lambda s: procedures.Figures(0.01, Interval(1, 3, 0.95))))
"""


def test_an_installed_packages_kind_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "mine" not in kinds()
    installed(tmp_path, GOOD, monkeypatch)
    protocol = parse_protocol(json.dumps(content({"test": "mine"})), "toy.yaml")
    assert verdicts(protocol, trials(MOSTLY_ABOVE))[0].verdict == "supported"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("", "AttributeError: module 'toy_kinds' has no attribute 'add'"),
        ("add = 3", "TypeError: 'int' object is not callable"),
        ("def add():\n    raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    ],
)
def test_a_broken_package_is_refused_in_one_sentence(
    code: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    installed(tmp_path, code, monkeypatch)
    told = f"the entry point kvpatch.test_kinds: toy = toy_kinds:add of package toy-kinds can't be used ({why})"
    for _ in range(2):  # and not only the first time
        with pytest.raises(ExtensionError) as error:
            parse_protocol(json.dumps(content({"test": "greater"})), "toy.yaml")
        assert str(error.value) == f"{told}; mend or uninstall it"
    monkeypatch.setattr(sys, "argv", ["kvpatch", "schema"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
