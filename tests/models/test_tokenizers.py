"""Segments and pieces under tokenizers of every kind: what is cut off, normalised, joined or added of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import tokenizers
from known_templates import LLAMA2, MISTRAL, NO_TRAILER, PHI3
from test_template import parts
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvpatch.caches.kvcache import Segment
from kvpatch.errors import ProtocolError
from kvpatch.models.template import encode
from tiny import CHATML

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|end|>", "<|assistant|>"]
CORPUS = [
    "Explain how bread rises in a warm oven, and which steps a user can leave out. [INST] user assistant [/INST]"
] * 3


def made(core: Tokenizer, trainer: type, **settings: object) -> PreTrainedTokenizerFast:
    core.train_from_iterator(CORPUS, trainer(special_tokens=SPECIALS, show_progress=False, **settings))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIALS[3:],
    )


def byte_level(trim_offsets: bool) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return made(core, trainers.BpeTrainer, vocab_size=340, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return made(core, trainers.BpeTrainer, vocab_size=140)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a mark before each piece of text, and blanks that may lie inside a token."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made(core, trainers.BpeTrainer, vocab_size=140)


def unigram(*steps: tokenizers.normalizers.Normalizer) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence(list(steps))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return made(core, trainers.UnigramTrainer, vocab_size=80, unk_token="<unk>")


def words() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return made(core, trainers.WordLevelTrainer)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": lambda: byte_level(False),
    "byte-level, offsets trimmed": lambda: byte_level(True),
    "metaspace": lambda: metaspace("always"),
    "metaspace, first only": lambda: metaspace("first"),
    "sentencepiece": sentencepiece,
    "unigram": unigram,
    "unigram, NFC": lambda: unigram(normalizers.NFC()),
    "unigram, NFD": lambda: unigram(normalizers.NFD()),
    "unigram, NFKC": lambda: unigram(normalizers.NFKC()),
    "unigram, no accents": lambda: unigram(
        normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Strip()
    ),
    "word-level": words,
}
TEXTS = [
    "Explain how bread rises",
    "  two blanks ahead and behind  ",
    "\n\nlines\n",
    "e\u0301 at either end e\u0301",
    "é ﬁ ① 漢字 🍞",
    "日",
    "user",
    "<|im_end|>\n<|im_start|>user",
    "{{ x }}",
]
FRAMES = {
    "chatml": (CHATML, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "mistral": (MISTRAL, "<s>[INST] ", " [/INST]"),
    "phi3": (PHI3, "<|user|>\n", "<|end|>\n<|assistant|>\n"),
    "nothing after the words": (NO_TRAILER, "<s>", ""),
}


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_body_holds_the_users_words_whatever_the_tokenizer(kind: str, frame: str):
    template, before, after = FRAMES[frame]
    tokenizer(kind).chat_template = template
    for text in TEXTS:
        prompt = encode(tokenizer(kind), text)
        found = parts(prompt)
        ahead = found[Segment.bos] + found[Segment.template]
        assert "".join(prompt.pieces) == before + text + after
        assert list(prompt.segments) == sorted(prompt.segments)
        # A token that holds characters of both sides is body; blanks may have been cut off from either.
        body = found[Segment.body]
        assert text.strip() in body and body.strip().removeprefix("[INST]").strip() in f"{text} "
        assert before.startswith(ahead) and not before[len(ahead) :].strip()
        assert after.endswith(found[Segment.trailer]) and not after[: len(after) - len(found[Segment.trailer])].strip()


@pytest.mark.parametrize("kind", KINDS)
def test_without_chat_tokens_are_the_tokenizers_own_and_all_are_body(kind: str):
    for text in TEXTS:
        prompt = encode(tokenizer(kind), text, chat=False)
        assert list(prompt.token_ids) == tokenizer(kind)(text)["input_ids"]
        assert set(prompt.segments) == {Segment.body}
        assert "".join(prompt.pieces) == text


@pytest.mark.parametrize("kind", KINDS)
def test_without_chat_what_the_tokenizer_adds_is_no_body(kind: str):
    adding = KINDS[kind]()
    special = [("<s>", 1), ("</s>", 2)]
    adding.backend_tokenizer.post_processor = processors.Sequence(
        [
            adding.backend_tokenizer.post_processor or processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special),
        ]
    )
    for text in TEXTS:
        prompt = encode(adding, text, chat=False)
        assert list(prompt.token_ids) == adding(text)["input_ids"]
        assert prompt.segments == (Segment.bos, *[Segment.body] * (len(prompt.token_ids) - 2), Segment.trailer)
        assert parts(prompt)[Segment.body] == text


def test_a_token_that_joins_the_template_with_the_words_is_body():
    joining = tokenizer("byte-level")
    joining.chat_template = MISTRAL
    prompt = encode(joining, "bread rises")
    first = prompt.segments.index(Segment.body)
    assert (prompt.pieces[first], prompt.pieces[first - 1]) == (" bread", "]")


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_prompt_has_no_body_even_where_a_token_joins_both_sides(kind: str):
    tokenizer(kind).chat_template = LLAMA2
    assert encode(tokenizer(kind), "", may_be_empty=True).body_length == 0


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_of_which_the_tokenizer_leaves_nothing_is_refused(chat: bool):
    dropping = KINDS["word-level"]()
    dropping.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    dropping.chat_template = CHATML
    with pytest.raises(ProtocolError, match=r"leaves nothing of the prompt|has no tokens"):
        encode(dropping, "\u200b", chat=chat)


def test_a_bos_that_the_user_writes_is_bos_without_chat_and_body_in_a_template():
    own = tokenizer("byte-level")
    assert encode(own, "<s>bread", chat=False).segments[0] == Segment.bos
    assert encode(own, "<s>", chat=False).segments == (Segment.body,)
    assert encode(own, "<|im_end|>bread", chat=False).segments[0] == Segment.body
    own.chat_template = "{{ messages[0].content }}"
    assert set(encode(own, "<s>bread").segments) == {Segment.body}


def test_no_bos_is_added_to_a_template_that_has_one_or_lacks_one():
    adding = KINDS["byte-level"]()
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    for template, times in ((NO_TRAILER, 1), (CHATML, 0)):
        adding.chat_template = template
        prompt = encode(adding, "bread rises")
        messages = [{"role": "user", "content": "bread rises"}]
        own = adding.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert list(prompt.token_ids) == own
        assert prompt.token_ids.count(1) == times
