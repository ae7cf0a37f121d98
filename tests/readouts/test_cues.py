"""Cues count only in company: by passages, with weights, and never where a passage stays under the threshold."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpatch.errors import ProtocolError
from kvpatch.readouts.behavior import Lexicon, content_words, normalise, recursive_score, recursive_score_masked
from kvpatch.readouts.cues import PASSAGE, Found, passages
from kvpatch.readouts.patterns import lowered
from kvpatch.readouts.scorer import read_scorer
from kvpatch.specs.scripts import WORD

RECURSION = Lexicon.load("recursion")
CUES = RECURSION.cues
EXAMPLES = [text for cue in CUES.cues for text in (*cue.matches, *cue.rejects)] + [*CUES.hits, *CUES.none]
VOCABULARY = sorted({word for text in EXAMPLES for word in text.split()})
texts = st.lists(st.sampled_from([*VOCABULARY, ".", "—", "\n\n", "'s"]), max_size=90).map(" ".join)


def read(*cues: str, more: str = "") -> Lexicon:
    content = "name: tide\nversion: 1\nentries: []\n" + more + "cues:\n" + "".join(f"  - {cue}\n" for cue in cues)
    return Lexicon.parse(content.encode(), "tide")


def test_recursion_lexicon_version_2_is_frozen():
    """Stored scores name this hash. Who changes the file gives it a new version and puts both here."""
    assert (RECURSION.name, RECURSION.version) == ("recursion", 2)
    assert RECURSION.sha256 == "3213b79b48bdf6245f4ef8096be38b4d8bdcb3efd696e467370d25639f710b76"


def test_a_cue_is_no_hit_alone_and_is_one_in_company():
    tide = read(
        "{id: sea, weight: 1, words: [sea, tide]}",
        "{id: rise, weight: 1, pattern: 'tide {..2} rises', matches: [the tide then rises]}",
        "{id: bank, weight: -2, words: [bank]}",
        more="threshold: 1.5\n",
    )
    assert tide.hits("The sea is grey.") == []
    assert [hit.text for hit in tide.hits("The sea is grey; the tide slowly rises.")] == ["sea", "tide slowly rises"]
    assert tide.hits("The sea is grey; the tide slowly rises, says the bank.") == []
    assert tide.hits("The tide. It rises.") == []  # a gap ends with its sentence


def test_cues_of_chinese_are_found_within_its_runs_and_weighed_by_its_sentences():
    tide = read(
        "{id: sea, weight: 1, words: [海]}",
        "{id: rise, weight: 1, pattern: '潮水.?上涨', matches: [潮水上涨]}",
        more="threshold: 1.5\n",
    )
    assert [hit.text for hit in tide.hits("灰色的海上潮水又上涨了")] == ["海", "潮水又上涨"]
    assert tide.hits("灰色的海") == []
    sentence = "这是一个很长很长的句子里面有三十多个字但是没有说到什么别的东西所以会结束。"
    assert len(sentence) > PASSAGE
    assert [(a, b) for a, b in passages(sentence * 2 + "\n")] == [
        (0, len(sentence)),
        (len(sentence), 2 * len(sentence) + 1),
    ]
    with pytest.raises(ProtocolError, match="each character is one"):
        read("{id: tide, weight: 1, words: [潮水]}")


def test_a_repeated_cue_is_weighed_twice_at_most():
    tide = read("{id: sea, weight: 1, words: [sea]}", more="threshold: 2.5\n")
    assert tide.hits("sea " * 50) == []


def test_a_match_of_function_words_alone_is_evidence_and_no_hit():
    tide = read("{id: it, weight: 1, words: [it]}", "{id: sea, weight: 1, words: [sea]}", more="threshold: 1.5\n")
    assert [hit.text for hit in tide.hits("it is the sea")] == ["sea"]


@given(texts)
def test_passages_cover_the_text_and_hold_at_most_twice_their_least_words(text: str):
    low = lowered(normalise(text.replace("|", " ")))
    found = passages(low)
    assert (found[0][0], found[-1][1]) == (0, len(low))
    assert all(before[1] == after[0] for before, after in itertools.pairwise(found))
    sizes = [sum(start <= word.start() < end for word in WORD.finditer(low)) for start, end in found]
    assert max(sizes) <= 2 * PASSAGE
    assert len(sizes) == 1 or min(sizes) >= 1


@given(texts)
def test_cues_are_found_as_by_trying_each_alone_at_each_word(text: str):
    low = lowered(normalise(text))
    expected = []
    for word, (at, cue) in itertools.product(WORD.finditer(low), enumerate(CUES.cues)):
        if word[0].removesuffix("'s") in cue.words:
            expected.append(Found(word.start(), word.end(), at))
        if cue.regex and (match := cue.regex.match(low, word.start())):
            expected.append(Found(match.start(), match.end(), at))
    assert sorted(CUES.find(low)) == sorted(expected)


@given(texts)
def test_hits_are_disjoint_and_cover_whole_words_with_content(text: str):
    normal = normalise(text)
    spans = [match.span() for match in WORD.finditer(normal)]
    starts, ends = {start for start, _ in spans}, {end for _, end in spans}
    hits = RECURSION.hits(text)
    assert all(before.end <= after.start for before, after in itertools.pairwise(hits))
    assert all(hit.start in starts and hit.text == normal[hit.start : hit.end] for hit in hits)
    assert all(hit.end in ends or normal[hit.end - 1] == "?" for hit in hits)
    assert all(content_words(hit.text) for hit in hits)


@given(texts, texts, texts)
def test_masking_never_raises_the_score_and_a_longer_source_never_unmasks(text: str, source: str, more: str):
    masked = recursive_score_masked(text, source, RECURSION)
    assert recursive_score_masked(text, f"{source} | {more}", RECURSION) <= masked <= recursive_score(text, RECURSION)
    assert recursive_score_masked(text, text, RECURSION) == 0.0


@given(texts)
def test_a_text_said_twice_scores_as_it_does_once(text: str):
    assert recursive_score(f"{text} | {text}", RECURSION) == pytest.approx(recursive_score(text, RECURSION))


def test_inflection_of_a_copied_word_is_masked():
    text = "The reply watches itself observing."
    assert {hit.text for hit in RECURSION.hits(text)} >= {"observing"}
    uncopied = recursive_score_masked(text, "an observer observes", RECURSION)
    assert uncopied < recursive_score(text, RECURSION)


@pytest.mark.parametrize(
    "unit", [*(text + " " for cue in CUES.cues for text in cue.matches[:1]), "a", "a-", "it that "]
)
def test_no_cue_backtracks_on_its_own_words_repeated(unit: str):
    """100,000 characters, whole and with the end of each unit missing."""
    RECURSION.hits((unit * 100_000)[:100_000])
    RECURSION.hits(((unit[:-2] + " ") * 100_000)[:100_000])


def test_cues_travel_between_processes():
    copy = pickle.loads(pickle.dumps(RECURSION))
    assert copy == RECURSION
    assert [copy.hits(text) for text in CUES.hits] == [RECURSION.hits(text) for text in CUES.hits]


@pytest.mark.parametrize(
    ("cues", "more", "reason"),
    [
        (["{id: a, weight: 1}"], "", "either words or a pattern"),
        (["{id: a, weight: heavy, words: [b]}"], "", "weight a number"),
        (["{id: a, weight: 1, words: [b c]}"], "", "single words"),
        (["{id: a, weight: 1, words: ['{seas}']}"], "", "no word list 'seas'"),
        (["{id: a, weight: 1, pattern: 'b ?c'}"], "", "quantified"),
        (["{id: a, weight: 1, pattern: '(b'}"], "", "no regex"),
        (["{id: a, weight: 1, pattern: 'b*'}"], "", "empty text"),
        (["{id: a, weight: 1, pattern: b, matches: [c]}"], "", "'c' does not hold"),
        (["{id: a, weight: 1, pattern: b, rejects: [b]}"], "", "'b' does not hold"),
        (["{id: a, weight: 1, words: [b]}", "{id: a, weight: 1, words: [c]}"], "", "must differ"),
        (["{id: a, weight: 1, words: [b]}"], "lists: {B: [c]}\n", "small letters"),
        (["{id: a, weight: 1, words: [b]}"], "examples: {hits: [c]}\n", "'c' must have a hit"),
        (["{id: a, weight: 1, words: [b]}"], "examples: {none: [b]}\n", "'b' must have no hit"),
        (["{id: a, weight: 1, words: [b]}"], "threshold: low\n", "threshold a number"),
    ],
)
def test_a_faulty_cue_is_refused_in_one_line_that_names_the_fault(cues: list[str], more: str, reason: str):
    with pytest.raises(ProtocolError, match=reason) as error:
        read(*cues, more=more)
    assert "\n" not in str(error.value)


def test_cue_without_an_example_of_its_pattern_is_refused_for_a_protocol(tmp_path: Path):
    path = tmp_path / "tide.yaml"
    path.write_text("name: tide\nversion: 1\nentries: []\ncues:\n  - {id: a, weight: 1, pattern: b}\n")
    with pytest.raises(ProtocolError, match="'a': it has no example"):
        read_scorer("tide.yaml", tmp_path)
