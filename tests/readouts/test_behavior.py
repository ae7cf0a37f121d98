"""Behavior readouts: the lexicon matches what its file says, and scores read the generated text alone."""

import dataclasses
import inspect
import itertools
import math
import pickle
import sys
import unicodedata

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from kvpatch.errors import ProtocolError
from kvpatch.readouts import patterns
from kvpatch.readouts.behavior import (
    STOPWORDS,
    Hit,
    Lexicon,
    content_words,
    copied_words,
    ngram_overlap,
    normalise,
    recursive_score,
    recursive_score_masked,
    uncopied_hits,
    words,
)
from kvpatch.specs import scripts

# The first edition: its entries count wherever they stand, so that a short text shows what is counted and how.
# What holds of the cues of the second edition stands in test_cues.py.
RECURSION = Lexicon.load("recursion-1")
PLAIN = "Bread rises because yeast turns sugar into gas, and the dough holds the gas in its threads of gluten."

EXAMPLES = [(entry.id, text) for entry in RECURSION.entries for text in entry.matches]
COUNTEREXAMPLES = [(entry.id, text) for entry in RECURSION.entries for text in entry.rejects]

# Texts dense in lexicon words, near misses, function words and punctuation, so that hits touch and overlap.
VOCABULARY = sorted({word for _, text in EXAMPLES + COUNTEREXAMPLES for word in text.split()})
dense_texts = st.lists(st.sampled_from([*VOCABULARY, ".", "—", "\n\n", "'s"]), max_size=30).map(" ".join)
texts = st.one_of(dense_texts, st.text(max_size=60))


# --- the shipped lexicon ---


@pytest.mark.parametrize(("entry", "text"), EXAMPLES)
def test_each_example_of_an_entry_is_one_hit_of_that_entry(entry: str, text: str):
    assert [hit.entry for hit in RECURSION.hits(text)] == [entry]


@pytest.mark.parametrize(("entry", "text"), COUNTEREXAMPLES)
def test_no_entry_matches_what_an_entry_rejects(entry: str, text: str):
    assert RECURSION.hits(text) == []


def test_every_entry_has_examples_and_counterexamples():
    assert all(len(entry.matches) >= 2 and len(entry.rejects) >= 2 for entry in RECURSION.entries)


def test_recursion_lexicon_version_1_is_frozen():
    """Stored scores name this hash. Who changes the file gives it a new version and puts both here."""
    assert (RECURSION.name, RECURSION.version) == ("recursion", 1)
    assert RECURSION.sha256 == "0b866b66d9fcd70f86a29992cc0a8da7f36f02cde9081fe695c6fafd4d9b4a1b"


def test_word_families_match_where_a_bare_stem_would_not():
    """Old scripts searched for the stem between word boundaries, which is in none of these."""
    for word in ("observe", "observes", "observed", "observing", "observer", "observers", "observation"):
        assert recursive_score(word, RECURSION) == 100.0, word
    assert recursive_score("observ", RECURSION) == 0.0


def test_ordinary_prose_has_no_hits():
    assert recursive_score(PLAIN, RECURSION) == 0.0


# --- loading ---


def write_lexicon(path, *entries: str, head: str = "name: rhyme\nversion: 3\n"):
    path.write_text(head + "entries:\n" + "".join(f"  - {entry}\n" for entry in entries), encoding="utf-8")
    return path


