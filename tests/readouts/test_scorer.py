"""A scorer is a lexicon or a function; it is plain data, masks what was copied, and what it returns is checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvpatch.errors import ProtocolError
from kvpatch.readouts.behavior import Lexicon, normalise, recursive_score, recursive_score_masked
from kvpatch.readouts.scorer import Scorer, names_code, read_scorer

TEXT = "The red fox saw a RED hen, and the blue hen saw it."  # 13 words
SPANS = "import re\ndef red(text):\n    return [m.span() for m in re.finditer('red|blue', text.lower())]\n"
NUMBER = "def red(text):\n    return 100 * text.lower().split().count('red') / 13\n"


def written(folder: Path, code: str, name: str = "scorer.py") -> Scorer:
    (folder / name).write_text(code)
    return read_scorer(f"{name}:red", folder)


def test_lexicon_scores_as_the_lexicon_does():
    text, seen = "I observe that I observe a strange loop.", "an observer"
    scored, lexicon = read_scorer("recursion").score(text, seen), Lexicon.load("recursion")
    assert scored.score == recursive_score(text, lexicon) > 0
    assert scored.masked == recursive_score_masked(text, seen, lexicon) < scored.score
    assert scored.hits == tuple((hit.start, hit.end) for hit in lexicon.hits(text))


def test_spans_are_scored_per_100_words_and_masked_where_they_hold_a_word_of_the_prompts(tmp_path):
    scored = written(tmp_path, SPANS).score(TEXT, "A red door")
    assert scored.hits == ((4, 7), (18, 21), (35, 39))
    assert scored.score == pytest.approx(100 * 3 / 13)
    assert scored.masked == pytest.approx(100 * 1 / 13)


def test_number_is_the_score_and_is_taken_again_without_the_words_of_the_prompts(tmp_path):
    scorer = written(tmp_path, NUMBER)
    assert scorer.score(TEXT, "A red door").score == pytest.approx(100 * 2 / 13)
    assert scorer.score(TEXT, "A red door").masked == 0
    assert scorer.score(TEXT, "A blue door").masked == pytest.approx(100 * 2 / 13)
    assert scorer.score(TEXT, "A red door").hits is None


def test_function_gets_the_text_that_offsets_index(tmp_path):
    code = 'def red(text):\n    return [(text.index("l\'"), len(text))] if "l\'" in text else []\n'
    text = "e\u0301te\u0301 l\u2019eau"
    assert written(tmp_path, code).score(text, "").hits == ((4, len(normalise(text))),)


@pytest.mark.parametrize("code", [SPANS, NUMBER])
def test_text_without_words_scores_nothing(tmp_path, code):
    scored = written(tmp_path, code).score("", "")
    assert (scored.score, scored.masked) == (0, 0)


@pytest.mark.parametrize(
    "returned",
    ["None", "'red'", "True", "float('nan')", "float('inf')", "[1]", "[(0, 99)]", "[(-1, 2)]", "[(3, 3)]", "{(0, 1)}",
     "[(0.0, 1.0)]", "[(0, 1, 2)]", "['ab']"],
)  # fmt: skip
def test_what_is_neither_a_number_nor_spans_is_refused(tmp_path, returned):
    with pytest.raises(ProtocolError, match=r"scorer scorer.py:red must return a finite number, or a list"):
        written(tmp_path, f"def red(text):\n    return {returned}\n").score(TEXT, "")


def test_function_that_gives_now_a_number_and_now_a_list_is_refused(tmp_path):
    with pytest.raises(ProtocolError, match="a number for one text and a list for another"):
        written(tmp_path, "def red(text):\n    return 1 if 'red' in text else []\n").score(TEXT, "A red door")


def test_hits_that_overlap_are_refused(tmp_path):
    with pytest.raises(ProtocolError, match="overlap"):
        written(tmp_path, "def red(text):\n    return [(4, 7), (0, 5)]\n").score(TEXT, "")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def red(text):\n    return 1 / 0\n", "scorer.py:red: ZeroDivisionError: division by zero"),
        ("def red(text):\n    raise KeyError\n", "scorer.py:red: KeyError: no message"),
        ("def red(text):\n    raise SystemExit(3)\n", "scorer.py:red: SystemExit"),
        ("def red()\n", "scorer.py:red, line 1: SyntaxError"),
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("red = 3\n", "there is no function 'red' in it"),
        ("def blue(text):\n    return 0\n", "there is no function 'red' in it"),
        ("def red(text, more):\n    return 0\n", "scorer.py:red: TypeError"),
    ],
)
def test_broken_function_is_told_in_one_line(tmp_path, code, words):
    with pytest.raises(ProtocolError) as raised:
        written(tmp_path, code).score(TEXT, "")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.py:red", "nowhere.py can't be read"),
        ("nowhere.yaml", "no lexicon 'nowhere.yaml'"),
        ("recusion", "no lexicon 'recusion'"),
        ("no_such_package.scores:red", "no_such_package"),
        ("sys:exit", "no module 'sys' with a file of its own"),
    ],
)
def test_scorer_that_is_not_there_is_told_in_one_line(tmp_path, name, words):
    with pytest.raises(ProtocolError) as raised:
        read_scorer(name, tmp_path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_reading_a_file_runs_none_of_it(tmp_path):
    scorer = written(tmp_path, f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n{SPANS}")
    assert not (tmp_path / "ran").exists()
    scorer.score(TEXT, "")
    assert (tmp_path / "ran").exists()


def test_only_functions_are_code():
    assert names_code("scorer.py:red")
    assert names_code("package.module:red")
    assert not any(map(names_code, ("recursion", "lexicon.yaml", "C:/lexicons/red.yaml", r"C:\red.yaml")))


def test_file_stands_alone(tmp_path):
    """What lies beside it can't be imported, so that its hash says all that was run."""
    (tmp_path / "beside.py").write_text("WORD = 'red'\n")
    with pytest.raises(ProtocolError, match="No module named 'beside'"):
        written(tmp_path, f"import beside\n{SPANS}").score(TEXT, "")


def test_file_may_define_dataclasses(tmp_path):
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Word:\n    it: str\n"
    )
    assert written(tmp_path, code + SPANS).score(TEXT, "").score > 0


def test_another_process_scores_the_same_without_the_file(tmp_path):
    scorer = written(tmp_path, SPANS)
    (tmp_path / "scorer.py").unlink()
    code = (
        "import sys\nfrom kvpatch.readouts.scorer import Scorer\n"
        "print(Scorer.model_validate_json(sys.argv[1]).score(sys.argv[2], 'A red door'))"
    )
    command = [sys.executable, "-c", code, scorer.model_dump_json(), TEXT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(scorer.score(TEXT, "A red door"))


def test_function_of_an_installed_module_is_hashed_by_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "colours_of_a_test.py").write_text(SPANS)
    scorer = read_scorer("colours_of_a_test:red")
    assert scorer.score(TEXT, "").score == pytest.approx(100 * 3 / 13)
    assert scorer.sha256 == written(tmp_path, SPANS).sha256
    (tmp_path / "colours_of_a_test.py").write_text(NUMBER)
    assert read_scorer("colours_of_a_test:red").sha256 != scorer.sha256
    with pytest.raises(ProtocolError, match="not the one the run was planned with"):
        scorer.model_copy(update={"sha256": "0" * 64}).score(TEXT, "")
