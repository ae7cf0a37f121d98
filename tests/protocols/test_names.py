"""Every name in a protocol is checked when it is read: a wrong one is told with its place and the nearest right one."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvpatch.cli import main as cli
from kvpatch.errors import ProtocolError
from kvpatch.planning.plan import PlanningModel, make_plan
from kvpatch.protocols.load import load_protocol, parse_protocol, shipped_protocols
from kvpatch.protocols.names import wrong_readouts
from kvpatch.protocols.schema import Protocol
from kvpatch.readouts.scorer import read_scorer
from kvpatch.specs.readouts import readouts
from kvpatch.store.columns import TRIAL_COLUMNS
from small import protocol_content, write_bank

CORRELATION: dict[str, Any] = {
    "id": "follows", "claim": "c", "phase": "1", "contrast": "C - N1", "readout": "mode_llr", "test": "correlates",
    "direction": "positive", "against": {"contrast": "C - N1", "readout": "rv_output", "transform": "log"},
    "controlling": [{"contrast": "C", "readout": "source_tokens"}], "family": "g", "gate": 4,
}  # fmt: skip
REPLICATION: dict[str, Any] = {
    "id": "again", "claim": "c", "phase": "2", "contrast": "C - N1", "readout": "mode_llr", "test": "replicates",
    "of": "transfer", "family": "again", "gate": 5,
}  # fmt: skip


def content(**changes: Any) -> dict[str, Any]:
    """The small protocol with a second phase on a second model, a correlation, a replication and expectations."""
    found = copy.deepcopy(protocol_content("bank"))
    found["models"] = {"second": "smollm2-135m"}
    found["phases"]["2"] = {"question": "?", "n": 3, "conditions": ["A", "B", "C", "N1"], "model": "second"}
    found["hypotheses"] += [copy.deepcopy(CORRELATION), copy.deepcopy(REPLICATION)]
    found["corrections"] = {"f": "holm"}
    found["expected"] = {"wired": {"supported": ["exists"], "not supported or slight": ["transfer"]}}
    return found | changes


def put(found: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The content with one value changed; a path such as "hypotheses/0/readout"."""
    *parents, last = path.split("/")
    place: Any = found
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    place[int(last) if isinstance(place, list) else last] = value
    return found


def written(folder: Path, found: dict[str, Any]) -> Path:
    write_bank(folder / "bank")
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(found, sort_keys=False))
    return path


def test_protocol_with_right_names_is_read(tmp_path):
    assert load_protocol(str(written(tmp_path, content())), needs_files=True).hypothesis("follows").controlling