def test_a_lexicon_for_another_mode_loads_from_a_path(tmp_path):
    path = write_lexicon(tmp_path / "rhyme.yaml", "{id: moon, pattern: 'moons? (?:and|in) june', matches: []}")
    lexicon = Lexicon.load(path)
    assert (lexicon.name, lexicon.version) == ("rhyme", 3)
    assert Lexicon.load(str(path)) == lexicon
    assert recursive_score("The Moon\n and June", lexicon) == 25.0
    assert recursive_score("observe myself", lexicon) == 0.0


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (["{id: a, pattern: '(unclosed'}"], "no regex"),
        (["{id: a, pattern: 'b*'}"], "empty text"),
        (["{id: a, pattern: 'b ?c'}"], "quantified"),
        (["{id: a, pattern: '(b) \\1'}"], "named group"),
        (["{id: a, pattern: b}", "{id: a, pattern: c}"], "ids of entries must differ"),
        (["{id: a}"], "id and pattern"),
        (["{id: a, pattern: b, weight: 2}"], "id and pattern"),
        (["{id: a, pattern: b, not_after: [on]}"], "need quotes"),
        (["{id: a, pattern: b, matches: word}"], "list of texts"),
        (["{id: a, pattern: '(?P<x>b)'}", "{id: c, pattern: '(?P<x>d)'}"], "named groups must differ"),
        (["just text"], "id and pattern"),
    ],
)
def test_a_faulty_lexicon_is_refused_in_one_line_that_names_the_fault(tmp_path, entries, reason):
    with pytest.raises(ProtocolError, match=reason) as error:
        Lexicon.load(write_lexicon(tmp_path / "faulty.yaml", *entries))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"name: x", b"name: x\nversion: one\nentries: []", b"a: [", b"\xff\xfe"]
)
def test_a_file_that_is_no_lexicon_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "other.yaml"
    path.write_bytes(content)
    with pytest.raises(ProtocolError) as error:
        Lexicon.load(path)
    assert "\n" not in str(error.value)


def test_an_unknown_lexicon_is_refused_with_the_names_of_the_shipped_ones():
    with pytest.raises(ProtocolError, match=r"no lexicon 'recusion'; give one of .*recursion, recursion-1"):
        Lexicon.load("recusion")


def test_a_lexicon_is_a_value_that_travels_between_processes():
    copy = pickle.loads(pickle.dumps(RECURSION))
    assert copy == RECURSION
    assert hash(copy) == hash(RECURSION)
    assert copy.hits("I observe myself") == RECURSION.hits("I observe myself")
    with pytest.raises(dataclasses.FrozenInstanceError):
        copy.version = 2


# --- hits ---


def test_a_hit_says_where_it_is_and_which_entry_claims_it():
    assert RECURSION.hits("Here I am aware.") == [Hit(10, 15, "aware", "aware")]


def test_the_longest_of_the_entries_that_start_together_claims_the_stretch():
    alone = {entry for word in ("watching", "myself") for entry in RECURSION.families(word)}
    assert "myself" in alone
    assert [hit.entry for hit in RECURSION.hits("watching myself")] == ["perceive_self"]
    assert RECURSION.families("watching myself") == {"perceive_self", "myself"}


@given(dense_texts)
def test_hits_are_disjoint_ordered_and_cover_whole_words(text: str):
    normal = normalise(text)
    spans = [match.span() for match in scripts.WORD.finditer(normal)]
    starts, ends = {start for start, _ in spans}, {end for _, end in spans}
    hits = RECURSION.hits(text)
    assert all(before.end <= after.start for before, after in itertools.pairwise(hits))
    assert all(hit.start in starts and hit.end in ends and hit.text == normal[hit.start : hit.end] for hit in hits)


@given(dense_texts)
def test_hits_equal_those_of_a_scan_that_tries_every_entry_at_every_character(text: str):
    """Independent of the gate, of the walk from word to word, and of how ties are broken in `hits`."""
    lowered = patterns.lowered(normalise(text))
    expected, at = [], 0
    while at < len(lowered):
        inside_word = at > 0 and any(s < at < e for s, e in (m.span() for m in scripts.WORD.finditer(lowered)))
        best = None
        for entry in [] if inside_word or not lowered[at].isalnum() else RECURSION.entries:
            match = entry.regex.match(lowered, at)
            if match and (best is None or match.end() > best[1]):
                best = (entry.id, match.end())
        if best:
            expected.append((at, best[1], best[0]))
        at = best[1] if best else at + 1
    assert [(hit.start, hit.end, hit.entry) for hit in RECURSION.hits(text)] == expected


@pytest.mark.parametrize(
    "text", ["what it\u2019s like to be me", "what it's like to be me", "WHAT IT\u02bcS LIKE TO BE ME"]
)
def test_curly_and_straight_apostrophes_are_equal(text: str):
    assert [hit.entry for hit in RECURSION.hits(text)] == ["what_it_is_like"]


