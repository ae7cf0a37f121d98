"""Whatever is changed in a model between two calls, decoding and scores are those of the model as it then is."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import kvpatch.engine.backend as fast_room
import kvpatch.models.backbone as backbone_room
from kvpatch.engine.backend import Fast, fast_of
from kvpatch.engine.decode import Continuations, decode
from kvpatch.engine.model import Model
from kvpatch.engine.prefill import prefill
from kvpatch.engine.score import score
from kvpatch.errors import CacheError, ModelError
from kvpatch.models.hf import LayerEdit
from kvpatch.models.load import Loaded
from kvpatch.models.probe import native_greedy, native_logits
from tiny import LAYERS, random_prompts, tiny_hf

pytestmark = pytest.mark.model

LENGTHS = [12, 3, 9]
COUNT = 6
ROWS = range(len(LENGTHS))


def fresh(architecture: str = "llama") -> Model:
    """A model of its own, which may be changed."""
    return Model(Loaded(tiny_hf(architecture), None, architecture, None, False))


def run(model: Model, **settings: Any) -> Continuations:
    cache = prefill(model.backbone, random_prompts(LENGTHS))
    return decode(model.backbone, cache, max_new_tokens=COUNT, **({"temperature": 0.0, "seeds": list(ROWS)} | settings))


def by_the_model(model: Model, **settings: Any) -> Continuations:
    """The same by the model's own forward pass."""
    held = model.backbone.kept.backend
    model.backbone.kept.backend = Fast(None, "model", "")
    found = run(model, **settings)
    model.backbone.kept.backend = held
    return found


def steering(model: Model) -> dict[int, LayerEdit]:
    steps = torch.zeros(len(LENGTHS), model.geometry.kv_heads, model.geometry.head_dim)
    steps[1] = 2.0
    return {1: LayerEdit(steer=steps)}


