"""`kvpatch verdicts` shows the plan's table first; its JSON is what it was, and `--plan` gives the table's rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finished import small_protocol
from kvpatch.cli.main import app
from kvpatch.protocols.schema import Protocol
from kvpatch.verdicts.outcome import outcome_of
from synthetic import write_run

PLAN = [
    {
        "kind": "intervention",
        "claim": "[bold]B[/bold] moves it",
        "expected": "+3.64, n = 100",
        "hypotheses": ["exists"],
    },
    {"kind": "question", "claim": "Where is it?", "hypotheses": ["part", "body"], "unknown": "where it was made"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = {**small_protocol().model_dump(mode="json", by_alias=True), "plan": PLAN}
    protocol = Protocol.model_validate(content)
    return write_run(tmp_path_factory.mktemp("plan") / "run", n=8, protocol=protocol).directory


def printed(*arguments: object, columns: int = 200) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns), "KVPATCH_DEBUG": "1"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_plans_table_is_printed_before_all_else(directory: Path) -> None:
    out = printed("verdicts", directory, "--all")
    assert out.split()[:3] == ["the", "plan's", "table"]
    for told in ("[bold]B[/bold] moves it", "+3.64, n = 100", "first-model", "where it was made", "exists: "):
        assert told in out
    assert out.index("moves it") < out.index("Where is it?") < out.rindex("verdicts")
    assert "verdicts" not in printed("verdicts", directory, "--plan")


def test_the_json_of_verdicts_is_the_stored_file_and_that_of_the_plan_its_rows(directory: Path) -> None:
    entries = json.loads(printed("verdicts", directory, "--json"))
    assert entries == json.loads((directory / "verdicts.json").read_text())
    assert {entry["id"]: entry["expected"] for entry in entries}["exists"] == "+3.64, n = 100"
    rows = json.loads(printed("verdicts", directory, "--plan", "--json"))
    assert [row["claim"] for row in rows] == [row["claim"] for row in PLAN]
    by_id = {entry["id"]: entry for entry in entries}
    for row in rows:
        assert row["answer"].endswith(".") and row["verdict"]
        for f in row["findings"]:
            assert [f[key] for key in ("estimate", "ci_low", "ci_high", "n", "verdict")] == [
                by_id[f["id"]][key] for key in ("estimate", "ci_low", "ci_high", "n", "verdict")
            ]


def test_a_notebook_has_the_table_too(directory: Path) -> None:
    from kvpatch.notebook import Run
    from kvpatch.store.directory import Store

    table = Run(directory).plan_table()
    assert table["answer"].tolist() == [row.answer for row in outcome_of(Store(directory)).plan_table]
