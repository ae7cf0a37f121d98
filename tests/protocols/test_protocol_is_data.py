"""A protocol is data: its names can't become paths, columns or markup, and its files lie in its own folder."""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path

import pytest
import yaml

from kvpatch.cli import console as terminal
from kvpatch.cli import main as cli
from kvpatch.cli.console import PlainConsole
from kvpatch.errors import KvpatchError, ProtocolError, quoted_briefly
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.load import load_protocol, parse_protocol
from kvpatch.protocols.naming import misnamed
from kvpatch.protocols.schema import Protocol
from kvpatch.store.directory import Store
from small import protocol_content, write_bank, write_protocol
from synthetic import record_of

HOSTILE = [
    "../../outside", "/etc/passwd", "..", ".hidden", "a/b", "a\\b", "-rf", "", " ", "a b", "[bold]x[/bold]", "[/]",
    "<script>", "a\x00b", "a\x1b[31mb", "a\u202eb", "a\nb", "x" * 65, "é" * 65, "\U00020000" * 64, "a:b", "a|b", "%s",
    "{0}",    "$(id)", "`id`", "'; drop table trials; --", "C - N1",
]  # fmt: skip


def named(kind: str, name: str) -> dict:
    content = copy.deepcopy(protocol_content("bank"))
    if kind == "phase":
        old = next(iter(content["phases"]))
        content["phases"] = {name if key == old else key: value for key, value in content["phases"].items()}
        for h in content["hypotheses"]:
            h["phase"] = name if h["phase"] == old else h["phase"]
    elif kind == "condition":
        content["conditions"][name] = content["conditions"]["A"]
    elif kind == "hypothesis":
        content["hypotheses"] = [*content["hypotheses"], content["hypotheses"][0] | {"id": name}]
    elif kind == "model":
        content["models"] = {name: "smollm2-135m"}
    return content


@pytest.mark.parametrize("kind", ["phase", "condition", "hypothesis", "model"])
@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_name_that_could_be_a_path_or_markup_is_refused_at_its_place(kind, name):
    with pytest.raises(
        ProtocolError, match=f"can't name a {kind}: a name is made|String should match pattern"
    ) as raised:
        parse_protocol(yaml.safe_dump(named(kind, name), sort_keys=False), "p.yaml")
    assert all(len(line) < 600 and line.isprintable() for line in str(raised.value).splitlines())


@pytest.mark.parametrize("name", ["1", "interventions", "N1y", "a-b.c", "_x", "späte_Schichten", "晚", "x" * 64])
@pytest.mark.parametrize("kind", ["phase", "condition", "model"])
def test_ordinary_name_in_any_script_is_taken(kind, name):
    parse_protocol(yaml.safe_dump(named(kind, name), sort_keys=False), "p.yaml")


@pytest.mark.parametrize("name", ["calibration", "Calibration", "calibration-second", "CALIBRATION-x"])
def test_phase_of_the_held_out_pairs_has_its_name_for_itself(name):
    with pytest.raises(ProtocolError, match="is a name that kvpatch uses itself"):
        parse_protocol(yaml.safe_dump(named("phase", name), sort_keys=False), "p.yaml")


def test_shipped_protocols_keep_to_the_names_they_ask_for():
    for name in ("dec7", "demo", "validate"):
        assert not list(misnamed(load_protocol(name)))


def test_stored_run_with_a_name_of_an_older_version_is_read():
    assert "phase one: a" in Protocol.as_stored(named("phase", "phase one: a")).phases


# Files


def elsewhere(tmp_path: Path) -> tuple[Path, Path]:
    """A protocol's folder, and a bank beside it."""
    (tmp_path / "own").mkdir()
    return tmp_path / "own", write_bank(tmp_path / "bank")


@pytest.mark.parametrize("how", ["dots", "link", "link within"])
def test_bank_outside_the_protocols_folder_is_read_only_where_it_is_allowed(tmp_path, how):
    own, bank = elsewhere(tmp_path)
    name = {"dots": "../bank", "link": "linked", "link within": "copied"}[how]
    if how == "link":
        (own / "linked").symlink_to(bank)
    if how == "link within":
        (own / "copied").mkdir()
        for file in bank.glob("*.yaml"):
            (own / "copied" / file.name).symlink_to(file)
    path = write_protocol(own, bank=name)
    with pytest.raises(ProtocolError, match=r"bank: the bank .* lies outside the protocol's folder"):
        load_protocol(str(path), needs_files=True)
    assert load_protocol(str(path)).bank == name  # it is not looked at where it is not needed
    assert load_protocol(str(path), needs_files=True, may_leave=True).bank == name


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.yaml", "../code.py:f", "~/x/../../../secret.yaml"])
def test_lexicon_outside_the_protocols_folder_is_refused_unread(tmp_path, name):
    (tmp_path / "own").mkdir()
    for file in ("secret.yaml", "code.py"):
        (tmp_path / file).write_text("hunter2: [")
    path = write_protocol(tmp_path / "own", readouts={"lexicon": name})
    with pytest.raises(ProtocolError, match="lies outside the protocol's folder") as raised:
        load_protocol(str(path), needs_files=True)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("name", ["../model", "a/../../model", "~/model", "~root/model"])
