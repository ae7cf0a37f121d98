"""A function of one's own that sees, and may change, the logits of every step."""

from __future__ import annotations

import pytest
import torch

import kvpatch as kv

pytestmark = pytest.mark.model
PROMPTS = ["Explain how bread rises.", "Watch each word as it arrives, and say so."]


@pytest.fixture
def model(tiny):
    return tiny("llama")


def test_it_is_shown_what_each_step_chooses_from(model) -> None:
    cache, seen = model.prefill(PROMPTS), []
    plain = model.generate(cache, max_new_tokens=5, temperature=0.7, stop=False)
    watched = model.generate(cache, max_new_tokens=5, temperature=0.7, stop=False, on_logits=seen.append)
    assert torch.equal(plain.token_ids, watched.token_ids)
    assert [step.number for step in seen] == [0, 1, 2, 3, 4]
    assert torch.allclose(seen[0].logits, model.logits(cache), atol=1e-4)
    for step in seen:
        assert torch.equal(step.token_ids, plain.token_ids[:, : step.number]) and bool(step.is_going.all())
        chosen = plain.token_ids[:, step.number, None]
        logprob = step.logits.log_softmax(-1).gather(1, chosen)[:, 0]
        assert torch.allclose(logprob, watched.logprobs[:, step.number], atol=1e-4)


def test_what_it_returns_is_chosen_from_and_logprobs_stay_the_models(model) -> None:
    cache = model.prefill(PROMPTS)

    def only(step: kv.DecodingStep) -> torch.Tensor:
        step.logits[:, :7] = -torch.inf
        step.logits[:, 8:] = -torch.inf
        return step.logits

    out = model.generate(cache, max_new_tokens=3, temperature=0.7, stop=False, on_logits=only)
    assert (out.token_ids == 7).all()
    own = model.logits(cache).log_softmax(-1)[:, 7]
    assert torch.allclose(out.logprobs[:, 0], own, atol=1e-4) and (out.logprobs[:, 0] < -0.1).all()


def test_changing_the_copy_without_returning_it_changes_nothing(model) -> None:
    cache = model.prefill(PROMPTS)

    def meddle(step: kv.DecodingStep) -> None:
        step.logits.fill_(0)
        step.token_ids.fill_(3)
        step.is_going.fill_(False)

    plain = model.generate(cache, max_new_tokens=4, temperature=0, stop=False)
    assert torch.equal(
        model.generate(cache, max_new_tokens=4, temperature=0, stop=False, on_logits=meddle).token_ids, plain.token_ids
    )


def test_rows_that_stopped_are_told(model, monkeypatch) -> None:
    cache, going = model.prefill(PROMPTS), []
    first = model.generate(cache, max_new_tokens=1, temperature=0).token_ids[0, 0].item()
    monkeypatch.setattr(type(model), "end_tokens", property(lambda self: [first]))
    model.generate(cache, max_new_tokens=3, temperature=0, on_logits=lambda step: going.append(step.is_going.tolist()))
    assert going[0] == [True, True] and (len(going) == 1 or going[1][0] is False)


@pytest.mark.parametrize(
    ("hook", "told"),
    [
        (3, "on_logits must be a function of one DecodingStep, got 3"),
        (lambda step: step.logits[:, :5], r"logits of shape \[2, \d+\], or None, got a tensor of shape \[2, 5\]"),
        (lambda step: "no", "got a str"),
        (lambda step: torch.full_like(step.logits, -torch.inf), "left a row without a token to choose"),
        (lambda step: step.logits * torch.nan, "a logit that is no number, at step 0"),
    ],
)
def test_a_mistake_is_told_in_one_line(model, hook, told: str) -> None:
    with pytest.raises(kv.ProtocolError, match=told) as caught:
        model.generate(model.prefill(PROMPTS), max_new_tokens=2, on_logits=hook)
    assert "\n" not in str(caught.value)
