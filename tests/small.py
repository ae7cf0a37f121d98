"""A small prompt bank and protocol, written as the YAML a user would write; for the tiny models of `tiny.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PAIRS = 8
_DISHES = ("soup", "stew", "rice", "cake", "tart", "toast", "curry", "salad")
_SHIPS = ("sloop", "ketch", "barge", "yacht", "dhow", "canoe", "junk", "punt")
_TREES = ("beech", "maple", "birch", "aspen", "alder", "cedar", "larch", "rowan")
CONTINUATIONS = {
    ("recursive", "target"): ("I watch my own reply about a pan", "This sentence looks at itself over a plate"),
    ("plain", "target"): ("First heat the oil in a wide pan", "Peel two onions and chop them small"),
    ("recursive", "source"): ("I notice myself steering toward an anchor", "My awareness rows this very phrase along"),
    ("plain", "source"): ("First coil the rope beside the mast", "Hoist a jib and check every cleat"),
}

CONDITIONS: dict[str, dict[str, Any]] = {
    "A": {"about": "natural target", "role": "experiment"},
    "B": {"about": "natural source", "into": "source", "role": "experiment"},
    "C": {"about": "full swap", "from": "source", "patch": {"align": "replace"}, "role": "experiment"},
    "D": {"about": "swap back", "into": "source", "from": "target", "patch": {"align": "replace"}},
    "E1": {"about": "values shuffled", "from": "source", "patch": {"align": "replace", "donor": "shuffle_values"}},
    "EJ": {"about": "jointly shuffled", "from": "source", "patch": {"align": "replace", "donor": "shuffle_jointly"}},
    "F2": {"about": "fitted", "from": "source", "patch": {"align": "replace", "donor": "gaussian_fitted"}},
    "S0": {"about": "self-swap", "from": "target", "patch": {"align": "replace"}, "role": "integrity"},
    "S1": {"about": "text of C", "text_of": "source", "role": "integrity"},
    "N1": {"about": "foreign", "from": "foreign", "patch": {"align": "replace"}},
    "N2": {"about": "scaffold", "from": "neutral", "patch": {"align": "replace"}},
    "N3": {"about": "shuffled words", "from": "shuffled_words", "patch": {"align": "replace"}},
    "P": {"about": "some layers", "from": "source", "patch": {"layers": [1, 2], "slots": "body", "parts": "v"}},
}


def bank_entries() -> list[dict[str, Any]]:
    """Entries of the bank: 8 targets, 8 sources, a foreign partner for every target, 2 continuations a cell."""
    entries: list[dict[str, Any]] = []
    for i, (dish, ship, tree) in enumerate(zip(_DISHES, _SHIPS, _TREES, strict=True)):
        entries += [
            {"id": f"t{i}", "group": "plain", "topic": dish, "domain": "food", "text": f"How long should {dish} cook?"},
            {
                "id": f"s{i}",
                "group": "recursive",
                "topic": ship,
                "domain": "sea",
                "text": f"Describe how {ship} notes arise.",
            },
            {
                "id": f"f{i}",
                "group": "foreign",
                "topic": tree,
                "domain": "wood",
                "partner_of": f"t{i}",
                "text": f"How tall does {tree} grow?",
            },
        ]
    for (mode, side), texts in CONTINUATIONS.items():
        domain = "food" if side == "target" else "sea"
        entries += [
            {"id": f"{mode}-{side}-{i}", "mode": mode, "topic_of": side, "domain": domain, "text": text}
            for i, text in enumerate(texts)
        ]
    return entries


def write_bank(folder: Path, entries: list[dict[str, Any]] | None = None) -> Path:
    """Write a bank directory of one file, bank.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bank.yaml").write_text(yaml.safe_dump(bank_entries() if entries is None else entries))
    return folder


def protocol_content(bank: Path | str, **changes: Any) -> dict[str, Any]:
    """The protocol as plain data; `changes` replaces top-level keys."""
    hypothesis = {"phase": "1", "readout": "mode_llr", "alpha": 0.05, "family": "f"}
    content: dict[str, Any] = {
        "protocol": "small",
        "title": "A small protocol",
        "question": "Does it hold?",
        "bank": str(bank),
        "pairing": {"max_length_difference": 0.5},
        "generation": {"max_new_tokens": 10, "temperature": 0.7},
        "readouts": {"r_v": {"window": 6}, "forced_tokens": 12, "likelihood_tokens": 6, "js_positions": 4},
        "calibration": {"pairs": 3, "conditions": ["A", "B"]},
        "conditions": CONDITIONS,
        "phases": {"1": {"question": "?", "n": 5, "conditions": list(CONDITIONS)}},
        "hypotheses": [
            {"id": "exists", "claim": "B > A", "contrast": "B - A", "test": "greater", "gate": 1, **hypothesis},
            {"id": "seed", "claim": "C > A", "contrast": "C - A", "test": "greater", "gate": 2, **hypothesis},
            {"id": "transfer", "claim": "C > N1", "contrast": "C - N1", "test": "greater", "gate": 2, **hypothesis},
        ],
    }
    return {**content, **changes}


def write_protocol(folder: Path, **changes: Any) -> Path:
    """Write a bank and a protocol that uses it; returns the protocol's file."""
    bank = changes.pop("bank", None) or write_bank(folder / "bank")
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(protocol_content(bank, **changes), sort_keys=False))
    return path


def with_patch(patch: Mapping[str, Any], **condition: Any) -> dict[str, Any]:
    """Changes that leave A, B and one condition X with this patch."""
    conditions = {name: CONDITIONS[name] for name in ("A", "B", "S0", "S1")}
    conditions["X"] = {"about": "under test", "from": "source", "patch": dict(patch), **condition}
    return {
        "conditions": conditions,
        "phases": {"1": {"question": "?", "n": 3, "conditions": list(conditions)}},
        "hypotheses": [],
    }
