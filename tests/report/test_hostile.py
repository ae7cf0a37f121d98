"""A run whose every text is hostile, as the terminal shows it; and the texts as every page shows them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hostile import HOSTILE, hidden, write_hostile_run
from kvpatch.cli import main as cli
from kvpatch.errors import visible


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hostile_run(tmp_path_factory.mktemp("hostile") / "run").directory


@pytest.mark.parametrize("text", HOSTILE)
def test_every_text_is_visible_and_says_the_same_twice(text: str) -> None:
    assert hidden([visible(text)]) == [] and visible(visible(text)) == visible(text)


def test_marks_of_direction_and_spaces_without_width_have_names() -> None:
    assert visible("a\u200eb\u200fc\u061cd\u200be\ufefff") == "a⟨LRM⟩b⟨RLM⟩c⟨ALM⟩d⟨ZWSP⟩e⟨BOM⟩f"
    joined = "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f469\u200d\U0001f680"
    assert visible(joined) == joined  # scripts and emoji need their joiners


@pytest.mark.parametrize("words", [["status"], ["verdicts"], ["verdicts", "--json"], ["effects"], ["report"]])
def test_terminal_shows_what_would_move_or_hide_as_symbols(directory, monkeypatch, capsys, words) -> None:
    monkeypatch.setattr(sys, "argv", ["kvpatch", words[0], str(directory), *words[1:]])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    assert stopped.value.code == 0 and hidden([said.out, said.err]) == []
