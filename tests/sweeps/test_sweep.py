"""A sweep gives, cell by cell, what a patch applied by hand gives; labelled, and drawn without a network."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import kvpatch as kv
from kvpatch.sweeps.metrics import Metric

SOURCE, TARGET = "Watch how each of these words arrives.", "Explain how bread rises in a warm oven"


@pytest.fixture(scope="module")
def pair(tiny) -> tuple[kv.Model, kv.KVCache, kv.KVCache]:
    model = tiny("llama")
    return model, model.prefill(SOURCE), model.prefill(TARGET)


def logits_by_hand(model: kv.Model, cache: kv.KVCache) -> torch.Tensor:
    """transformers' own logits behind the pending token of a cache of one row."""
    held = DynamicCache()
    for layer, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
        held.update(k.clone(), v.clone(), layer)
    name = {model.backbone._cache_argument: held}
    with torch.no_grad():
        return model.hf(cache.pending[:, None], position_ids=cache.pending_position[:, None], **name).logits[0, -1]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma3", "gpt_neox", "cohere", "phi3"])
def test_every_cell_equals_a_loop_over_transformers(tiny, architecture: str) -> None:
    model = tiny(architecture)
    source, target = model.prefill(SOURCE), model.prefill(TARGET)
    one, two = (model.continuation_ids(text)[0] for text in ("a", "b"))
    grid = model.sweep(
        source,
        target,
        {"layers": "each", "slots": [1, 5, -1], "parts": ["k", "v", "kv"]},
        kv.logit_difference("a", "b"),
    )
    assert grid.data.dims == ("layers", "slots", "parts") and grid.data.shape == (4, 3, 3)
    for layer in range(4):
        for place, slot in enumerate([1, 5, -1]):
            for parts in ("k", "v", "kv"):
                logits = logits_by_hand(model, kv.Patch(layers=layer, slots=slot, parts=parts).apply(source, target))
                found = float(grid.data.sel(layers=layer, parts=parts)[place])
                assert found == pytest.approx(float(logits[one] - logits[two]), abs=1e-4)


def test_absolute_positions_are_swept_where_no_key_moves(tiny) -> None:
    model = tiny("gpt2")
    target = model.prefill(TARGET)
    source = kv.KVCache.from_dynamic(
        target[[0]].to_dynamic(), positions=target.positions, token_ids=target.token_ids, pending=target.pending
    )
    grid = model.sweep(source, target, {"layers": "each", "slots": "each"}, kv.kl_to_target())
    assert float(abs(grid.data).max()) < 1e-5
    with pytest.raises(kv.CacheError, match="can't be moved"):
        model.sweep(model.prefill(SOURCE), target, {"layers": "each", "slots": "each"}, kv.kl_to_target())
    assert model.sweep(
        model.prefill(SOURCE), target, {"layers": "each", "slots": "each", "parts": "v"}, kv.kl_to_target()
    )


@pytest.mark.parametrize(
    "patch",
    [
        kv.Patch(strength=0.5),
        kv.Patch(rotate=False, align="start"),
        kv.Patch(donor="shuffle_values"),
        kv.Patch(donor="gaussian_isotropic", parts="v"),
    ],
    ids=str,
)
def test_settings_of_the_patch_hold_in_every_cell(pair, patch: kv.Patch) -> None:
    model, source, target = pair
    over = {"layers": [2, [0, 3], kv.LayerBand(band=(0.5, 1))], "kv_heads": "each", "slots": ["body", 4, [1, 2]]}
    grid = model.sweep(source, target, over, lambda logits: logits[..., 7], patch, seed=3)
    assert grid.data.dims == ("layers", "slots", "kv_heads") and grid.data.shape == (3, 3, 2)
    for i, layers in enumerate(over["layers"]):
        for j, slots in enumerate(over["slots"]):
            one = patch.model_copy(
                update={"layers": kv.Patch(layers=layers).layers, "slots": kv.Patch(slots=slots).slots, "kv_heads": [1]}
            )
            expected = logits_by_hand(model, one.apply(source, target, seed=3))[7]
            assert float(grid.data[i, j, 1]) == pytest.approx(float(expected), abs=1e-4)


