"""The weights of a Llama-like model, laid out for the engine's own decoding step.

Llama, Mistral, Qwen 2 and 3 and Gemma 3 differ in few places: norms of queries and keys, norms behind attention and
MLP, the activation, windows. `network_of` reads those off the model, and joins the projections that read the same
input: one matrix for queries, keys and values, one for gate and up. The model's own weights become views of the joined
ones, so that nothing is held twice and both ways of running the model use the same numbers.

What a model is taken for here is never trusted: the engine compares a step with the model's own forward pass before it
uses it (`engine.fast`), and takes the model's own forward pass where the two differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kvpatch.models.backbone import Backbone
from kvpatch.models.changes import what_runs_other_code
from kvpatch.models.fp8 import FP8, Fp8Linear, ScaledWeight, Weight

LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""Values of `config.model_type` that are taken for Llama-like."""
_Linear = nn.Linear | Fp8Linear
_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Norm weights are float32, what Gemma adds to them included; the rest is the model's own type, or
    matrices of 8 floating bits."""

    before_attention: Tensor  # [width]
    qkv: Weight  # [(query_heads + 2 kv_heads) * head_dim, width]
    qkv_bias: Tensor | None
    query_norm: Tensor | None  # [head_dim]
    key_norm: Tensor | None
    out: Weight  # [width, query_heads * head_dim]
    after_attention: Tensor | None  # [width]; Gemma's norm of what attention adds
    before_mlp: Tensor  # [width]
    gate_up: Weight  # [2 * inner, width]
    down: Weight  # [width, inner]
    after_mlp: Tensor | None
    window: int | None
    rope: int  # index into `Network.frequencies`


@dataclass(frozen=True)
class Network:
    """A Llama-like model.

    Attributes:
        embedding: [vocabulary, width]; `embedding_scale` multiplies what is read from it, None for 1.
        frequencies: distinct sets of rotary frequencies, radians per position, [head_dim / 2] each.
        rope_scale: factor of cosines and sines (YaRN's; 1 elsewhere).
        attention_scale: factor of the products of queries and keys.
        joined: the modules whose weights are views of joined ones, with the joined weight.
        copies: weights held beside the model's, each with the module it is of, the name there and what is added.
    """

    embedding: Tensor
    embedding_scale: Tensor | None
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    epsilon: float
    activation: str
    query_heads: int
    kv_heads: int
    head_dim: int
    attention_scale: float
    frequencies: tuple[tuple[float, ...], ...]
    rope_scale: float
    joined: tuple[tuple[tuple[_Linear, ...], Tensor], ...]
    copies: tuple[tuple[Tensor, nn.Module, str, float], ...]

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query_heads // self.kv_heads

    @property
    def entered(self) -> list[tuple[Tensor, Weight]]:
        """For every layer the norm that its input passes, and the matrix that multiplies it next."""
        return [(layer.before_attention, layer.qkv) for layer in self.layers]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what was changed in the small weights that are held twice: norms and biases."""
        for copy, module, name, added in self.copies:
            copy.copy_(getattr(module, name).data.float() + added)

    def shares_weights(self) -> bool:
        """Whether every joined weight is still the model's own: not where two layers share a projection, which can lie
        in one place only."""
        for modules, whole in self.joined:
            at = whole.data_ptr()
            for module in modules:
                if module.weight.data_ptr() != at:
                    return False
                at += module.weight.numel() * module.weight.element_size()
        return True


@torch.no_grad()
def network_of(backbone: Backbone) -> Network | str:
    """The network of a model, or why it is not Llama-like. Joins the model's weights in place."""
    config = backbone.config
    if backbone.is_dispatched:
        return "the model is split over devices or partly offloaded"
    if backbone.quantization not in ("", FP8):
        return f"the weights are quantised ({backbone.quantization})"
    if config.model_type not in LIKE_LLAMA:
        return f"{config.model_type} models take the general decoding step"
    if reason := what_runs_other_code(backbone.hf) or _what_is_unknown(backbone):
        return reason
    geometry = backbone.geometry
    if any(geometry.chunks):
        return f"{backbone.name} attends in chunks"
    decoder: Any = backbone.decoder
    is_gemma = config.model_type.startswith("gemma")
    frequencies = tuple(dict.fromkeys(rope.inv_freq for rope in geometry.rope))
    joined: list[tuple[tuple[_Linear, ...], Tensor]] = []
    copies: list[tuple[Tensor, nn.Module, str, float]] = []
    layers = []

    def norm(module: Any) -> Any:
        """A norm's weight in float32; None for no norm."""
        if module is None:
            return None
        added = 1.0 if is_gemma else 0.0
        copies.append((module.weight.data.float() + added, module, "weight", added))
        return copies[-1][0]

    blocks: list[Any] = list(backbone.blocks)
    for index, module in enumerate(blocks):
        attention, mlp = module.self_attn, module.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        gates = (mlp.gate_proj, mlp.up_proj)
        qkv, gate_up = (_joined(modules, joined) for modules in (projections, gates))
        bias = None
        if attention.q_proj.bias is not None:
            bias = torch.cat([p.bias.data for p in projections])
            parts = bias.split([len(p.bias) for p in projections])
            copies += [(part, p, "bias", 0.0) for part, p in zip(parts, projections, strict=True)]
        layers.append(
            LayerWeights(
                before_attention=norm(module.input_layernorm),
                qkv=qkv,
                qkv_bias=bias,
                query_norm=norm(getattr(attention, "q_norm", None)),
                key_norm=norm(getattr(attention, "k_norm", None)),
                out=_weight_of(attention.o_proj),
                after_attention=norm(module.post_attention_layernorm) if is_gemma else None,
                before_mlp=norm(module.pre_feedforward_layernorm if is_gemma else module.post_attention_layernorm),
                gate_up=gate_up,
                down=_weight_of(mlp.down_proj),
                after_mlp=norm(module.post_feedforward_layernorm) if is_gemma else None,
                window=geometry.windows[index],
                rope=frequencies.index(geometry.rope[index].inv_freq),
            )
        )
    return Network(
        embedding=decoder.embed_tokens.weight.data,
        embedding_scale=_embedding_scale(decoder.embed_tokens),
        layers=tuple(layers),
        norm=norm(decoder.norm),
        epsilon=_epsilon(decoder.norm),
        activation=_activation(blocks[0].mlp),
        query_heads=geometry.query_heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        attention_scale=float(blocks[0].self_attn.scaling),
        frequencies=frequencies,
        rope_scale=float(getattr(decoder.rotary_emb, "attention_scaling", 1.0)),
        joined=tuple(joined),
        copies=tuple(copies),
    )


def _what_is_unknown(backbone: Backbone) -> str | None:
    """What of a model's parts the network has no place for. Modules are asked, not the configuration, which says only
    how they were made."""
    geometry, decoder = backbone.geometry, cast(Any, backbone.decoder)
    name = geometry.architecture
    blocks: list[Any] = list(backbone.blocks)
    if type(backbone.head) is not nn.Linear or not isinstance(decoder.embed_tokens, nn.Embedding):
        return f"{name} has an embedding or an output head that is not plain"
    if decoder.embed_tokens.max_norm is not None:
        return f"{name} bounds its embeddings"
    if reason := _how_parts_differ(decoder, blocks, type(backbone.hf).__module__):
        return f"{name} has {reason}"
    if any(_activation(block.mlp) != _activation(blocks[0].mlp) for block in blocks) or not _activation(blocks[0].mlp):
        return f"{name} has an activation the fast step does not know"
    if any(rope.layout != "half" or rope.rotary_dim != geometry.head_dim for rope in geometry.rope):
        return f"{name} does not turn whole keys by halves"
    if len({(block.self_attn.k_proj.weight.shape, block.self_attn.scaling) for block in blocks}) > 1:
        return f"{name} has layers of unequal shape"
    if [block.self_attn.layer_idx for block in blocks] != list(range(len(blocks))):
        return f"{name} has layers that are not numbered in their order"
    return next((f"{name} {reason}" for block in blocks if (reason := _what_is_odd_in(block))), None)


def _how_parts_differ(decoder: Any, blocks: list[Any], home: str) -> str | None:
    """Which parts of the layers are not alike, or do not come from the file of the model's own class."""
    norms = _norms(decoder, blocks)
    for parts in (blocks, [b.self_attn for b in blocks], [b.mlp for b in blocks], norms):
        kinds = {type(part) for part in parts}
        if len(kinds) > 1 or any(kind.__module__ != home for kind in kinds):
            return "layers of unequal or unknown parts"
    return "norms of unequal epsilons" if len({_epsilon(norm) for norm in norms}) > 1 else None


def _what_is_odd_in(block: Any) -> str | None:
    """What of one layer the network has no place for."""
    attention, mlp = block.self_attn, block.mlp
    inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
    plain = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    kinds = {type(m) for m in (*inputs, *plain)}
    if not kinds <= {nn.Linear, Fp8Linear} or any(m.bias is not None for m in plain):
        return "has biases, or projections that are not plain"
    if any(len({type(m) for m in of}) > 1 for of in (inputs, (mlp.gate_proj, mlp.up_proj))):
        return "has fp8 weights and others among projections of one input"
    if len({m.bias is None for m in inputs}) > 1:
        return "has biases of some of queries, keys and values"
    return "caps attention's logits" if getattr(attention, "attn_logit_softcapping", None) else None


_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _norms(decoder: Any, blocks: list[Any]) -> list[Any]:
    """Every norm of the model."""
    of_layers = [getattr(block, name, None) for block in blocks for name in _NORMS]
    of_heads = [getattr(block.self_attn, name, None) for block in blocks for name in ("q_norm", "k_norm")]
    return [decoder.norm, *(norm for norm in (*of_layers, *of_heads) if norm is not None)]


def _epsilon(norm: Any) -> float:
    """What a root mean square norm adds to the mean square."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _activation(mlp: Any) -> Any:
    """Name of the activation an MLP has, None for one the step does not know."""
    return _ACTIVATIONS.get(type(mlp.act_fn).__name__)


def _embedding_scale(embedding: Any) -> Tensor | None:
    scale = getattr(embedding, "embed_scale", None)
    return None if scale is None else torch.as_tensor(scale).to(embedding.weight)


def _weight_of(module: _Linear) -> Weight:
    if isinstance(module, Fp8Linear):
        return ScaledWeight(module.weight.data, module.scale.data)
    return module.weight.data


def _joined(modules: tuple[_Linear, ...], joined: list[tuple[tuple[_Linear, ...], Tensor]]) -> Weight:
    """Modules' weights as one, noted among those that are joined."""
    whole = _join([cast(nn.Parameter, module.weight) for module in modules])
    joined.append((modules, whole))
    if all(isinstance(module, Fp8Linear) for module in modules):
        return ScaledWeight(whole, _join([cast(Fp8Linear, module).scale for module in modules]))
    return whole


def _join(parameters: list[nn.Parameter]) -> Tensor:
    """Stack parameters, whose numbers become views of the stack, [all outputs, ...]."""
    held = [parameter.data for parameter in parameters]
    ends = [w.data_ptr() + w.numel() * w.element_size() for w in held]
    is_one_tensor = all(w.is_contiguous() for w in held) and len({w.untyped_storage().data_ptr() for w in held}) == 1
    if is_one_tensor and [w.data_ptr() for w in held[1:]] == ends[:-1]:
        return held[0].as_strided((sum(map(len, held)), *held[0].shape[1:]), held[0].stride())  # done before
    whole = torch.cat(held)
    at = 0
    for parameter, own in zip(parameters, held, strict=True):
        parameter.data = whole[at : at + len(own)]
        at += len(own)
    return whole
