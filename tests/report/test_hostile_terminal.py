"""Hostile texts of a protocol, a bank and a lexicon on the way through every command: none moves or hides anything."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hostile import FREE, HOSTILE, hidden
from kvpatch.cli import main as cli
from small import bank_entries, protocol_content, write_bank

pytestmark = pytest.mark.model


def hostile_protocol(folder: Path) -> Path:
    """A protocol that can be run, each of whose free texts, and those of its bank, is one of the sixty in its turn."""
    # A zero byte and the like can't stand in YAML as they are; its dumper escapes them.
    turns = itertools.cycle(HOSTILE)

    def filled(tree: Any) -> Any:
        if isinstance(tree, dict):
            free = {key: next(turns) for key in FREE if isinstance(tree.get(key), str)}
            return {key: filled(value) for key, value in tree.items()} | free
        return [filled(value) for value in tree] if isinstance(tree, list) else tree

    entries = bank_entries()
    for place, entry in enumerate(entries):
        if "group" in entry:
            entry |= {"text": f"{HOSTILE[place % 60][:40]} {entry['text']}", "topic": next(turns)[:60]}
    content = filled(protocol_content("bank"))
    content["phases"]["1"]["n"] = 2
    content["generation"]["max_new_tokens"] = 3
    write_bank(folder / "bank", entries)
    path = folder / "hostile.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def said(monkeypatch: Any, capsys: Any, *words: object) -> tuple[int, list[str]]:
    """Exit code, and what a command printed."""
    monkeypatch.setattr(sys, "argv", ["kvpatch", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), [printed.out, printed.err]


def test_every_command_on_a_hostile_protocol_shows_symbols(tmp_path, tiny_dirs, monkeypatch, capsys):
    protocol, model, out = hostile_protocol(tmp_path), tiny_dirs("llama"), tmp_path / "run"
    monkeypatch.setenv("KVPATCH_DEBUG", "")
    for words in (
        ["power", protocol, "--draws", "2", "--all"],
        ["power", protocol, "--draws", "0", "--json"],
        ["plan", protocol, "--model", model, "--no-timing", "--all"],
        ["bank", tmp_path / "bank", "--model", model, "--all"],
        ["bank", tmp_path / "bank", "--model", model, "--json"],
        ["run", protocol, "--model", model, "--out", out],
        ["status", out], ["verdicts", out, "--all"], ["effects", out, "--all"], ["report", out], ["repair", out],
    ):  # fmt: skip
        code, printed = said(monkeypatch, capsys, *words)
        assert code == 0, (words, printed)
        assert hidden(printed) == [], words


@pytest.mark.parametrize("text", HOSTILE)
def test_what_refuses_a_hostile_name_shows_symbols(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KVPATCH_DEBUG", "")
    content = protocol_content("bank", mode=text, hypotheses=[{"id": text, "phase": text}], conditions={text: {}})
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "b.yaml").write_text(yaml.safe_dump([{"id": text, "group": text, text: 1}, {"mode": text}]))
    (tmp_path / "l.yaml").write_text(yaml.safe_dump({"lists": {text: [text]}, "entries": [{"id": text}]}))
    name = text.replace("\0", "")
    for words in (
        ["plan", tmp_path / "p.yaml", "--model", "x/y"],
        ["bank", tmp_path / "bank", "--model", "x"],
        ["plan", name or "x", "--model", name],
        ["status", tmp_path / name[:80].replace("/", "-")],
        ["verdicts", "x", "--protocol", name],
    ):
        code, printed = said(monkeypatch, capsys, *words)
        assert code == 2 and hidden(printed) == [], words