def test_further_model_outside_the_protocols_folder_is_loaded_only_where_it_is_allowed(tmp_path, name):
    phases = {"1": {"question": "?", "n": 2, "conditions": ["A", "B"], "model": "other"}}
    write_bank(tmp_path / "bank")
    path = write_protocol(tmp_path, bank="bank", models={"other": name}, phases=phases, hypotheses=[])
    with pytest.raises(ProtocolError, match=r"models\.other: the model .* lies outside the protocol's folder"):
        load_protocol(str(path), needs_files=True)
    assert load_protocol(str(path), needs_files=True, may_leave=True).models == {"other": name}


@pytest.mark.parametrize("name", ["..", "../banks", "../../protocols", ".", "recursion/../recursion"])
def test_shipped_bank_goes_by_its_name_alone(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProtocolError, match="bank"):
        load_bank(f"no{name}")
    with pytest.raises(ProtocolError):
        load_bank(name, tmp_path)


# The terminal


def test_square_brackets_and_control_characters_reach_the_terminal_as_text(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    shown = PlainConsole()
    for text in ("[bold red]x[/bold red]", "[/]", "[link=file:///etc]y[/link]", ":smile:", "a\x1b[2Jb\x9b31mc\u202ed"):
        shown.print(text)
        terminal.say(text)
    said = out.getvalue()
    for text in ("[bold red]x[/bold red]", "[/]", "[link=file:///etc]y[/link]", ":smile:", "a␛[2Jb␦31mc⟨RLO⟩d"):
        assert said.count(text) == 2, text
    assert not set("\x1b\x9b\u202e") & set(said)


def test_json_on_the_terminal_means_the_same_and_holds_no_control_character(capsys):
    terminal.say_json('{"a": "\x9b31m\u202e é"}\n')
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == {"a": "\x9b31m\u202e é"} and "é" in printed
    assert not set("\x9b\u202e") & set(printed)


@pytest.mark.parametrize("hostile", ["[/]", "[bold]", "a\x1b[31m", "[link=x]y", "\u202ex", "\x9b2J"])
def test_commands_show_a_stored_run_whose_every_name_is_hostile(tmp_path, hostile, monkeypatch, capsys):
    content = protocol_content("bank")
    content = {**content, "protocol": hostile, "title": hostile, "question": hostile}
    protocol = Protocol.model_validate(content)
    store = Store(tmp_path / "run")
    with store.locked():
        model = record_of(protocol, {}).model.model_copy(update={"name": hostile})
        store.write_record(record_of(protocol, {hostile: 3}, model=model, phases=[hostile], other_models={}))
    monkeypatch.setattr(sys, "argv", ["kvpatch", "status", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert not set("\x1b\x9b\u202e") & set(capsys.readouterr().out)


# Messages


def test_message_quotes_at_most_200_characters_and_no_control_character():
    told = quoted_briefly(f"no model {'x' * 9_000!r}: give another")
    assert told == f"no model '{'x' * 200}…': give another"
    assert quoted_briefly("it can't be 'a' or \"b\"") == "it can't be 'a' or \"b\""
    assert str(KvpatchError("a\x1b[2Jb\u202ec")) == "a␛[2Jb⟨RLO⟩c"
    assert len(str(KvpatchError("y " * 100_000))) < 5_000
    assert len(str(KvpatchError(f"{'z' * 5_000}: wrong"))) < 500


def test_every_mistake_is_quoted_briefly_and_a_flood_of_them_is_cut():
    content = protocol_content("bank")
    content["phases"] = {f"{'p' * 5_000}{i}": {"question": "?", "n": "many", "conditions": ["A"]} for i in range(200)}
    with pytest.raises(ProtocolError) as raised:
        parse_protocol(yaml.safe_dump(content), "p.yaml")
    lines = str(raised.value).splitlines()
    assert len(lines) == 51 and "more mistakes" in lines[-1]
    assert max(map(len, lines)) < 1_000