def test_each_slot_pairs_prompts_of_unequal_length_as_the_whole_patch_does(pair) -> None:
    model, source, target = pair
    assert source.slots < target.slots
    grid = model.sweep(source, target, {"slots": "each", "layers": [1]}, kv.kl_to_target())
    slots = grid.data.coords["slots"].values
    assert slots.tolist() == list(range(target.slots - source.slots, target.slots))
    assert grid.data.coords["token"].values.tolist() == list(target.pieces[0])[-source.slots :]
    assert grid.data.coords["source_token"].values.tolist() == list(source.pieces[0])
    start = model.sweep(source, target, {"slots": "each"}, kv.kl_to_target(), kv.Patch(align="start"))
    assert start.data.coords["source_token"].values.tolist() == list(source.pieces[0])
    assert start.data.coords["slots"].values.tolist() == list(range(source.slots))


def metrics(model: kv.Model, source: kv.KVCache, target: kv.KVCache) -> list[tuple[Metric, Any]]:
    """Metrics, and the same computed of a cache by other means."""

    def likelihood(cache: kv.KVCache, text: str) -> torch.Tensor:
        return model.score(cache, [text])[0]

    def kl(own: kv.KVCache) -> Any:
        p = model.logits(own)[0].softmax(dim=-1)
        return lambda cache: (p * (p.log() - model.logits(cache)[0].softmax(dim=-1).log())).sum()

    texts = (" warm oven", " bread rises"), (" these words",)
    mean = lambda cache, some: torch.stack([likelihood(cache, text).mean() for text in some]).mean()  # noqa: E731
    return [
        (kv.log_likelihood(" warm oven"), lambda cache: likelihood(cache, " warm oven").sum()),
        (kv.probability(" warm oven"), lambda cache: likelihood(cache, " warm oven").sum().exp()),
        (kv.kl_to_source(), kl(source)),
        (kv.kl_to_target(), kl(target)),
        (kv.mode_likelihood_ratio(*texts), lambda cache: mean(cache, texts[0]) - mean(cache, texts[1])),
    ]


def test_every_metric_is_what_its_name_says(pair) -> None:
    model, source, target = pair
    for metric, by_hand in metrics(model, source, target):
        grid = model.sweep(source, target, {"layers": [1, 3], "slots": [3, 8]}, metric)
        for layer in (1, 3):
            cache = kv.Patch(layers=layer, slots=8).apply(source, target)
            assert float(grid.data.sel(layers=layer, slots=8)) == pytest.approx(float(by_hand(cache)), abs=1e-4), metric
        assert grid.source_value == pytest.approx(float(by_hand(source)), abs=1e-4)
        assert grid.target_value == pytest.approx(float(by_hand(target)), abs=1e-4)


