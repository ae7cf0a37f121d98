"""The recursion lexicon finds the labelled texts in the mode and leaves the others: totals alone are ever printed.

Nobody who works on the lexicon reads the held-out half, so a failure must not show a text of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kvpatch.readouts.behavior import Lexicon

LABELLED = Path(__file__).parent / "labelled"


def precision_and_recall(half: str, lexicon: Lexicon) -> tuple[float, float]:
    """Of the texts with at least one hit the share in the mode; of those in the mode the share with a hit."""
    labelled = yaml.safe_load((LABELLED / f"{half}.yaml").read_text(encoding="utf-8"))
    judged = [(bool(lexicon.hits(entry["text"])), entry["mode"]) for entry in labelled]
    both = judged.count((True, True))
    return both / sum(found for found, _ in judged), both / sum(mode for _, mode in judged)


@pytest.mark.parametrize("half", ["dev", "held_out"])
def test_lexicon_reaches_a_precision_and_a_recall_of_four_fifths(half: str):
    precision, recall = precision_and_recall(half, Lexicon.load("recursion"))
    reached = precision >= 0.8 and recall >= 0.8  # a plain bool, so that pytest shows no text
    assert reached, f"{half}: precision {precision:.3f}, recall {recall:.3f}"
