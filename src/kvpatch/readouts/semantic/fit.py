"""Fit a direction of the semantic score again, and write it as data.

    python -m kvpatch.readouts.semantic.fit --out src/kvpatch/readouts/semantic/recursion.json \\
        --labelled tests/readouts/labelled/dev.yaml

Texts are labelled with whether they are in the mode, and with an item. Texts of one item are variants of each other: in
the mode and plain, in first and third person. They never stand on both sides of a split.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from kvpatch.readouts.semantic import BOUND, embed, model_sha256

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Inverse strengths of the L2 penalty that cross-validation chooses from."""
FOLDS = 8
SEED = 20261128


@dataclass(frozen=True)
class Example:
    """One text of the fit: whether it is in the mode, and the item whose variants stay on one side of a split."""

    text: str
    mode: bool
    item: str
    source: str


def read_examples(path: Path) -> list[Example]:
    """Examples of a YAML list: `mode` is true or false of a labelled text, "recursive" or "plain" of a continuation."""
    entries: list[dict[str, Any]] = yaml.safe_load(path.read_text("utf-8"))
    return [
        Example(entry["text"], entry["mode"] in (True, "recursive"), entry.get("item") or entry["id"], path.name)
        for entry in entries
    ]


def fit(examples: Sequence[Example]) -> dict[str, Any]:
    """Weights [384], bias and `plain` of a direction, and how it was fitted (`strength`, `losses`, `folds`).

    The penalty is the strongest whose mean log-loss on items that are left out lies within one standard error of the
    least: among directions that tell these texts apart about as well, the one that leans least on these texts.
    """
    from sklearn.model_selection import GroupKFold

    x, y = embed([example.text for example in examples]), np.array([example.mode for example in examples])
    items = [example.item for example in examples]
    losses: dict[float, float] = {}
    errors: dict[float, float] = {}
    plain: dict[float, float] = {}
    for strength in STRENGTHS:
        odds = np.zeros(len(y))
        for kept, left in GroupKFold(FOLDS, shuffle=True, random_state=SEED).split(x, y, items):
            odds[left] = _regression(strength).fit(x[kept], y[kept]).decision_function(x[left])
        of_each = np.logaddexp(0, np.where(y, -odds, odds))
        losses[strength], errors[strength] = float(of_each.mean()), float(of_each.std() / np.sqrt(len(y)))
        plain[strength] = float(np.clip(odds[~y], -BOUND, BOUND).mean())
    least = min(losses, key=lambda strength: losses[strength])
    best = min(strength for strength in STRENGTHS if losses[strength] <= losses[least] + errors[least])
    model = _regression(best).fit(x, y)
    return {
        "weights": [round(float(weight), 6) for weight in model.coef_[0]],
        "bias": round(float(model.intercept_[0]), 6),
        "plain": round(plain[best], 6),
        "strength": best,
        "losses": {str(strength): round(loss, 4) for strength, loss in losses.items()},
        "folds": FOLDS,
    }


def _regression(strength: float) -> LogisticRegression:
    """Logistic regression with an L2 penalty in which both modes count alike, however many texts each has."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, class_weight="balanced", max_iter=5000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labelled", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    paths = [Path(__file__).with_name("training.yaml"), *given.labelled]
    examples = [example for path in paths for example in read_examples(path)]
    found = fit(examples)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    content = {
        "name": given.out.stem,
        "bias": found.pop("bias"),
        "plain": found.pop("plain"),
        "model_sha256": model_sha256(),
        "weights": found.pop("weights"),
        "fitted_on": {"files": files, "texts": len(examples), **found},
    }
    given.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