WRONG: list[tuple[str, Any, str]] = [
    ("hypotheses/0/readout", "mode_lr", "hypotheses.0.readout: no readout 'mode_lr'; did you mean 'mode_llr'?"),
    ("hypotheses/0/readout", "Mode_LLR", "did you mean 'mode_llr'?"),
    ("hypotheses/0/readout", "scoree", "no readout 'scoree'; there is recursive_score, recursive_score_masked, "),
    ("hypotheses/0/readout", "seed", "column 'seed' measures no outcome; "),
    ("hypotheses/0/readout", "changes_fired", "column 'changes_fired' measures no outcome"),
    ("hypotheses/0/readout", "rv_trajectory", "column 'rv_trajectory' measures no outcome"),
    ("hypotheses/3/against/readout", "rv_outputt", "hypotheses.3.against.readout: no readout 'rv_outputt'; did you"),
    ("hypotheses/3/controlling/0/readout", "source_token", "hypotheses.3.controlling.0.readout: no readout"),
    ("hypotheses/0/transform", "log", "hypotheses.0.transform: 'mode_llr' can be 0 or below"),
    ("hypotheses/3/against/readout", "js_pull", "hypotheses.3.against.transform: 'js_pull' can be 0 or below"),
    ("hypotheses/0/readout", "attention_body", "phase '1' does not measure 'attention_body'; give the phase '"),
    ("hypotheses/0/readout", "pr_v_late", "phase '1' does not measure 'pr_v_late'; give the phase 'geometry: true'"),
    ("hypotheses/3/against/readout", "pr_k_late", "phase '1' does not measure 'pr_k_late'"),
    ("hypotheses/3/controlling/0/readout", "angle_target", "phase '1' does not measure 'angle_target'"),
    ("hypotheses/0/phase", "one", "hypotheses.0.phase: no phase 'one'; there is 1, 2"),
    ("hypotheses/0/contrast", "B - AA", "hypotheses.0.contrast: condition 'AA' is not in phase '1'; did you mean 'A'?"),
    ("hypotheses/0/contrast", "B - Q", "condition 'Q' is not in phase '1'; it has A, B, C"),
    ("hypotheses/3/against/contrast", "C - N11", "hypotheses.3.against.contrast: condition 'N11'"),
    ("hypotheses/3/controlling/0/contrast", "CC", "hypotheses.3.controlling.0.contrast: condition 'CC'"),
    ("hypotheses/4/of", "tranfer", "hypotheses.4.of: no hypothesis 'tranfer'; did you mean 'transfer'?"),
    ("hypotheses/4/of", "follows", "'follows' is no contrast with a direction"),
    ("hypotheses/0/test", "greatr", "hypotheses.0.test: Input should be 'greater'"),
    ("phases/1/conditions", ["A", "B", "C", "N1", "a"], "phases.1.conditions.4: no condition 'a'; did you mean 'A'?"),
    ("phases/2/controls", ["S00"], "phases.2.controls.0: no condition 'S00'; did you mean 'S0'?"),
    ("phases/2/model", "secnd", "phases.2.model: no model 'secnd' in 'models'; did you mean 'second'?"),
    ("calibration/conditions", ["A", "X"], "calibration.conditions.1: no condition 'X'; there is A, B, C"),
    ("conditions/C/from", "sorce", "conditions.C.from: no prompt 'sorce'; did you mean 'source'?"),
    ("conditions/S1/text_of", "forein", "conditions.S1.text_of: no prompt 'forein'; did you mean 'foreign'?"),
    ("conditions/C/into", "traget", "conditions.C.into: Input should be 'target' or 'source', not 'traget'; did"),
    ("corrections", {"ff": "holm"}, "corrections.ff: no hypothesis has family 'ff'; did you mean 'f'?"),
    ("expected", {"wird": {"supported": ["exists"]}}, "expected.wird: no organism 'wird'; did you mean 'wired'?"),
    ("expected", {"wired": {"suported": ["exists"]}}, "no verdict 'suported'; did you mean 'supported'?"),
    ("expected", {"wired": {"supported": ["exsts"]}}, "no hypothesis 'exsts'; did you mean 'exists'?"),
    ("pairing/sources", "recursve", "has no group or level 'recursve'; did you mean 'recursive'?"),
    ("pairing/targets", "x", "pairing.targets: bank 'bank' has no group or level 'x'; it has foreign, pl"),
    ("pairing/also", ["foregn"], "pairing.also.0: bank 'bank' has no group or level 'foregn'; did you mean 'foreign'?"),
    ("phases/2/pairing", {"by": "subject", "sources": "level_9"}, "phases.2.pairing.sources: bank 'bank' has no group"),
    ("mode", "recursiv", "mode: bank 'bank' has no continuations of mode 'recursiv'; did you mean 'recursive'?"),
    ("bank", "recursoin", "bank: no prompt bank 'recursoin'"),
    ("bank", "recursoin", "did you mean 'recursion'?"),
    ("readouts/lexicon", "recusion", "readouts.lexicon: no lexicon 'recusion'; "),
    ("readouts/lexicon", "mine_lexicon.yaml", "readouts.lexicon: no lexicon 'mine_lexicon.yaml'"),
    ("readouts/lexicon", "scorer.py:french", "readouts.lexicon: scorer scorer.py:french"),
    ("generation/temprature", 0.5, "generation.temprature: no such key; expected temperature"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "words"), WRONG)
def test_wrong_name_is_told_in_one_line_with_its_place_and_what_there_is(tmp_path, path, value, words):
    file = written(tmp_path, put(content(), path, value))
    with pytest.raises(ProtocolError) as raised:
        load_protocol(str(file), needs_files=True)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"{file}, line ")
    assert words in message


def test_line_is_that_of_the_wrong_name(tmp_path):
    file = written(tmp_path, put(content(), "hypotheses/3/against/readout", "rv_outputt"))
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if "rv_outputt" in text)
    with pytest.raises(ProtocolError, match=f", line {line}, hypotheses"):
        load_protocol(str(file))


