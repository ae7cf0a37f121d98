"""Query heads changed while a prompt runs: against hooks by hand on plain transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import kvpatch as kv
from kvpatch.interventions.in_prefill import run_in_prefill
from kvpatch.models.template import EncodedPrompt
from kvpatch.specs.interventions import InPrefill
from tiny import random_prompts

pytestmark = pytest.mark.model

LAYER = 1


def by_hand(model, site: str, heads: Sequence[int], source, target) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the target's prompt, unpadded, where some heads of one layer have the source's numbers."""
    hf, attention = model.hf, model.hf.model.layers[LAYER].self_attn
    dim, kept = attention.head_dim, {}

    def run(prompt, change: Callable[[Tensor], Tensor]):
        if site == "heads":
            handle = attention.o_proj.register_forward_pre_hook(lambda module, args: (change(args[0]),))
        else:  # rotations are equal where the prompts are of one length, so that queries before them will do
            handle = attention.q_proj.register_forward_hook(lambda module, args, out: change(out))
        try:
            with torch.no_grad():
                cache = hf(input_ids=torch.tensor([prompt.token_ids[:-1]]), use_cache=True).past_key_values
        finally:
            handle.remove()
        return [(layer.keys[0], layer.values[0]) for layer in cache.layers]

    def keep(own: Tensor) -> Tensor:
        kept["source"] = own.clone()
        return own

    def give(own: Tensor) -> Tensor:
        own = own.clone()
        for head in heads:
            own[..., head * dim : (head + 1) * dim] = kept["source"][..., head * dim : (head + 1) * dim]
        return own

    run(source, keep)
    return run(target, give)


@pytest.mark.parametrize("heads", [[0], [1, 3]])
@pytest.mark.parametrize("site", ["heads", "queries"])
def test_it_equals_a_hook_written_by_hand(site: str, heads: list[int], tiny) -> None:
    model = tiny("llama")
    sources, targets = random_prompts([12, 9], seed=1), random_prompts([12, 9], seed=2)
    natural = model.prefill(targets)
    spec = InPrefill(site=site, layers=[LAYER], query_heads=heads)
    made = run_in_prefill(model.backbone, spec, sources, targets, natural)
    assert made.planned == made.fired == 1
    assert made.touched.kv_heads == len({h // (model.geometry.query_heads // model.geometry.kv_heads) for h in heads})
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        slots = len(target.token_ids) - 1
        for layer, (keys, values) in enumerate(by_hand(model, site, heads, source, target)):
            assert torch.allclose(made.cache.keys[layer][row, :, -slots:], keys, atol=2e-5, rtol=1e-4)
            assert torch.allclose(made.cache.values[layer][row, :, -slots:], values, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(made.cache.values[2], natural.values[2], atol=1e-4)


@pytest.mark.parametrize("site", ["heads", "queries"])
def test_one_head_changes_less_than_all_and_all_of_a_source_alike_change_nothing(site: str, tiny) -> None:
    model = tiny("llama")
    prompts = ["Explain how bread rises.", "Say what a warm oven does."]
    own = model.prefill(prompts)
    same = model.intervene(kv.InPrefill(site=site, layers=[LAYER]), prompts, prompts)
    for found, natural in zip(same.values, own.values, strict=True):
        assert torch.allclose(found, natural, atol=1e-5)
    one, all_ = (
        model.intervene(kv.InPrefill(site=site, layers=[LAYER], query_heads=heads), prompts, "Watch each word.")
        for heads in ([0], slice(None))
    )
    assert not torch.equal(one.values[2], all_.values[2]) and torch.equal(one.values[LAYER], own.values[LAYER])


def test_a_mistake_is_told_in_one_line(tiny) -> None:
    model = tiny("llama")
    with pytest.raises(kv.KvpatchError, match="site 'values' has no query heads to choose"):
        kv.InPrefill(site="values", query_heads=[1])
    for heads, told in [
        ([99], "query head 99 does not exist: there are 4"),
        (slice(50, None), "hold none of a layer's"),
    ]:
        with pytest.raises(kv.KvpatchError, match=told):
            model.intervene(kv.InPrefill(site="heads", query_heads=heads), "Hello there.", "Watch this now.")


def test_what_names_no_head_keeps_its_hash() -> None:
    assert "query_heads" not in InPrefill(site="values").to_json()
    assert "query_heads" in InPrefill(site="heads", query_heads=[1]).to_json()


def test_queries_of_a_shorter_source_are_turned_to_where_they_land(tiny) -> None:
    """The target is the source behind three more tokens: its layer 0 makes the same queries, three positions on."""
    model = tiny("llama")
    (target,) = random_prompts([15], seed=2)
    source = EncodedPrompt(target.token_ids[3:], target.segments[3:], target.pieces[3:])
    natural = model.prefill([target])
    made = run_in_prefill(model.backbone, InPrefill(site="queries", layers=[0]), [source], [target], natural)
    for found, own in zip(made.cache.values, natural.values, strict=True):
        assert torch.allclose(found, own, atol=1e-5)
