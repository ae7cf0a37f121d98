"""The semantic score: right on texts that a person labelled, unmoved by loops and length, null without its extra."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from kvpatch.cli.app import warn_of_missing_meaning
from kvpatch.protocols.load import load_protocol
from kvpatch.protocols.schema import Readouts
from kvpatch.readouts import semantic
from kvpatch.readouts.semantic import direction, is_available, model_sha256, semantic_scores, windows
from kvpatch.readouts.semantic.fit import read_examples

LABELLED = Path(__file__).parent / "labelled"
FOLDER = Path(semantic.__file__).parent
needs_extra = pytest.mark.skipif(not is_available(), reason="the extra 'semantic' is not installed")

PLAIN = (
    "The city lies on both sides of a river. It has two universities, a port and a cathedral that was begun in 1248. "
    "Trams run from the station to the market every ten minutes. "
)
MODE = "I watch this sentence being written, and I notice the watching, which is written down here as well."


def scores(*texts: str) -> list[float]:
    found = semantic_scores("recursion", texts)
    assert all(score is not None for score in found)
    return [score for score in found if score is not None]


def totals(half: str) -> tuple[float, float]:
    """Precision and recall on one half of the labelled texts; nothing of a single text is told."""
    entries = yaml.safe_load((LABELLED / f"{half}.yaml").read_text("utf-8"))
    found = semantic_scores("recursion", [entry["text"] for entry in entries])
    said = np.array([score is not None and score > 0 for score in found])
    true = np.array([entry["mode"] for entry in entries])
    right = int((said & true).sum())
    return right / int(said.sum()), right / int(true.sum())


@needs_extra
@pytest.mark.parametrize("half", ["dev", "held_out"])
def test_precision_and_recall_are_at_least_four_fifths(half: str):
    precision, recall = totals(half)
    print(f"{half}: precision {precision:.3f}, recall {recall:.3f}")
    assert precision >= 0.8, f"precision {precision:.3f}"
    assert recall >= 0.8, f"recall {recall:.3f}"


@needs_extra
def test_a_score_is_the_same_alone_and_among_others():
    texts = [*[example.text for example in read_examples(FOLDER / "training.yaml")][::12], PLAIN * 5, MODE]
    together = scores(*texts)
    backwards = scores(*reversed(texts))[::-1]
    alone = [scores(text)[0] for text in texts]
    assert np.allclose(together, alone, rtol=0, atol=1e-5)
    assert np.allclose(together, backwards, rtol=0, atol=1e-5)


@needs_extra
@pytest.mark.parametrize("words", ["the", "noticing", "I notice that", "this answer is aware of", "lamp", "and , ."])
def test_a_loop_of_words_scores_as_plain_text_whatever_it_repeats(words: str):
    plain = direction("recursion").plain
    (score,) = scores(" ".join([words] * 60))
    assert abs(score - plain) < 0.6, f"{score} is not near {plain}"


@needs_extra
def test_repeating_a_plain_text_or_going_on_in_it_does_not_reach_the_mode():
    short, *longer = scores(PLAIN, PLAIN * 4, PLAIN * 20)
    assert short < 0
    assert all(score < 0 for score in longer)
    assert all(abs(score - direction("recursion").plain) < 1.5 for score in longer)


@needs_extra
def test_random_words_are_plain_on_the_whole():
    draw = np.random.default_rng(0)
    examples = [e for e in read_examples(FOLDER / "training.yaml") if not e.mode]
    words = sorted({word.lower().strip('.,;:!?"') for example in examples for word in example.text.split()})
    found = scores(*(" ".join(draw.choice(words, 40)) for _ in range(40)))
    assert np.mean(found) < -1
    assert np.mean([score < 0 for score in found]) >= 0.95


@needs_extra
def test_a_score_is_bounded_and_a_text_without_words_has_none():
    assert semantic_scores("recursion", ["", "1 2 3 ... ?!", "\n\n", " "]) == [None] * 4
    assert all(-4 <= score <= 4 for score in scores("a", MODE, MODE * 3, PLAIN * 9, "\u4f60\u597d" * 300))
    assert scores(MODE)[0] > 1 > 0 > scores(PLAIN)[0]
    assert semantic_scores("recursion", []) == []


@needs_extra
def test_a_thousand_texts_take_less_than_half_a_minute():
    texts = [f"{number} {PLAIN}" for number in range(1000)]
    scores(MODE)  # the model is loaded
    start = time.monotonic()
    scores(*texts)
    print(f"1000 texts: {time.monotonic() - start:.1f} s")
    assert time.monotonic() - start < 120, "four times what two free cores need, since tests share them"


@needs_extra
def test_the_direction_was_fitted_on_the_files_that_are_here_and_with_this_model():
    fitted = direction("recursion")
    assert len(fitted.weights) == 384
    assert fitted.model_sha256 == model_sha256()
    paths = {"training.yaml": FOLDER / "training.yaml", "dev.yaml": LABELLED / "dev.yaml"}
    assert fitted.fitted_on["files"] == {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in paths.items()}


def test_the_training_texts_cross_register_with_mode():
    entries = yaml.safe_load((FOLDER / "training.yaml").read_text("utf-8"))
    assert len(entries) >= 300
    assert len({entry["text"] for entry in entries}) == len(entries)
    crossed = [(entry["mode"], entry["person"]) for entry in entries]
    assert min(crossed.count(cell) for cell in {(m, p) for m in (True, False) for p in ("first", "third")}) >= 60
    labelled = [yaml.safe_load((LABELLED / f"{half}.yaml").read_text("utf-8")) for half in ("dev", "held_out")]
    copied = {entry["text"] for half in labelled for entry in half} & {entry["text"] for entry in entries}
    assert len(copied) == 0, "a labelled text was copied"


def test_windows_hold_every_word_once_and_are_neither_short_nor_endless():
    text = PLAIN * 3 + "Yes. " + "word " * 200
    found = windows(text)
    assert " ".join(window.text for window in found).split() == text.split()
    assert sum(window.words for window in found) == len(text.split())
    assert all(20 <= window.words < 100 for window in found)
    first = windows(PLAIN)
    assert all(window.fresh == window.words for window in first)
    assert sum(w.fresh for w in windows("the " * 50)) == 4


def test_without_the_extra_every_score_is_null_and_a_run_says_so_once(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(semantic, "PACKAGE", "no_such_package")
    assert semantic_scores("recursion", [MODE, PLAIN]) == [None, None]
    warn_of_missing_meaning(load_protocol("dec7"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install 'kvpatch[semantic]'" in said


def test_only_a_protocol_that_asks_for_the_score_is_warned(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(semantic, "PACKAGE", "no_such_package")
    protocol = load_protocol("dec7")
    warn_of_missing_meaning(protocol.model_copy(update={"readouts": Readouts()}))
    assert capsys.readouterr().err == ""
