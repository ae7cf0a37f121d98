"""Verdicts agree with those that a script without a line of kvpatch works out from the same Parquet files."""

from __future__ import annotations

import ast
import functools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from recompute import disagreements, recompute

from finished import HYPOTHESES, needing_run, small_protocol, small_run, stored_run, whole_run
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.test_kinds import Word, kinds
from kvpatch.store.directory import Store
from kvpatch.verdicts.decide import Verdict, verdicts_json
from kvpatch.verdicts.outcome import outcome_of
from synthetic import dec7, write_run

FOLDER = Path(__file__).parent
TEXTS = {"A": "target", "B": "source", "C": "source", "N1": "foreign", "NT": "foreign", "S0": "target"}
DESTROYED = {"X": 0.6, "Y": -0.1}


def hard_run(directory: Path) -> Store:
    """A run in which rows are missing, hits are rare, one readout never scores, and another is moved by damage."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        pair, name = int(row["target_id"].split("-")[1]), row["condition"]
        chance = zlib.crc32(f"{row['phase']} {name} {pair}".encode()) % 100
        out: dict[str, Any] = {"equals_text": TEXTS.get(name), "recursive_score_masked": 0.0}
        out["recursive_score"] = row["recursive_score"] if chance < 8 else 0.0
        if row["split"] == "test" and row["phase"] == "2" and chance < {"X": 25, "B": 15}.get(name, 0):
            out["error"] = "RuntimeError: planted"
        if row["split"] == "test" and name == "Y" and chance < 30:
            out["mode_llr"] = None
        # X breaks the cache, Y hardly; both are incoherent about equally often, NT more often.
        out["mode_llr_damage"] = [{"X": -3.0, "Y": -0.05}.get(name, 0.0) + chance / 5000, 0.0]
        out["coherent"] = chance >= {"X": 30, "Y": 27, "NT": 45}.get(name, 2)
        return out

    hypotheses = [
        {k: v for k, v in h.items() if k not in ("gate", "is_gatekeeper")} | {"needs": []} for h in HYPOTHESES
    ]
    rare = {"readout": "recursive_score", "margin": {"value": 0.5}}
    asked = {h["id"]: h for h in hypotheses}
    more = [
        {**asked["inert"], **rare, "id": "rare"},
        {**asked["part"], **rare, "id": "rare_above", "contrast": "Y - A"},
        {**asked["down"], **rare, "id": "rare_below", "contrast": "NT - A"},
        {**asked["part"], "id": "silent", "readout": "recursive_score_masked"},
        {**asked["body"], "id": "lacking_little", "phase": "2", "contrast": "X - C", "test": "less"},
        {**asked["rises"], "id": "lacking_order", "phase": "2", "contrast": "A < Y < X"},
        {**asked["goes_along"], "id": "lacking_along", "contrast": "Y - A"},
        {**asked["down"], "id": "lacking_much", "contrast": "Y - B", "margin": {"dz": 0.3, "natural_gap": 0.2}},
    ]
    for h in more:
        h["family"] = "more"
    content = small_protocol().model_dump(mode="json", by_alias=True)
    content["hypotheses"] = [*hypotheses, *more]
    content["corrections"] = {"more": "benjamini_hochberg"}
    store = write_run(directory, n=40, calibration=30, protocol=Protocol.model_validate(content), change=change)
    record = json.loads((directory / "run.json").read_text("utf-8"))
    record["readout_calibration"] = {
        "fitted_on": "0" * 64, "pairs": 30, "neutral": [], "destroyed": list(DESTROYED), "items_sha256": "0" * 64,
        "n_items": 8, "rule": {"covariates": [], "centre": 0, "at_rest": [], "coefficients": [], "is_weighted": False},
        "readouts": {"mode_llr": {"gap": 0.7, "dz": 1.0, "shares": DESTROYED}},
    }  # fmt: skip
    (directory / "run.json").write_text(json.dumps(record), "utf-8")
    return store


def graph_run(directory: Path) -> Store:
    """A run whose families pass their alpha on, with more of its rows missing than the rule allows."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        chance = zlib.crc32(f"{row['phase']} {row['condition']} {row['target_id']}".encode()) % 100
        is_lost = row["split"] == "test" and chance < {"X": 12, "NT": 30}.get(row["condition"], 0)
        return {"error": "RuntimeError: planted"} if is_lost else {}

    content = small_protocol().model_dump(mode="json", by_alias=True)
    content["hypotheses"] = [
        {k: v for k, v in h.items() if k not in ("gate", "is_gatekeeper", "alpha")}
        | {"needs": [] if h["family"] == "f1" else ["exists"]}
        for h in HYPOTHESES
    ]
    content["families"] = {
        "f1": {"alpha": 0.01, "passes_to": {"f2": 0.5, "f3": 0.5}},
        "f2": {"alpha": 0.02, "passes_to": {"f3": 1.0}},
        "f3": {"alpha": 0.02, "passes_to": {"f2": 1.0}},
        "f4": {"alpha": 0.03, "correction": "benjamini_hochberg"},
    }
    return write_run(directory, n=40, calibration=30, protocol=Protocol.model_validate(content), change=change)