def assert_transformers_own(model: Model) -> None:
    """Greedy texts of all rows and their scores are transformers', sampled and steered texts the forward pass's."""
    prompts = [list(p.token_ids) for p in random_prompts(LENGTHS)]
    greedy = run(model)
    expected = greedy.token_ids.tolist()
    cache = prefill(model.backbone, random_prompts(LENGTHS))
    scores = score(model.backbone, cache, [[new] for new in expected]).logprobs[:, 0]
    for row, (ids, new) in enumerate(zip(prompts, expected, strict=True)):
        logits = native_logits(model.hf, torch.tensor([ids + new]))[0, len(ids) - 1 : -1]
        # One pass over the whole text tells every greedy token, since each looks back alone.
        assert logits.argmax(-1).tolist() == new
        own = logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0]
        assert torch.allclose(scores[row], own, atol=1e-3)
        assert torch.allclose(greedy.logprobs[row], own, atol=1e-3)
    for settings in ({"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.7, "places": 2}):
        assert torch.equal(run(model, **settings).token_ids, by_the_model(model, **settings).token_ids)
    found, general = run(model, edits=steering(model)), by_the_model(model, edits=steering(model))
    assert torch.equal(found.token_ids, general.token_ids)


def noise(like: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(like.shape, generator=generator).to(like)


class Wrapped(nn.Module):
    """A block as a library of control vectors wraps it."""

    def __init__(self, block: nn.Module, size: float = 3.0) -> None:
        super().__init__()
        self.block = block
        self.held = {"size": size}  # where no look at numbers finds it

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.block(*args, **kwargs)
        return out + self.held["size"] * noise(out[0, 0])


class Lora(nn.Module):
    """A projection with something added, as an adapter library wraps it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.delta = base, nn.Parameter(noise(base.weight), requires_grad=False)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.delta.T


class BareLora(nn.Module):
    """The same, with no weight to be seen."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.delta = base, noise(base.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.delta.T


def _blocks(hf: Any) -> list[Any]:
    return list(hf.model.layers)


def _data(hf: Any, path: str) -> None:
    for block in _blocks(hf):
        weight = block.get_submodule(path).weight
        weight.data = noise(weight)


def _parameter(hf: Any, path: str) -> None:
    for block in _blocks(hf):
        module = block.get_submodule(path)
        module.weight = nn.Parameter(noise(module.weight), requires_grad=False)


def _replace(hf: Any, path: str, make: Callable[[Any], nn.Module]) -> None:
    for block in _blocks(hf):
        block.set_submodule(path, make(block.get_submodule(path)))


def _embedding(hf: Any) -> None:
    hf.model.embed_tokens.weight.data = noise(hf.model.embed_tokens.weight)


def _head_data(hf: Any) -> None:
    hf.lm_head.weight.data = noise(hf.lm_head.weight)


def _head_replaced(hf: Any) -> None:
    hf.lm_head = nn.Linear(48, hf.config.vocab_size, bias=True).requires_grad_(False)
    hf.lm_head.weight.data, hf.lm_head.bias.data = noise(hf.lm_head.weight), noise(hf.lm_head.bias, 2)


def _head_wrapped(hf: Any) -> None:
    hf.lm_head = Lora(hf.lm_head)


def _head_forward(hf: Any) -> None:
    own = hf.lm_head.forward
    hf.lm_head.forward = lambda x: own(x).flip(-1)


def _tied(hf: Any) -> None:
    hf.lm_head.weight = hf.model.embed_tokens.weight


def _blocks_wrapped(hf: Any) -> None:
    for i, block in enumerate(_blocks(hf)):
        hf.model.layers[i] = Wrapped(block)


def _list_replaced(hf: Any) -> None:
    layers = copy.deepcopy(hf.model.layers)  # their configuration is copied too
    for i, block in enumerate(layers):
        block.mlp.down_proj.weight.data = noise(block.mlp.down_proj.weight, i)
    hf.model.layers = layers


def _block_copied(hf: Any) -> None:
    block = copy.deepcopy(hf.model.layers[0])
    block.self_attn.layer_idx = 2
    hf.model.layers[2] = block


def _blocks_swapped(hf: Any) -> None:
    hf.model.layers[1], hf.model.layers[2] = hf.model.layers[2], hf.model.layers[1]


def _layers_removed(hf: Any) -> None:
    hf.model.layers = hf.model.layers[:2]
    hf.config.num_hidden_layers = 2


def _attention_wrapped(hf: Any) -> None:
    class Attention(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, *rest = self.inner(*args, **kwargs)
            return 0.5 * out, *rest

    for block in _blocks(hf):
        block.self_attn = Attention(block.self_attn)


def _decoder_wrapped(hf: Any) -> None:
    class Decoder(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = self.inner(*args, **kwargs)
            out["last_hidden_state"] = out.last_hidden_state.flip(-1)
            return out

    hf.model = Decoder(hf.model)


def _weight_norm(hf: Any) -> None:
    projection = hf.model.layers[1].mlp.down_proj
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(projection)  # hooks set the weight
    projection.weight_g.data *= 3


def _vocabulary_grown(hf: Any) -> None:
    hf.resize_token_embeddings(hf.config.vocab_size + 6, mean_resizing=False)
    hf.lm_head.weight.data[-6:] = 3.0


def _forward_on_the_instance(hf: Any) -> None:
    for block in _blocks(hf):
        block.mlp.forward = lambda x: torch.zeros_like(x)


def _bound_forward(hf: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x))

    hf.model.layers[1].mlp.forward = types.MethodType(forward, hf.model.layers[1].mlp)


def _compiled_call(hf: Any) -> None:
    hf.model.layers[1].mlp._compiled_call_impl = lambda x: torch.zeros_like(x)


def _in_place(hf: Any) -> None:
    with torch.no_grad():
        for block in _blocks(hf):
            block.mlp.down_proj.weight.mul_(-1.5)
            block.self_attn.q_proj.weight.data.mul_(1.5)
            block.self_attn.o_proj.weight.data.copy_(noise(block.self_attn.o_proj.weight))
            block.input_layernorm.weight.data.add_(0.5)
            block.post_attention_layernorm.weight.numpy()[:] *= 0.5
        hf.lm_head.weight.add_(noise(hf.lm_head.weight))
        hf.model.embed_tokens.weight.data[:, 3] = 2.0
        hf.model.norm.weight.detach()[5] = -3.0


def _state_dict(hf: Any, *, assign: bool) -> None:
    hf.load_state_dict({k: noise(v) + (v.ndim == 1) for k, v in hf.state_dict().items()}, assign=assign)


def _norm_replaced(hf: Any) -> None:
    own = copy.deepcopy(hf.model.norm)
    own.weight.data = noise(own.weight)
    hf.model.norm = own


def _norm_of_another_kind(hf: Any) -> None:
    hf.model.norm = nn.LayerNorm(48).requires_grad_(False)


def _epsilon(hf: Any) -> None:
    hf.model.layers[1].input_layernorm.variance_epsilon = 0.3


def _scaling(hf: Any) -> None:
    for block in _blocks(hf):
        block.self_attn.scaling *= 1.7


def _one_scaling(hf: Any) -> None:
    hf.model.layers[3].self_attn.scaling *= 3


def _activation(hf: Any) -> None:
    for block in _blocks(hf):
        block.mlp.act_fn = nn.Tanh()


def _frequencies(hf: Any) -> None:
    hf.model.rotary_emb.inv_freq.data.mul_(0.3)


def _frequencies_replaced(hf: Any) -> None:
    hf.model.rotary_emb.inv_freq = hf.model.rotary_emb.inv_freq * 0.3


def _rotary_replaced(hf: Any) -> None:
    config = copy.deepcopy(hf.config)
    config.rope_parameters["rope_theta"] = 50.0
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config)


def _rotary_scaling(hf: Any) -> None:
    hf.model.rotary_emb.attention_scaling = 0.4


def _projection_replaced(hf: Any) -> None:
    _replace(hf, "mlp.down_proj", lambda old: _linear(noise(old.weight)))


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    made.weight.data = weight
    return made


def _with_bias(hf: Any) -> None:
    for block in _blocks(hf):
        block.mlp.up_proj.bias = nn.Parameter(noise(block.mlp.up_proj.weight[:, 0]), requires_grad=False)


def _parametrized(hf: Any) -> None:
    parametrizations.weight_norm(hf.model.layers[1].mlp.gate_proj)
    hf.model.layers[1].mlp.gate_proj.parametrizations.weight.original0.data *= 2


def _shared_weights(hf: Any) -> None:
    for block in _blocks(hf)[1:]:
        block.self_attn.q_proj.weight = hf.model.layers[0].self_attn.q_proj.weight


def _transposed(hf: Any) -> None:
    hf.model.layers[1].self_attn.q_proj.weight.data = noise(torch.empty(48, 64)).T


def _weights_of_half_the_type(hf: Any) -> None:
    hf.to(torch.float64)


def _hooks(where: str, result: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(hf: Any) -> None:
        hf.get_submodule(where).register_forward_hook(lambda module, args, out: result(out))

    return change


def _head_pre_hook(hf: Any) -> None:
    hf.lm_head.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))


CHANGES: dict[str, Callable[[Any], None]] = {
    "o_proj.data": lambda hf: _data(hf, "self_attn.o_proj"),
    "down_proj.data": lambda hf: _data(hf, "mlp.down_proj"),
    "q_proj.data": lambda hf: _data(hf, "self_attn.q_proj"),
    "norm.data": lambda hf: _data(hf, "input_layernorm"),
    "o_proj parameter": lambda hf: _parameter(hf, "self_attn.o_proj"),
    "down_proj parameter": lambda hf: _parameter(hf, "mlp.down_proj"),
    "norm parameter": lambda hf: _parameter(hf, "post_attention_layernorm"),
    "embedding": _embedding,
    "head.data": _head_data,
    "head replaced": _head_replaced,
    "head wrapped": _head_wrapped,
    "head's forward": _head_forward,
    "head tied": _tied,
    "blocks wrapped": _blocks_wrapped,
    "list of layers replaced": _list_replaced,
    "block copied": _block_copied,
    "blocks swapped": _blocks_swapped,
    "layers removed": _layers_removed,
    "attention wrapped": _attention_wrapped,
    "decoder wrapped": _decoder_wrapped,
    "weight norm": _weight_norm,
    "vocabulary grown": _vocabulary_grown,
    "no MLP in a layer": lambda hf: hf.model.layers[1].set_submodule("mlp", nn.Identity()),
    "forward on the instance": _forward_on_the_instance,
    "bound forward": _bound_forward,
    "compiled call": _compiled_call,
    "adapters": lambda hf: [_replace(hf, path, Lora) for path in ("self_attn.v_proj", "mlp.down_proj")],
    "adapters without weights": lambda hf: [
        _replace(hf, path, BareLora) for path in ("self_attn.q_proj", "mlp.up_proj")
    ],
    "in place": _in_place,
    "state loaded": lambda hf: _state_dict(hf, assign=False),
    "state assigned": lambda hf: _state_dict(hf, assign=True),
    "norm replaced": _norm_replaced,
    "norm of another kind": _norm_of_another_kind,
    "epsilon": _epsilon,
    "scaling": _scaling,
    "scaling of one layer": _one_scaling,
    "activation": _activation,
    "frequencies in place": _frequencies,
    "frequencies replaced": _frequencies_replaced,
    "rotary embedding replaced": _rotary_replaced,
    "rotary scaling": _rotary_scaling,
    "projection replaced": _projection_replaced,
    "bias added": _with_bias,
    "parametrised": _parametrized,
    "weights shared by layers": _shared_weights,
    "transposed weight": _transposed,
    "another type": _weights_of_half_the_type,
    "hook on the head": _hooks("lm_head", lambda out: out.flip(-1)),
    "hook before the head": _head_pre_hook,
    "hook on the embedding": _hooks("model.embed_tokens", lambda out: 2 * out.flip(-1)),
    "hook on a norm": _hooks("model.layers.1.input_layernorm", lambda out: out.flip(-1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_first_call_is_seen(change: str):
    torch.manual_seed(0)
    model = fresh()
    before = run(model).token_ids
    assert fast_of(model.backbone).network is not None
    CHANGES[change](model.hf)
    assert_transformers_own(model)
    assert not torch.equal(run(model).token_ids, before) or change == "another type"


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_neox", "phi3", "gpt2"])
def test_other_models_follow_too(architecture: str):
    model = fresh(architecture)
    run(model)
    for block in model.backbone.blocks:
        weight = next(p for name, p in block.named_parameters() if "mlp" in name and p.ndim == 2)
        weight.data = noise(weight)
    assert_transformers_own(model)
    head: Any = model.hf.get_output_embeddings()
    head.weight = nn.Parameter(noise(head.weight, 4), requires_grad=False)
    assert_transformers_own(model)


def test_small_weights_that_are_held_twice_follow_in_place():
    model = fresh("qwen2")
    run(model)
    with torch.no_grad():
        for block in _blocks(model.hf):
            block.self_attn.k_proj.bias.add_(1.0)
            block.self_attn.q_proj.bias.data = noise(block.self_attn.q_proj.bias)
    assert_transformers_own(model)


@pytest.mark.parametrize("name", ["scalar_embed_scale", "embed_scale"])
def test_the_scale_of_embeddings_follows(name: str):
    model = fresh("gemma3")
    run(model)
    embedding = model.hf.model.embed_tokens
    if name == "embed_scale":
        embedding.embed_scale.data.mul_(0.2)
    else:
        embedding.scalar_embed_scale = 1.0
    assert_transformers_own(model)


def test_windows_follow_the_modules():
    model = fresh("mistral")
    run(model)
    for block in _blocks(model.hf):
        block.self_attn.sliding_window = 5
    model.hf.config.sliding_window = 5
    assert_transformers_own(model)
    assert model.geometry.windows == (5,) * LAYERS


def test_the_cap_of_logits_follows_the_configuration():
    model = fresh("gemma2")
    run(model)
    model.hf.config.final_logit_softcapping = 1.0
    assert_transformers_own(model)


def test_a_change_of_a_class_is_seen_and_taken_back():
    model = fresh()
    before = run(model)
    kind = type(model.hf.model.layers[0].mlp)
    own = kind.forward
    try:
        kind.forward = lambda self, x: self.down_proj(self.up_proj(x))
        assert_transformers_own(model)
        assert fast_of(model.backbone).note.endswith("has functions that were replaced")
    finally:
        kind.forward = own
    assert torch.equal(run(model).token_ids, before.token_ids)
    assert fast_of(model.backbone).network is not None


def test_a_replaced_function_of_the_modelling_file_is_seen(monkeypatch: pytest.MonkeyPatch):
    import transformers.models.llama.modeling_llama as home

    model = fresh()
    before, own = run(model), home.rotate_half
    monkeypatch.setattr(home, "rotate_half", lambda x: own(x))
    assert torch.equal(run(model).token_ids, before.token_ids)
    assert fast_of(model.backbone).note.endswith("rotate_half was replaced")
    monkeypatch.setattr(home, "rotate_half", lambda x: -x.flip(-1))
    assert_transformers_own(model)
    assert {rope.layout for rope in model.geometry.rope} == {"fixed"}  # no key of it can be moved


def test_weights_that_are_swapped_for_a_while_are_seen_for_that_while():
    model = fresh()
    before = run(model)
    others = {name: noise(p) for name, p in model.hf.named_parameters() if p.ndim == 2}
    with torch.nn.utils.stateless._reparametrize_module(model.hf, others):
        assert_transformers_own(model)
    assert torch.equal(run(model).token_ids, before.token_ids)


def test_a_wrapper_that_changes_by_itself_is_never_stood_in_for():
    model = fresh()
    for i, block in enumerate(_blocks(model.hf)):
        model.hf.model.layers[i] = Wrapped(block, size=0.0)
    run(model)
    for block in _blocks(model.hf):
        block.held["size"] = 4.0
    assert_transformers_own(model)


def test_a_changed_model_may_be_changed_again_and_back():
    model = fresh()
    before = run(model)
    held = [block.mlp.down_proj.weight for block in _blocks(model.hf)]
    own = [w.data.clone() for w in held]
    for seed in (1, 2):
        for weight in held:
            weight.data = noise(weight, seed)
        assert_transformers_own(model)
    for weight, old in zip(held, own, strict=True):
        weight.data = old
    assert torch.equal(run(model).token_ids, before.token_ids)


def test_global_hooks_are_seen():
    model = fresh()
    run(model)
    head = model.hf.lm_head
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out.flip(-1) if module is head else None
    )
    try:
        assert_transformers_own(model)
    finally:
        handle.remove()
    assert fast_of(model.backbone).network is not None


@pytest.mark.parametrize("how", ["hook", "forward", "class"])
def test_what_is_put_on_the_whole_model_is_refused_where_it_changes_logits(how: str, monkeypatch: pytest.MonkeyPatch):
    model = fresh()
    cache = prefill(model.backbone, random_prompts(LENGTHS))
    own = model.hf.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out["logits"] = out.logits.flip(-1)
        return out

    if how == "hook":
        model.hf.register_forward_hook(lambda module, args, out: type(out)(logits=out.logits.flip(-1)))
    elif how == "forward":
        model.hf.forward = forward
    else:
        monkeypatch.setattr(type(model.hf), "forward", lambda self, *args, **kwargs: forward(*args, **kwargs))
    for _ in range(2):
        with pytest.raises(ModelError, match=r"the model's own logits|gives other logits than its decoder"):
            prefill(model.backbone, random_prompts(LENGTHS))
        with pytest.raises(ModelError, match=r"the model's own logits|gives other logits than its decoder"):
            decode(model.backbone, cache, max_new_tokens=2, temperature=0, seeds=ROWS)


def test_what_is_put_on_the_whole_model_and_changes_nothing_is_let_be():
    model = fresh()
    before = run(model)
    own = model.hf.forward
    model.hf.forward = lambda *args, **kwargs: own(*args, **kwargs)
    model.hf.register_forward_hook(lambda module, args, out: None)
    assert torch.equal(run(model).token_ids, before.token_ids)


def test_a_model_that_cannot_be_patched_any_more_is_refused_until_the_change_is_taken_back():
    class Passing(nn.Module):
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden

    model = fresh()
    before, geometry = run(model), model.geometry
    block = model.hf.model.layers[1]
    model.hf.model.layers[1] = Passing()
    for _ in range(2):
        with pytest.raises(ModelError, match="keeps no key-value cache of its own in layer 1"):
            run(model)
    model.hf.model.layers[1] = block
    assert torch.equal(run(model).token_ids, before.token_ids)
    assert model.geometry == geometry


def test_a_layer_too_few_is_refused_in_a_sentence():
    model = fresh()
    run(model)
    del model.hf.model.layers[1]
    with pytest.raises(ModelError, match="has no list of 4 layers"):
        run(model)
    model.hf.config.num_hidden_layers = 3
    with pytest.raises(ModelError, match="layer 2 of 3 has layer_idx 3"):
        run(model)
    for number, block in enumerate(_blocks(model.hf)):
        block.self_attn.layer_idx = number
    assert_transformers_own(model)
    assert model.geometry.layers == 3


def test_another_transformers_model_cannot_be_put_in_silently():
    model = fresh()
    with pytest.raises(AttributeError):
        model.hf = tiny_hf("llama")  # pyright: ignore[reportAttributeAccessIssue]


def test_a_cache_of_more_layers_is_refused_once_layers_are_removed():
    model = fresh()
    cache = prefill(model.backbone, random_prompts(LENGTHS))
    _layers_removed(model.hf)
    with pytest.raises(CacheError):
        decode(model.backbone, cache, max_new_tokens=2, temperature=0, seeds=ROWS)


def test_training_mode_is_refused_with_dropout_alone():
    model = fresh()
    before = run(model)
    model.hf.train()
    assert torch.equal(run(model).token_ids, before.token_ids)
    model.hf.model.layers[2].self_attn.attention_dropout = 0.1
    with pytest.raises(ModelError, match=r"training mode.*layers\.2\.self_attn\.attention_dropout = 0\.1.*eval"):
        run(model)
    model.hf.eval()
    assert torch.equal(run(model).token_ids, before.token_ids)


def test_hooks_are_not_called_while_the_model_is_looked_at():
    model = fresh()
    run(model)
    calls: list[int] = []
    model.hf.model.layers[0].register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
    model.hf.model.layers[1].mlp.act_fn = nn.SiLU()
    cache = prefill(model.backbone, random_prompts([9]))
    assert calls == [8]
    decode(model.backbone, cache, max_new_tokens=3, temperature=0, seeds=[0])
    assert calls == [8, 1, 1, 1]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gemma2", "gpt2", "phi3"])
def test_an_unchanged_model_is_looked_at_once(architecture: str, monkeypatch: pytest.MonkeyPatch):
    model = fresh(architecture)
    looks: list[str] = []
    for room, name in ((fast_room, "_find"), (backbone_room, "geometry_of")):
        own = getattr(room, name)
        monkeypatch.setattr(room, name, lambda backbone, own=own, name=name: (looks.append(name), own(backbone))[1])
    for _ in range(3):
        run(model)
        run(model, temperature=0.8, edits=steering(model))
        cache = prefill(model.backbone, random_prompts(LENGTHS))
        score(model.backbone, cache, [[[5, 6]]] * len(LENGTHS))
        native_greedy(model.hf, [5, 6, 7], 3)
        ids = torch.tensor([[5, 6, 7]])
        model.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        model.hf(ids, output_hidden_states=True)
        with torch.no_grad():
            for parameter in model.hf.parameters():
                parameter.mul_(1.01)
    assert looks == ["_find"]
    model.backbone.blocks[1].added = 1.0
    run(model)
    run(model)
    assert looks == ["_find", "geometry_of", "_find"]


def test_a_hook_that_comes_and_goes_costs_no_new_look(monkeypatch: pytest.MonkeyPatch):
    model = fresh()
    run(model)
    monkeypatch.setattr(fast_room, "_find", lambda backbone: pytest.fail("looked anew"))
    handle = model.hf.model.layers[0].register_forward_hook(lambda module, args, out: None)
    assert fast_of(model.backbone).note == "the model carries hooks"
    run(model)
    handle.remove()
    assert fast_of(model.backbone).network is not None