def test_marked_words_are_measured_only_where_some_are_marked():
    found = put(content(), "hypotheses/0/readout", "attention_marked")
    for attention, words in ((True, "give the phase 'attention: {marked: ...}'"), (False, "does not measure")):
        with pytest.raises(ProtocolError, match=words):
            parse_protocol(yaml.safe_dump(put(found, "phases/1/attention", attention)), "mine.yaml")
    marked = put(found, "phases/1/attention", {"marked": "body"})
    assert parse_protocol(yaml.safe_dump(marked), "mine.yaml").phases["1"].watched is not None


def test_natural_gap_of_a_readout_that_the_calibration_does_not_measure_is_refused():
    found = put(content(), "phases/1/geometry", True)
    found["hypotheses"][0] |= {"readout": "pr_v_late", "test": "equivalent", "margin": {"natural_gap": 0.2}}
    with pytest.raises(ProtocolError, match=r"margin.natural_gap: the calibration pairs have no 'pr_v_late'"):
        parse_protocol(yaml.safe_dump(found), "mine.yaml")
    found["hypotheses"][0]["margin"] = {"dz": 0.2}
    assert parse_protocol(yaml.safe_dump(found), "mine.yaml")


def test_condition_whose_prompt_the_phase_does_not_lend_is_refused():
    found = put(content(), "pairing/also", ["foreign"])
    found["conditions"]["L"] = {"about": "lent", "from": "another", "patch": {"align": "replace"}}
    found["phases"]["3"] = {"question": "?", "n": 2, "conditions": ["A", "L"], "pairing": {"also": ["another"]}}
    assert parse_protocol(yaml.safe_dump(found), "mine.yaml")
    found["phases"]["1"]["conditions"] = ["A", "B", "C", "N1", "L"]
    with pytest.raises(ProtocolError, match=r"phases.1.conditions.4: condition 'L' takes a 'another' prompt, and the"):
        parse_protocol(yaml.safe_dump(found), "mine.yaml")


def test_all_that_is_wrong_is_said_at_once_one_line_each_in_the_order_of_the_file(tmp_path):
    found = put(
        put(put(content(), "hypotheses/0/readout", "scoree"), "calibration/conditions", ["A", "X"]), "mode", "x"
    )
    found = put(put(found, "pairing/targets", "plane"), "hypotheses/4/of", "tranfer")
    with pytest.raises(ProtocolError) as raised:
        load_protocol(str(written(tmp_path, found)), needs_files=True)
    lines = str(raised.value).splitlines()
    for line, word in zip(lines, ("'plane'", "'X'", "'scoree'", "'tranfer'", "mode 'x'"), strict=True):
        assert word in line
    wrong = put(put(content(), "generation/temperature", "warm"), "hypotheses/0/gate", 9) | {"titel": "x"}
    del wrong["title"]
    with pytest.raises(ProtocolError) as raised:
        load_protocol(str(written(tmp_path, wrong)))
    lines = str(raised.value).splitlines()
    assert len(lines) == 3, lines
    for line, word in zip(lines, ("generation.temperature", "hypotheses.0.gate", "titel: no such key"), strict=True):
        assert word in line


def test_key_that_is_wrong_within_one_of_several_forms_is_named():
    found = put(content(), "phases/1/attention", {"markd": "body"})
    with pytest.raises(ProtocolError, match=r"phases.1.attention.markd: no such key; expected marked") as raised:
        parse_protocol(yaml.safe_dump(found), "mine.yaml")
    assert "\n" not in str(raised.value)


def test_hypothesis_of_an_extension_is_found_where_its_file_has_it_or_goes_by_its_id():
    text = "extends: dec7\nphases:\n  '5': {geometry: false}\nhypotheses:\n"
    text += "  - id: transfer_llr\n    alpha: 0.01\n    readout: mode_lr\n"
    with pytest.raises(ProtocolError) as raised:
        parse_protocol(text, "m.yaml")
    lines = str(raised.value).splitlines()
    assert "m.yaml, line 7, hypotheses.0.readout: no readout 'mode_lr'" in lines[-1]
    assert any("hypotheses.ratio_predicts.against.readout: phase '5' does not measure" in line for line in lines[:-1])


# Files


