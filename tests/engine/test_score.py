"""Score: log-probabilities of given continuations are the native model's, however they are packed."""

from __future__ import annotations

import pytest
import torch

import kvpatch.engine.token_budget as pass_room
from kvpatch.engine.decode import decode
from kvpatch.engine.prefill import prefill
from kvpatch.engine.score import score
from kvpatch.errors import CacheError, ProtocolError
from kvpatch.models.probe import native_logits
from tiny import ARCHITECTURES, CONTEXT, WINDOW, prompt_of, random_prompts

pytestmark = pytest.mark.model

PROMPTS = random_prompts([WINDOW + 6, 3, 1], seed=7)
BRANCHES = [  # ragged in number and in length
    [list(p.token_ids) for p in random_prompts([5, WINDOW + 3, 1], seed=8)],
    [list(p.token_ids) for p in random_prompts([2], seed=9)],
    [list(p.token_ids) for p in random_prompts([1, 8, 8, 3], seed=10)],
]


def native_logprobs(model, ids: list[int], new: list[int]) -> list[float]:
    """Log-probability of each new token after what precedes it, from the native model."""
    logits = native_logits(model.hf, torch.tensor([[*ids, *new]]))[0, len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0].tolist()


def close(expected: list[float]):
    return pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_branches_equal_native_log_softmax_and_the_rest_is_nan(architecture: str, tiny):
    model = tiny(architecture)
    out = score(model.backbone, prefill(model.backbone, PROMPTS), BRANCHES)
    assert out.logprobs.shape == (3, 4, WINDOW + 3)
    assert (out.logits, out.values) == (None, {})
    for row, prompt in enumerate(PROMPTS):
        for b, branch in enumerate(BRANCHES[row]):
            expected = native_logprobs(model, list(prompt.token_ids), branch)
            assert out.logprobs[row, b, : len(branch)].tolist() == close(expected)
            assert out.logprobs[row, b, len(branch) :].isnan().all()
        assert out.logprobs[row, len(BRANCHES[row]) :].isnan().all()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_packed_branches_equal_each_branch_scored_alone(architecture: str, tiny):
    model = tiny(architecture)
    cache = prefill(model.backbone, PROMPTS)
    packed = score(model.backbone, cache, BRANCHES, keep_values=[1], keep_logits=4)
    for row, branches in enumerate(BRANCHES):
        for b, branch in enumerate(branches):
            alone = score(model.backbone, cache[row], [[branch]], keep_values=[1], keep_logits=4)
            assert packed.logprobs[row, b, : len(branch)].tolist() == close(alone.logprobs[0, 0].tolist())
            if b == 0:
                n = len(branch)
                assert torch.allclose(packed.values[1][row, :, :n], alone.values[1][0, :, :n], rtol=1e-4, atol=1e-5)
                shown = alone.logits.shape[1]
                assert torch.allclose(packed.logits[row, :shown], alone.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_values_of_the_first_branch_are_those_of_a_prefill_of_prompt_and_continuation(architecture: str, tiny):
    model = tiny(architecture)
    out = score(model.backbone, prefill(model.backbone, PROMPTS), BRANCHES, keep_values=[0, 3])
    for row, prompt in enumerate(PROMPTS):
        first = BRANCHES[row][0]
        whole = prefill(model.backbone, [prompt_of([*prompt.token_ids, *first, 9])])
        for layer in (0, 3):
            expected = whole.values[layer][0, :, -len(first) :]
            found = out.values[layer][row, :, : len(first)]
            assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("keep_values", [(), (0,)])
def test_logits_are_the_native_ones_of_the_first_branchs_first_positions(keep_values: tuple[int, ...], tiny):
    model = tiny("gemma2")
    out = score(model.backbone, prefill(model.backbone, PROMPTS), BRANCHES, keep_logits=3, keep_values=keep_values)
    for row, prompt in enumerate(PROMPTS):
        first = BRANCHES[row][0]
        count = min(3, len(first))
        ids = [*prompt.token_ids, *first]
        expected = native_logits(model.hf, torch.tensor([ids]))[0, len(prompt.token_ids) - 1 :][:count]
        assert torch.allclose(out.logits[row, :count], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens_at_once", [1, 60])
def test_the_size_of_a_pass_does_not_change_the_result(tokens_at_once: int, tiny, monkeypatch: pytest.MonkeyPatch):
    model = tiny("gemma3")
    cache = prefill(model.backbone, PROMPTS)
    at_once = score(model.backbone, cache, BRANCHES, keep_values=[2], keep_logits=2)
    monkeypatch.setitem(pass_room.TOKENS_AT_ONCE, "cpu", tokens_at_once)
    in_passes = score(model.backbone, cache, BRANCHES, keep_values=[2], keep_logits=2)
    assert torch.allclose(in_passes.logprobs, at_once.logprobs, rtol=1e-4, atol=1e-4, equal_nan=True)
    for row in range(3):
        n = len(BRANCHES[row][0])
        a, b = in_passes.values[2][row, :, :n], at_once.values[2][row, :, :n]
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_scoring_what_was_generated_gives_its_logprobs(tiny):
    model = tiny("gemma3")
    cache = prefill(model.backbone, PROMPTS)
    out = decode(model.backbone, cache, max_new_tokens=9, temperature=0.7, seeds=[0, 1, 2])
    again = score(model.backbone, cache, [[row] for row in out.token_ids.tolist()])
    assert torch.allclose(again.logprobs[:, 0], out.logprobs, rtol=1e-4, atol=1e-4)


def test_the_cache_is_unchanged_afterwards(tiny):
    model = tiny("llama")
    cache = prefill(model.backbone, PROMPTS)
    before = cache.checksums()
    score(model.backbone, cache, BRANCHES, keep_values=[0], keep_logits=2)
    assert cache.checksums() == before


# --- Model.score ---


def test_model_score_takes_texts_and_ids_and_shares_one_row_among_all(tiny):
    model = tiny("llama")
    cache = model.prefill("Explain how bread rises.")
    texts = [" The yeast", " bread rises in a warm oven"]
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    out = model.score(cache, texts)
    assert out.shape == (2, max(map(len, ids)))
    for row, new in enumerate(ids):
        assert out[row, : len(new)].tolist() == close(native_logprobs(model, cache.row_token_ids(0), new))
        assert out[row, len(new) :].isnan().all()
    assert torch.allclose(model.score(cache, ids), out, equal_nan=True)


def test_model_score_pairs_rows_with_continuations(tiny):
    model = tiny("llama")
    cache = prefill(model.backbone, PROMPTS)
    out = model.score(cache, [branches[0] for branches in BRANCHES])
    for row, prompt in enumerate(PROMPTS):
        first = BRANCHES[row][0]
        assert out[row, : len(first)].tolist() == close(native_logprobs(model, list(prompt.token_ids), first))


# --- refusals ---


def test_requests_that_do_not_fit_are_refused(tiny):
    model = tiny("llama")
    cache = prefill(model.backbone, PROMPTS)
    with pytest.raises(CacheError, match="2 continuations for a batch of 3"):
        score(model.backbone, cache, BRANCHES[:2])
    with pytest.raises(CacheError, match="2 continuations for a batch of 3"):
        model.score(cache, [[9], [9]])
    for empty in ([[[9]], [[9]], []], [[[9]], [[9], []], [[9]]]):
        with pytest.raises(ProtocolError, match="a continuation is empty"):
            score(model.backbone, cache, empty)
    with pytest.raises(CacheError, match="another model"):
        score(tiny("gpt_neox").backbone, cache, BRANCHES)


def test_the_context_is_the_limit(tiny):
    model = tiny("gpt2")
    cache = prefill(model.backbone, random_prompts([CONTEXT - 4]))
    score(model.backbone, cache, [[[9] * 4, [9]]], keep_values=[0])
    with pytest.raises(ProtocolError, match=f"the model's context is {CONTEXT}"):
        score(model.backbone, cache, [[[9], [9] * 6]])


def test_a_long_prompt_leaves_a_short_one_its_room(tiny):
    """Each row needs the room of its own continuations alone."""
    model = tiny("gpt2")
    cache = prefill(model.backbone, random_prompts([CONTEXT - 1, 3]))
    out = score(model.backbone, cache, [[[9]], [[9] * 12]])
    ids = list(random_prompts([CONTEXT - 1, 3])[1].token_ids)
    assert out.logprobs[1, 0].tolist() == close(native_logprobs(model, ids, [9] * 12))
    score(model.backbone, cache, [[[9] * 12]], of=[1])
    with pytest.raises(ProtocolError, match=f"the model's context is {CONTEXT}"):
        score(model.backbone, cache, [[[9] * 12]], of=[0])