def test_passes_are_cut_and_memory_that_runs_out_is_lived_with(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source, target = pair
    over = {"layers": "each", "slots": "each"}
    whole = model.sweep(source, target, over, kv.kl_to_source())
    from kvpatch.engine import variants

    run, asked = variants._run_some, []

    def short_of_memory(backbone: Any, some: Any, chosen: Any, fed: Any) -> torch.Tensor:
        asked.append(len(chosen))
        if len(chosen) > 30:
            raise torch.OutOfMemoryError
        return run(backbone, some, chosen, fed)

    monkeypatch.setattr(variants, "_run_some", short_of_memory)
    monkeypatch.setattr(model.backbone.kept, "tokens_at_once", 0)
    monkeypatch.setattr("kvpatch.engine.token_budget.FEWEST_TOKENS", 16)
    cut = model.sweep(source, target, over, kv.kl_to_source())
    assert max(asked) > 30 and len(asked) > 3
    np.testing.assert_allclose(cut.data.values, whole.data.values, atol=1e-5)


def test_neither_cache_nor_model_is_changed(pair) -> None:
    model, source, target = pair
    before = source.checksums() + target.checksums(), model.generate(target, max_new_tokens=4).texts
    model.sweep(source, target, {"layers": "each"}, kv.kl_to_source())
    assert before == (source.checksums() + target.checksums(), model.generate(target, max_new_tokens=4).texts)
    assert not any(block._forward_pre_hooks for block in model.backbone.blocks)


def test_rows_of_a_batch_are_swept_each_with_its_own_source(pair) -> None:
    model, source, target = pair
    two = model.prefill([SOURCE, SOURCE.replace("Watch", "Catch")])
    if len(set(two.row_lengths)) > 1:
        two = two[[0, 0]]
    grid = model.sweep(two, target[[0, 0]], {"layers": "each", "slots": [3]}, kv.kl_to_source())
    assert grid.data.dims == ("row", "layers", "slots")
    alone = model.sweep(two[[1]], target, {"layers": "each", "slots": [3]}, kv.kl_to_source())
    np.testing.assert_allclose(grid.data.isel(row=1).values, alone.data.values, atol=1e-5)
    with pytest.raises(kv.CacheError, match="of one length"):
        model.sweep(source, model.prefill([TARGET, "Short."]), {"layers": "each"}, kv.kl_to_source())


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ({}, "over must name what to sweep"),
        ("layers", "over must name what to sweep"),
        ({"layer": "each"}, "did you mean 'layers'"),
        ({"layers": [99]}, r"layer 99 does not exist: there are 4 \(0 to 3\)"),
        ({"slots": [500]}, "slot 500 does not exist"),
        ({"kv_heads": range(3)}, "KV head 2 does not exist: there are 2"),
        ({"parts": ["k", "q"]}, "'k', 'v' or 'kv', not 'q'"),
        ({"layers": []}, "'layers' is empty"),
        ({"layers": 3}, "needs an axis of several values"),
        ({"layers": {1, 2}}, "must be in an order"),
        ({"slots": ["boddy"]}, "'boddy' is not a selection"),
    ],
)
def test_an_axis_that_can_not_be_meant_is_told_in_one_line(pair, over: Any, told: str) -> None:
    with pytest.raises(kv.KvpatchError, match=told) as caught:
        pair[0].sweep(pair[1], pair[2], over, kv.kl_to_source())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        (None, "metric must be one of kv.logit_difference"),
        (kv.kl_to_source, r"write kv.kl_to_source\(...\)"),
        (lambda logits: logits.sum(), "must give one number a row"),
        (kv.logit_difference(" bread", " bread rises"), "begin with the same token"),
    ],
)
def test_a_metric_that_can_not_be_meant_is_told_in_one_line(pair, metric: Any, told: str) -> None:
    with pytest.raises(kv.ProtocolError, match=told):
        pair[0].sweep(pair[1], pair[2], {"layers": "each"}, metric)


def test_what_else_can_not_be_meant_is_told(pair, tiny) -> None:
    model, source, target = pair
    with pytest.raises(kv.CacheError, match="changes the number of slots"):
        model.sweep(source, target, {"slots": "each"}, kv.kl_to_source(), kv.Patch(align="append"))
    with pytest.raises(kv.CacheError, match="source must be a KVCache, got str"):
        model.sweep("a", target, {"slots": "each"}, kv.kl_to_source())  # type: ignore[arg-type]
    with pytest.raises(kv.CacheError, match="another model"):
        tiny("qwen3").sweep(source, target, {"slots": "each"}, kv.kl_to_source())
    for wrong in ("", 3, None):
        with pytest.raises(kv.ProtocolError, match="an answer must be text"):
            kv.probability(wrong)  # type: ignore[arg-type]


def test_it_is_drawn_with_its_tokens_and_without_a_network(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network is asked"))
    model, source, target = pair
    for over in (
        {"layers": "each", "slots": "each"},
        {"layers": "each", "slots": "each", "parts": ["k", "v"]},
        {"layers": "each"},
        {"slots": "each"},
        {"layers": "each", "kv_heads": "each"},
    ):
        grid = model.sweep(source, target, over, kv.kl_to_source())
        chart = grid.plot()
        written = json.dumps(chart.to_dict(), ensure_ascii=False)
        assert "KL to the source" in written
        svg = chart._repr_mimebundle_()["image/svg+xml"]
        assert svg.startswith("<svg") and ("bread" in svg or "brea" in svg) == ("slots" in over)
    assert "Sweep(layers=4, kv_heads=2; KL to the source" in repr(grid) and "highest at layers" in grid._repr_html_()
    assert list(grid.to_frame().columns) == ["layers", "kv_heads", "value"]


def test_logits_are_those_of_transformers(pair) -> None:
    model, source, target = pair
    both = model.logits(kv.KVCache.concat([source, target]))
    expected = torch.stack([logits_by_hand(model, cache) for cache in (source, target)])
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-4)