def test_files_that_are_not_there_are_wrong_only_where_they_are_needed(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content(bank="nowhere", readouts={"lexicon": "nowhere.yaml"})))
    assert load_protocol(str(path)).bank == "nowhere"
    with pytest.raises(ProtocolError, match="bank: no prompt bank 'nowhere'"):
        load_protocol(str(path), needs_files=True)
    write_bank(tmp_path / "nowhere")
    assert load_protocol(str(path)).bank == "nowhere"
    with pytest.raises(ProtocolError, match=r"readouts.lexicon: no lexicon 'nowhere.yaml'"):
        load_protocol(str(path), needs_files=True)


@pytest.mark.parametrize("needs_files", [True, False])
def test_lexicon_that_does_not_hold_to_its_examples_is_told_with_the_protocol(tmp_path, needs_files):
    lexicon = r"{name: l, version: 1, entries: [{id: see, pattern: '\bobserv\b', matches: [observe]}]}"
    (tmp_path / "lexicon.yaml").write_text(lexicon)
    file = written(tmp_path, put(content(), "readouts/lexicon", "lexicon.yaml"))
    with pytest.raises(
        ProtocolError, match=r"readouts.lexicon: lexicon 'lexicon.yaml', entry 'see': example 'observe'"
    ):
        load_protocol(str(file), needs_files=needs_files)


def test_code_is_not_run_to_check_a_name(tmp_path):
    (tmp_path / "scorer.py").write_text("raise SystemExit('it ran')\n")
    file = written(tmp_path, put(content(), "readouts/lexicon", "scorer.py:french"))
    assert load_protocol(str(file), needs_files=True).readouts.lexicon == "scorer.py:french"
    file = written(tmp_path, put(content(), "readouts/lexicon", "no_such_package.module:french"))
    assert load_protocol(str(file), needs_files=True)


# Where it counts


@pytest.mark.parametrize("command", [("plan", "--model", "m"), ("run", "--model", "m", "--out", "out"), ("power",)])
def test_commands_refuse_a_misspelt_readout_before_they_load_anything(tmp_path, capsys, monkeypatch, command):
    file = written(tmp_path, put(put(content(), "hypotheses/0/readout", "scoree"), "hypotheses/3/contrast", "C - N9"))
    monkeypatch.chdir(tmp_path)
    for loading in ("load_all", "host_of"):
        monkeypatch.setattr(f"kvpatch.cli.runs.{loading}", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["kvpatch", command[0], str(file), *command[1:]])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    assert (stopped.value.code, said.out) == (2, "")
    assert [line.partition(": ")[0] for line in said.err.splitlines()] == ["kvpatch", "kvpatch"]
    assert "no readout 'scoree'" in said.err and "'N9'" in said.err
    assert not (tmp_path / "out").exists()


def test_protocol_made_in_python_is_refused_at_planning(tmp_path):
    from kvpatch.prompts.bank import load_bank

    bank = load_bank(str(write_bank(tmp_path / "bank")))
    protocol = Protocol.model_validate(put(protocol_content(tmp_path / "bank"), "hypotheses/0/readout", "scoree"))
    model = PlanningModel(body_length=len, key="k", kv_heads=2, has_template=True)
    with pytest.raises(ProtocolError, match=r"small, hypotheses.0.readout: no readout 'scoree'"):
        make_plan(protocol, bank, {None: model}, seed=0)


def test_readouts_are_columns_that_measure_and_shipped_protocols_name_no_other():
    assert {"mode_llr", "recursive_score", "n_tokens", "source_tokens"} <= readouts().keys()
    assert not {"seed", "sample", "changes_planned", "changes_fired", "coherent", "text"} & readouts().keys()
    assert readouts().keys() - TRIAL_COLUMNS.keys() == {"source_tokens"}
    for name in shipped_protocols():
        protocol = load_protocol(name, needs_files=True)
        assert {h.readout for h in protocol.hypotheses} <= readouts().keys()
        assert read_scorer(protocol.readouts.lexicon).kind == "lexicon"


def test_the_semantic_score_is_read_only_where_the_protocol_switches_it_on(tmp_path: Path):
    content = protocol_content(write_bank(tmp_path / "bank"))
    content["hypotheses"][0]["readout"] = "semantic_score"
    (wrong,) = wrong_readouts(Protocol.model_validate(content))
    assert "readouts: {semantic: recursion}" in str(wrong)
    content["readouts"] = {**content.get("readouts", {}), "semantic": "recursion"}
    assert list(wrong_readouts(Protocol.model_validate(content))) == []
