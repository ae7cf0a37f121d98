"""docs/coming-from.md shows the code of benchmarks/peer_tasks, which runs, agrees with the peers' and is no longer.

The peers run in an environment of their own, since they want another transformers. Where KVPATCH_PEERS names its
interpreter the tasks run there too.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kvpatch as kv
from kvpatch.models.load import pull

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "coming-from.md").read_text("utf-8")
PEERS = os.environ.get("KVPATCH_PEERS")
TITLES = {
    "kvpatch": "python",
    "nnsight": 'python title="nnsight"',
    "transformer_lens": 'python title="TransformerLens"',
}


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", ROOT / "benchmarks" / "peers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module
    spec.loader.exec_module(module)
    return module


peers = _benchmark()


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    """What the tasks leave behind in kvpatch: every name of its file."""
    names: dict[str, Any] = {"__name__": "kvpatch_tasks"}
    results = {}
    cells = peers.cells_of("kvpatch")
    for task in ("load", "prepare", *peers.TASKS):
        peers.run_cell("kvpatch", cells[task], names)
        if task in peers.TASKS:
            results[task] = peers.plain(names[peers.TASKS[task]])
    return {"names": names, "results": results}


@pytest.mark.parametrize("library", peers.LIBRARIES)
def test_the_page_shows_every_task_as_it_stands_in_its_file(library: str) -> None:
    cells = peers.cells_of(library)
    shown = [task for task in cells if library == "kvpatch" or task != "load"]
    assert set(peers.TASKS) < set(shown)
    for task in shown:
        assert f"```{TITLES[library]}\n{cells[task][1]}```\n" in PAGE, f"{library}: {task}"


@pytest.mark.parametrize("task", peers.TASKS)
def test_kvpatch_needs_at_most_as_many_lines_as_the_better_peer(task: str) -> None:
    code = {library: peers.cells_of(library)[task][1] for library in peers.LIBRARIES}
    lines = {library: peers.lines_of(text) for library, text in code.items()}
    assert lines["kvpatch"] <= min(lines.values())
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {task} |"))
    told = [cell.split(",")[0].strip() for cell in row.strip("|").split("|")[1:]]
    assert told == [peers.told_lines(code[library]) for library in peers.LIBRARIES]


def test_comments_and_empty_lines_are_no_lines() -> None:
    assert peers.lines_of("# a\n\nx = 1  # b\n    # c\n") == 1
    assert peers.tokens_of("# a\nx = 1\n") == 3


@pytest.mark.model
def test_the_tasks_do_what_their_headings_say(ours: dict[str, Any]) -> None:
    names, results = ours["names"], ours["results"]
    model: kv.Model = names["model"]
    source, target = names["source"], names["target"]
    assert isinstance(results["swap"], str) and len(results["batch"]) == 2
    assert names["grid"].dims == ("layers", "slots") and names["grid"].shape == (30, 8)
    logits = model.logits(kv.Patch(layers=12, slots=1).apply(source, target))[0]
    first, other = (model.tokenizer(word, add_special_tokens=False).input_ids[0] for word in (" Athens", " Madrid"))
    assert results["slot"] == pytest.approx(float(logits[first] - logits[other]), abs=1e-4)
    assert results["slot"] == pytest.approx(float(names["grid"].sel(layers=12, slots=1)), abs=1e-4)
    assert len(results["attention"]) == 9 and 0 < sum(results["attention"]) < 9
    assert peers.difference(results["residual"], model.logits(target)[0].tolist()) > 1e-3
    assert results["batch"][0] == results["swap"]


@pytest.mark.model
@pytest.mark.skipif(
    not PEERS,
    reason="KVPATCH_PEERS names no interpreter of an environment with the peers (benchmarks/peers.py says how)",
)
@pytest.mark.parametrize("library", ["nnsight", "transformer_lens"])
def test_a_peer_gives_the_same_numbers(library: str, ours: dict[str, Any]) -> None:
    found = peers.elsewhere(str(PEERS), library, pull("smollm2-135m"), 0, 1)["results"]
    off = {task: peers.difference(ours["results"][task], found[task]) for task in peers.TASKS}
    assert [task for task, much in off.items() if not much <= peers.TOLERANCE] == [], off
