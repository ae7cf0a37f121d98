"""What decoding holds in 8 floating bits: how it is rounded, who reads it, and what stays as it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import kvpatch as kv
from kvpatch.checks import identities
from kvpatch.checks.identities import check
from kvpatch.engine import backend
from kvpatch.engine import places as places_room
from kvpatch.engine.backend import CACHE_NOISE, Fast, fast_of
from kvpatch.engine.batching import bytes_per_place
from kvpatch.engine.decode import decode, round_held, slab_of
from kvpatch.engine.places import Places, Slots, bytes_per_slot, make_places
from kvpatch.engine.prefill import prefill
from kvpatch.engine.score import score
from kvpatch.engine.step import PlainOps, Sampling
from kvpatch.executors.host import model_record
from kvpatch.models import fp8
from kvpatch.models.fp8 import whole_activations
from kvpatch.models.hf import LayerEdit
from kvpatch.models.llamalike import LayerWeights
from synthetic import dec7, record_of
from tiny import CHATML, CONFIGS, random_prompts, tiny_of, tiny_tokenizer

ALL = (slice(None), slice(None))


def saved(where: Path, architecture: str = "llama") -> Path:
    """A tiny model whose layers fp8 weights fit."""
    name, usual = CONFIGS[architecture]
    tiny_of(name, **{**usual, "hidden_size": 64}).save_pretrained(where)
    tiny_tokenizer(CHATML).save_pretrained(where)
    return where


def loaded(where: Path, architecture: str = "llama", dtype: str = "bfloat16", cache: str | None = "fp8") -> kv.Model:
    return kv.load(saved(where, architecture), dtype=dtype, cache_dtype=cache, device="cpu")


def filled(model: kv.Model, cache: Any, limit: int = 4) -> Places:
    """Places that hold a cache and are about to make their first step."""
    places = make_places(model.backbone, cache.batch, cache.slots, limit, [])
    at = (*ALL, slice(0, cache.slots))
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        places.keys[layer].write(at, keys)
        places.values[layer].write(at, values)
    places.slot_positions[:, : cache.slots] = cache.positions
    places.first.copy_(cache.slots - cache.lengths)
    places.feed.copy_(cache.pending)
    places.position.copy_(cache.pending_position)
    places.going.fill_(True)
    places.live = cache.slots + 1
    return places


def test_a_slot_is_rounded_by_its_own_numbers_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(3, 2, 5, 16, generator=generator).bfloat16()
    new[1, 0, 2] *= 1e3
    new[2, 1, 4] = 0

    def held(of: torch.Tensor) -> Slots:
        shape = (len(of), 2, 7, 16)
        slots = Slots(torch.zeros(shape, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.zeros(shape[:3]))
        slots.write((torch.arange(len(of)), slice(None), slice(2, 7)), of)
        return slots

    slots = held(new)
    found = slots.read((*ALL, slice(2, 7)))
    assert torch.equal(found.bfloat16().float(), found)  # four digits
    largest = new.double().abs().amax(-1)
    scale = slots.scale
    assert scale is not None
    scale = scale[:, :, 2:].double()
    assert torch.equal(scale, torch.exp2(scale.log2().round()))
    assert bool((largest / scale <= 448).all())
    assert bool(((largest / scale > 224) | (largest == 0)).all())
    # Half a step of three bits behind the first one, or of the smallest numbers.
    off = (found.double() - new.double()).abs()
    assert bool((off <= (new.double().abs() / 16).maximum(scale[..., None] * 2.0**-10)).all())
    assert float((off / new.double().abs().clamp(min=1e-9)).max()) > 0.05
    assert not slots.read((*ALL, slice(0, 2))).any()
    loud = held(1000 * new[:1])
    assert torch.equal(held(new[:1]).numbers.view(torch.uint8), slots.numbers.view(torch.uint8)[:1])
    assert loud.scale is not None and float(loud.scale[:, :, 2:].min()) > 0.1
    assert slots.nbytes == 3 * 2 * 7 * (16 + 4)


@pytest.fixture(params=["in bytes, as on a GPU", "in bfloat16"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How rounded slots are held."""
    if "bytes" in request.param:
        monkeypatch.setattr(places_room, "holds_bytes", lambda backbone: backbone.rounds_cache)
    return request.param


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_attention_is_that_over_the_numbers_that_are_held(tmp_path: Path, architecture: str) -> None:
    model = loaded(tmp_path, architecture)
    backbone, cache = model.backbone, prefill(model.backbone, random_prompts([9, 3, 14]))
    net = fast_of(backbone).network
    assert net is not None
    places, ops = filled(model, cache), PlainOps(backbone, net, Sampling(0.0, 1.0, ()), 64)
    generator = torch.Generator().manual_seed(0)
    ops.begin(places)
    for layer, weights in enumerate(net.layers):
        qkv = torch.randn(3, weights.qkv.shape[0], generator=generator).bfloat16()
        found = ops.attend(layer, weights, qkv, places).view(3, net.query_heads, net.head_dim).double()
        # The queries as the step turns them, read off attention over two slots of known values.
        at = (*ALL, slice(0, cache.slots + 1))
        keys, values = places.keys[layer].read(at).double(), places.values[layer].read(at).double()
        queries = turned_queries(ops, weights, qkv).double()
        for row in range(3):
            may = torch.arange(cache.slots + 1) >= places.first[row]
            if weights.window is not None:
                may &= places.position[row] - places.slot_positions[row, : cache.slots + 1] < weights.window
            for head in range(net.query_heads):
                of = head // net.group
                scores = keys[row, of] @ queries[row, head] * net.attention_scale
                share = scores.masked_fill(~may, float("-inf")).softmax(dim=0)
                torch.testing.assert_close(found[row, head], share @ values[row, of], atol=0.02, rtol=0.01)


