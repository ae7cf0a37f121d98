"""Prompts given as chat messages: a system's turn, earlier turns, and the user's words as the body."""

from __future__ import annotations

import pytest

import kvpatch as kv
from kvpatch.caches.kvcache import Segment
from tiny import CHATML, tiny_hf, tiny_tokenizer

SYSTEM = {"role": "system", "content": "Be brief and kind."}
USER = {"role": "user", "content": "Explain how bread rises."}


def body_of(cache: kv.KVCache, row: int = 0) -> str:
    """The text of the row's body."""
    pairs = zip(cache.pieces[row], cache.row_segments[row], strict=True)
    return "".join(piece for piece, segment in pairs if segment == Segment.body)


def test_the_tokens_are_those_of_the_template_and_the_body_is_the_users_words(tiny) -> None:
    model = tiny("llama")
    cache = model.prefill([[SYSTEM, USER]])
    expected = model.tokenizer.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, return_dict=False)
    assert cache.row_token_ids(0) == expected
    assert body_of(cache).strip() == USER["content"]
    at = "".join(cache.pieces[0]).index("Be brief")
    covered = 0
    for piece, segment in zip(cache.pieces[0], cache.row_segments[0], strict=True):
        if at <= covered < at + len(SYSTEM["content"]):
            assert segment == Segment.template
        covered += len(piece)


def test_a_users_turn_alone_is_the_text(tiny) -> None:
    model = tiny("llama")
    text = model.prefill([USER["content"]])
    for given in ([[USER]], [USER], ((USER,),)):
        assert model.prefill(given).row_token_ids(0) == text.row_token_ids(0)


def test_conversations_and_texts_share_a_batch(tiny) -> None:
    model = tiny("llama")
    turns = [USER, {"role": "assistant", "content": "By yeast."}, {"role": "user", "content": "And cake?"}]
    cache = model.prefill([USER["content"], [SYSTEM, USER], turns])
    assert cache.batch == 3 and body_of(cache, 2).strip() == "And cake?"
    assert [body_of(cache, row).strip() for row in (0, 1)] == [USER["content"]] * 2


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([SYSTEM], "the last message is the system's"),
        ([USER, {"role": "assistant", "content": "Yes"}], "the last message is the assistant's"),
        ([{"role": "user"}], "must have a role and a content"),
        ([SYSTEM, {"role": "user", "content": ["a"]}], "must be text"),
        ([SYSTEM, "hello"], "must have a role and a content"),
        ([SYSTEM, {"role": "user", "content": "  "}], "a prompt is empty"),
    ],
)
def test_a_mistake_is_told_in_one_line(tiny, messages, told: str) -> None:
    with pytest.raises(kv.ProtocolError, match=told) as caught:
        tiny("llama").prefill([messages])
    assert "\n" not in str(caught.value)


def test_what_can_not_hold_messages_says_so(tiny) -> None:
    with pytest.raises(kv.ProtocolError, match="chat messages need the model's chat template"):
        tiny("llama").prefill([[SYSTEM, USER]], chat=False)
    with pytest.raises(kv.ModelError, match="no chat template"):
        tiny("llama", False).prefill([[SYSTEM, USER]])


def test_a_template_that_drops_or_refuses_a_system_is_told() -> None:
    deaf = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    for template, told in [(deaf, "drops or rewrites the system's words"), (strict, "no system here")]:
        model = kv.load(model=tiny_hf("llama"), tokenizer=tiny_tokenizer(template))
        assert body_of(model.prefill([USER["content"]])).strip() == USER["content"]
        with pytest.raises(kv.ModelError, match=told):
            model.prefill([[SYSTEM, USER]])
