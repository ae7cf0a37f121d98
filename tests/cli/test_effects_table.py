"""The table of effects in a terminal: every heading and interval is whole, however narrow it is."""

from __future__ import annotations

import pytest

from kvpatch.cli.console import printed
from kvpatch.cli.effects_table import _heading, _that_fit, print_effects
from kvpatch.verdicts.outcome import outcome_of, phase_effects
from synthetic import write_run


@pytest.fixture(scope="module")
def effects(tmp_path_factory: pytest.TempPathFactory) -> list:
    return phase_effects(outcome_of(write_run(tmp_path_factory.mktemp("run") / "run", n=5, phases=["1"])), "1")


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_heading_and_no_interval_is_cut_or_broken(
    effects: list, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = printed(lambda: print_effects(effects))
    text = "\n".join(lines)
    assert "\u2026" not in text and max(map(len, lines)) <= width
    for name in {effect.readout for effect in effects}:
        assert f" {_heading(name)} " in text, name
    c = [effect for effect in effects if effect.condition == "C"]
    assert len(c) >= 5
    assert text.count(" C  ") == sum("condition" in line for line in lines)


def test_readouts_go_to_as_many_tables_as_they_need() -> None:
    names = ["mode_llr", "content_llr", "rv_output"]
    assert _that_fit(names, 60) == [names]
    assert _that_fit(names, 40) == [names[:2], names[2:]]
    assert _that_fit(names, 5) == [[name] for name in names]
