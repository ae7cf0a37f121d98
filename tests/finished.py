"""Finished runs on which the statistics and what shows them could disagree, for the tests that hold one against the
other."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path
from typing import Any

from kvpatch.protocols.schema import Protocol
from kvpatch.store.directory import Store
from synthetic import write_run

CONDITIONS = {
    "A": {"about": "natural target", "role": "experiment"},
    "B": {"about": "natural source", "into": "source", "role": "experiment"},
    "C": {"about": "whole source cache", "from": "source", "patch": {"align": "replace"}, "role": "experiment"},
    "N1": {"about": "foreign cache", "from": "foreign", "patch": {"align": "replace"}},
    "NT": {"about": "the text N1 equals", "text_of": "foreign"},
    "X": {"about": "body only", "from": "source", "patch": {"slots": "body"}, "role": "experiment"},
    "Y": {"about": "body of a foreign prompt", "from": "foreign", "patch": {"slots": "body"}},
    "S0": {"about": "the target's own cache", "from": "target", "patch": {"align": "replace"}, "role": "integrity"},
}
ALL = list(CONDITIONS)
SHARED = "2"
"""The phase whose pairs share prompts."""
COHERENT = {"C": 0.5, "NT": 0.6, "Y": 0.9, "S0": 0.0}
"""Share of coherent outputs, where it is not 1. C and S0 are texts of the pair, NT is another prompt's."""


def _h(name: str, contrast: str, test: str, gate: int, **more: Any) -> dict[str, Any]:
    given = {"id": name, "claim": f"{name} holds", "phase": "1", "readout": "mode_llr", "family": f"f{gate}"}
    return {**given, "contrast": contrast, "test": test, "gate": gate, **more}


HYPOTHESES = [
    _h("exists", "B - A", "greater", 1, is_gatekeeper=True),
    _h("by_construction", "A - C", "greater", 1, is_gatekeeper=True),
    _h("inert", "N1 - A", "equivalent", 2, is_gatekeeper=True, margin={"value": 0.6}),
    _h("part", "X - N1", "greater", 3),
    _h("down", "A - B", "much_less", 3, margin={"value": 0.2}),
    _h("swap", "C - N1", "much_greater", 3, margin={"natural_gap": 0.2}),
    _h("text", "NT - A", "equivalent", 3, margin={"value": 0.6}),
    _h("body", "X - Y", "greater", 3),
    _h("both", "B - A - C + NT", "greater", 3),
    _h("log_rv", "C - N1", "less", 3, readout="rv_output", transform="log"),
    _h("rises", "A < X < B", "trend", 3),
    _h("peaks", "A < B > X", "umbrella", 3),
    _h(
        "goes_along", "C - N1", "correlates", 3, direction="negative",
        against={"contrast": "C - N1", "readout": "rv_output", "transform": "log"},
    ),
    _h("shared_up", "B - A", "much_greater", 3, phase=SHARED, margin={"dz": 0.5}),
    _h("shared_same", "N1 - A", "equivalent", 3, phase=SHARED, margin={"natural_gap": 0.5}),
    _h("shared_part", "X - N1", "greater", 3, phase=SHARED, readout="recursive_score"),
    _h("shared_rises", "A < X < B", "trend", 3, phase=SHARED),
    _h(
        "shared_along", "C - N1", "correlates", 3, phase=SHARED, direction="positive",
        against={"contrast": "C - N1", "readout": "recursive_score"},
    ),
    _h("shared_again", "A - B", "replicates", 3, phase=SHARED, of="down"),
    _h("shut", "N1 - B", "greater", 4, is_gatekeeper=True),
    _h("behind", "X - N1", "greater", 5),
]  # fmt: skip


def small_protocol() -> Protocol:
    """Gates that open by a supported, an equivalent and no tautological gatekeeper, and one that closes."""
    phases = {
        "1": {"question": "?", "n": 40, "conditions": ALL},
        SHARED: {"question": "?", "n": 40, "conditions": ["A", "B", "C"], "controls": ["X", "N1", "NT", "Y", "S0"]},
    }
    fields = {"protocol": "small", "title": "A small protocol", "question": "Does it hold?"}
    return Protocol.model_validate({**fields, "conditions": CONDITIONS, "phases": phases, "hypotheses": HYPOTHESES})


def small_run(directory: Path) -> Store:
    """A run of it: 40 pairs a phase; those of the second share six sources, and a target here and there."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        pair = int(row["target_id"].split("-")[1])
        out: dict[str, Any] = {}
        if row["split"] == "test":
            out["coherent"] = (pair * 17 % 40) / 40 < COHERENT.get(row["condition"], 1.0)
        if row["phase"] == SHARED:
            out |= {"source_id": f"rec-{pair % 12:03d}", "target_id": f"plain-{pair - (pair % 7 == 1):03d}"}
            out["mode_llr"] = row["mode_llr"] + 0.4 * (pair % 12 > 5) * (row["condition"] != "A")
        # Y loses one of its 36 coherent outputs of 40: 35 of 39 are less than 90%, and would be rounded to it.
        if (row["phase"], row["condition"], pair) in {(SHARED, "X", 3), (SHARED, "X", 4), ("1", "Y", 0)}:
            out["error"] = "RuntimeError: planted"
        return out

    return write_run(directory, n=40, calibration=30, protocol=small_protocol(), change=change)


NEEDS = {
    "exists": [], "inert": ["exists"], "by_construction": [], "shut": ["by_construction"], "part": ["exists", "inert"],
    "behind": ["exists", "shut"], "body": ["behind"],
}  # fmt: skip


def needing_run(directory: Path) -> Store:
    """A run of hypotheses that name what they need: of which some passed, one is tautological and some did not pass."""
    content = small_protocol().model_dump(mode="json", by_alias=True)
    content["hypotheses"] = [
        {key: value for key, value in h.items() if key not in ("gate", "is_gatekeeper")} | {"needs": NEEDS[h["id"]]}
        for h in HYPOTHESES
        if h["id"] in NEEDS
    ]
    return write_run(directory, n=40, calibration=30, protocol=Protocol.model_validate(content))


def whole_run(directory: Path) -> Store:
    """A run of dec7, every phase, whose conditions are coherent in anything from none to all of their outputs."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        if row["split"] != "test":
            return {}
        pair = int(row["target_id"].split("-")[1])
        return {"coherent": (zlib.crc32(f"{row['phase']} {row['condition']}".encode()) + pair) % 5 >= 1}

    return write_run(directory, n=4, change=change)


RUNS = {"small": small_run, "dec7": whole_run}
"""Made of numbers drawn for the purpose, so that rules which could disagree do."""
STORED = {path.name.removesuffix(".tar.xz"): path for path in Path(__file__).parent.glob("layout/finished/*.tar.xz")}
"""What `kvpatch run` left of each shipped organism and of the demo (layout/make_finished_runs.py)."""


def stored_run(name: str, directory: Path) -> Store:
    """One of `STORED`, unpacked into a directory."""
    with tarfile.open(STORED[name]) as archive:
        archive.extractall(directory, filter="data")
    return Store(directory / name)