def turned_queries(ops: PlainOps, weights: LayerWeights, qkv: torch.Tensor) -> torch.Tensor:
    """[rows, query_heads, head_dim] after norm and RoPE, by rotating pairs (i, i + half) as complex numbers."""
    net = ops.network
    heads = qkv.view(len(qkv), -1, net.head_dim)[:, : net.query_heads]
    if weights.query_norm is not None:
        heads = ops.norm(heads, weights.query_norm)
    cos, sin = ops.turns[weights.rope]
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], dim=-1).bfloat16()


def test_both_ways_to_hold_them_hold_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tmp_path)
    cache = prefill(model.backbone, random_prompts([9, 3, 14]))
    places = [filled(model, cache)]
    monkeypatch.setattr(places_room, "holds_bytes", lambda backbone: backbone.rounds_cache)
    places.append(filled(model, cache))
    at = (*ALL, slice(0, cache.slots))
    for layer in range(model.geometry.layers):
        for part in ("keys", "values"):
            one, two = (getattr(of, part)[layer] for of in places)
            assert one.scale is None and two.scale is not None
            assert torch.equal(one.read(at).float(), two.read(at))
            assert one.read(at).float().ne(getattr(cache, part)[layer].float()).any()


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_decoding_goes_on_from_rounded_numbers_and_all_else_stays_whole(tmp_path: Path, dtype: str) -> None:
    whole, model = (loaded(tmp_path, dtype=dtype, cache=cache) for cache in (None, "fp8"))
    prompts = random_prompts([3, 9, 20, 14])
    caches = [prefill(m.backbone, prompts) for m in (whole, model)]
    for one, two in zip((*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values), strict=True):
        assert torch.equal(one, two)
    forced = [[[5, 6, 7], [8]]] * 4
    scores = [score(m.backbone, cache, forced).logprobs for m, cache in zip((whole, model), caches, strict=True)]
    torch.testing.assert_close(*scores, atol=0, rtol=0, equal_nan=True)
    before = caches[1].checksums()
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "seeds": range(4), "keep_values": [1]}
    plain, found = (decode(m.backbone, cache, **settings) for m, cache in zip((whole, model), caches, strict=True))
    assert caches[1].checksums() == before
    off = (plain.logprobs[:, 0] - found.logprobs[:, 0]).abs()
    assert 0 < float(off.max()) < 1.0
    values = found.values[1]
    torch.testing.assert_close(values, fp8.as_held(values), atol=0, rtol=0.01)
    same = decode(model.backbone, caches[1], **settings)
    assert torch.equal(same.token_ids, found.token_ids) and torch.equal(same.logprobs, found.logprobs)


def test_the_model_s_own_pass_which_shows_logits_holds_the_same_numbers(tmp_path: Path) -> None:
    whole, model = (loaded(tmp_path, cache=cache) for cache in (None, "fp8"))
    cache = prefill(model.backbone, random_prompts([3, 9, 20, 14]))
    settings: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0.0, "seeds": range(4)}
    found = decode(model.backbone, cache, **settings).logprobs
    shown = decode(model.backbone, cache, on_logits=lambda step: None, **settings).logprobs
    unrounded = decode(whole.backbone, cache, on_logits=lambda step: None, **settings).logprobs
    assert float((found - shown).abs().max()) < 0.5 * float((found - unrounded).abs().max())


