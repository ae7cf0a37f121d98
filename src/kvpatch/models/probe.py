"""Asking a model what it does, once, at load: shapes, rotations and logits, or a refusal that says why not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpatch.caches.rope import LayerRope, rotate
from kvpatch.errors import ModelError
from kvpatch.models.cached import refuse_other_caches
from kvpatch.models.geometry import Geometry
from kvpatch.models.hf import Slab, Step
from kvpatch.models.kinds import refuse_own_attention
from kvpatch.models.limits import rotary_switch
from kvpatch.models.masks import FURTHEST, read_masks

if TYPE_CHECKING:
    from kvpatch.models.backbone import Backbone

NO_CONTEXT = 1 << 30
"""The context of a model whose configuration names none."""
_PROBE_POSITION = 37


@torch.no_grad()
def native_logits(hf: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Logits [batch, tokens, vocabulary] of the model's own forward pass over unpadded rows, no part of ours in it."""
    with attention_as_written(hf):
        return hf(input_ids=token_ids, use_cache=False)[0].float()  # some configurations ask for a plain tuple


@contextlib.contextmanager
def attention_as_written(hf: PreTrainedModel, *, everywhere: bool = False) -> Iterator[None]:
    """Let a model whose attention caps its scores run the attention that its own file writes out: the default one of
    older versions of transformers leaves the cap away, so that the model's own logits would not be the model's.

    everywhere: whether its attention caps its scores or not.
    """
    held = {id(own): own for module in hf.modules() if (own := vars(module).get("config")) is not None}
    configs: list[Any] = [
        c for c in held.values() if everywhere or getattr(c, "attn_logit_softcapping", None) is not None
    ]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


def native_greedy(
    hf: PreTrainedModel, token_ids: list[int], count: int, device: torch.device | None = None
) -> list[int]:
    """The `count` likeliest next tokens, one after the other, by the model's own forward pass over the whole text, with
    no cache and no part of ours.

    transformers' `generate` would give the same, but for what the model's generation settings ask for besides:
    penalties, beams, forced or forbidden tokens. device: where tokens enter, of a model that is split.
    """
    ids = list(token_ids)
    for _ in range(count):
        ids.append(int(native_logits(hf, torch.tensor([ids], device=device or hf.device))[0, -1].argmax()))
    return ids[len(token_ids) :]