def test_composed_and_decomposed_text_score_alike(tmp_path):
    lexicon = Lexicon.load(write_lexicon(tmp_path / "cafe.yaml", "{id: cafe, pattern: 'cafés?'}"))
    composed, decomposed = "Le CAFÉ noir", unicodedata.normalize("NFD", "Le CAFÉ noir")
    assert composed != decomposed
    assert lexicon.hits(composed) == lexicon.hits(decomposed) == [Hit(3, 7, "cafe", "CAFÉ")]


def test_offsets_are_those_of_the_text_itself_when_it_is_in_nfc():
    text = "İ said: it\u2019s \u201cself\u2011aware\u201d — ΑΣ"
    (hit,) = RECURSION.hits(text)
    assert text[hit.start : hit.end] == "self\u2011aware"


def test_lowering_keeps_the_offset_of_every_character():
    assert [chr(code) for code in range(sys.maxunicode + 1) if len(patterns.lowered(chr(code))) != 1] == []


def test_a_line_break_within_a_phrase_does_not_hide_it_but_a_full_stop_does():
    assert [hit.entry for hit in RECURSION.hits("the one\n  who writes")] == ["the_one_who"]
    assert RECURSION.hits("This is the one. Who writes?") == []


# --- words ---


def words_by_walking(text: str) -> list[str]:
    """Words, found one character at a time from Unicode's properties rather than by a regex over the whole."""
    text, found, current, last = normalise(text) + "\0", [], "", ""
    for at, char in enumerate(text):
        joins = last == "spaced" and char in "'-\u200c\u200d" and kind_of(text[at + 1]) == "spaced"
        kind = kind_of(char)
        if current and (unicodedata.category(char)[0] == "M" or joins):
            current += char
        elif current and kind == last and kind in ("spaced", "katakana"):
            current += char
        else:
            found += [current.casefold()] if current else []
            current, last = (char, kind) if kind else ("", "")
    return found


def kind_of(char: str) -> str:
    """How a letter makes words, by the database of the package `regex`, which is no part of what is tested."""
    if not char.isalnum():
        return ""
    if regex.match(r"\p{Word_Break=Katakana}|[\uff9e\uff9f]", char):
        return "katakana"
    single = r"[\p{Han}\p{Hiragana}\p{Line_Break=Complex_Context}〆]"
    return "single" if regex.match(single, char) else "spaced"


@given(
    st.one_of(
        st.text(),
        st.text(alphabet="a\u03b11'-\u2019_. \u0301\u093e\u200d\u05d0一", max_size=30),
        st.text(alphabet="aя1'-. \u0301中文をじカーﾞﾅขึกำ\u0301क\u093e한", max_size=30),
        dense_texts,
    )
)
def test_words_equal_those_found_character_by_character(text: str):
    assert words(text) == words_by_walking(text)


def test_every_combining_mark_of_this_unicode_version_stays_in_its_word():
    marks = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"]
    assert [mark for mark in marks if len(words(f"b{mark}b")) != 1] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n—…!?_\0 '- ", []),
        (
            "Don\u2019t re-read 3.5 cakes--now, 'tis dogs'",
            ["don't", "re-read", "3", "5", "cakes", "now", "tis", "dogs"],
        ),
        ("_self_ *aware*", ["self", "aware"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("שָׁלוֹם עולם", ["שָׁלוֹם", "עולם"]),
        ("ПРИВЕТ мир", ["привет", "мир"]),
        ("ПРИВЕ\u0301Т, йод", ["приве\u0301т", "йод"]),  # an accent on a letter, and a letter of two characters
        ("مَرْحَبًا بالعالم", ["مَرْحَبًا", "بالعالم"]),
        ("안녕하세요 세계", ["안녕하세요", "세계"]),
        ("面包会发酵。因为", ["面", "包", "会", "发", "酵", "因", "为"]),
        ("コンピューターで自分を見る", ["コンピューター", "で", "自", "分", "を", "見", "る"]),
        ("ขนมปังขึ้นฟู", ["ข", "น", "ม", "ปั", "ง", "ขึ้", "น", "ฟู"]),
        ("用GPU-2跑abc", ["用", "gpu-2", "跑", "abc"]),
    ],
)
def test_words_of_any_script(text: str, expected: list[str]):
    assert words(text) == [unicodedata.normalize("NFC", word) for word in expected]