def test_a_slab_of_the_model_s_own_pass_is_rounded_as_it_is_and_as_it_grows(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    cache = prefill(model.backbone, random_prompts([3, 9]))
    slab = slab_of(model.backbone, cache, 2)
    round_held(model.backbone, slab)
    model.backbone.forward(cache.pending[:, None], cache.pending_position[:, None], slab)
    for layer in slab.slab_layers:
        for held, whole in ((layer.keys, cache.keys), (layer.values, cache.values)):
            assert torch.equal(held, fp8.as_held(held))
            assert held[:, :, cache.slots].any() and not held[:, :, cache.slots + 1].any()
            assert torch.equal(held[:, :, : cache.slots], fp8.as_held(whole[layer.layer]))
    with whole_activations():
        still = slab_of(model.backbone, cache, 2)
        round_held(model.backbone, still)
    assert torch.equal(still.slab_layers[0].keys[:, :, : cache.slots], cache.keys[0])


def test_check_looks_through_a_rounded_cache(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    cache = prefill(model.backbone, random_prompts([3, 9]))
    rounded = identities.next_logits(model, cache)
    with whole_activations():
        whole = identities.next_logits(model, cache)
    assert 0 < float((rounded - whole).abs().max() / whole.abs().max()) < 0.5


def test_steering_is_rounded_with_the_value_that_it_steers(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    cache = prefill(model.backbone, random_prompts([3, 9]))
    geometry = model.geometry
    steer = torch.full((2, geometry.kv_heads, geometry.head_dim), 3.0).bfloat16()
    settings: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.0, "seeds": range(2), "keep_values": [0]}
    found = decode(model.backbone, cache, edits={0: LayerEdit(steer=steer)}, **settings).values[0][:, :, :3]
    assert float(found.float().mean()) == pytest.approx(3.0, abs=0.5)
    torch.testing.assert_close(found, fp8.as_held(found), atol=0, rtol=0.01)


def test_a_row_does_not_depend_on_its_mates_numbers(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    prompts = random_prompts([3, 9, 20, 14])
    settings: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.8}
    found = decode(model.backbone, prefill(model.backbone, prompts), seeds=range(4), **settings)
    again = decode(model.backbone, prefill(model.backbone, prompts[::-1]), seeds=range(3, -1, -1), **settings)
    assert torch.equal(found.token_ids, again.token_ids.flip(0))


def test_places_take_the_memory_that_is_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_room, "holds_bytes", lambda backbone: backbone.rounds_cache)
    whole, model = (loaded(tmp_path, cache=cache) for cache in (None, "fp8"))
    assert bytes_per_slot(model.backbone) < bytes_per_slot(whole.backbone)
    places = make_places(model.backbone, 3, 8, 4, [])
    assert sum(s.nbytes for s in (*places.keys, *places.values)) == 3 * 13 * bytes_per_slot(model.backbone)
    planned = [bytes_per_place(m.backbone, 32, 4) for m in (whole, model)]
    assert planned[0] - planned[1] == 37 * (bytes_per_slot(whole.backbone) - bytes_per_slot(model.backbone))


@pytest.mark.usefixtures("held")
def test_within_whole_activations_nothing_is_rounded(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    assert model.backbone.rounds_cache
    with whole_activations():
        assert not model.backbone.rounds_cache
        slots = make_places(model.backbone, 1, 4, 1, []).values[0]
        assert slots.scale is None and not slots.is_rounded


def test_attention_that_drops_the_scales_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_room, "holds_bytes", lambda backbone: backbone.rounds_cache)
    model = loaded(tmp_path)
    network = fast_of(model.backbone).network

    class Dropping(PlainOps):
        def attend(self, layer: int, weights: LayerWeights, qkv: torch.Tensor, places: Places) -> torch.Tensor:
            held = places.values[layer]
            assert held.scale is not None
            held.scale.fill_(float(held.scale.mean()))
            return super().attend(layer, weights, qkv, places)

    @dataclasses.dataclass(frozen=True)
    class By(Fast):
        kind: type[PlainOps] = PlainOps

        def make_ops(self, backbone: Any, sampling: Sampling, positions: int) -> PlainOps:
            assert self.network is not None
            return self.kind(backbone, self.network, sampling, positions)

    right, wrong = (
        backend._difference_over_the_cache(model.backbone, By(network, "plain", "", kind=kind))
        for kind in (PlainOps, Dropping)
    )
    assert right == 0 and wrong > CACHE_NOISE


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_run_json_says_it_and_another_run_is_told_from_it(tmp_path: Path, dtype: str) -> None:
    whole, model = (model_record(loaded(tmp_path, dtype=dtype, cache=cache)) for cache in (None, "fp8"))
    assert model.dtype == {"bfloat16": "bfloat16, fp8 cache", "fp8": "bfloat16, fp8 weights, fp8 cache"}[dtype]
    assert whole.model_copy(update={"dtype": model.dtype}) == model


def test_a_run_does_not_go_on_with_another_cache_and_is_told_which_it_has(tmp_path: Path) -> None:
    whole, rounded = loaded(tmp_path, cache=None), loaded(tmp_path)
    assert repr(rounded) == repr(whole).replace("torch.bfloat16,", "torch.bfloat16, fp8 cache,")
    records = [record_of(dec7(), {}, model=model_record(model)) for model in (whole, rounded)]
    for stored, mine, told in [
        (*records, "bfloat16, and not bfloat16, fp8 cache"),
        (*records[::-1], "bfloat16, fp8 cache, and not bfloat16"),
    ]:
        with pytest.raises(kv.StoreError) as caught:
            mine.continued(stored)
        assert f"it has another model (dtype of {stored.model.name}: {told}); give another --out" in str(caught.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_check_holds_with_it_and_measures_what_it_moves_both_ways(
    tmp_path: Path, dtype: str, architecture: str
) -> None:
    found = {i.identity: i for i in check(loaded(tmp_path, architecture, dtype))}
    assert [(name, i.error, i.bound, i.note) for name, i in found.items() if i.holds is False] == []
    twofold = [i for i in found.values() if "left whole" in i.note and "in 8 bits" in i.note]
    assert len(twofold) >= len(identities._MOVED_BY_ROUNDING) - (architecture == "gemma3")


def test_check_sees_a_wrong_splice_through_a_cache_of_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = identities.rotate
    monkeypatch.setattr(identities, "rotate", lambda key, by, rope: turned(key, by + 5, rope))
    found = {i.identity: i for i in check(loaded(tmp_path))}
    assert found["moving all keys and the query changes nothing"].holds is False


@pytest.mark.parametrize(
    ("architecture", "settings", "told"),
    [
        ("gpt_neox", {"dtype": "bfloat16"}, "held by the engine's own decoding step, which this model does not take"),
        ("llama", {"dtype": "float32"}, "go with bfloat16, and the model is in float32"),
        ("llama", {}, "go with bfloat16, and the model is in float32"),
        ("llama", {"dtype": "bfloat16", "cache_dtype": "int8"}, "no cache_dtype 'int8'; it is fp8, or left out"),
        ("llama", {"dtype": "bfloat16", "cache_dtype": 8}, "no cache_dtype 8; it is fp8, or left out"),
    ],
)
def test_what_it_does_not_go_with_is_refused_in_one_line(
    tmp_path: Path, architecture: str, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(kv.ModelError, match=told) as caught:
        kv.load(saved(tmp_path, architecture), **{"cache_dtype": "fp8", "device": "cpu", **settings})
    assert "\n" not in str(caught.value)


def test_another_type_is_refused_before_anything_is_read() -> None:
    with pytest.raises(kv.ModelError, match="no cache_dtype 'int8'"):
        kv.load("no/such-model", cache_dtype="int8")


def test_a_model_in_memory_is_refused_with_what_would_do_for_it(tmp_path: Path) -> None:
    read = kv.load(saved(tmp_path), dtype="float32", device="cpu")
    with pytest.raises(kv.ModelError, match=r"in float32; move it with .to\(torch.bfloat16\) before$"):
        kv.load(model=read.hf, tokenizer=read.tokenizer, cache_dtype="fp8")
    again = kv.load(model=read.hf.to(torch.bfloat16), tokenizer=read.tokenizer, cache_dtype="fp8")
    assert again.backbone.rounds_cache


def test_an_older_gpu_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(kv.ModelError, match=r"compute capability 8.0.* leave cache_dtype out"):
        fp8.refuse_unfit(torch.device("cuda"), "fp8 caches", "leave cache_dtype out")


def test_a_model_that_leaves_the_engine_s_step_later_is_refused_when_it_decodes(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    cache = model.prefill(["How bread rises"])
    handle = model.hf.model.layers[0].register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(kv.ModelError, match="does not take: the model carries hooks"):
        model.generate(cache, max_new_tokens=2)
    handle.remove()
    assert model.generate(cache, max_new_tokens=2, temperature=0).token_ids.shape == (1, 2)


def test_the_command_line_takes_it_and_refuses_in_its_own_words(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from kvpatch.cli.app import with_flags
    from kvpatch.cli.main import app

    where = str(saved(tmp_path))
    given = ["check", where, "--dtype", "bfloat16", "--device", "cpu", "--json", "--cache-dtype"]
    out = CliRunner().invoke(app, [*given, "fp8"])
    assert out.exit_code == 0, out.output
    assert "with the cache left whole" in out.output
    out = CliRunner().invoke(app, [*given, "int8"])
    assert "no --cache-dtype 'int8'" in with_flags(str(out.exception))
    out = CliRunner().invoke(app, ["check", where, "--device", "cpu", "--cache-dtype", "fp8"])
    assert with_flags(str(out.exception)).endswith("in float32; give --dtype bfloat16 or --dtype fp8")