def heads_run(directory: Path) -> Store:
    """A run of ranks within pairs and of chosen heads alone: several heads are chosen, pairs share targets, some
    samples are lost, and some levels lack what is ranked."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        pair = int(row["target_id"].split("-")[1])
        chance = zlib.crc32(f"{row['condition']} {pair} {row['sample']}".encode()) % 100
        out: dict[str, Any] = {"attention_marked_each": 0.3}
        if row["split"] == "test" and pair % 5 == 1:
            out["target_id"] = f"plain-{pair - 1:03d}"
        if row["split"] == "test" and chance < 4:
            out["error"] = "RuntimeError: planted"
        return out | ({"rv_prompt": None} if chance == 99 else {})

    content = dec7().model_dump(mode="json", by_alias=True)
    asked = [h for h in content["hypotheses"] if h["test"] in ("rank_correlates", "chosen_heads")]
    families = {h["family"] for h in asked}
    content["hypotheses"] = [{**h, "needs": []} for h in asked]
    content["families"] = {k: {**v, "passes_to": {}} for k, v in content["families"].items() if k in families}
    content["corrections"] = {k: v for k, v in content["corrections"].items() if k in families}
    del content["plan"]
    size = {"n": 30, "samples": 2, "phases": sorted({h["phase"] for h in asked}), "heads": (8, 10)}
    return write_run(directory, protocol=Protocol.model_validate(content), change=change, **size)


MADE: dict[str, Callable[[Path], Store]] = {
    "small": small_run, "needing": needing_run, "dec7": whole_run, "hard": hard_run, "graph": graph_run,
    "heads": heads_run,
}  # fmt: skip


Decided = Callable[[str], tuple[Path, list[Verdict]]]


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> Decided:
    """Name of a run -> its directory and verdicts, each made once."""

    @functools.cache
    def of(name: str) -> tuple[Path, list[Verdict]]:
        folder = tmp_path_factory.mktemp("runs")
        store = MADE[name](folder / name) if name in MADE else stored_run(name, folder)
        return store.directory, outcome_of(store).verdicts

    return of


@pytest.mark.parametrize("name", ["demo", "dose", *MADE])
def test_a_script_without_kvpatch_finds_the_same_numbers_and_words(decided: Decided, name: str):
    directory, verdicts = decided(name)
    found, stored = recompute(directory), json.loads(verdicts_json(verdicts))
    assert disagreements(found, stored) == []
    first = stored[0]
    for key, value in (("p", first["p"] * 1.001), ("estimate", first["estimate"] + 1e-6), ("verdict", "not supported")):
        told = disagreements(found, [{**first, key: value}, *stored[1:]])
        assert [line.split(" is ")[0] for line in told] == [f"{first['id']}: {key}"]


def test_the_runs_hold_every_rule_that_the_script_states(decided: Decided):
    """Otherwise the test above would hold of rules that nothing tried."""
    found = [v for name in MADE for v in decided(name)[1]]
    assert {v.test for v in found} == set(kinds())
    assert {"gate", "prerequisite", "coherence", "specificity", "missing"} <= {v.blocked_by for v in found}
    assert {v.verdict for v in found} == set(get_args(Word))
    for said in ("exact bounds", "nothing scored", "the verdict is the same", "groups of pairs"):
        assert any(said in v.because for v in found), said


def test_the_script_imports_nothing_of_kvpatch_nor_of_its_tests():
    allowed = {"__future__", "json", "math", "re", "sys", "warnings", "collections", "hashlib", "itertools", "pathlib"}
    allowed |= {
        "numpy",
        "scipy",
        "pyarrow",
        "recompute_heads",
        "recompute_numbers",
        "recompute_rows",
        "recompute_rules",
    }
    for path in sorted(FOLDER.glob("recompute*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path.name