@torch.no_grad()
def refuse_what_is_passed_by(backbone: Backbone) -> None:
    """Stop where the model as a whole does something besides its decoder and its head, which alone are run here."""
    count = min(8, backbone.geometry.context)
    ids = torch.randint(backbone.geometry.vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
    ids = ids.to(backbone.device)
    with _explained(backbone.geometry.architecture):
        own = native_logits(backbone.hf, ids)
        slab = backbone.slab(1, count)
        ours = backbone.logits(backbone.forward(ids, torch.arange(count, device=ids.device)[None], slab))
    bound = 1e-3 if backbone.is_exact else 5e-2
    if not float((own - ours).abs().max()) / (float(own.abs().max()) + 1e-9) < bound:
        raise ModelError(
            f"{backbone.geometry.architecture}: the whole model gives other logits than its decoder and its output "
            "head, which kvpatch runs; put hooks and replaced forwards on these two or on the layers"
        )


@torch.no_grad()
def geometry_of(backbone: Backbone) -> Geometry:
    """Find a model's geometry by running one token at two positions: a lone token's hidden states can't depend on its
    position through attention, so the two keys of every layer differ by that layer's rotation and by nothing else."""
    hf, config = backbone.hf, backbone.config
    name = type(hf).__name__
    layers = config.num_hidden_layers
    token = torch.tensor([[config.vocab_size // 2]], device=backbone.device)
    slabs, hidden, step = [], None, None
    for position in (0, _PROBE_POSITION):
        at = torch.tensor([[position]], device=backbone.device)
        slab = backbone.slab(1, 1)
        slab.extend(at)
        step = Step(slab.positions, at, backbone.dtype, attended={})
        with _explained(name), torch.no_grad():
            try:
                out = backbone.run(token, at, slab, step)
            except Exception:
                if not getattr(hf, "_supports_attention_backend", True):
                    refuse_own_attention(name, [True], [])
                raise
        hidden = out if hidden is None else hidden
        slabs.append(slab)
    assert hidden is not None
    assert step is not None
    assert step.attended is not None
    refuse_own_attention(name, [layer.is_initialized for layer in slabs[1].slab_layers], list(step.attended))
    refuse_other_caches(name, slabs[1].slab_layers, step.attended)
    rope = tuple(_layer_rope(backbone, layer, slabs) for layer in range(layers))
    with _explained(name):
        own = native_logits(hf, token)[0, -1]
    _refuse_other_logits(backbone, token, hidden, own)
    context = int(getattr(config, "max_position_embeddings", 0) or NO_CONTEXT)
    with _explained(name):
        masks = read_masks(backbone.decoder, backbone.configs, layers, context, backbone.device)
    ends = {context: ""}
    if switch := rotary_switch(config):
        ends[switch] = "its rotary frequencies change with the length"
    end = min(ends)
    if context < NO_CONTEXT and end > _PROBE_POSITION + 2:
        _refuse_frequencies_that_change(backbone, end, rope)
    first = slabs[0].slab_layers[0]
    return Geometry(
        architecture=name,
        layers=layers,
        query_heads=step.attended[0][0].shape[1],
        kv_heads=first.keys.shape[1],
        head_dim=first.keys.shape[3],
        vocabulary=backbone.head.weight.shape[0],
        context=end,
        windows=tuple(mask.window for mask in masks),
        rope=rope,
        dtype=first.keys.dtype,
        ends_because=ends[end],
        chunks=tuple(mask.chunk for mask in masks),
        devices=tuple(layer.keys.device for layer in slabs[0].slab_layers),
    )


def _refuse_other_logits(backbone: Backbone, token: Tensor, hidden: Tensor, own: Tensor) -> None:
    """Stop where the decoder's states [1, 1, width] and the head do not give the model's own logits [vocabulary], and
    say whether it is because something stands between the two."""
    name, width = backbone.name, backbone.head.weight.shape[1]
    if hidden.shape[-1] == width:
        ours = backbone.logits(hidden)[0, -1]
        is_same = ours.shape == own.shape
        if is_same and _off(ours, own) < (1e-3 if backbone.is_exact else 5e-2):
            return
    reads: list[Tensor] = []
    handle = backbone.head.register_forward_pre_hook(lambda _, given: reads.append(given[0]))
    try:
        native_logits(backbone.hf, token)
    finally:
        handle.remove()
    fed = reads[-1][0, -1] if reads else None
    last = hidden[0, -1].float()
    if fed is None or fed.shape != last.shape or _off(fed.float().to(last.device), last) > _bound(backbone):
        raise ModelError(
            f"{name}: our forward pass does not give the model's own logits: something stands between its last layer "
            "and its output head (a transform, a scaling or a pass of its own), which kvpatch does not run"
        )
    raise ModelError(
        f"{name}: our forward pass does not give the model's own logits: it changes them after its output head in a "
        "way kvpatch does not know"
    )


def _refuse_frequencies_that_change(backbone: Backbone, context: int, rope: Sequence[LayerRope]) -> None:
    """Stop where a token's keys depend on how long the pass is that makes them: whether it has others beside a token at
    the next position than beside one at the end of the context. Of the layers that turn keys alike, the first tells:
    there rounding has added up least."""
    token, slabs = backbone.config.vocab_size // 2, []
    for other in (_PROBE_POSITION + 1, min(context, FURTHEST) - 1):
        at = torch.tensor([[_PROBE_POSITION, other]], device=backbone.device)
        slabs.append(backbone.slab(1, 2))
        slabs[-1].extend(at)
        with _explained(backbone.name):
            backbone.run(torch.full_like(at, token), at, slabs[-1], Step(slabs[-1].positions, at, backbone.dtype))
    for layer in {rope.index(kind) for kind in rope}:
        near, far = (slab.slab_layers[layer].keys[:, :, :1].float() for slab in slabs)
        if _off(far, near) > _bound(backbone):
            raise ModelError(
                f"{backbone.name}: the keys of layer {layer} depend on how long the text is, in a way kvpatch does not "
                "know, so cached keys can't be patched"
            )


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        if str(error).startswith(name):
            raise
        raise ModelError(f"{name}: {error}") from error
    except Exception as error:
        raise ModelError(f"{name} can't be run over a cache of ours: {type(error).__name__}: {error}") from error


def _layer_rope(backbone: Backbone, layer: int, slabs: list[Slab]) -> LayerRope:
    """The rotation that turns a layer's key at position 0 into its key at the probe position."""
    (k0, v0), (k1, v1) = ((s.slab_layers[layer].keys.float(), s.slab_layers[layer].values.float()) for s in slabs)
    bound = _bound(backbone)
    if _off(v0, v1) > bound:
        return LayerRope("absolute")
    candidates = [LayerRope("none")]
    for known in _frequencies(backbone.hf):
        for frequencies in (known, tuple(-f for f in known)):  # some turn the other way (NanoChat)
            candidates += [LayerRope("half", frequencies), LayerRope("interleaved", frequencies)]
    delta = torch.tensor([[_PROBE_POSITION]], device=k0.device)
    fitting = [c for c in candidates if c.rotary_dim <= k0.shape[3]]
    best = min(fitting, key=lambda c: _off(rotate(k0, delta, c), k1))
    # Keys without a position are made by the very same products, so that a small turn can't pass for none.
    if _off(rotate(k0, delta, best), k1) > (1e-5 if best.layout == "none" else bound):
        # Such as a norm with weights behind the rotation (HunYuan): a key is right where it stands, and nowhere else.
        return LayerRope("fixed")
    return best


def _bound(backbone: Backbone) -> float:
    """What two ways of making the same keys may differ by, over their norm."""
    return 1e-3 if backbone.is_exact else 3e-2


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / (b.norm() + 1e-9))


def _frequencies(hf: PreTrainedModel) -> list[tuple[float, ...]]:
    """Every distinct set of rotary frequencies among the model's buffers, and those that its tables of sines and
    cosines were made from."""
    found: dict[tuple[float, ...], None] = {}
    for name, buffer in hf.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            found[tuple(buffer.double().flatten().tolist())] = None
        elif (of_table := _frequencies_of_table(buffer)) is not None:
            found[of_table] = None
    return list(found)


def _frequencies_of_table(table: Tensor) -> tuple[float, ...] | None:
    """Radians per position of a table [positions, 2 * pairs] of sines and then cosines (GPT-J); None if it is none.

    Each row says the angle up to whole turns. The second row tells it roughly, and rows twice as far each tell it twice
    as sharply.
    """
    if table.ndim != 2 or not table.is_floating_point() or table.shape[0] < 2 or table.shape[1] % 2:
        return None
    sin, cos = table.double().chunk(2, dim=1)
    if bool((sin[0] != 0).any()) or bool((cos[0] != 1).any()) or float((sin**2 + cos**2 - 1).abs().max()) > 1e-2:
        return None
    step = torch.atan2(sin[1], cos[1])
    at = 2
    while at < table.shape[0]:
        angle = torch.atan2(sin[at], cos[at])
        step = (angle + 2 * torch.pi * ((at * step - angle) / (2 * torch.pi)).round()) / at
        at *= 2
    return tuple(step.tolist())
