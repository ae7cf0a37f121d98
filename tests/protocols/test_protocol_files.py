"""A protocol file is read as a person wrote it, and each mistake is named with its file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kvpatch.errors import ProtocolError
from kvpatch.protocols.load import load_protocol, parse_protocol, shipped_protocols
from small import protocol_content

TEXT = yaml.safe_dump(protocol_content("recursion"), sort_keys=False)


def line_of(needle: str, text: str = TEXT) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if line.startswith(needle))


def test_dec7_is_shipped_and_loads():
    assert "dec7" in shipped_protocols()
    dec7 = load_protocol("dec7")
    assert dec7.protocol == "dec7"
    assert {"A", "B", "C", "D", "E1", "F1", "S0", "S1", "N1"} <= set(dec7.phases["1"].all_conditions)


def test_file_is_read_as_its_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    assert load_protocol(str(path)).sha256 == parse_protocol(TEXT, "mine").sha256


def replaced(old: str, new: str) -> str:
    assert TEXT.count(old) >= 1, old
    return TEXT.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        (replaced("max_new_tokens: 10", "max_new_tokens: many"), line_of("  max_new_tokens"), "generation.max_new"),
        (replaced("max_new_tokens: 10", "max_new_tokens: 0"), line_of("  max_new_tokens"), "generation.max_new"),
        (replaced("temperature: 0.7", "temperature: -1"), line_of("  temperature"), "generation.temperature"),
        (replaced("temperature: 0.7", "temperature: .nan"), line_of("  temperature"), "generation.temperature"),
        (replaced("temperature: 0.7", "warmth: 0.7"), line_of("  temperature"), "generation.warmth"),
        (replaced("title: A small protocol", "titel: x"), line_of("title"), "titel: no such key; expected title"),
        (replaced("    n: 5", "    n: [5]"), line_of("    n: 5"), "phases.1.n"),
        (replaced("align: replace", "align: sideways"), line_of("      align: replace"), "conditions.C.patch.align"),
        (replaced("      align: replace", "      align: replace\n      layers: [0]"), None, "conditions.C.patch"),
        (replaced("    from: source\n", ""), line_of("  C:"), "conditions.C"),
        (replaced("- A\n    - B", "- Z\n    - B"), line_of("    - A"), "phases.1.conditions.0: no condition 'Z'"),
        (replaced("B - A", "B minus A"), line_of("  contrast: B - A"), "hypotheses.0.contrast"),
        (replaced("B - A", "B - Q"), line_of("  contrast: B - A"), "condition 'Q' is not in phase '1'"),
        (replaced("test: greater", "test: bigger"), line_of("  test: greater"), "hypotheses.0.test"),
        (replaced("test: greater", "test: equivalent"), line_of("- id: exists"), "needs a margin"),
        (replaced("- id: seed", "- id: exists"), line_of("- id: seed"), "'exists' is defined twice"),
        (replaced("  gate: 1", "  gate: 9"), line_of("  gate: 1"), "hypotheses.0.gate"),
        ("protocol: small\nconditions: {A: [\n", None, "not YAML"),
        ("- a\n- b\n", 1, "expected a mapping"),
        ("", 1, "expected a mapping"),
    ],
)
def test_mistake_is_named_with_file_line_and_key(text, line, key):
    with pytest.raises(ProtocolError) as raised:
        parse_protocol(text, "mine.yaml")
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("mine.yaml, line ")
    assert line is None or message.startswith(f"mine.yaml, line {line}")
    assert key in message


def test_key_given_twice_is_refused():
    """YAML would keep the second and say nothing."""
    with pytest.raises(ProtocolError, match=f"mine.yaml, line {line_of('phases:')}: key 'A' is given twice"):
        parse_protocol(replaced("phases:\n", "  A:\n    about: again\nphases:\n"), "mine.yaml")
    with pytest.raises(ProtocolError, match="key 'claim' is given twice"):
        parse_protocol(replaced("  claim: B > A", "  claim: B > A\n  claim: C > A"), "mine.yaml")


def test_unknown_name_says_what_there_is():
    with pytest.raises(ProtocolError, match="no protocol 'dec8': shipped are dec7"):
        load_protocol("dec8")


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_unreadable_file_is_named(tmp_path: Path, name):
    path = tmp_path / name
    if name == ".":
        path = tmp_path / "folder.yaml"
        path.mkdir()
    with pytest.raises(ProtocolError, match=r"\.yaml: can't be read") as raised:
        load_protocol(str(path))
    assert "\n" not in str(raised.value)


def test_file_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("title: \xe9".encode("latin-1"))
    with pytest.raises(ProtocolError, match="can't be read"):
        load_protocol(str(path))


def test_a_protocol_may_say_only_what_it_changes_of_a_shipped_one():
    text = "extends: dec7\nprotocol: mine\ngeneration: {max_new_tokens: 7}\nhypotheses:\n"
    text += "  - {id: transfer_llr, alpha: 0.01}\n"
    text += (
        "  - {id: more, claim: c, phase: '1', contrast: C - N1, readout: mode_llr, test: greater, family: f, gate: 2}\n"
    )
    mine, dec7 = parse_protocol(text, "mine.yaml"), load_protocol("dec7")
    assert mine.protocol == "mine"
    assert (mine.generation.max_new_tokens, mine.generation.temperature) == (7, dec7.generation.temperature)
    assert mine.hypothesis("transfer_llr").alpha == 0.01
    assert mine.hypothesis("transfer_llr").claim == dec7.hypothesis("transfer_llr").claim
    assert [h.id for h in mine.hypotheses] == [*(h.id for h in dec7.hypotheses), "more"]
    assert mine.conditions == dec7.conditions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("protocol: m\nextends: dec8\n", "m.yaml, line 2, extends: no shipped protocol 'dec8'"),
        (
            "extends: dec7\nexpected: {early: {supported: [nothing]}}\n",
            "line 2, expected.early.supported: no hypothesis",
        ),
    ],
)
def test_what_is_wrong_with_an_extension_is_named(text: str, message: str):
    with pytest.raises(ProtocolError, match=message):
        parse_protocol(text, "m.yaml")
