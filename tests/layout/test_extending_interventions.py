"""An intervention from outside the package: it runs through a protocol to a verdict and stands in the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

from kvpatch.caches.selection import Touched, chosen_layers
from kvpatch.errors import CacheError, ExtensionError, ProtocolError
from kvpatch.executors.batch import run_batch
from kvpatch.interventions.build import Fitting, Kind, Made, Trials, register
from kvpatch.interventions.kinds import refuse_missing_layers
from kvpatch.planned import plan_for
from kvpatch.planning.plan import Batch, Plan
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.conditions import Condition
from kvpatch.protocols.load import load_protocol, parse_protocol
from kvpatch.protocols.schema import Protocol
from kvpatch.readouts.fluency import CoherenceLimits
from kvpatch.run import run
from kvpatch.specs import outside_interventions
from kvpatch.specs.base import Number
from kvpatch.specs.interventions import InterventionSpec
from kvpatch.specs.selectors import Layers
from kvpatch.store.directory import Store
from small import CONDITIONS, protocol_content, write_bank, write_protocol

pytestmark = pytest.mark.model


class ScaledValues(InterventionSpec):
    """Multiply the cached values of some layers by a factor."""

    kind: ClassVar[str] = "scaled_values"
    factor: Number
    layers: Layers = None


def scale(spec: ScaledValues, trials: Trials) -> Made:
    own = trials.own
    layers = chosen_layers(spec.layers, own.layers, may_be_empty=trials.may_be_empty)
    values = [v * spec.factor if layer in layers else v for layer, v in enumerate(own.values)]
    touched = Touched(tuple(own.row_lengths), len(layers), own.keys[0].shape[1])
    return Made(replace(own, values=tuple(values)), touched)


def refuse_short(spec: ScaledValues, fitting: Fitting) -> None:
    if min(len(prompt.token_ids) for prompt in fitting.receivers) < spec.factor:
        raise CacheError(f"a factor of {spec.factor:g} is more than a prompt has tokens")


class Blended(InterventionSpec):
    """The values of the giver where both caches are as long; takes a prompt, and draws on the calibration pairs."""

    kind: ClassVar[str] = "blended"
    takes_giver: ClassVar[bool] = True
    share: Number = 0.5

    @property
    def is_fitted(self) -> bool:
        return True


def blend(spec: Blended, trials: Trials) -> Made:
    own, givers = trials.own, trials.giver_caches()
    reference = trials.reference()
    assert reference is not None and len(trials.givers) == len(trials.receivers) == own.batch == givers.batch
    values = tuple(
        o[:, :, -1:] * (1 - spec.share) + g[:, :, -1:] * spec.share
        for o, g in zip(own.values, givers.values, strict=True)
    )
    new = tuple(torch.cat([o[:, :, :-1], v], dim=2) for o, v in zip(own.values, values, strict=True))
    return Made(replace(own, values=new), Touched((1,) * own.batch, own.layers, own.keys[0].shape[1]))


SCALED = Kind(ScaledValues, scale, refuse_model=refuse_missing_layers, refuse_prompts=refuse_short)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside_interventions, "REGISTERED", {})
    register(SCALED)
    register(Kind(Blended, blend))


@pytest.fixture(scope="module")
def model(tiny: Callable) -> Any:
    return tiny("llama")


SAID = {"kind": "scaled_values", "factor": 3, "layers": [1, 2]}


def changes(said: dict[str, Any], **condition: Any) -> dict[str, Any]:
    """The small protocol with a condition X of this intervention, and a hypothesis on it."""
    conditions = {name: CONDITIONS[name] for name in ("A", "B", "C", "N1", "S0", "S1")}
    conditions["X"] = {"about": "values made larger", "intervention": said, "role": "experiment", **condition}
    about_x = {"id": "scaled", "claim": "X > A", "contrast": "X - A", "test": "greater", "gate": 2}
    content = protocol_content("unused")
    common = {key: content["hypotheses"][0][key] for key in ("phase", "readout", "alpha", "family")}
    return {
        "conditions": conditions,
        "phases": {"1": {"question": "?", "n": 5, "conditions": list(conditions)}},
        "hypotheses": [*content["hypotheses"], about_x | common],
    }


def loaded(folder: Path, said: dict[str, Any], **condition: Any) -> Protocol:
    return load_protocol(str(write_protocol(folder, **changes(said, **condition))))


def plan_of(model: Any, protocol: Protocol) -> Plan:
    return plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=None, phases=None)[0]


def batch_of(plan: Plan) -> Batch:
    return next(batch for batch in plan.batches if batch.split == "test")


def test_a_protocol_with_it_runs_to_a_verdict_and_a_report(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    protocol = loaded(tmp_path, SAID)
    outcome = run(protocol, {None: model}, tmp_path / "run")
    (verdict,) = [v for v in outcome.verdicts if v.id == "scaled"]
    assert verdict.n == 5 and verdict.estimate is not None
    rows = [row for row in Store(tmp_path / "run").read().to_pylist() if row["condition"] == "X"]
    assert len(rows) == 5 and {row["error"] for row in rows} == {None}
    assert {row["patch"] for row in rows} == {json.dumps(SAID | {"factor": 3.0}, sort_keys=True)}
    assert {(row["n_layers_patched"], row["n_kv_heads_patched"]) for row in rows} == {(2, 2)}
    assert all(row["n_slots_patched"] == len(row["cache_token_ids"]) - 1 for row in rows)
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "values made larger" in page and "X - A" in page
    # A run is read without the code that made it.
    monkeypatch.setattr(outside_interventions, "REGISTERED", {})
    again = Protocol.as_stored(Store(tmp_path / "run").read_record().protocol)
    assert again.sha256 == protocol.sha256 == Store(tmp_path / "run").read_record().protocol_sha256
    assert again.conditions["X"].recipe == rows[0]["patch"] and not again.conditions["X"].is_natural


def test_the_example_of_the_documentation_runs_as_it_stands_there(model: Any, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(outside_interventions, "REGISTERED", {})
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text("utf-8")
    section = page.split("## An intervention\n")[1].split("\n## ")[0]
    code, said = (section.split(f"```{language}\n")[1].split("```")[0] for language in ("python", "yaml"))
    exec(compile(code, "scaled_values.py", "exec", dont_inherit=True), {"__name__": "scaled_values"})
    condition = yaml.safe_load(said)["conditions"]["X"]
    rows = run_batch(model, batch_of(plan_of(model, loaded(tmp_path, condition["intervention"]))))
    touched = {(row["n_layers_patched"], row["error"]) for row in rows if row["condition"] == "X"}
    assert touched == {(2, None)}


def test_its_caches_are_what_its_code_says(model: Any, tmp_path: Path):
    """Factor 1 is the natural run to the bit; a factor of 3 is not."""
    batches = {
        factor: batch_of(plan_of(model, loaded(tmp_path / str(factor), SAID | {"factor": factor}))) for factor in (1, 3)
    }
    sums = {}
    for factor, batch in batches.items():
        rows = run_batch(model, batch)
        sums[factor] = {(r["condition"], r["pair_id"]): r["cache_checksum_before"] for r in rows}
    for (condition, pair), found in sums[1].items():
        if condition == "X":
            assert found == sums[1]["A", pair] != sums[3]["X", pair]
    assert {t.trial_id for t in batches[1].trials} != {t.trial_id for t in batches[3].trials}


def test_it_can_take_a_prompt_and_the_calibration_prompts(model: Any, tmp_path: Path):
    plan = plan_of(model, loaded(tmp_path, {"kind": "blended"}, **{"from": "foreign"}))
    rows = [row for row in run_batch(model, batch_of(plan)) if row["condition"] == "X"]
    assert {row["error"] for row in rows} == {None} and {row["n_slots_patched"] for row in rows} == {1}
    assert json.loads(rows[0]["patch"]) == {"kind": "blended", "share": 0.5}
    sent = Batch.model_validate_json(batch_of(plan).model_dump_json(by_alias=True))
    assert sent == batch_of(plan) and isinstance(sent.conditions["X"].change, Blended)


def test_where_the_key_is_not_used_nothing_of_it_is_stored():
    plain = Condition.model_validate(CONDITIONS["C"])
    assert "intervention" not in plain.model_dump(mode="json", by_alias=True)
    assert "outside" not in plain.model_dump(mode="json")


def test_every_setting_is_part_of_the_hash(tmp_path: Path):
    said = [SAID, SAID | {"factor": 2}, SAID | {"layers": [1]}, {"kind": "scaled_values", "factor": 3}]
    shas = {Protocol.model_validate(protocol_content("b", **changes(each))).sha256 for each in said}
    assert len(shas) == len(said)
    full = changes(SAID | {"layers": None}), changes({"kind": "scaled_values", "factor": 3.0})
    assert len({Protocol.model_validate(protocol_content("b", **each)).sha256 for each in full}) == 1


NO_KIND = "no intervention of kind"
NO_KEY = "no such key; expected"
THREE = {"kind": "scaled_values", "factor": 3}
WRONG: list[tuple[Any, str, str]] = [
    (SAID | {"kind": "scaled_valus"}, ".kind", f"{NO_KIND} 'scaled_valus'; did you mean 'scaled_values'?"),
    ({"kind": "zzz"}, ".kind", f"{NO_KIND} 'zzz'; registered are blended, scaled_values"),
    ({"kind": "reshape"}, ".kind", "'reshape' is a key of the condition itself; write 'reshape: ...' in place of"),
    ({"kind": 3}, ".kind", "Input should be a valid string, not 3"),
    ({"factor": 3}, ".kind", "this key is missing"),
    ({"kind": "scaled_values"}, ".factor", "this key is missing"),
    (THREE | {"factor": "much"}, ".factor", "factor must be a finite number, got 'much'"),
    ({"kind": "scaled_values", "facter": 3}, ".facter", f"{NO_KEY} factor, or one of factor, layers"),
    (THREE | {"zzz": 1}, ".zzz", f"{NO_KEY} one of factor, layers"),
    ("scaled_values", "", "expected a mapping that has 'kind' and the settings of that kind"),
]


@pytest.mark.parametrize(("said", "place", "told"), WRONG)
def test_a_mistake_is_told_with_its_place(tmp_path: Path, said: Any, place: str, told: str):
    text = yaml.safe_dump(protocol_content(write_bank(tmp_path / "bank"), **changes(said)), sort_keys=False)
    with pytest.raises(ProtocolError) as caught:
        parse_protocol(text, "mine.yaml")
    (line,) = str(caught.value).splitlines()
    at, message = line.split(f", conditions.X.intervention{place}: ")
    number = int(at.removeprefix("mine.yaml, line "))
    assert (place.removeprefix(".") or "intervention") in text.splitlines()[number - 1] or "missing" in told
    assert message.startswith(told)


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        (
            {"intervention": SAID, "from": "source"},
            "'scaled_values' takes nothing from another prompt; leave 'from' out",
        ),
        ({"intervention": {"kind": "blended"}}, "an intervention of kind 'blended' needs 'from'"),
        ({"intervention": SAID, "text_of": "source"}, "made in one way; it has 'text_of' and 'intervention'"),
    ],
)
def test_it_is_one_way_among_the_others(condition: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        Condition.model_validate({"about": "?", **condition})


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"factor": 2, "layers": [9]}, "condition X of phase 1: layer 9"),
        ({"factor": 900}, r"condition X of phase 1: a factor of 900 is more than a prompt has tokens \(pair "),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run(model: Any, tmp_path: Path, said: dict[str, Any], told: str):
    with pytest.raises(ProtocolError, match=told):
        plan_of(model, loaded(tmp_path, {"kind": "scaled_values", **said}))


def _raises(spec: ScaledValues, trials: Trials) -> Made:
    raise ZeroDivisionError("by\nnothing")


def _short(spec: ScaledValues, trials: Trials) -> Made:
    return Made(trials.own[[0]], Touched.none(1))


def _natural(spec: ScaledValues, trials: Trials) -> Made:
    return Made(trials.own, Touched.none(trials.own.batch))


def _counts(spec: ScaledValues, trials: Trials) -> Made:
    return replace(scale(spec, trials), planned=2, fired=2)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (_raises, "the intervention 'scaled_values' failed: ZeroDivisionError: by nothing"),
        (lambda spec, trials: trials.own, "must return a Made that holds a KVCache, not KVCache"),
        (_short, "must return one row per trial; of 5 trials it gave 1 rows"),
        (_natural, "found nothing to change in a prompt"),
        (_counts, "its Kind must say runs_prompts=True"),
    ],
)
def test_code_that_fails_marks_its_own_trials_alone(model: Any, tmp_path: Path, build: Any, told: str):
    register(Kind(ScaledValues, build))
    rows = run_batch(model, batch_of(plan_of(model, loaded(tmp_path, SAID))))
    assert {row["condition"] for row in rows if row["error"]} == {"X"}
    assert all(told in row["error"] for row in rows if row["condition"] == "X")


def test_code_that_changes_natural_caches_in_place_changes_its_own_trials_alone(model: Any, tmp_path: Path):
    def in_place(spec: Blended, trials: Trials) -> Made:
        made = blend(spec, trials)
        for cache in (trials.own, trials.giver_caches()):
            for values in cache.values:
                values.fill_(7)
            cache.pending.fill_(9)
        return made

    protocol = loaded(tmp_path, {"kind": "blended"}, **{"from": "source"})
    batch = batch_of(plan_of(model, protocol))
    limits = CoherenceLimits(excess_context=9.0, repetition_4=0.5)

    def others() -> list[str]:
        return [repr(row) for row in run_batch(model, batch, limits=limits) if row["condition"] != "X"]

    expected = others()
    register(Kind(Blended, in_place))
    assert others() == expected


def test_a_name_is_taken_once():
    other = type("Other", (InterventionSpec,), {"kind": "scaled_values", "__annotations__": {"kind": ClassVar[str]}})
    with pytest.raises(ExtensionError, match="there is an intervention of kind 'scaled_values' already"):
        register(Kind(other, scale))  # pyright: ignore[reportArgumentType]
    for name in ("reshape", "patch", "two words", ""):
        named = type("Named", (InterventionSpec,), {"kind": name, "__annotations__": {"kind": ClassVar[str]}})
        with pytest.raises(ExtensionError, match=r"kvpatch itself|needs a name of letters"):
            register(Kind(named, scale))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ExtensionError, match="registered as a Kind"):
        register(ScaledValues)  # type: ignore[arg-type]


def test_settings_whose_types_are_nowhere_are_refused_when_they_are_registered():
    annotations = {"kind": ClassVar[str], "factor": "NotImported"}
    unfinished = type("Unfinished", (InterventionSpec,), {"kind": "unfinished", "__annotations__": annotations})
    with pytest.raises(ExtensionError, match=r"types of the settings of 'unfinished', .*Unfinished, can't be found"):
        register(Kind(unfinished, scale))  # pyright: ignore[reportArgumentType]


def installed(folder: Path, entries: dict[str, str], code: str) -> Path:
    """A package as an installation leaves it: its module, and the entry points of its metadata."""
    info = folder / "toy_kinds-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "toy_kinds.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-kinds\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[kvpatch.interventions]", *lines, ""]))
    return folder


CODE = """
from typing import ClassVar
from kvpatch.interventions.build import Kind, Made
from kvpatch.caches.selection import Touched
from kvpatch.specs.interventions import InterventionSpec

