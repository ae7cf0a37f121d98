"""Fit a direction of the semantic score again, and write it as data.

    python -m kvpatch.readouts.semantic.fit --labelled tests/readouts/labelled/dev.yaml --out recursion.json \\
        --continuations src/kvpatch/prompts/banks/recursion-2/continuations_*.yaml

Texts are labelled with whether they are in the mode, and with an item: texts of one item are variants of each other (the
same sentence in the mode and plain, in first and third person) and never stand on both sides of a split. Beside them
stand loops of a few words of these texts, all of them plain. They keep an output that only repeats itself from looking
like the mode, whichever words it repeats.
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
from numpy.typing import NDArray

from kvpatch.readouts.semantic import embed, model_sha256

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


def loops(examples: Sequence[Example]) -> list[Example]:
    """Of every fourth text a loop of one to six of its words; all plain, whichever words they are."""
    draw = np.random.default_rng(SEED)
    out: list[Example] = []
    for example in examples[::4]:
        words = example.text.split()
        length = int(draw.integers(1, 7))
        start = int(draw.integers(0, max(1, len(words) - length)))
        text = " ".join(words[start : start + length] * int(draw.integers(30, 60) // length))
        out.append(Example(text, False, example.item, "loops"))
    return out


def fit(examples: Sequence[Example]) -> tuple[NDArray[np.float64], float, dict[str, Any]]:
    """Weights [384], bias, and how the fit was made; the strength is that of the least loss on items left out."""
    from sklearn.model_selection import GroupKFold

    x, y = embed([example.text for example in examples]), np.array([example.mode for example in examples])
    items = [example.item for example in examples]
    losses: dict[float, float] = {}
    for strength in STRENGTHS:
        odds = np.zeros(len(y))
        for kept, left in GroupKFold(FOLDS, shuffle=True, random_state=SEED).split(x, y, items):
            odds[left] = _regression(strength).fit(x[kept], y[kept]).decision_function(x[left])
        losses[strength] = float(np.logaddexp(0, np.where(y, -odds, odds)).mean())
    best = min(losses, key=lambda strength: losses[strength])
    model = _regression(best).fit(x, y)
    how = {"strength": best, "losses": {str(s): round(loss, 4) for s, loss in losses.items()}, "folds": FOLDS}
    return model.coef_[0].astype(np.float64), float(model.intercept_[0]), how


def _regression(strength: float) -> LogisticRegression:
    """Logistic regression with an L2 penalty in which both modes count alike, however many texts each has."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, class_weight="balanced", max_iter=5000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labelled", type=Path, nargs="*", default=[])
    parser.add_argument("--continuations", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    paths = [Path(__file__).with_name("training.yaml"), *given.labelled, *given.continuations]
    examples = [example for path in paths for example in read_examples(path)]
    examples += loops(examples)
    weights, bias, how = fit(examples)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    content = {
        "name": given.out.stem,
        "bias": round(bias, 6),
        "model_sha256": model_sha256(),
        "fitted_on": {"files": files, "texts": len(examples), **how},
        "weights": [round(float(weight), 6) for weight in weights],
    }
    given.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
