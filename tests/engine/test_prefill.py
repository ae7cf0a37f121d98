"""Prefill: its caches are those of transformers, whatever the batch, the order and the size of a pass."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import kvpatch.engine.token_budget as pass_room
from kvpatch.caches.kvcache import PAD, Origin, Segment
from kvpatch.engine.prefill import prefill
from kvpatch.errors import ProtocolError
from kvpatch.models.backbone import Backbone
from kvpatch.models.probe import attention_as_written
from tiny import ARCHITECTURES, CONTEXT, WINDOW, prompt_of, random_prompts

pytestmark = pytest.mark.model

LENGTHS = [2 * WINDOW + 9, 1, 12, 2, WINDOW + 1, 12]


def own_cache(model, token_ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer from transformers' own cache, one unpadded row, nothing dropped."""
    cache = DynamicCache()
    with torch.no_grad(), attention_as_written(model.hf):
        model.hf(input_ids=torch.tensor([token_ids]), use_cache=True, **{model.backbone._cache_argument: cache})
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_padded_batch_equals_transformers_own_cache_row_by_row(architecture: str, tiny):
    model, prompts = tiny(architecture), random_prompts(LENGTHS)
    cache = prefill(model.backbone, prompts)
    assert (cache.batch, cache.slots) == (len(LENGTHS), max(LENGTHS) - 1)
    for row, prompt in enumerate(prompts):
        slots = len(prompt.token_ids) - 1
        if not slots:
            continue
        for layer, (keys, values) in enumerate(own_cache(model, list(prompt.token_ids[:-1]))):
            assert off(cache.keys[layer][row, :, -slots:], keys) < 1e-5
            assert off(cache.values[layer][row, :, -slots:], values) < 1e-5


@pytest.mark.parametrize("tokens_at_once", [1, 60, 1024])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_with_a_long_common_beginning_equal_transformers_own_cache(
    architecture: str, tokens_at_once: int, tiny, monkeypatch: pytest.MonkeyPatch
):
    model = tiny(architecture)
    common, rest = random_prompts([WINDOW + 6, 20], seed=3)
    # The shortest is the common beginning and its pending token; two are equal.
    prompts = [prompt_of([*common.token_ids, *rest.token_ids[20 - n :]]) for n in (20, 1, 9, 2, 9)]
    monkeypatch.setitem(pass_room.TOKENS_AT_ONCE, "cpu", tokens_at_once)
    cache = prefill(model.backbone, prompts)
    for row, prompt in enumerate(prompts):
        assert cache.row_token_ids(row) == list(prompt.token_ids)
        slots = len(prompt.token_ids) - 1
        assert cache.positions[row].tolist() == [PAD] * (cache.slots - slots) + list(range(slots))
        for layer, (keys, values) in enumerate(own_cache(model, list(prompt.token_ids[:-1]))):
            assert off(cache.keys[layer][row, :, -slots:], keys) < 1e-5
            assert off(cache.values[layer][row, :, -slots:], values) < 1e-5


@pytest.mark.parametrize("length", [2, WINDOW + 6])
def test_equal_prompts_give_equal_rows(length: int, tiny):
    model = tiny("gemma3")
    cache = prefill(model.backbone, random_prompts([length]) * 3)
    assert cache.slots == length - 1
    alone = prefill(model.backbone, random_prompts([length]))
    for layer in range(4):
        for row in range(3):
            assert off(cache.keys[layer][row], alone.keys[layer][0]) < 1e-5
            assert off(cache.values[layer][row], alone.values[layer][0]) < 1e-5


def test_every_slot_is_labelled_in_the_order_the_prompts_were_given(tiny):
    prompts = random_prompts(LENGTHS)
    cache = prefill(tiny("llama").backbone, prompts)
    for row, prompt in enumerate(prompts):
        slots = len(prompt.token_ids) - 1
        padding = cache.slots - slots
        assert cache.token_ids[row].tolist() == [PAD] * padding + list(prompt.token_ids[:-1])
        assert cache.positions[row].tolist() == [PAD] * padding + list(range(slots))
        assert cache.segments[row].tolist() == [PAD] * padding + [int(Segment.body)] * slots
        assert cache.origins[row].tolist() == [PAD] * padding + [int(Origin.own)] * slots
        assert cache.pieces[row] == prompt.pieces[:-1]
        assert int(cache.pending[row]) == prompt.token_ids[-1]
        assert int(cache.pending_position[row]) == slots
    assert cache.rope == tiny("llama").geometry.rope


@pytest.mark.parametrize("tokens_at_once", [1, 40, 100])
def test_the_size_of_a_pass_does_not_change_the_result(tokens_at_once: int, tiny, monkeypatch: pytest.MonkeyPatch):
    backbone, prompts = tiny("gemma3").backbone, random_prompts(LENGTHS)
    at_once = prefill(backbone, prompts)
    passes = []
    forward = Backbone.forward

    def counted(self, token_ids, *rest, **settings):
        passes.append(token_ids.shape[0])
        return forward(self, token_ids, *rest, **settings)

    monkeypatch.setattr(Backbone, "forward", counted)
    monkeypatch.setitem(pass_room.TOKENS_AT_ONCE, "cpu", tokens_at_once)
    in_passes = prefill(backbone, prompts)
    assert len(passes) > 1
    assert sum(passes) == len(prompts)
    assert torch.equal(in_passes.token_ids, at_once.token_ids)
    assert in_passes.pieces == at_once.pieces
    for a, b in zip((*in_passes.keys, *in_passes.values), (*at_once.keys, *at_once.values), strict=True):
        real = at_once.is_real[:, None, :, None]
        assert off(a * real, b * real) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_prompt_of_one_token_has_an_empty_cache_and_can_be_continued(architecture: str, tiny):
    model = tiny(architecture)
    cache = prefill(model.backbone, [prompt_of([9]), prompt_of([10])])
    assert (cache.batch, cache.slots) == (2, 0)
    assert cache.pending.tolist() == [9, 10]
    assert cache.pending_position.tolist() == [0, 0]
    with torch.no_grad():
        expected = model.hf(input_ids=torch.tensor([[9], [10]]), use_cache=False).logits[:, -1]
    out = model.generate(cache, max_new_tokens=1, temperature=0)
    assert out.token_ids[:, 0].tolist() == expected.argmax(-1).tolist()


def test_a_prompt_as_long_as_the_context_is_taken_and_a_longer_one_refused(tiny):
    backbone = tiny("llama").backbone
    assert prefill(backbone, random_prompts([CONTEXT])).slots == CONTEXT - 1
    with pytest.raises(ProtocolError, match=f"a prompt has {CONTEXT + 1} tokens; the model's context is {CONTEXT}"):
        prefill(backbone, random_prompts([3, CONTEXT + 1]))


def test_no_prompts_are_refused(tiny):
    with pytest.raises(ProtocolError, match="no prompt"):
        tiny("llama").prefill([])


def test_text_and_encoded_prompts_may_be_mixed(tiny):
    model = tiny("llama")
    text = "Explain how bread rises."
    cache = model.prefill([model.encode(text), text])
    assert cache[0].checksums() == cache[1].checksums()
    assert model.prefill(text)[0].row_token_ids(0) == list(model.encode(text).token_ids)
    assert model.prefill(text, chat=False).row_token_ids(0) == model.tokenizer(text)["input_ids"]
