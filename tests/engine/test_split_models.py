"""A model that is split over two devices is patched, decoded, scored and watched as the whole one is, to the bit; each
layer's keys and values stay where the layer runs. The second device is `two_devices.OTHER`, and real ones on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvpatch as kv
from kvpatch.checks.identities import check
from kvpatch.engine.attention import Maps
from kvpatch.engine.backend import fast_of
from kvpatch.engine.model import Model
from small import write_protocol
from tiny import CHATML, LAYERS, tiny_hf, tiny_tokenizer
from two_devices import CPU, OTHER, TwoDevices, split_in_half

SOURCE, TARGET = "Watch yourself choose each of these words now.", "Explain how bread rises in a warm oven."
OTHERS = ["Describe a cat that sleeps on a warm roof.", "Say why the sea is salt, and keep it short."]
HALF = LAYERS // 2
WAYS: dict[str, Callable[[Model, kv.KVCache, kv.KVCache], Any]] = {
    "whole": lambda m, s, t: kv.Patch(align="replace").apply(s, t),
    "moved": lambda m, s, t: kv.Patch(align="append").apply(s, t),
    "halfway": lambda m, s, t: kv.Patch(slots="body", strength=0.5).apply(s, t),
    "values of a few layers": lambda m, s, t: kv.Patch(layers=[1, 2], slots="body", parts="v").apply(s, t),
    **{
        donor: lambda m, s, t, donor=donor: kv.Patch(slots="body", donor=donor).apply(s, t, seed=3, reference=t)
        for donor in (
            "shuffle_values",
            "shuffle_rerotate",
            "shuffle_jointly",
            "shuffle_heads",
            "gaussian_isotropic",
            "gaussian_fitted",
            "mean",
        )
    },
    **{
        f"{site} in prefill": lambda m, s, t, site=site: m.intervene(
            kv.InPrefill(site=site, layers=[1, 2]), TARGET, SOURCE
        )
        for site in ("residual", "values", "queries_keys_values", "queries", "heads")
    },
    "steered values": lambda m, s, t: m.intervene(
        kv.ValueSteering(layers=[1, 2], alpha=2.0), TARGET, calibration=([SOURCE, OTHERS[0]], [TARGET, OTHERS[1]])
    ),
    "steered cache": lambda m, s, t: m.intervene(
        kv.CacheSteering(layers=[1, 2], strength=2.0), TARGET, calibration=([SOURCE, OTHERS[0]], [TARGET, OTHERS[1]])
    ),
    "words joined": lambda m, s, t: m.intervene(kv.Joined(keep="receiver"), TARGET, SOURCE),
    "reshaped": lambda m, s, t: m.intervene(kv.Reshape(layers=[3], window=6), TARGET, SOURCE),
}


def tensors_of(cache: kv.KVCache) -> list[Tensor]:
    return [*cache.keys, *cache.values, cache.positions, cache.token_ids, cache.pending_position]


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(torch.Tensor.cpu(a), b) for a, b in zip(found, expected, strict=True))


def held(hf: Any) -> Model:
    return kv.load(model=hf, tokenizer=tiny_tokenizer(CHATML))


class Pair:
    """The whole model and the split one, in the mode in which the second has two devices."""

    def __init__(self, architecture: str) -> None:
        self.whole = held(tiny_hf(architecture))
        self.devices = TwoDevices()
        hf = tiny_hf(architecture)
        with self.devices:
            split_in_half(self.devices, hf)
            self.split = held(hf)


_pair = functools.cache(Pair)


@pytest.fixture(params=["llama", "gemma3", "gpt2"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return _pair(request.param)


def test_the_second_device_keeps_torch_s_rules() -> None:
    devices, one, two = TwoDevices(), torch.ones(2, 2), torch.ones(2, 2)
    with devices:
        there = two.to(OTHER)
        assert (one.device, there.device, (there + 1).device) == (CPU, OTHER, OTHER)
        assert there[torch.tensor([0])].device == OTHER and (there * torch.tensor(2.0)).device == OTHER
        one[:1] = there[:1]
        for forbidden in (
            lambda: one + there,
            lambda: torch.cat([one, there]),
            lambda: one[there.bool()],
            lambda: torch.where(there > 0, one, 0),
            lambda: torch.equal(one, there),
            lambda: there.numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                forbidden()


def test_keys_and_values_stay_where_their_layer_runs(pair: Pair) -> None:
    with pair.devices:
        cache = pair.split.prefill([SOURCE, TARGET, *OTHERS])
        places = [k.device for k in cache.keys]
        assert places == [v.device for v in cache.values] == [CPU] * HALF + [OTHER] * (LAYERS - HALF)
        assert cache.positions.device == pair.split.backbone.device == OTHER
        assert tuple(places) == pair.split.backbone.layer_devices and pair.split.backbone.is_split
        again = cache.to(CPU).to(pair.split.backbone.device, pair.split.backbone.layer_devices)
        assert [k.device for k in again.keys] == places
        assert cache.checksums() == pair.whole.prefill([SOURCE, TARGET, *OTHERS]).checksums()
        with pytest.raises(kv.CacheError, match=r"layer_devices"):
            pair.split.generate(cache.to(OTHER), max_new_tokens=1)


@pytest.mark.parametrize("way", WAYS)
def test_a_patch_on_a_split_model_is_that_on_the_whole_one(pair: Pair, way: str) -> None:
    try:
        expected = WAYS[way](pair.whole, pair.whole.prefill(SOURCE), pair.whole.prefill(TARGET))
    except kv.KvpatchError as error:
        if not any(rope.keeps_its_place for rope in pair.whole.geometry.rope):
            raise
        with pair.devices, pytest.raises(kv.KvpatchError, match=str(error)[:20]):
            WAYS[way](pair.split, pair.split.prefill(SOURCE), pair.split.prefill(TARGET))
        return
    texts = pair.whole.generate(expected, max_new_tokens=6).token_ids
    scores = pair.whole.score(expected, " the oven")
    with pair.devices:
        found = WAYS[way](pair.split, pair.split.prefill(SOURCE), pair.split.prefill(TARGET))
        assert [k.device for k in found.keys] == list(pair.split.backbone.layer_devices)
        assert torch.equal(pair.split.generate(found, max_new_tokens=6).token_ids.cpu(), texts)
        assert torch.allclose(pair.split.score(found, " the oven").cpu(), scores, atol=1e-5)
        assert all(
            torch.allclose(a.cpu().float(), b.float(), atol=1e-5)
            for a, b in zip(tensors_of(found), tensors_of(expected), strict=True)
        )


def test_attention_geometry_sweeps_and_steered_decoding(pair: Pair, tmp_path: Path) -> None:
    def seen(model: Model) -> list[Any]:
        source, target = model.prefill(SOURCE), model.prefill(TARGET)
        watched = model.attention([SOURCE, TARGET], marked="body", maps=Maps(layers=[0, 3], heads=[1]))
        out = model.generate(target, max_new_tokens=5, attention=True)
        own = source if not any(rope.keeps_its_place for rope in model.geometry.rope) else target
        grid = model.sweep(own, target, {"layers": "each", "slots": "body"}, kv.kl_to_target(), progress=False)
        rows = [kv.r_v(target, early=1, late=3, window=6), model.logits(target), watched.values, out.attention.values]
        target.save(tmp_path / "cache.safetensors")
        loaded = kv.KVCache.load(tmp_path / "cache.safetensors", model=model)
        back = kv.KVCache.from_dynamic(
            target.to_dynamic(),
            positions=target.positions,
            token_ids=target.token_ids,
            pending=target.pending,
            model=model,
        )
        more = [model.logits(one) for one in (loaded, back)]
        maps = [watched.map(layer).values for layer in (0, 3)]
        return [*(row.cpu() for row in (*rows, *more)), *map(torch.as_tensor, maps), torch.as_tensor(grid.data.values)]

    expected = seen(pair.whole)
    with pair.devices:
        found = seen(pair.split)
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, atol=1e-4, equal_nan=True)


def test_a_split_model_passes_every_identity_and_says_what_runs_it(pair: Pair) -> None:
    with pair.devices:
        found = check(pair.split)
        assert [i.identity for i in found if i.holds is False] == []
        fast = fast_of(pair.split.backbone)
    assert fast.network is None and "split over devices" in fast.note


def test_a_whole_run_on_a_split_model_gives_the_trials_of_the_whole_one(tmp_path: Path) -> None:
    pair = _pair("llama")
    protocol = write_protocol(tmp_path, hypotheses=[])
    rows = []
    for name, model, mode in (("whole", pair.whole, nullcontext()), ("split", pair.split, pair.devices)):
        with mode:
            run = kv.run(protocol, model, tmp_path / name, n=2)
        rows.append(run.trials().sort_values("trial_id"))
        assert not run.trials()["error"].notna().any()
    assert rows[0]["trial_id"].tolist() == rows[1]["trial_id"].tolist()
    for column in ("text", "equals_text", "n_slots_patched"):
        assert rows[0][column].tolist() == rows[1][column].tolist()
    for column in ("rv_prompt", "rv_output", "js_pull", "nll_own"):
        one, two = (torch.tensor(of[column].to_numpy(float)) for of in rows)
        assert torch.allclose(one, two, atol=1e-4, equal_nan=True), column


def _devices(count: int) -> pytest.MarkDecorator:
    have = torch.cuda.device_count()
    return pytest.mark.skipif(have < count, reason=f"there are {have} CUDA devices, and this takes {count}")


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("there", [pytest.param("cpu", marks=_devices(1)), pytest.param("cuda:1", marks=_devices(2))])
def test_a_model_split_over_real_devices_passes_every_identity(architecture: str, there: str, tmp_path: Path) -> None:
    """The first half of the layers on a GPU, the second half computed on the processor or on another GPU."""
    from accelerate import dispatch_model

    hf = tiny_hf(architecture)
    blocks = next(n for n, m in hf.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
    device_map: dict[str, Any] = {name: 0 for name, _ in hf.named_children()}
    decoder = blocks.rpartition(".")[0]
    device_map.pop(decoder)
    device_map |= {f"{decoder}.{name}": there for name, _ in hf.get_submodule(decoder).named_children()}
    device_map.pop(blocks)
    device_map |= {f"{blocks}.{i}": 0 if i < HALF else there for i in range(LAYERS)}
    head = next(n for n, m in hf.named_modules() if m is hf.get_output_embeddings())
    tied = next(n for n, m in hf.named_modules() if m is hf.get_input_embeddings())
    device_map |= {head: 0, tied: 0}
    # With the processor as the main device its layers are computed there, and not offloaded.
    dispatch_model(hf, device_map, main_device=there if there == "cpu" else None)
    model = held(hf)
    places = [torch.device("cuda", 0)] * HALF + [torch.device(there)] * (LAYERS - HALF)
    assert list(model.backbone.layer_devices) == places
    cache = model.prefill([SOURCE, TARGET, *OTHERS])
    assert [k.device for k in cache.keys] == [v.device for v in cache.values] == places
    assert [i.identity for i in check(model) if i.holds is False] == []
    whole = held(tiny_hf(architecture))
    assert torch.allclose(model.logits(cache).cpu(), whole.logits(whole.prefill([SOURCE, TARGET, *OTHERS])), atol=1e-3)
    for way in ("whole", "values of a few layers", "gaussian_fitted", "shuffle_heads", "residual in prefill"):
        try:
            expected = WAYS[way](whole, whole.prefill(TARGET), whole.prefill(TARGET))
        except kv.CacheError as error:  # positions that are part of the keys can't be moved
            with pytest.raises(kv.CacheError, match=str(error)[:20]):
                WAYS[way](model, model.prefill(TARGET), model.prefill(TARGET))
            assert architecture == "gpt2"
            continue
        found = WAYS[way](model, model.prefill(TARGET), model.prefill(TARGET))
        assert torch.allclose(model.logits(found).cpu(), whole.logits(expected), atol=1e-3), way
    assert model.generate(cache, max_new_tokens=5, temperature=0).token_ids.shape == (4, 5)
    model.score(cache, [" one"] * 4)
