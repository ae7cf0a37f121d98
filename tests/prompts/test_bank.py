"""The shipped bank holds what the experiment needs, and a malformed bank is answered in one line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvpatch.errors import ProtocolError
from kvpatch.prompts.bank import Bank, load_bank, shipped_banks, shuffled_words
from kvpatch.readouts.behavior import Lexicon, content_words
from kvpatch.specs.scripts import is_single
from small import bank_entries, write_bank

LEVELS = ("L1_hint", "L2_simple", "L3_deeper", "L4_full", "L5_refined", "long_control")


@pytest.fixture(scope="module", params=["recursion", "recursion-1"])
def bank(request: pytest.FixtureRequest) -> Bank:
    return load_bank(request.param)


@pytest.fixture(scope="module")
def first() -> Bank:
    """The first edition, whose rules the second one replaced by balance (test_balance.py)."""
    return load_bank("recursion-1")


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon.load("recursion")


@pytest.fixture(scope="module")
def count_tokens():
    """Length in SmolLM2's tokens."""
    from transformers import AutoTokenizer

    from kvpatch.models.load import pull

    tokenizer = AutoTokenizer.from_pretrained(pull("smollm2-135m"), local_files_only=True)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_bank_holds_enough_targets_and_sources(bank):
    assert len(bank.group("plain")) >= 130
    assert len(bank.group("recursive")) >= 130


def test_every_target_has_one_foreign_partner(bank):
    partners = [p.partner_of for p in bank.group("foreign")]
    assert sorted(partners) == sorted(p.id for p in bank.group("plain"))


def test_every_cell_of_the_2x2_has_64_continuations(bank):
    cells = Counter((c.mode, c.topic_of) for c in bank.continuations if c.topic_of != "either")
    assert len(cells) == 4
    assert min(cells.values()) >= 64


def test_every_domain_of_a_target_or_source_has_continuations_of_both_modes(bank):
    has = {(c.topic_of, c.domain, c.mode) for c in bank.continuations}
    for side, group in (("target", "plain"), ("source", "recursive")):
        for domain in {p.domain for p in bank.group(group)}:
            assert {(side, domain, "plain"), (side, domain, "recursive")} <= has


def test_bank_holds_enough_pseudo_recursive_and_zero_lexicon_prompts(bank):
    assert len(bank.group("pseudo_recursive")) >= 40
    assert len(bank.group("zero_lexicon")) >= 40
    assert all(bank.by_id[p.paraphrase_of].group == "recursive" for p in bank.group("zero_lexicon"))


def test_every_level_of_the_ladder_has_the_same_20_subjects(bank):
    topics = {level: [p.topic for p in bank.group("ladder") if p.level == level] for level in LEVELS}
    assert set(topics) == {p.level for p in bank.group("ladder")}
    assert all(len(set(topics[level])) == len(topics[level]) >= 20 for level in LEVELS)
    assert len({frozenset(topics[level]) for level in LEVELS}) == 1


def test_every_subject_of_the_ladder_has_continuations_of_both_modes_disjoint_from_all_its_prompts(first):
    ladder = first.group("ladder")
    said = {word for prompt in ladder for word in content_words(prompt.text)}
    disjoint = Counter(
        (c.domain, c.mode) for c in first.continuations if c.topic_of == "either" and not content_words(c.text) & said
    )
    domains = {prompt.continuation_domain for prompt in ladder}
    assert {(domain, mode) for domain in domains for mode in ("plain", "recursive")} == set(disjoint)
    assert min(disjoint.values()) >= 3


def test_levels_of_the_ladder_are_equal_in_length_to_within_a_tenth(bank, count_tokens):
    means = [
        sum(lengths) / len(lengths)
        for level in LEVELS
        if (lengths := [count_tokens(p.text) for p in bank.group("ladder") if p.level == level])
    ]
    assert min(means) >= 0.9 * max(means)


def test_targets_and_sources_each_lie_on_topics_of_their_own(first):
    for group in ("plain", "recursive", "foreign"):
        topics = [p.topic for p in first.group(group)]
        assert len(set(topics)) == len(topics), group


def test_ids_are_unique_and_texts_distinct(bank):
    entries = [*bank.prompts, *bank.continuations]
    assert len({e.id for e in entries}) == len(entries)
    assert [text for text, n in Counter(" ".join(e.text.lower().split()) for e in entries).items() if n > 1] == []


@pytest.mark.parametrize("group", ["plain", "foreign", "zero_lexicon"])
def test_no_prompt_of_a_group_without_the_mode_s_words_has_one(bank, lexicon, group):
    if group == "zero_lexicon":  # written without the words of the first edition; the second weighs every word
        lexicon = Lexicon.load("recursion-1")
    assert {p.id: [hit.text for hit in lexicon.hits(p.text)] for p in bank.group(group) if lexicon.hits(p.text)} == {}