@pytest.mark.parametrize(
    "text",
    ["面包为什么会发酵。", "コンピューターで自分を見る", "ขนมปังขึ้นฟู", "й ПРИВЕ\u0301Т мир", "हिन्दी में", "مَرْحَبًا بالعالم"],
)
def test_words_are_those_of_unicode_s_own_rules(text: str):
    """UAX #29 as the package `regex` carries it out."""
    parts = regex.split(r"(?wV1)\b", normalise(text))
    assert words(text) == [part.casefold() for part in parts if regex.search(r"[\p{L}\p{N}]", part)]


def test_characters_that_are_words_are_those_of_the_unicode_database():
    letters = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isalnum() and code != 0x2BC]
    wrong = [f"{ord(char):04x}" for char in letters if scripts.is_single(char) != (kind_of(char) == "single")]
    assert wrong == []
    assert [f"{ord(c):04x}" for c in letters if (len(words(f"{c}{c}")) == 1) != (kind_of(c) != "single")] == []


# --- scores ---


def test_score_is_hits_per_100_words():
    assert recursive_score("I observe the bread and observe the oven today.", RECURSION) == pytest.approx(200 / 9)


@pytest.mark.parametrize("text", ["", " ", "...", "\0", "—", "_", "\u0301"])
def test_a_text_without_words_scores_zero(text: str):
    assert recursive_score(text, RECURSION) == 0.0
    assert recursive_score_masked(text, text, RECURSION) == 0.0


def test_the_score_has_no_way_to_see_the_prompt():
    """It takes the output alone, and a recursive prompt put before it would have changed it."""
    prompt, output = "Observe yourself writing; be the observer. ", PLAIN
    assert list(inspect.signature(recursive_score).parameters) == ["text", "lexicon"]
    assert recursive_score(output, RECURSION) == 0.0 < recursive_score(prompt + output, RECURSION)


def test_the_source_never_adds_hits_to_the_masked_score():
    assert recursive_score_masked(PLAIN, "Observe yourself; be aware, be conscious.", RECURSION) == 0.0


@given(texts)
def test_score_lies_between_0_and_100(text: str):
    assert 0.0 <= recursive_score(text, RECURSION) <= 100.0


@given(texts)
def test_a_text_said_twice_scores_as_it_does_once(text: str):
    assert recursive_score(f"{text} | {text}", RECURSION) == recursive_score(text, RECURSION)


@given(texts)
def test_score_ignores_case(text: str):
    upper = "".join(char.upper() if char.isascii() else char for char in text)
    assert recursive_score(upper, RECURSION) == recursive_score(text, RECURSION)


# --- what was copied ---


@given(texts, texts)
def test_masking_never_raises_the_score(text: str, source: str):
    assert 0.0 <= recursive_score_masked(text, source, RECURSION) <= recursive_score(text, RECURSION)


@given(texts)
def test_a_text_masked_by_itself_scores_zero(text: str):
    assert recursive_score_masked(text, text, RECURSION) == 0.0


@given(texts, texts, texts)
def test_a_longer_source_never_unmasks(text: str, source: str, more: str):
    short = recursive_score_masked(text, source, RECURSION)
    assert recursive_score_masked(text, f"{source} | {more}", RECURSION) <= short


@given(texts, st.sampled_from(["", PLAIN, "..."]))
def test_a_source_that_shares_nothing_masks_nothing(text: str, source: str):
    if content_words(text).isdisjoint(content_words(source)):
        assert recursive_score_masked(text, source, RECURSION) == recursive_score(text, RECURSION)


