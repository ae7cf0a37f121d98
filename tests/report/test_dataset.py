"""A run as a dataset: every trial and verdict is in its files, and the card says what they hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

import kvpatch as kv
from kvpatch.report.dataset import write_dataset
from synthetic import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> kv.Run:
    return kv.Run(write_run(tmp_path_factory.mktemp("runs") / "small", n=4, phases=["1", "6"]).directory)


@pytest.fixture(scope="module")
def folder(run: kv.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dataset") / "of a run"
    command = [sys.executable, "-m", "kvpatch", "export", str(run.directory), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def head(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text("utf-8").split("---\n")[1])


def test_each_configuration_of_the_card_is_a_file_that_can_be_read(folder: Path, run: kv.Run) -> None:
    files = {one["config_name"]: folder / one["data_files"] for one in head(folder)["configs"]}
    assert list(files) == ["trials", "verdicts", "attention"]
    assert sorted(folder.rglob("*.parquet")) == sorted(files.values())
    tables = {name: pq.read_table(path) for name, path in files.items()}
    assert tables["trials"].equals(run.store.read())
    assert tables["attention"].num_rows == run.store.read_attention().num_rows > 0
    of_verdicts = tables["verdicts"].to_pylist()
    assert [row["id"] for row in of_verdicts] == list(run.verdicts().index)
    assert [row["verdict"] for row in of_verdicts] == list(run.verdicts()["verdict"])


def test_the_card_names_every_column_and_the_answer(folder: Path, run: kv.Run) -> None:
    card = (folder / "README.md").read_text("utf-8")
    for name in run.store.read().column_names:
        assert f"| `{name}` |" in card
    assert "**Answer.** " in card and str(run.directory) not in card


def test_nothing_in_a_run_leaves_the_line_of_the_card_that_it_stands_in(run: kv.Run, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\n# no | `heading` [x](javascript:1)\u202e"
    outcome = run.outcome
    outcome = type(outcome)(
        outcome.record, outcome.protocol.model_copy(update={"title": hostile}), outcome.rows, outcome.verdicts
    )
    write_dataset(run.store, outcome, tmp_path)
    lines = (tmp_path / "README.md").read_text("utf-8").splitlines()
    found = next(line for line in lines if "alert" in line)
    assert found.startswith("# \\<script\\>") and "\\[x\\](javascript" in found and "\u202e" not in found
    assert not any(line.startswith("# no") for line in lines)
