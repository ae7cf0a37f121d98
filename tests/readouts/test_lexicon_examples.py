"""A lexicon is held to its examples when it is read, a user's as a shipped one: no pattern is scored in vain."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpatch.errors import ProtocolError
from kvpatch.readouts.behavior import Lexicon, lexicon_bytes
from kvpatch.readouts.scorer import read_scorer

SHIPPED = ("recursion", "recursion-1", "organism")


def written(folder: Path, *entries: str) -> Path:
    """A lexicon in a file of the user's."""
    path = folder / "mine.yaml"
    path.write_text("name: mine\nversion: 1\nentries:\n" + "".join(f"  - {entry}\n" for entry in entries))
    return path


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            [r"{id: see, pattern: '\bobserv\b', matches: [observe]}"],
            ["'see'", "example 'observe'", "its pattern finds nothing in it"],
        ),
        ([r"{id: moon, pattern: 'moons?', matches: [moon, moonlight]}"], ["'moon'", "'moonlight'", "finds nothing"]),
        ([r"{id: two, pattern: 'moon', matches: ['moon and moon']}"], ["'two'", "'moon and moon'", "'moon' of entry"]),
        (
            ["{id: a, pattern: 'full moon', matches: [full moon]}", "{id: b, pattern: moon, matches: [full moon]}"],
            ["entry 'b'", "'full moon' of entry 'a'"],
        ),
        (
            ["{id: a, pattern: moons?, matches: [moon], rejects: [month, 'blue moons']}"],
            ["entry 'a'", "counter-example 'blue moons'", "'moons' of entry 'a'"],
        ),
        (
            ["{id: a, pattern: sun, matches: [sun]}", "{id: b, pattern: moon, matches: [moon], rejects: [the sun]}"],
            ["entry 'b'", "counter-example 'the sun'", "'sun' of entry 'a'"],
        ),
        ([r"{id: late, pattern: 'moon', not_after: [full], matches: [full moon]}"], ["'late'", "'full moon'"]),
    ],
)
@pytest.mark.parametrize("read", [Lexicon.load, lambda path: read_scorer(str(path))], ids=["load", "read_scorer"])
def test_example_that_does_not_hold_is_told_with_entry_example_and_file(tmp_path, entries, words, read):
    path = written(tmp_path, *entries)
    with pytest.raises(ProtocolError) as raised:
        read(path)
    message = str(raised.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


@pytest.mark.parametrize("matches", ["", ", matches: []"])
def test_entry_without_an_example_is_refused_for_a_protocol(tmp_path, matches):
    path = written(tmp_path, "{id: sun, pattern: sun, matches: [sun]}", f"{{id: moon, pattern: moon{matches}}}")
    with pytest.raises(ProtocolError, match=r"entry 'moon': it has no example; give at least one text under 'matches'"):
        read_scorer("mine.yaml", path.parent)


def test_lexicon_that_holds_to_its_examples_is_read(tmp_path):
    path = written(tmp_path, "{id: moon, pattern: 'moons? (?:and|in) june', matches: [Moon in June], rejects: [moon]}")
    assert read_scorer("mine.yaml", path.parent).kind == "lexicon"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_lexicons_hold_to_their_examples_and_every_entry_has_some(name):
    assert read_scorer(name).kind == "lexicon"
    content = lexicon_bytes(name)
    broken = content.replace(b"matches: [", b"matches: [qqqq, ", 1)
    assert broken != content
    with pytest.raises(ProtocolError, match="'qqqq'"):
        Lexicon.parse(broken, name)
