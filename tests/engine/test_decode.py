"""Decode: what the model writes is what it would write alone, with no cache of ours, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch

from kvpatch.caches.kvcache import PAD
from kvpatch.engine.decode import Continuations, decode
from kvpatch.engine.prefill import prefill
from kvpatch.engine.sampling import choose
from kvpatch.errors import CacheError, ProtocolError
from kvpatch.models.probe import native_logits
from tiny import ARCHITECTURES, CONTEXT, WINDOW, prompt_of, random_prompts

pytestmark = pytest.mark.model


def run(model, prompts, count: int, *, temperature: float = 0.0, seeds=None, **settings) -> Continuations:
    cache = prefill(model.backbone, prompts)
    seeds = range(len(prompts)) if seeds is None else seeds
    return decode(model.backbone, cache, max_new_tokens=count, temperature=temperature, seeds=seeds, **settings)


def slow_greedy(model, ids: list[int], count: int) -> list[int]:
    """Greedy, the whole text through the native model for every token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(native_logits(model.hf, torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


def native_logprobs(model, ids: list[int], new: list[int]) -> list[float]:
    """Log-probability of each new token after what precedes it, from the native model."""
    logits = native_logits(model.hf, torch.tensor([[*ids, *new]]))[0, len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0].tolist()


# --- against the native model ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_a_loop_over_the_native_model(architecture: str, tiny):
    model, prompts = tiny(architecture), random_prompts([WINDOW + 8, 3, 1])
    out = run(model, prompts, 10)
    for row, prompt in enumerate(prompts):
        assert out.token_ids[row].tolist() == slow_greedy(model, list(prompt.token_ids), 10)
    assert out.stopped == ("length",) * 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_are_the_models_own_at_temperature_1_whatever_the_sampling(architecture: str, tiny):
    model, prompts = tiny(architecture), random_prompts([WINDOW + 8, 3])
    out = run(model, prompts, 12, temperature=1.7, top_p=0.9)
    for row, prompt in enumerate(prompts):
        expected = native_logprobs(model, list(prompt.token_ids), out.token_ids[row].tolist())
        assert out.logprobs[row].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_sampled_tokens_are_chosen_with_the_noise_of_row_seed_and_step(tiny):
    model, prompt = tiny("llama"), random_prompts([9])[0]
    out = run(model, [prompt], 8, temperature=0.7, top_p=0.8, seeds=[123])
    ids = list(prompt.token_ids)
    for step in range(8):
        logits = native_logits(model.hf, torch.tensor([ids]))[:, -1]
        ids.append(int(choose(logits, torch.tensor([123]), step, 0.7, 0.8)))
    assert out.token_ids[0].tolist() == ids[9:]


# --- rows do not touch one another ---


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_64_rows_of_mixed_lengths_each_write_the_text_they_write_alone(architecture: str, tiny):
    model = tiny(architecture)
    prompts = random_prompts([1 + (7 * i) % 41 for i in range(64)], seed=5)
    seeds = [1000 + i for i in range(64)]
    together = run(model, prompts, 12, temperature=0.7, seeds=seeds)
    for row, prompt in enumerate(prompts):
        alone = run(model, [prompt], 12, temperature=0.7, seeds=[seeds[row]])
        assert together.token_ids[row].tolist() == alone.token_ids[0].tolist()
        assert together.logprobs[row].tolist() == pytest.approx(alone.logprobs[0].tolist(), rel=1e-4, abs=1e-4)
    assert len({tuple(row) for row in together.token_ids.tolist()}) > 60


def test_a_row_does_not_depend_on_when_its_mates_stop(tiny):
    model, prompts = tiny("llama"), random_prompts([5, 9, 12])
    free = run(model, prompts, 16, temperature=0.7)
    end = int(free.token_ids[1, 3])
    out = run(model, prompts, 16, temperature=0.7, end_tokens=[end])
    for row in range(3):
        ids = free.token_ids[row].tolist()
        cut = ids.index(end) + 1 if end in ids else 16
        assert out.token_ids[row].tolist() == ids[:cut] + [PAD] * (16 - cut)


# --- stops ---


def test_a_row_stops_behind_its_end_token_and_the_rest_is_marked(tiny):
    model, prompts = tiny("llama"), random_prompts([5, 9, 12])
    free = run(model, prompts, 16, temperature=0.7)
    ends = [int(free.token_ids[0, 2]), int(free.token_ids[2, 6])]
    out = run(model, prompts, 16, temperature=0.7, end_tokens=ends, keep_values=[1])
    for row in range(3):
        ids = free.token_ids[row].tolist()
        cut = next((i + 1 for i, token in enumerate(ids) if token in ends), 16)
        assert out.lengths[row] == cut
        assert out.stopped[row] == ("eos" if any(t in ends for t in ids) else "length")
        assert out.token_ids[row, cut:].tolist() == [PAD] * (16 - cut)
        assert all(math.isnan(x) for x in out.logprobs[row, cut:].tolist())
        assert not any(math.isnan(x) for x in out.logprobs[row, :cut].tolist())
        assert not out.values[1][row, :, cut:].any()
    assert out.lengths[0] < 16


def test_generation_ends_when_all_rows_have_stopped(tiny):
    model, prompts = tiny("llama"), random_prompts([5, 9])
    free = run(model, prompts, 16, temperature=0.7)
    ends = [int(free.token_ids[0, 2]), int(free.token_ids[1, 4])]
    left: list[int] = []
    out = run(model, prompts, 16, temperature=0.7, end_tokens=ends, on_step=left.append)
    assert len(left) == max(out.lengths) < 16
    assert left == [sum(length > step + 1 for length in out.lengths) for step in range(len(left))]


def test_generate_stops_at_the_models_own_end_token_unless_told_not_to(tiny, monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama")
    assert model.end_tokens == [2]
    cache = prefill(model.backbone, random_prompts([5, 9]))
    free = model.generate(cache, max_new_tokens=10, stop=False)
    end = int(free.token_ids[0, 3])
    monkeypatch.setattr(model.hf.generation_config, "eos_token_id", [2, end])
    stopped = model.generate(cache, max_new_tokens=10)
    assert stopped.stopped[0] == "eos"
    cut = free.token_ids[0].tolist().index(end) + 1
    assert stopped.token_ids[0, :cut].tolist() == free.token_ids[0, :cut].tolist()
    assert stopped.texts[0] == model.tokenizer.decode(free.token_ids[0, :cut], skip_special_tokens=True)
    going = model.generate(cache, max_new_tokens=10, stop=False)
    assert torch.equal(going.token_ids, free.token_ids)
    assert going.stopped == ("length", "length")


def test_generate_returns_no_column_in_which_all_rows_have_stopped(tiny, monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama")
    cache = prefill(model.backbone, random_prompts([5]))
    free = model.generate(cache, max_new_tokens=10, stop=False)
    monkeypatch.setattr(model.hf.generation_config, "eos_token_id", int(free.token_ids[0, 4]))
    out = model.generate(cache, max_new_tokens=10)
    assert out.token_ids.shape == out.logprobs.shape == (1, out.token_ids.shape[1])
    assert out.token_ids.shape[1] <= 5
    assert (out.token_ids != PAD).all()


# --- seeds ---


def test_a_seed_gives_the_same_text_again_and_another_seed_another(tiny):
    model, prompts = tiny("llama"), random_prompts([9]) * 3
    out = run(model, prompts, 12, temperature=0.7, seeds=[4, 4, 5]).token_ids.tolist()
    assert out[0] == out[1] != out[2]
    assert out == run(model, prompts, 12, temperature=0.7, seeds=[4, 4, 5]).token_ids.tolist()


def test_seeds_of_any_64_bits_are_taken_and_differ(tiny):
    model, seeds = tiny("llama"), [0, 2**63, 2**64 - 1, -(2**63) + 1, 2**32]
    out = run(model, random_prompts([9]) * 5, 12, temperature=1.0, seeds=seeds).token_ids.tolist()
    assert len({tuple(row) for row in out}) == 5


def test_generate_numbers_the_seeds_where_none_are_given(tiny):
    model = tiny("llama")
    cache = prefill(model.backbone, random_prompts([9]) * 3)
    counted = model.generate(cache, max_new_tokens=8, seeds=[0, 1, 2])
    assert torch.equal(model.generate(cache, max_new_tokens=8).token_ids, counted.token_ids)


# --- what is returned, and what is left alone ---


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_values_of_the_new_tokens_are_those_of_a_prefill_of_the_whole_text(architecture: str, tiny):
    model, prompts = tiny(architecture), random_prompts([WINDOW + 8, 3])
    out = run(model, prompts, 7, temperature=0.7, keep_values=[0, 3])
    for row, prompt in enumerate(prompts):
        whole = prefill(model.backbone, [prompt_of([*prompt.token_ids, *out.token_ids[row].tolist()])])
        for layer in (0, 3):
            expected = whole.values[layer][0, :, -6:]
            found = out.values[layer][row, :, :6]
            assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
            assert not out.values[layer][row, :, 6:].any()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_cache_is_unchanged_afterwards(architecture: str, tiny):
    model = tiny(architecture)
    cache = prefill(model.backbone, random_prompts([30, 4]))
    before, labels = cache.checksums(), cache.positions.clone()
    first = model.generate(cache, max_new_tokens=20, temperature=0.7, stop=False)
    assert cache.checksums() == before
    assert torch.equal(cache.positions, labels)
    assert torch.equal(model.generate(cache, max_new_tokens=20, temperature=0.7, stop=False).token_ids, first.token_ids)


def test_memory_of_the_cache_is_not_shared_with_the_slab(tiny, monkeypatch: pytest.MonkeyPatch):
    from kvpatch.engine.decode import slab_of

    cache = prefill(tiny("llama").backbone, random_prompts([9]))
    slab = slab_of(tiny("llama").backbone, cache, 0)
    before = cache.checksums()
    for layer in slab.layers:
        layer.keys.zero_()
        layer.values.zero_()
    assert cache.checksums() == before


# --- refusals ---


def test_requests_that_do_not_fit_are_refused(tiny):
    model = tiny("llama")
    cache = prefill(model.backbone, random_prompts([6, 9]))
    with pytest.raises(CacheError, match="3 seeds for a batch of 2"):
        model.generate(cache, seeds=[0, 1, 2])
    with pytest.raises(ProtocolError, match="max_new_tokens must be at least 1, got 0"):
        model.generate(cache, max_new_tokens=0)
    for settings in ({"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ProtocolError, match="temperature must be at least 0 and top_p in"):
            model.generate(cache, **settings)
    with pytest.raises(CacheError, match="another model"):
        tiny("gpt_neox").generate(cache)


def test_the_context_is_the_limit(tiny):
    model = tiny("gpt2")
    cache = prefill(model.backbone, random_prompts([CONTEXT - 5, 3]))
    model.generate(cache, max_new_tokens=6, stop=False)
    with pytest.raises(ProtocolError, match=f"{CONTEXT + 1} positions are needed; the model's context is {CONTEXT}"):
        model.generate(cache, max_new_tokens=7)
