"""The second edition of the bank differs between its groups in what they are named for, and in nothing else."""

from __future__ import annotations

from collections import Counter

import pytest

from kvpatch.planning.balance import balance
from kvpatch.planning.pairing import form_pairs
from kvpatch.prompts.bank import Bank, Prompt, load_bank
from kvpatch.protocols.load import load_protocol
from kvpatch.readouts.behavior import Lexicon

GROUPS = {"recursive": 288, "plain": 288, "foreign": 288, "foreign_matched": 288}


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def bank() -> Bank:
    return load_bank("recursion")


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon.load("recursion")


def test_no_group_stands_apart_from_another(bank: Bank, lexicon: Lexicon) -> None:
    found = balance(bank, lexicon, words)
    assert len(found) == 8  # prompts, ladder, and continuations on three sides' topics in two persons
    assert {one.title: one.over for one in found} == {one.title: [] for one in found}


def test_the_first_edition_is_found_out(lexicon: Lexicon) -> None:
    prompts, ladder, *continuations = balance(load_bank("recursion-1"), lexicon, words)
    assert {"you", "question", "zipf", "hits"} <= set(prompts.over)
    assert {"you", "I", "hits"} <= set(ladder.over)
    assert all("I" in one.over for one in continuations)


def test_groups_are_of_the_size_stated_and_crossed_in_person_and_speech_act(bank: Bank) -> None:
    assert {name: len(bank.group(name)) for name in GROUPS} == GROUPS
    for name in GROUPS:
        cells = Counter((prompt.domain, prompt.addressed, prompt.act) for prompt in bank.group(name))
        assert set(cells.values()) == {3}
        assert len(cells) == 16 * 2 * 3


def test_a_foreign_partner_is_of_its_prompt_s_person_speech_act_and_field_and_of_another_topic(bank: Bank) -> None:
    for name, of in (("foreign", "plain"), ("foreign_matched", "recursive")):
        partners = bank.group(name)
        assert {p.partner_of for p in partners} == {p.id for p in bank.group(of)}
        for partner in partners:
            prompt = bank.by_id[str(partner.partner_of)]
            assert (partner.addressed, partner.act, partner.domain) == (prompt.addressed, prompt.act, prompt.domain)
            assert partner.topic != prompt.topic


def test_what_a_prompt_states_of_itself_holds(bank: Bank) -> None:
    def says_you(prompt: Prompt) -> bool:
        return bool({"you", "your", "yours", "yourself"} & {w.strip(".,;:?!'\"").lower() for w in prompt.text.split()})

    for prompt in bank.prompts:
        assert prompt.addressed == says_you(prompt), prompt.id
        assert (prompt.act == "question") == prompt.text.endswith("?"), prompt.id


def test_levels_of_the_ladder_are_alike_subject_by_subject(bank: Bank) -> None:
    levels = {name: {p.topic: p for p in bank.group(name)} for name in
              ("L1_hint", "L2_simple", "L3_deeper", "L4_full", "L5_refined", "long_control")}  # fmt: skip
    for topic in levels["L1_hint"]:
        same = [prompts[topic] for prompts in levels.values()]
        assert len({(p.addressed, p.act) for p in same}) == 1, topic


def test_a_continuation_stands_in_both_modes_and_both_persons(bank: Bank) -> None:
    items = Counter(c.item for c in bank.continuations)
    assert set(items.values()) == {4}
    assert len({c.item for c in bank.continuations if c.topic_of == "source"}) == 128
    assert len({c.item for c in bank.continuations if c.topic_of == "target"}) == 128
    framings = {(c.item, c.mode, c.person) for c in bank.continuations}
    assert len(framings) == len(bank.continuations)
    for continuation in bank.continuations:
        says_i = {"I", "me", "my", "mine", "myself", "My"} & {w.strip(".,;:?!'\"") for w in continuation.text.split()}
        assert bool(says_i) == (continuation.person == "first"), continuation.id


def test_the_planned_number_of_pairs_is_there_and_each_is_alike_in_person_and_speech_act(bank: Bank) -> None:
    dec7 = load_protocol("dec7")
    pairs = form_pairs(bank, dec7, {p.id: words(p.text) for p in bank.prompts}, seed=0).pairs
    assert len(pairs) >= 130
    for pair in pairs:
        assert (pair.target.addressed, pair.target.act) == (pair.source.addressed, pair.source.act)
        found, most = [len(cell) for cell in pair.continuations], dec7.readouts.continuations_per_cell
        assert found[::2] == found[1::2]  # an item that shares a word with the source is left out in every framing
        assert most - 2 <= min(found) <= max(found) <= most
