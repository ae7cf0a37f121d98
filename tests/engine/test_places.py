"""The engine's own step and rows that take turns: the texts are those of the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

import kvpatch.engine.backend as fast_room
import kvpatch.engine.batching as room
from kvpatch.engine.backend import Fast, fast_of
from kvpatch.engine.decode import Continuations, decode
from kvpatch.engine.model import Model
from kvpatch.engine.prefill import prefill
from kvpatch.models.hf import LayerEdit
from kvpatch.models.kept import Kept
from kvpatch.models.llamalike import Network
from kvpatch.models.load import Loaded
from tiny import WINDOW, random_prompts, tiny_hf

pytestmark = pytest.mark.model

LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
LENGTHS = [WINDOW + 8, 3, 1, 30, 9, 2, 17]
OTHERS = ("gemma2", "gpt_neox", "phi3", "cohere", "gpt2")


def fresh(architecture: str) -> Model:
    """A model of its own, whose weights may be changed."""
    return Model(Loaded(tiny_hf(architecture), None, architecture, None, False))


@pytest.fixture
def by_the_model(tiny) -> Iterator:
    """`by_the_model(name)`: a tiny model that decodes by its own forward pass while the test runs."""
    switched = []

    def switch(architecture: str) -> Model:
        model = tiny(architecture)
        switched.append((model.backbone, model.backbone.kept.backend))
        model.backbone.kept.backend = Fast(None, "model", "")
        return model

    yield switch
    for backbone, known in switched:
        backbone.kept.backend = known


def run(model: Model, count: int = 20, **settings) -> Continuations:
    cache = prefill(model.backbone, random_prompts(LENGTHS))
    settings = {"temperature": 0.8, "seeds": range(len(LENGTHS)), "keep_values": [1]} | settings
    return decode(model.backbone, cache, max_new_tokens=count, **settings)


def assert_same(found: Continuations, expected: Continuations) -> None:
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.allclose(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.allclose(found.values[1], expected.values[1], rtol=1e-4, atol=1e-4)
    assert found.stopped == expected.stopped


@pytest.mark.parametrize("architecture", LIKE_LLAMA)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_are_those_of_the_forward_pass_in_any_number_of_places(architecture, temperature, by_the_model):
    model = by_the_model(architecture)
    free = run(model, temperature=temperature)
    ends = [int(free.token_ids[0, 4]), int(free.token_ids[3, 9]), int(free.token_ids[5, 2])]
    expected = run(model, temperature=temperature, end_tokens=ends)
    assert 2 < min(expected.lengths) + 2 < max(expected.lengths)
    model.backbone.kept.backend = None
    assert fast_of(model.backbone).network is not None
    for places in (None, 7, 3, 1):
        assert_same(run(model, temperature=temperature, end_tokens=ends, places=places), expected)


def test_a_nucleus_is_cut_alike(by_the_model):
    model = by_the_model("llama")
    expected = run(model, top_p=0.7)
    model.backbone.kept.backend = None
    assert_same(run(model, top_p=0.7, places=3), expected)


@pytest.mark.parametrize("architecture", LIKE_LLAMA)
def test_the_step_equals_the_model_s_own_forward_pass(architecture, tiny):
    fast = fast_of(tiny(architecture).backbone)
    assert fast.ops == "plain"
    assert fast.error < 1e-5


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_models_decode_by_their_own_forward_pass_and_the_reason_is_told(architecture, tiny):
    fast = fast_of(tiny(architecture).backbone)
    assert fast.network is None
    assert fast.note == f"{tiny(architecture).backbone.config.model_type} models take the general decoding step"


def test_joined_weights_are_the_model_s_own():
    model = fresh("llama")
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    network = fast_of(model.backbone).network
    assert network is not None
    after = model.hf.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    attention = model.hf.model.layers[2].self_attn
    attention.k_proj.weight.data[3] = 7.0
    rows = attention.q_proj.weight.shape[0]
    assert bool((network.layers[2].qkv[rows + 3] == 7.0).all())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_weights_that_are_changed_or_exchanged_are_seen(architecture):
    model = fresh(architecture)
    run(model)
    layer = model.hf.model.layers[1]
    with torch.no_grad():
        layer.self_attn.v_proj.weight.mul_(1.5)
        layer.input_layernorm.weight.add_(0.5)
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight * 0.5, requires_grad=False)
    found = run(model)
    model.backbone.kept.backend = Fast(None, "model", "")
    assert_same(found, run(model))


def test_hooks_that_transformers_leaves_behind_are_nobody_s():
    model = fresh("llama")
    model.hf(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.hf.modules())
    assert fast_of(model.backbone).network is not None


def test_a_model_with_hooks_decodes_by_its_own_forward_pass():
    model = fresh("llama")
    plain = run(model)
    seen: list[int] = []
    handle = model.hf.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(1))
    hooked = run(model)
    assert len(seen) >= max(hooked.lengths)
    handle.remove()
    seen.clear()
    assert_same(run(model), plain)
    assert_same(hooked, plain)
    assert seen == []


def _with_layer(index: int, **changes) -> Callable[[Network], Network]:
    def changed(network: Network) -> Network:
        layers = list(network.layers)
        layers[index] = replace(layers[index], **{k: change(layers[index]) for k, change in changes.items()})
        return replace(network, layers=tuple(layers))

    return changed


def _noise(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float32).to(like) * 0.15


DEFECTS = {
    "epsilon": lambda n: replace(n, epsilon=1e-3),
    "activation": lambda n: replace(n, activation="gelu_tanh"),
    "attention scale": lambda n: replace(n, attention_scale=n.attention_scale * 1.01),
    "frequencies": lambda n: replace(n, frequencies=tuple(tuple(f * 1.01 for f in fs) for fs in n.frequencies)),
    "one window dropped": _with_layer(2, window=lambda layer: None),
    "one window too long": _with_layer(2, window=lambda layer: layer.window + 1),
    "one window too short": _with_layer(2, window=lambda layer: layer.window - 1),
    "two layers swapped": lambda n: replace(n, layers=(*n.layers[:2], n.layers[3], n.layers[2])),
    "one layer left out": lambda n: replace(n, layers=n.layers[:-1]),
    "final norm": lambda n: replace(n, norm=n.norm * 1.01 + _noise(n.norm)),
    **{f"down projection of layer {i}": _with_layer(i, down=lambda layer: _noise(layer.down)) for i in range(4)},
    **{f"output projection of layer {i}": _with_layer(i, out=lambda layer: _noise(layer.out)) for i in range(4)},
    "one column of a down projection": _with_layer(
        1, down=lambda layer: layer.down + 0.1 * (torch.arange(layer.down.shape[1]) == 3).to(layer.down)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_network_that_differs_from_the_model_is_not_used(defect: str, dtype, monkeypatch: pytest.MonkeyPatch):
    if dtype != torch.float32 and defect in ("epsilon", "attention scale", "one column of a down projection"):
        pytest.skip("smaller than the bound that this type's rounding asks for")
    model = Model(Loaded(tiny_hf("mistral").to(dtype), None, "mistral", None, False))
    assert fast_of(model.backbone).network is not None
    model.backbone.kept = Kept()
    made = fast_room.network_of
    monkeypatch.setattr(fast_room, "network_of", lambda backbone: DEFECTS[defect](made(backbone)))
    fast = fast_of(model.backbone)
    assert fast.network is None
    assert fast.note.startswith("plain: logits differ from the model's own by")


def test_steering_goes_with_the_row(by_the_model):
    model = by_the_model("llama")
    steps = torch.zeros(len(LENGTHS), 2, 16)
    steps[1], steps[4] = 3.0, -2.0
    edits = {2: LayerEdit(steer=steps)}
    expected, plain = run(model, edits=edits), run(model)
    assert edits[2].fired == 20
    model.backbone.kept.backend = None
    for places in (None, 2):
        edits = {2: LayerEdit(steer=steps)}
        assert_same(run(model, edits=edits, places=places), expected)
        assert edits[2].fired == 20
    changed = (expected.token_ids != plain.token_ids).any(dim=1).tolist()
    assert changed == [row in (1, 4) for row in range(len(LENGTHS))]


def test_where_memory_runs_out_half_the_rows_go_on_with_the_same_texts(tiny, monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama")
    expected, tried = run(model), []
    made = room._runner

    def scarce(backbone, fast, cache, request, count, **settings):
        tried.append(count)
        if count > 2:
            raise torch.OutOfMemoryError("on purpose")
        return made(backbone, fast, cache, request, count, **settings)

    monkeypatch.setattr(room, "_runner", scarce)
    monkeypatch.setattr(model.backbone, "kept", replace(model.backbone.kept))
    assert_same(run(model), expected)
    assert tried == [7, 4, 2]
    run(model)
    assert tried[3:] == [2]


def test_places_of_finished_rows_are_given_up(tiny, monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama")
    free = run(model)
    ends = [int(free.token_ids[row, 3]) for row in range(4)]
    sizes: list[int] = []
    step = room.decode_step
    monkeypatch.setattr(room, "decode_step", lambda b, n, o, places: (sizes.append(len(places)), step(b, n, o, places)))
    out = run(model, end_tokens=ends)
    assert sizes[0] == len(LENGTHS)
    assert sizes[-1] <= sum(length == max(out.lengths) for length in out.lengths) / room.GIVE_UP_AT


def test_planned_places_on_a_cpu_are_all_rows(tiny):
    assert room.planned_places(tiny("llama").backbone, 40, 20, 500) == 500