def test_plain_continuations_hold_no_word_of_the_lexicon(first, lexicon):
    assert [c.id for c in first.continuations if c.mode == "plain" and lexicon.hits(c.text)] == []


def test_recursive_continuations_hold_words_of_the_lexicon_where_plain_ones_hold_none(first, lexicon):
    hit = [bool(lexicon.hits(c.text)) for c in first.continuations if c.mode == "recursive"]
    assert sum(hit) > 0.6 * len(hit)


def test_foreign_partners_are_within_a_tenth_of_their_targets_in_length(bank, count_tokens):
    for target in bank.group("plain"):
        lengths = sorted(count_tokens(p.text) for p in (target, bank.partners[target.id]))
        assert lengths[1] - lengths[0] <= 0.1 * lengths[1], (target.id, lengths)


def test_prompts_are_sentences_of_their_own_and_not_one_template(bank):
    """No run of six words in more than three prompts of one group (a level of the ladder is a group)."""
    groups: dict[tuple[str, str | None], Counter] = {}
    for prompt in bank.prompts:
        words = prompt.text.lower().split()
        runs = {tuple(words[i : i + 6]) for i in range(len(words) - 5)}
        groups.setdefault((prompt.group, prompt.level), Counter()).update(runs)
    shared = {key: counts.most_common(1)[0] for key, counts in groups.items() if counts}
    assert {key: most for key, most in shared.items() if most[1] > 3} == {}


def test_hash_of_a_bank_follows_its_content(tmp_path):
    entries = bank_entries()
    first = load_bank(str(write_bank(tmp_path / "a", entries)))
    again = load_bank(str(write_bank(tmp_path / "b", entries)))
    entries[0]["text"] += " Please."
    changed = load_bank(str(write_bank(tmp_path / "c", entries)))
    assert first.sha256 == again.sha256 != changed.sha256


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"text": ""}, "entry 2, text"),
        ({"text": "  \n "}, "entry 2, text"),
        ({"text": None}, "entry 2, text"),
        ({"group": 3}, "entry 2, group"),
        ({"colour": "red"}, "entry 2, colour"),
        ({"mode": "two words"}, "entry 2, mode"),
    ],
)
def test_wrong_entry_is_named_with_its_file(tmp_path, change, expected):
    entries = bank_entries()
    entries[1] |= change
    with pytest.raises(ProtocolError, match=f"bank.yaml, {expected}") as raised:
        load_bank(str(write_bank(tmp_path, entries)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- {id: a, group: [", "bank.yaml, line 2: not YAML"),
        ("- just words", "bank.yaml, entry 1"),
        ("id: a", "bank.yaml: expected a list"),
        ("", "holds no prompts"),
        (b"\xff\xfe\xfa", "bank.yaml"),
    ],
)
def test_wrong_file_is_named(tmp_path, content, expected):
    (tmp_path / "bank.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ProtocolError, match=expected) as raised:
        load_bank(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_id_used_twice_is_refused(tmp_path):
    entries = bank_entries()
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(entries[:1]))
    with pytest.raises(ProtocolError, match="'t0' is used twice"):
        load_bank(str(write_bank(tmp_path, entries)))


def test_unknown_bank_and_group_are_refused(bank):
    with pytest.raises(ProtocolError, match="no prompt bank 'nothing'"):
        load_bank("nothing")
    with pytest.raises(ProtocolError, match="no group or level 'haiku'; it has L1_hint"):
        bank.group("haiku")


@given(st.text(), st.integers(0, 2**63 - 1))
def test_shuffled_words_keep_the_multiset_and_follow_the_seed(text, seed):
    shuffled = shuffled_words(text, seed)
    if not any(map(is_single, text)):  # characters of other scripts are shuffled one by one
        assert Counter(shuffled.split()) == Counter(text.split())
    assert Counter("".join(shuffled.split())) == Counter("".join(text.split()))
    assert shuffled == shuffled_words(text, seed)


def test_shuffled_words_change_the_order(bank):
    texts = [p.text for p in bank.group("recursive")]
    assert all(shuffled_words(text, i) != " ".join(text.split()) for i, text in enumerate(texts))


def test_shipped_bank_is_found_from_any_directory(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_bank("recursion").name == "recursion"


def test_a_bank_s_name_is_its_newest_edition_and_older_ones_stay_by_their_number():
    newest, first = load_bank("recursion"), load_bank("recursion-1")
    assert load_bank("recursion-2").sha256 == newest.sha256 != first.sha256
    assert {prompt.group for prompt in newest.prompts} >= {"foreign", "foreign_matched"}
    assert first.sha256.startswith("9c7cbc910bc5")  # runs that were stored with it name it by this hash
    assert {"recursion", "recursion-1", "recursion-2"} <= set(shipped_banks())
