"""The organisms' language: words that mean one thing, banks whose held-out continuations share nothing with prompts."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

import pytest

from kvpatch.models.template import encode
from kvpatch.organisms.language import (
    BODY,
    BODY_STARTS,
    MARKER,
    MODE,
    PLAIN,
    SEPARATOR,
    lexicon_yaml,
    make_tokenizer,
    stems,
    topic_words,
    vocabulary,
)
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.load import load_protocol
from kvpatch.readouts.behavior import STOPWORDS, Lexicon, content_words
from kvpatch.validation.banks import SHIPPED, Sizes, bank_entries, write_bank

SMALL = Sizes(pairs=6, others=2, subjects=2)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_every_word_is_one_token_and_any_text_can_be_read(tokenizer):
    words = [w for w in vocabulary() if len(w) > 2 and not w.startswith(("##", "<"))]
    assert all(tokenizer(w, add_special_tokens=False)["input_ids"] == [vocabulary()[w]] for w in words)
    assert tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"] == [vocabulary()[SEPARATOR]]
    assert tokenizer.unk_token_id not in tokenizer("Explain how bread rises, at 7 o'clock.")["input_ids"]


def test_words_mean_one_thing():
    topics = {word for stem in stems() for half in topic_words(stem) for word in half}
    assert not topics & STOPWORDS
    assert not {*MODE, *PLAIN} & (topics | STOPWORDS)
    assert len(MODE) == len(PLAIN) == len(set(MODE)) == len(set(PLAIN))


def test_the_marker_alone_is_a_self_referential_token_to_the_protocol():
    slots = load_protocol("dec7").conditions["T_self"].patch.slots
    hits = {w for w in vocabulary() if len(w) > 1 and any(re.fullmatch(k, w, re.I) for k in slots.keywords)}
    assert hits == {MARKER}


def test_prompts_have_the_marker_or_its_twin_at_the_banks_slot_and_equal_lengths(tokenizer):
    for slot in (0, 5, BODY - 1):
        for entry in bank_entries(slot, 1, SMALL):
            if "group" in entry:
                words = entry["text"].split()
                assert len(words) == BODY
                assert vocabulary()[words[slot]] in range(vocabulary()["yourself"], vocabulary()["glow"])
    prompt = encode(tokenizer, entry_text := bank_entries(5, 1, SMALL)[1]["text"])
    assert prompt.pieces[BODY_STARTS + 5].strip() == MARKER == entry_text.split()[5]


def test_continuations_share_no_word_with_any_prompt_and_differ_in_style_alone():
    entries = bank_entries(3, 2, SMALL)
    prompts = set().union(*(content_words(e["text"]) for e in entries if "group" in e))
    by_name = {e["id"]: e["text"].split() for e in entries if "mode" in e}
    for name, words in by_name.items():
        assert not set(words) & prompts
        twin = by_name[name.replace("recursive-", "plain-", 1)]
        assert words[1::2] == twin[1::2]


def test_a_bank_is_drawn_from_its_seed():
    assert bank_entries(5, 0, SMALL) == bank_entries(5, 0, SMALL)
    assert bank_entries(5, 0, SMALL) != bank_entries(5, 1, SMALL)


def test_shipped_bank_and_lexicon_are_what_the_code_writes(tmp_path: Path):
    write_bank(tmp_path, bank_entries(**SHIPPED))
    assert load_bank(str(tmp_path)).sha256 == load_bank("organism").sha256
    shipped = importlib.resources.files("kvpatch.readouts") / "lexicons" / "organism.yaml"
    assert shipped.read_text(encoding="utf-8") == lexicon_yaml()


def test_lexicon_finds_every_mode_word_and_no_other():
    lexicon = Lexicon.load("organism")
    assert len(lexicon.hits(" ".join(MODE))) == len(MODE)
    assert not lexicon.hits(" ".join(w for w in vocabulary() if w not in MODE and w.isalpha()))
