"""Chat templates at fault are refused by name; templates of well-known models give the user's words, once and whole."""

from __future__ import annotations

import copy
import functools
from datetime import datetime, timedelta

import pytest
from known_templates import GEMMA, GOOD, LLAMA31, LLAMA32, NO_TRAILER
from test_template import parts
from transformers.utils import chat_template_utils

from kvpatch.caches.kvcache import Segment
from kvpatch.errors import KvpatchError, ModelError
from kvpatch.models.load import template_sha256
from kvpatch.models.scaffold import scaffold_of
from kvpatch.models.template import encode
from tiny import CHATML, tiny_tokenizer

WORDS = 'Explain how bread rises, isn\'t it <b>odd</b> & "warm"?'

TEXTS = [
    WORDS,
    f"  \n{WORDS}\n\t ",
    "er",
    "user",
    "a",
    "assistant",
    "<|im_end|>",
    "{{ x }} {% if %}",
    "Ünï — 漢字 🍞 e\u0301",
]


@functools.cache
def _tokenizer():
    return tiny_tokenizer()


def with_template(template: str | None):
    """The tiny tokenizer with this chat template."""
    tokenizer = copy.copy(_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def left_of(text: str, trim: str) -> str:
    return {"both": text.strip(), "right": text.rstrip(), "none": text}[trim]


@pytest.mark.parametrize("name", GOOD)
def test_a_well_known_template_gives_the_words_once_between_its_own_text(name: str):
    template, before, after, trim = GOOD[name]
    tokenizer = with_template(template)
    scaffold = scaffold_of(tokenizer)
    assert (scaffold.before, scaffold.after, scaffold.depends_on_clock) == (before, after, False)
    for text in TEXTS:
        prompt, body = encode(tokenizer, text, scaffold=scaffold), left_of(text, trim)
        assert "".join(prompt.pieces) == before + body + after
        assert list(prompt.segments) == sorted(prompt.segments)
        first = len(before) - 1 if before.endswith(" ") else len(before)  # a blank may join the first word's token
        found = parts(prompt)
        ahead = found[Segment.bos] + found[Segment.template]
        assert ahead in (before[:first], before) and ahead + found[Segment.body] + found[Segment.trailer] == (
            before + body + after
        )
        assert found[Segment.body].strip() == body.strip()
        assert prompt.body_length > 0


@pytest.mark.parametrize("name", GOOD)
def test_tokens_are_those_that_transformers_makes_of_the_turn(name: str):
    tokenizer = with_template(GOOD[name][0])
    own = tokenizer.apply_chat_template(
        [{"role": "user", "content": WORDS}], add_generation_prompt=True, return_dict=True
    )
    assert list(encode(tokenizer, WORDS).token_ids) == own["input_ids"]


@pytest.mark.parametrize("name", GOOD)
def test_an_empty_scaffold_has_no_body_under_any_well_known_template(name: str):
    template, before, after, _ = GOOD[name]
    tokenizer = with_template(template)
    prompt = encode(tokenizer, "", may_be_empty=True)
    assert prompt.body_length == 0
    assert "".join(prompt.pieces).split() == (before + after).split()


def test_where_nothing_follows_the_words_the_pending_token_is_the_last_of_the_body():
    prompt = encode(with_template(NO_TRAILER), "Explain how")
    assert prompt.segments[-1] == Segment.body and Segment.trailer not in prompt.segments


# --- templates at fault ---

PARTS = (
    "<|im_start|>user\n{% for c in messages[0].content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
CONTENT = "m['content']"
BAD = {
    "iterates over parts": (PARTS, "drops the user's words: it expects content as a list of parts"),
    "takes the first part": (
        "<s>{{ messages[0]['content'][0]['text'] + '</s>' }}",
        "drops the user's words: it expects content as a list of parts",
    ),
    "joins the parts": (
        "<s>{{ messages[0]['content'] | map(attribute='text') | join('') }}</s>",
        "drops the user's words: it expects content as a list of parts",
    ),
    "no words": ("<s>user\n</s>assistant\n", "drops the user's words ("),
    "another key": (CHATML.replace(CONTENT, "(m['text'] or '')"), "drops the user's words ("),
    "twice": (CHATML.replace(CONTENT, f"{CONTENT} + ' ' + {CONTENT}"), "writes the user's words 2 times"),
    "three times": (CHATML.replace(CONTENT, f"{CONTENT} * 3"), "writes the user's words 3 times"),
    "twice, once in capitals": (
        CHATML.replace(CONTENT, f"{CONTENT} | upper + {CONTENT}"),
        "writes other text around",
    ),
    "upper": (CHATML.replace(CONTENT, f"{CONTENT} | upper"), "rewrites the user's words: "),
    "lower": (CHATML.replace(CONTENT, f"{CONTENT} | lower"), "rewrites the user's words: "),
    "title": (CHATML.replace(CONTENT, f"{CONTENT} | title"), "rewrites the user's words: "),
    "capitalize": (CHATML.replace(CONTENT, f"{CONTENT} | capitalize"), "rewrites the user's words: "),
    "escape": (CHATML.replace(CONTENT, f"{CONTENT} | e"), "rewrites the user's words: "),
    "json": (CHATML.replace(CONTENT, f"{CONTENT} | tojson"), "rewrites the user's words: "),
    "one line": (CHATML.replace(CONTENT, f"{CONTENT} | replace('\\n', ' ')"), "rewrites the user's words: "),
    "one blank": (CHATML.replace(CONTENT, f"{CONTENT}.split() | join(' ')"), "rewrites the user's words: "),
    "striptags": (CHATML.replace(CONTENT, f"{CONTENT} | striptags"), "rewrites the user's words: "),
    "cut": (CHATML.replace(CONTENT, f"{CONTENT}[:30]"), "rewrites the user's words: "),
    "reverse": (CHATML.replace(CONTENT, f"{CONTENT}[::-1]"), "rewrites the user's words: "),
    "their length": (f"{{{{ messages[0]['content'] | length }}}} {CHATML}", "writes other text around"),
    "random": ("{{ [1, 2, 3] | random }}" + CHATML, "writes another text each time it is rendered"),
    "lorem ipsum": ("{{ lipsum(n=1) }}" + CHATML, "writes another text each time it is rendered"),
    "wants a system turn": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('A system turn must come first.') }}{% endif %}"
        + CHATML,
        "can't render a user's turn on its own: A system turn must come first.",
    ),
    "syntax": ("{% for m in messages %}{{ m.content }}", "can't render a user's turn on its own: "),
    "undefined": ("{{ messages[3].content.text }}", "can't render a user's turn on its own: "),
    "type": ("{{ messages[0].content + 1 }}", "can't render a user's turn on its own: "),
    "unsafe": ("{{ messages.__class__.__mro__ }}{{ messages[0].content }}", "can't render a user's turn on its own: "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_template_at_fault_is_refused_and_named_in_one_sentence(name: str):
    template, fault = BAD[name]
    tokenizer = with_template(template)
    with pytest.raises(ModelError) as raised:
        encode(tokenizer, WORDS)
    said = str(raised.value)
    assert said.startswith(f"the chat template {fault}"), said
    assert f"the tokenizer's chat_template, sha256 {str(template_sha256(tokenizer))[:8]}" in said
    assert said.endswith("use chat=False or another template") and "\n" not in said
    assert encode(tokenizer, WORDS, chat=False).body_length > 0


def test_what_became_of_the_words_is_shown():
    with pytest.raises(ModelError, match=r"rewrites the user's words: 'Words(\w+)Abc' became 'words\1abc'"):
        encode(with_template(BAD["lower"][0]), WORDS)


@pytest.mark.parametrize(
    ("change", "text", "fault"),
    [
        (
            "replace('bread', 'cake')",
            "Explain how bread rises.",
            "'bread rises.' became 'cake rises.'",
        ),
        ("replace('bread', '')", "bread", "drops the user's words: 'bread'"),
        ("truncate(200, True, '')", "word " * 60, "rewrites the user's words"),
        ("replace('/no_think', '/no_think /no_think')", "Go /no_think", "rewrites the user's words"),
    ],
)
def test_a_prompt_that_the_template_changes_is_refused_where_other_prompts_are_not(change: str, text: str, fault: str):
    tokenizer = with_template(CHATML.replace(CONTENT, f"{CONTENT} | {change}"))
    assert parts(encode(tokenizer, "Say hello."))[Segment.body] == "Say hello."
    with pytest.raises(ModelError) as raised:
        encode(tokenizer, text)
    assert fault in str(raised.value)


def test_a_prompt_that_the_template_answers_with_another_scaffold_is_refused():
    think = "{% if 'think' in messages[0].content %}{{ 'Think first.' }}{% endif %}" + CHATML
    assert encode(with_template(think), "Say hello.").body_length > 0
    with pytest.raises(ModelError, match="writes other text around 'I think so' than around other words"):
        encode(with_template(think), "I think so")


# --- words that the template holds too ---


def test_words_that_the_template_holds_too_are_found_in_their_own_place():
    holding = "<|im_start|>system\nYou are a helper. er er user Words Abc<|im_end|>\n" + CHATML
    tokenizer = with_template(holding)
    scaffold = scaffold_of(tokenizer)
    for text in ("er", "helper", "You are a helper.", "user", "\n", scaffold.before, scaffold.after, "Words Abc"):
        found = parts(encode(tokenizer, text, scaffold=scaffold, may_be_empty=True))
        assert found[Segment.bos] + found[Segment.template] == scaffold.before
        assert (found[Segment.body], found[Segment.trailer]) == (text, scaffold.after)


def test_a_template_that_holds_another_template_s_stand_in_is_no_trouble():
    with pytest.raises(ModelError) as raised:
        encode(with_template(BAD["lower"][0]), WORDS)
    stand_in = str(raised.value).split("'")[2]
    assert stand_in.startswith("Words")
    tokenizer = with_template(stand_in + CHATML)
    assert parts(encode(tokenizer, f"{stand_in} {stand_in}"))[Segment.body] == f"{stand_in} {stand_in}"


# --- several templates ---


@pytest.mark.parametrize("kind", [dict, list])
def test_the_default_of_several_templates_is_taken(kind: type):
    named = {"default": CHATML, "tool_use": GEMMA}
    tokenizer = with_template(None)
    tokenizer.chat_template = named if kind is dict else [{"name": n, "template": t} for n, t in named.items()]
    assert encode(tokenizer, WORDS) == encode(with_template(CHATML), WORDS)


def test_several_templates_without_a_default_are_refused():
    tokenizer = with_template(None)
    tokenizer.chat_template = {"tool_use": GEMMA, "rag": CHATML}
    with pytest.raises(ModelError, match="has chat templates for rag, tool_use, and none is named default") as raised:
        encode(tokenizer, WORDS)
    assert "\n" not in str(raised.value)
    assert encode(tokenizer, WORDS, chat=False).body_length > 0


# --- the clock ---


class Clock(datetime):
    """A clock that a test sets."""

    moment = datetime(2024, 7, 26, 12)

    @classmethod
    def now(cls, tz=None):
        return cls.moment


@pytest.fixture
def clock(monkeypatch) -> type[Clock]:
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(Clock, "moment", datetime(2024, 7, 26, 12))
    return Clock


@pytest.mark.parametrize(
    "template",
    [
        LLAMA32,
        "{{ strftime_now('%H:%M:%S.%f') }}" + CHATML,
        CHATML + "{{ strftime_now('%A') }}",
        "{% if strftime_now('%H') | int < 12 %}Good morning{% else %}Good evening{% endif %}" + CHATML,
        "{% if strftime_now('%Y') | int > 2030 %}{{ raise_exception('too old') }}{% endif %}" + CHATML,
    ],
)
def test_a_template_that_reads_the_clock_is_found_out(template: str):
    assert scaffold_of(with_template(template)).depends_on_clock


@pytest.mark.parametrize("template", [LLAMA31, "{% if tools %}{{ strftime_now('%Y') }}{% endif %}" + CHATML])
def test_a_template_that_writes_no_date_is_not(template: str):
    assert not scaffold_of(with_template(template)).depends_on_clock


def test_another_day_gives_another_scaffold(clock):
    tokenizer = with_template(LLAMA32)
    today = scaffold_of(tokenizer)
    assert "Today Date: 26 Jul 2024" in today.before
    assert scaffold_of(tokenizer).sha256 == today.sha256
    clock.moment += timedelta(days=1)
    assert "Today Date: 27 Jul 2024" in scaffold_of(tokenizer).before
    assert scaffold_of(tokenizer).sha256 != today.sha256
    assert chat_template_utils.datetime is clock


def test_scaffolds_are_told_apart_by_where_the_words_stand():
    first, second = (
        scaffold_of(with_template(t)).sha256 for t in ("ab{{ messages[0].content }}c", "a{{ messages[0].content }}bc")
    )
    assert first != second


def test_a_prompt_of_the_next_day_keeps_the_scaffold_of_the_first(clock):
    tokenizer = with_template(LLAMA32)
    scaffold = scaffold_of(tokenizer)
    clock.moment += timedelta(days=1)
    assert "26 Jul 2024" in "".join(encode(tokenizer, WORDS, scaffold=scaffold).pieces)


def test_the_clock_goes_on_after_a_template_failed(clock):
    with pytest.raises(KvpatchError):
        scaffold_of(with_template(BAD["syntax"][0]))
    assert chat_template_utils.datetime is clock
