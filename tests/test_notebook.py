"""A run in a notebook, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import polars
import pytest

import kvpatch as kv
from synthetic import write_run


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("notebook") / "run", n=4, phases=["1", "4"]).directory


def test_trials_come_as_pandas_and_as_polars(directory: Path) -> None:
    run = kv.Run(directory)
    assert isinstance(run.trials(), pd.DataFrame) and isinstance(run.trials("polars"), polars.DataFrame)
    assert run.trials("polars").height == len(run.trials()) == len(run.trials("pandas")) == 4 * 19 + 4 * 14 + 24
    with pytest.raises(kv.ProtocolError, match="'polars' or 'pandas'"):
        run.trials("arrow")  # type: ignore[call-overload]
    polar = run.verdicts("polars")
    assert polar["id"].to_list() == run.verdicts("pandas").index.tolist() == run.verdicts().index.tolist()
    with pytest.raises(kv.ProtocolError, match="'polars' or 'pandas'"):
        run.verdicts("arrow")  # type: ignore[call-overload]


def test_verdicts_and_effects_are_tables(directory: Path) -> None:
    run = kv.Run(directory)
    assert run.verdicts().loc["transfer_llr", "n"] == 4
    assert {"condition", "estimate"} <= set(run.effects().columns)


def test_plots_are_altair_charts(directory: Path) -> None:
    plot = kv.Run(directory).plot
    drawn = [
        plot.conditions(),
        plot.coherence(),
        plot.forest(),
        plot.effects(phase="4"),
        plot.narrowing("transfer_llr"),
    ]
    for chart in drawn:
        assert chart.to_dict()["$schema"]
        # Drawn here: a notebook needs no network to show it.
        shown = chart._repr_mimebundle_()
        assert set(shown) == {"image/svg+xml", "text/plain"} and shown["image/svg+xml"].startswith("<svg")
    with pytest.raises(ValueError, match="no chart of 'nothing'"):
        plot.forest("nothing")


def test_it_shows_its_answer_and_verdicts_as_text(directory: Path) -> None:
    run = kv.Run(directory)
    shown = run._repr_html_()
    assert run.answer.split()[0] in shown and "transfer_llr" in shown and "<script" not in shown
    assert repr(run) == f"Run({str(directory)!r}: dec7 on first-model, 156 of 156)"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(kv.StoreError, match="not a run directory"):
        kv.Run(tmp_path)


def test_neither_a_run_nor_the_view_needs_torch(directory: Path) -> None:
    code = (
        "import sys, kvpatch as kv; r = kv.Run(sys.argv[1]); r.verdicts(); r.plot.forest(); import kvpatch.view.server;"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch'"
    )
    subprocess.run([sys.executable, "-c", code, str(directory)], check=True)
