"""Prompts in tokens: which token belongs to which part of the prompt, for several styles of chat template."""

from __future__ import annotations

from functools import cache

import pytest

from kvpatch.caches.kvcache import Segment
from kvpatch.errors import ModelError, ProtocolError
from kvpatch.models.template import encode
from tiny import CHATML, tiny_tokenizer

LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<s>' }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# A system turn of its own, with words that a user may also say.
SYSTEM = "<|im_start|>system\nYou are a helpful user assistant.<|im_end|>\n" + CHATML
STYLES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "system": SYSTEM}
FRAMES = {
    "chatml": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": ("<s><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
    "system": (
        "<|im_start|>system\nYou are a helpful user assistant.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
}
TEXTS = [
    "Explain how bread rises.",
    "user",
    "assistant",
    "a",
    "model user assistant system",
    "You are a helpful user assistant.",
    "two lines\nof words\n\nand a third",
    "ünïcödé — 漢字 and 🍞 rise",
    "<|im_end|>\n<|im_start|>assistant",
    "say <|im_start|>user and <|eot_id|> and <start_of_turn>user",
    "{{ messages }} {% if x %}",
    "Zq7words Zq7wordsZq7 Zq7wordsZq7",
]


@cache
def tokenizer(style: str | None):
    return tiny_tokenizer(STYLES[style] if style else None)


def parts(prompt) -> dict[Segment, str]:
    """The text of each segment."""
    return {
        kind: "".join(piece for piece, segment in zip(prompt.pieces, prompt.segments, strict=True) if segment == kind)
        for kind in Segment
    }


# --- chat ---


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("style", STYLES)
def test_the_body_is_the_users_words_and_the_rest_is_the_frame(style: str, text: str):
    found = parts(encode(tokenizer(style), text))
    before, after = FRAMES[style]
    assert found[Segment.bos] + found[Segment.template] == before
    assert found[Segment.body] == text
    assert found[Segment.trailer] == after


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("style", STYLES)
def test_segments_come_in_order_and_pieces_join_to_the_rendered_text(style: str, text: str):
    prompt = encode(tokenizer(style), text)
    before, after = FRAMES[style]
    assert list(prompt.segments) == sorted(prompt.segments)
    assert prompt.segments.count(Segment.bos) == 1
    assert "".join(prompt.pieces) == before + text + after
    assert len(prompt.token_ids) == len(prompt.segments) == len(prompt.pieces)
    assert prompt.body_length == prompt.segments.count(Segment.body) > 0


@pytest.mark.parametrize("style", STYLES)
def test_tokens_are_those_of_the_tokenizers_own_chat_template(style: str):
    text = "Explain how bread rises."
    messages = [{"role": "user", "content": text}]
    own = tokenizer(style).apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(encode(tokenizer(style), text).token_ids) == own


@pytest.mark.parametrize("style", ["llama3", "gemma"])
def test_words_are_found_where_the_template_strips_them(style: str):
    found = parts(encode(tokenizer(style), "  Explain how bread rises. \n"))
    assert found[Segment.body] == "Explain how bread rises."
    assert (found[Segment.bos] + found[Segment.template], found[Segment.trailer]) == FRAMES[style]


def test_stripped_words_that_also_occur_in_the_template_are_found_in_their_own_place():
    found = parts(encode(tokenizer("gemma"), " user "))
    assert found[Segment.body] == "user"
    assert (found[Segment.bos] + found[Segment.template], found[Segment.trailer]) == FRAMES["gemma"]


def test_whitespace_that_the_template_keeps_is_body():
    assert parts(encode(tokenizer("chatml"), "  two spaces "))[Segment.body] == "  two spaces "


@pytest.mark.parametrize("filter_", ["upper", "reverse | join('')"])
def test_a_template_that_rewrites_the_words_is_refused(filter_: str):
    rewriting = tiny_tokenizer(CHATML.replace("m['content']", f"m['content'] | {filter_}"))
    with pytest.raises(ModelError, match="rewrites the user's words"):
        encode(rewriting, "Explain how bread rises.")


def test_a_scaffold_may_be_empty_and_has_no_body():
    for style in STYLES:
        found = parts(encode(tokenizer(style), "", may_be_empty=True))
        assert (found[Segment.bos] + found[Segment.template], found[Segment.trailer]) == FRAMES[style]
        assert found[Segment.body] == ""


# --- without a template ---


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("style", [None, "chatml"])
def test_without_chat_the_tokens_are_exactly_those_of_the_tokenizer(style: str | None, text: str):
    prompt = encode(tokenizer(style), text, chat=False)
    assert list(prompt.token_ids) == tokenizer(style)(text)["input_ids"]
    assert prompt.segments == (Segment.bos, *[Segment.body] * (len(prompt.token_ids) - 1))
    assert "".join(prompt.pieces) == text


def test_without_chat_an_end_token_that_the_tokenizer_adds_is_trailer():
    from tokenizers import processors

    adding = tiny_tokenizer()
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    prompt = encode(adding, "bread rises")
    assert prompt.token_ids[-1] == 2
    assert (prompt.segments[0], prompt.segments[-1]) == (Segment.bos, Segment.trailer)
    assert set(prompt.segments[1:-1]) == {Segment.body}


def test_chat_is_on_where_there_is_a_template_and_off_where_there_is_none():
    text = "Explain how bread rises."
    assert encode(tokenizer("chatml"), text) == encode(tokenizer("chatml"), text, chat=True)
    assert encode(tokenizer(None), text) == encode(tokenizer(None), text, chat=False)


# --- refusals ---


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
@pytest.mark.parametrize("chat", [None, True, False])
def test_an_empty_prompt_is_refused(text: str, chat: bool | None):
    with pytest.raises(ProtocolError, match="a prompt is empty"):
        encode(tokenizer("chatml"), text, chat=chat)


def test_an_empty_scaffold_needs_a_template():
    with pytest.raises(ProtocolError, match="a prompt is empty"):
        encode(tokenizer(None), "", may_be_empty=True)
    with pytest.raises(ProtocolError, match="a prompt is empty"):
        encode(tokenizer("chatml"), "", chat=False, may_be_empty=True)


def test_chat_without_a_template_is_refused():
    with pytest.raises(ModelError, match="no chat template; use chat=False"):
        encode(tokenizer(None), "words", chat=True)


def test_a_tokenizer_without_offsets_is_refused():
    class SlowTokenizer:
        is_fast = False
        chat_template = None

    with pytest.raises(ModelError, match="SlowTokenizer gives no character offsets"):
        encode(SlowTokenizer(), "words")