@pytest.mark.parametrize(
    ("text", "source", "is_masked"),
    [
        ("I observe", "OBSERVE this", True),
        ("I am observing", "be the observer of it", True),  # inflection, through the entry
        ("my self-observation", "observe it", True),  # a family within a longer hit
        ("I observe", "on self-observation", True),  # a family within a longer stretch of the source
        ("a mirror facing a mirror", "the mirror on the wall", True),  # a word, where the source has no hit
        ("the observer\u2019s place", "one observer", True),
        ("my own thoughts", "my own oven, as one may call it", False),  # function words only
        ("I observe", "an obstacle", False),
        ("I am aware", "unaware of it", False),
        ("I observe", "introspection", False),
        ("I observe", "", False),
    ],
)
def test_a_hit_is_masked_by_its_words_and_their_family_in_the_source(text: str, source: str, is_masked: bool):
    assert recursive_score(text, RECURSION) > 0
    assert (uncopied_hits(text, source, RECURSION) == []) is is_masked


def test_masking_drops_hits_and_keeps_words_in_the_count():
    text = "I observe that awareness grows"
    assert recursive_score(text, RECURSION) == 40.0
    assert recursive_score_masked(text, "please observe", RECURSION) == 20.0


def test_a_text_that_only_copies_words_of_a_recursive_source_has_no_masked_score():
    source = "Be aware of your own awareness, and observe the observer as this sentence is written."
    output = "The observer, aware, and the awareness of observing: observed, this sentence."
    assert recursive_score(output, RECURSION) > 30
    assert recursive_score_masked(output, source, RECURSION) == 0.0


def test_copied_words_are_spans_of_content_words_of_the_source():
    text = "The yeast, and then Yeast's gas: a gas-filled dough."
    spans = copied_words(text, "yeast makes the gas and then")
    assert [text[start:end] for start, end in spans] == ["yeast", "Yeast's", "gas", "gas-filled"]


@given(texts, texts)
def test_there_are_copied_words_exactly_when_content_words_meet(text: str, source: str):
    assert bool(copied_words(text, source)) is not content_words(text).isdisjoint(content_words(source))


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("我观察自己写字", 200 / 7),  # in the middle of a run, and at its beginning
        ("自己。", 100 / 2),
        ("自, 己", 0),
        ("看 自己", 100 / 3),
    ],
)
def test_lexicon_of_a_script_without_spaces_finds_its_words_anywhere(tmp_path, text: str, score: float):
    entries = ["{id: self, pattern: '自己'}", "{id: watch, pattern: '观察|我观'}"]
    lexicon = Lexicon.load(write_lexicon(tmp_path / "zh.yaml", *entries))
    assert recursive_score(text, lexicon) == pytest.approx(score)


def test_chinese_is_copied_where_two_characters_are_and_not_where_one_is(tmp_path):
    lexicon = Lexicon.load(write_lexicon(tmp_path / "zh.yaml", "{id: watch, pattern: '自我观察|注视'}"))
    text = "他在自我观察，也注视。"
    assert content_words("自我观察。我") == {"自我", "我观", "观察", "我"}
    assert [text[slice(*span)] for span in copied_words(text, "请观察自我")] == ["自我", "观察"]
    assert [text[slice(*span)] for span in copied_words(text, "一次自我观察")] == ["自我观察"]
    assert copied_words(text, "我看，自然，视。在") == []
    assert len(uncopied_hits(text, "我看，自然，视。在", lexicon)) == 2
    assert [hit.text for hit in uncopied_hits(text, "请观察", lexicon)] == ["注视"]
    assert ngram_overlap("面包会发酵", "面包会发霉") == 0.5


def test_gap_counts_words_whose_vowels_are_marks_as_one(tmp_path):
    lexicon = Lexicon.load(write_lexicon(tmp_path / "hi.yaml", "{id: see, pattern: 'मैं {..1} देखता'}"))
    assert [hit.text for hit in lexicon.hits("मैं किताब देखता हूँ")] == ["मैं किताब देखता"]
    assert lexicon.hits("मैं यह किताब देखता हूँ") == []


