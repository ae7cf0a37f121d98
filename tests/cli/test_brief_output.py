"""What a command prints at 80 columns: numbers are never cut, and a time left is of what is left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvpatch.cli import brief_verdicts, progress, tables
from kvpatch.verdicts.records import Verdict


def verdict(**given: Any) -> Verdict:
    told = {"id": "late_carries", "contrast": "late - late_n", "readout": "mode_llr", "verdict": "supported"}
    told |= {"estimate": 1.0912, "ci_low": 1.0123, "ci_high": 1.1311, "p_adjusted": 0.0156, "n": 6, "claim": "w " * 60}
    return cast(Verdict, SimpleNamespace(**(told | given)))


@pytest.mark.parametrize("width", [60, 80, *range(85, 125), 200])
@pytest.mark.parametrize("name", ["a", "late_carries", "a_name_that_is_as_long_as_some_are"])
def test_estimate_interval_p_and_n_are_printed_whole(width: int, name: str) -> None:
    lines = brief_verdicts._lines(verdict(id=name), width)
    whole = " ".join(" ".join(lines).split())
    assert f"supported: {name}, late - late_n in mode_llr = 1.09 [1.01, 1.13], p 0.0156, n = 6." in whole
    assert all(len(line) <= width for line in lines)


def test_time_left_counts_the_tokens_of_the_batch_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: 10 * next(clock))
    told: dict[str, Any] = {}
    bar = cast(Any, SimpleNamespace(add_task=lambda *a, **k: 0, update=lambda task, **given: told.update(given)))
    shown = progress._ProgressBar(bar, cast(Any, SimpleNamespace(is_terminal=True)), lambda: None)
    batches = [SimpleNamespace(generation=SimpleNamespace(max_new_tokens=32), trials=range(50))] * 2
    shown.planned(cast(Any, SimpleNamespace(n_trials=100, batches=batches)))
    shown.stage("running")
    for _ in range(16):
        shown.tokens(50)
    # Half of the first batch's tokens are written, in 16 looks at 10 s each: a quarter of all.
    assert told["left"] == pytest.approx(3 * 160)
    assert told["completed"] == 0


def test_status_of_thousands_of_phases_shows_the_first_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    phases = [{"phase": f"p{i}", "done": 0, "planned": 1, "failed": 0} for i in range(5_000)]
    rest = dict.fromkeys(("seconds_left", "tokens_per_second", "finished", "workers"))
    tables.print_status(
        {
            "protocol": "p",
            "model": "m",
            "state": "running",
            "phases": phases,
            "done": 0,
            "left": 5_000,
            "failed": 0,
            **rest,
        }
    )
    said = capsys.readouterr().out
    assert "p499 " in said and "p500 " not in said and "and 4500 more phases: --json lists all" in said
