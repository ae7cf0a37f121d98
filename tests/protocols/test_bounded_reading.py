"""A file that would take minutes, or all memory, is refused in one line and soon; so is a pattern that never ends."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest
import yaml

from kvpatch.errors import ProtocolError
from kvpatch.files import MOST_BYTES, NotYaml, read_json, read_yaml, yaml_nodes
from kvpatch.prompts import bank as bank_room
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.load import load_protocol, parse_protocol
from kvpatch.readouts.behavior import Lexicon
from kvpatch.readouts.lexicon_files import is_shipped
from kvpatch.readouts.scorer import read_scorer
from kvpatch.specs.regexes import Pattern, PatternError
from kvpatch.specs.selectors import SlotQuery
from small import protocol_content

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
BAD = {
    "a billion laughs": (LAUGHS, "keys and values, those of aliases counted"),
    "20 MB in a list": ("[" + "1," * 10_000_000 + "]", "bytes, and may have"),
    "many in a list": ("[" + "1," * 1_000_000 + "]", "keys and values"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(200_000)), "keys and values"),
    "deep brackets": ("[" * 100_000, "nesting|within one another"),
    "deep braces": ("{a: " * 1_000, "within one another"),
    "deep blocks": ("".join(f"{' ' * i}a:\n" for i in range(1_500)), "within one another"),
    "deep dashes": ("- " * 100_000, "within one another"),
    "an alias within itself": ("a: &a [1, *a]", "stands within what it stands for"),
    "an unknown alias": ("a: *b", "undefined alias"),
    "a long number": (f"a: {'9' * 5_000}", "a number has 5,000 letters"),
    "a long number to base 60": (f"a: 1{':1' * 500_000}", "a number has 1,000,001 letters"),
    "one in quotes, by its tag": (f"a: !!int '1{':1' * 500_000}'", "a number has 1,000,001 letters"),
    "one with a fraction": (f"a: [1{':1' * 500_000}.5]", "a number has 1,000,003 letters"),
    "no date": ("a: 2001-13-45", "can't be read"),
    "a list as a key": ("? [a]\n: b", "unhashable"),
    "code": ("!!python/object/apply:os.system [id]", "constructor"),
    "a zero byte": ("a: \x00", "control characters"),
}


@pytest.mark.parametrize("kind", BAD)
def test_yaml_past_a_limit_is_refused_wherever_it_is_read(kind, tmp_path):
    content, words = BAD[kind]
    begun = time.process_time()
    with pytest.raises(NotYaml, match=words):
        read_yaml(content)
    with pytest.raises(ProtocolError, match=words):
        parse_protocol(content, "p.yaml")
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "a.yaml").write_text(content)
    with pytest.raises(ProtocolError, match="not YAML"):
        load_bank("bank", tmp_path)
    (tmp_path / "l.yaml").write_text(content)
    with pytest.raises(ProtocolError, match="not YAML") as raised:
        Lexicon.load(tmp_path / "l.yaml")
    assert len(str(raised.value)) < 1_000
    assert time.process_time() - begun < 20


def test_long_text_of_digits_in_quotes_or_with_spaces_is_a_text():
    assert read_yaml(f"a: '{'9' * 5_000}'") == {"a": "9" * 5_000}
    assert read_yaml(f"a: {'9 ' * 5_000}9") == {"a": "9 " * 5_000 + "9"}
    assert read_yaml(f"a: {'9' * 300}") == {"a": int("9" * 300)}


def test_aliases_within_the_limits_are_read():
    assert read_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


def test_thousands_of_mistakes_are_told_soon_and_not_all():
    content = protocol_content("bank")
    content["conditions"] = content["conditions"] | {
        f"X{i}": {"about": "x", "fro": "source", "text_of": "nobody"} for i in range(3_000)
    }
    content["phases"]["1"]["conditions"] += [f"Y{i}" for i in range(3_000)]
    for text in (content, content | {"conditions": protocol_content("bank")["conditions"]}):
        begun = time.process_time()
        with pytest.raises(ProtocolError) as raised:
            parse_protocol(yaml.safe_dump(text), "p.yaml")
        assert len(raised.value.lines) <= 51 and time.process_time() - begun < 20


def test_bank_of_thousands_of_wrong_entries_is_told_soon_with_the_lines_of_the_first(tmp_path, monkeypatch):
    (tmp_path / "bank").mkdir()
    for name in ("a", "b"):
        entries = [{"id": f"{name}{i}", "group": "plain", "txet": "x"} for i in range(8_000)]
        (tmp_path / "bank" / f"{name}.yaml").write_text(yaml.safe_dump(entries))
    looked: list[int] = []
    monkeypatch.setattr(bank_room, "yaml_nodes", lambda raw: looked.append(1) or yaml_nodes(raw))
    with pytest.raises(ProtocolError) as raised:
        load_bank("bank", tmp_path)
    assert "a.yaml, entry 2, txet: no such key; did you mean 'text'?" in raised.value.lines[1]
    assert "(line 4)" in raised.value.lines[1] and raised.value.lines[-1] == "and 15950 more mistakes in this file"
    assert len(looked) == 2  # a file is looked through for its lines once


def test_bank_of_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bank_room, "MOST_IN_ALL", 100)
    (tmp_path / "bank").mkdir()
    for i in range(3):
        (tmp_path / "bank" / f"{i}.yaml").write_text(f"# {'x' * 40}\n[]\n")
    with pytest.raises(ProtocolError, match="more than 100 bytes in its files"):
        load_bank("bank", tmp_path)


def test_tens_of_thousands_of_wrong_hypotheses_are_told_soon():
    content = protocol_content("bank") | {"hypotheses": ["x"] * 60_000}
    begun = time.process_time()
    with pytest.raises(ProtocolError, match=r"hypotheses\.0: must be a mapping"):
        parse_protocol(yaml.safe_dump(content), "p.yaml")
    assert time.process_time() - begun < 20


@pytest.mark.parametrize("what", ["pipe", "device", "long"])
def test_scorer_that_is_no_regular_file_or_too_long_is_not_read_for_ever(tmp_path, what):
    path = tmp_path / "s.py"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(ProtocolError, match=r"scorer s.py:f: .*(can't be read|more than)"):
        read_scorer("s.py:f", tmp_path)


@pytest.mark.parametrize("what", ["pipe", "directory", "device"])
def test_what_is_no_regular_file_is_not_read_for_ever(tmp_path, what):
    path = tmp_path / "p.yaml"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ProtocolError, match="can't be read"):
        load_protocol(str(path))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 100_000, "", "\xff", "{", "nan]"])
def test_json_that_is_none_or_too_deep_is_one_kind_of_error(tmp_path: Path, content: str):
    (tmp_path / "x.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError):  # noqa: PT011 (json's own, and ours)
        read_json(tmp_path / "x.json")


# Patterns

SLOW = [r"(a+)+b", r"(a|a)*b", r"(a|aa)+b", r"(?:a*)*b", r"(\w+)*b"]


@pytest.mark.parametrize("pattern", SLOW)
def test_pattern_that_tries_too_many_ways_ends_soon(pattern):
    """`regex` sees through some of them, and is stopped on the others."""
    begun = time.monotonic()
    with contextlib.suppress(ProtocolError):
        list(Pattern(pattern).finditer("a" * 60 + "! b"))
    assert time.monotonic() - begun < 10


def test_repetitions_within_the_limit_are_patterns():
    for pattern in (r"(?:a{0,200}){0,200}", r"[a-z]{3,}(?: \w+){0,40}", "(a|b)*", r"(?:(?<=a)b){0,999}", "(?>a{9})?"):
        assert Pattern(pattern).match("abc") is not None


def test_some_pattern_is_stopped():
    with pytest.raises(ProtocolError, match=r"the pattern '\(a\|a\)\*b' took more than 1 s on the text"):
        Pattern("(a|a)*b").match("a" * 60 + "! b")


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", "[a", "(?P<n>a)(?P<n>b)", "(" * 5_000, "a{2,1}", "a" * 300_000, "a{99999999999}", "(?:a{65535}){65535}"),
        *("(?=(a{999}|b){999})c", "(?:(a{999})|b){999}", "()(?(1)a|(b{999}){999})", "(?:a{9999}?){9999}"),
    ],
)
def test_what_is_no_pattern_is_refused_by_its_reason(pattern):
    with pytest.raises(PatternError):
        Pattern(pattern)
    with pytest.raises(ValueError, match="is not a regular expression"):
        SlotQuery(keywords=[pattern])


def lexicon_with(folder: Path, pattern: str, example: str) -> Path:
    entry = {"id": "slow", "pattern": pattern, "matches": [example]}
    path = folder / "slow.yaml"
    path.write_text(yaml.safe_dump({"name": "slow", "version": 1, "entries": [entry]}))
    return path


@pytest.mark.parametrize("pattern", ["(a|aa)+b", "(a|a)*b"])
def test_lexicon_of_ones_own_is_stopped_on_a_text_that_its_pattern_never_ends_on(tmp_path, pattern):
    scorer = read_scorer(str(lexicon_with(tmp_path, pattern, "aab")))
    assert scorer.score("aab aab x", "").score > 0
    begun = time.monotonic()
    with pytest.raises(ProtocolError, match="took more than 1 s"):
        scorer.score("a" * 60 + "! b", "")
    assert time.monotonic() - begun < 10


def test_lexicon_with_an_example_that_it_never_ends_on_is_refused_when_it_is_read(tmp_path):
    with pytest.raises(ProtocolError, match="took more than 1 s"):
        read_scorer(str(lexicon_with(tmp_path, "(a|a)*b", "a" * 60 + "! b")))


def test_lexicon_that_is_shipped_gives_the_same_hits_with_and_without_the_limit(tmp_path):
    shipped = Lexicon.load("recursion")
    assert is_shipped(shipped.sha256)
    from importlib.resources import files

    content = (files("kvpatch.readouts") / "lexicons" / "recursion.yaml").read_bytes()
    timed = Lexicon.parse(content + b"\n# mine\n", "mine")
    assert not is_shipped(timed.sha256)
    texts = [c.text for c in load_bank("recursion").continuations[::5]]
    assert [shipped.hits(text) for text in texts] == [timed.hits(text) for text in texts]
    assert any(shipped.hits(text) for text in texts)


@pytest.mark.parametrize(
    "hypotheses", ["[x]", "[{id: [a]}]", "[{id: {a: 1}}]", "[null]", "[{}]", "x", "[[1]]", "[{id: 3}]"]
)
def test_changes_of_hypotheses_that_are_none_are_mistakes_of_the_file(hypotheses):
    with pytest.raises(ProtocolError, match=r"p\.yaml, line \d"):
        parse_protocol(f"extends: dec7\nprotocol: x\nhypotheses: {hypotheses}\n", "p.yaml")


@pytest.mark.parametrize("name", ["é" * 300, "x" * 5_000, "a\x00b", "\udcff"])
def test_name_that_no_file_can_have_is_the_name_of_no_file(name, tmp_path):
    for read in (load_bank, Lexicon.load, load_protocol):
        with pytest.raises(ProtocolError, match="no "):
            read(name)
    with pytest.raises(ProtocolError):
        load_bank(name, tmp_path)