def test_thai_and_hindi_words_are_copied_as_they_are():
    assert copied_words("हिन्दी में किताब", "एक किताब") == [(11, 16)]
    text = "ขนมปังขึ้นฟู"
    assert [text[slice(*span)] for span in copied_words(text, "ขนมปัง")] == ["ขนมปัง"]


def test_content_words_leave_out_function_words_and_split_compounds():
    assert content_words("The Dog\u2019s self-made bread isn\u2019t ours; it rises by itself.") == {
        "dog",
        "self-made",
        "self",
        "made",
        "bread",
        "rises",
        "itself",
    }


@given(texts)
def test_content_words_are_case_folded_and_never_function_words(text: str):
    found = content_words(text)
    assert not found & STOPWORDS
    assert "" not in found
    if not regex.search(
        r"[\p{Han}\p{Hiragana}\p{Line_Break=Complex_Context}]", text
    ):  # where pairs of characters count
        assert found == content_words(" ".join(words(text)))


def test_ngram_overlap_is_the_share_of_the_outputs_ngrams():
    source = "the bread rises in the oven"
    assert ngram_overlap("Bread rises in the cellar", source) == 0.5
    assert ngram_overlap("bread, rises: in THE", source) == 1.0
    assert ngram_overlap("a b c d e", source) == 0.0
    assert ngram_overlap("bread bread bread rises", source, n=1) == 1.0
    assert ngram_overlap("bread bread rises", source, n=2) == 0.5


def test_ngram_overlap_of_too_short_a_text_is_nan():
    assert math.isnan(ngram_overlap("only three words", "only three words"))
    assert math.isnan(ngram_overlap("", "", n=1))
    assert ngram_overlap("four words are enough", "") == 0.0
    with pytest.raises(ValueError, match="n must be at least 1"):
        ngram_overlap("a", "a", n=0)


@given(texts, texts, st.integers(1, 5))
def test_ngram_overlap_equals_a_search_for_each_ngram_in_turn(text: str, source: str, n: int):
    output, origin = words(text), words(source)
    found = [
        any(output[at : at + n] == origin[there : there + n] for there in range(len(origin) - n + 1))
        for at in range(len(output) - n + 1)
    ]
    expected = sum(found) / len(found) if found else math.nan
    assert ngram_overlap(text, source, n) == pytest.approx(expected, nan_ok=True)


# --- odd and hostile texts ---

LONG = 100_000


def repeated(unit: str) -> str:
    return (unit * (LONG // len(unit) + 1))[:LONG]


HOSTILE = {
    "one long word": repeated("observ"),
    "one long compound": repeated("self-"),
    "one long possessive": repeated("a's"),
    "spaces after a trigger": "my own" + " " * LONG,
    "spaces between triggers": repeated("attention" + " " * 500),
    "long word after a trigger": "attention " + "a" * LONG,
    "combining marks": "a" + "\u0301" * LONG,
    "joiners": "a" + "-'" * (LONG // 2),
    "NUL": "\0" * LONG,
    "right to left": repeated("מודע לעצמי \u202e"),
    "lone surrogates": repeated("aware \ud800 "),
    "half a phrase": repeated("the part of me that "),
    "nested doubling": repeated("thinking about my own "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_read_to_the_end(name: str):
    """100,000 characters: a pattern that backtracks more than linearly would not finish."""
    text = HOSTILE[name]
    assert 0.0 <= recursive_score_masked(text, text[: LONG // 2], RECURSION) <= recursive_score(text, RECURSION)
    copied_words(text, text)
    ngram_overlap(text, text)


@pytest.mark.parametrize("entry", RECURSION.entries, ids=lambda entry: entry.id)
def test_no_entry_backtracks_on_its_own_words_repeated(entry):
    """An example over and over, whole and with its end missing, so that every attempt fails late."""
    example = entry.matches[0]
    assert RECURSION.hits(repeated(example + " ")) != []
    RECURSION.hits(repeated(example[:-1] + " "))


def test_nul_and_right_to_left_marks_do_not_hide_a_hit():
    assert len(RECURSION.hits("\0aware\0 \u202eaware\u202c \u200faware")) == 3