class Still(InterventionSpec):
    kind: ClassVar[str] = "still"
    times: int = 1

def build(spec, trials):
    return Made(trials.own, Touched.none(trials.own.batch))

STILL = Kind(Still, build)
NUMBER = 3
"""


def test_an_entry_point_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entries = {"still": "toy_kinds:STILL", "broken": "toy_kinds:NOT_THERE", "number": "toy_kinds:NUMBER"}
    monkeypatch.syspath_prepend(installed(tmp_path / "site", entries | {"moving": "toy_kinds:STILL"}, CODE))
    monkeypatch.delitem(__import__("sys").modules, "toy_kinds", raising=False)

    def said(**of: Any) -> Condition:
        return Condition.model_validate({"about": "?", "intervention": of})

    assert said(kind="still", times=2).recipe == '{"kind": "still", "times": 2}'
    for kind, told in {
        "broken": r"the intervention 'broken' \(toy_kinds:NOT_THERE of toy-kinds\) can't be loaded: AttributeError: ",
        "number": r"the intervention 'number' \(toy_kinds:NUMBER of toy-kinds\) is no .*Kind but int; mend the entry",
        "moving": r"the intervention 'moving' \(toy_kinds:STILL of toy-kinds\) calls itself 'still'",
        "stil": r"no intervention of kind 'stil'; did you mean 'still'\?",
    }.items():
        with pytest.raises(ValueError, match=told):
            said(kind=kind)
