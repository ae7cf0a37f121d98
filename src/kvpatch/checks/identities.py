"""`kvpatch check`: is this model patched correctly? Identities that hold whatever the weights.

Errors of logits are relative to the largest logit of the reference, so that one bound fits every model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.rope import rotate
from kvpatch.engine.decode import decode, round_held, slab_of
from kvpatch.engine.model import Model
from kvpatch.engine.prefill import prefill
from kvpatch.engine.residual import disturbed_residual, recorded_residual, replaced_residual
from kvpatch.models.fp8 import FP8, whole_activations
from kvpatch.models.hf import LayerEdit, Step
from kvpatch.models.probe import native_greedy
from kvpatch.models.second_opinion import compare, own_attentions_differ
from kvpatch.models.template import EncodedPrompt
from kvpatch.specs.base import Frozen
from kvpatch.specs.patch import Patch

BOUND = 1e-5
NOISE_LIMIT = 5e-2
OF_DISTURBED = 3.0
"""What activations of 8 bits may make of an identity, over what one more rounding at every layer makes of logits."""
CHECK_WORK = 10.0
"""Work that a check may spend on long prompts, against that of loading."""
_SOURCE = "Watch how each of these words arrives, and say what it is like to be the one that is choosing them now."
_TARGET = "Explain how bread rises in a warm oven, and which of the usual steps a beginner can leave out safely."
_SHIFT = 7


class Identity(Frozen):
    """One identity: the measured error, the bound it must stay under, and whether it does. `holds` is None where the
    identity does not apply to this model, and `note` says why."""

    identity: str
    holds: bool | None
    error: float
    bound: float
    note: str = ""


@dataclass
class _Setup:
    model: Model
    source: KVCache
    target: KVCache
    source_prompt: EncodedPrompt
    target_prompt: EncodedPrompt
    bound: float
    hooks: tuple[int, int] = (0, 0)  # planned, fired; left by the residual identity


def check(model: Model, on_identity: Callable[[Identity], None] | None = None) -> list[Identity]:
    """Measure every identity on a model.

    Returns:
        One `Identity` each, in a fixed order. In float32 the bound is 1e-5, or three times a rounding that was measured
        on the model's own passes where that is more; in other types, and with quantised weights, it is ten times the
        measured noise of the same row among other batch mates (at least one rounding), and that noise has a limit of
        its own. Of a model with fp8 weights, or whose decoding holds an fp8 cache, what rounding moves is measured
        twice, see `_in_both_ways`.
    """
    setup = _set_up(model)
    spared = None
    if FP8 in (model.backbone.quantization, model.backbone.cache_dtype):
        with whole_activations():
            spared = _set_up(model)
    out = []
    for name, measure in _IDENTITIES.items():
        if spared is not None and measure in _MOVED_BY_ROUNDING:
            error, note, bound = _in_both_ways(measure, setup, spared)
        else:  # logits are compared with transformers' with activations left whole, by `compare` itself
            error, note, bound = measure(spared if spared is not None and measure is _model_logits else setup)
        holds = None if error != error else error <= bound
        out.append(Identity(identity=name, holds=holds, error=error if error == error else 0.0, bound=bound, note=note))
        if on_identity:
            on_identity(out[-1])
    return out


def _set_up(model: Model) -> _Setup:
    source, target = _same_length(model)
    caches = prefill(model.backbone, [source, target])
    setup = _Setup(model, caches[0], caches[1], source, target, BOUND)
    if not model.backbone.is_exact:
        # Noise may measure 0 by luck; less than one rounding of this type says nothing.
        setup.bound = 10 * max(_batch_noise(setup), model.backbone.rounding)
    return setup


def _in_both_ways(
    measure: Callable[[_Setup], tuple[float, str, float]], setup: _Setup, spared: _Setup
) -> tuple[float, str, float]:
    """An identity of a model with fp8 weights: with activations left whole, under the bound of other types, which shows
    what is wrong; and with activations in 8 bits, as a run has them. Those enlarge any rounding, so that there the
    bound follows from what one more rounding at every layer does to the model's own logits. The error and the bound are
    those of the way that comes nearer to its bound. The same of a cache that decoding holds in 8 bits.

    Args:
        spared: made with activations and cache left whole.
    """
    with whole_activations():
        error, note, bound = measure(spared)
    rounded, _, own = measure(setup)
    if error != error:
        return error, note, bound
    noise = _disturbed(setup)
    of_rounded = max(own, OF_DISTURBED * noise)
    left = "activations" if setup.model.backbone.quantization == FP8 else "the cache"
    told = f"{error:.2g} with {left} left whole, {rounded:.2g} in 8 bits, where noise is {noise:.2g}"
    note = f"{note}; {told}" if note else told
    return (rounded, note, of_rounded) if rounded * bound > error * of_rounded else (error, note, bound)


@torch.no_grad()
def _disturbed(s: _Setup) -> float:
    """How far the logits of the model's own pass move where each layer's input is off by one unit in the last place;
    behind a cache that is rounded, where decoding rounds it."""
    backbone, ids = s.model.backbone, torch.tensor([s.source_prompt.token_ids], device=s.model.backbone.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]

    def logits() -> Tensor:
        if backbone.rounds_cache:
            return next_logits(s.model, prefill(backbone, [s.source_prompt]))
        return backbone.logits(backbone.forward(ids, positions, backbone.slab(1, ids.shape[1]))[:, -1])

    still = logits()
    with disturbed_residual(backbone):
        return _off(logits(), still)


def _same_length(model: Model) -> tuple[EncodedPrompt, EncodedPrompt]:
    """Two prompts cut to the same number of tokens, the last token of each kept."""
    source, target = model.encode(_SOURCE), model.encode(_TARGET)
    length = min(len(source.token_ids), len(target.token_ids), model.geometry.context - 16)

    def cut(prompt: EncodedPrompt) -> EncodedPrompt:
        keep = [*range(length - 1), len(prompt.token_ids) - 1]
        return prompt.pick(keep)

    return cut(source), cut(target)


def next_logits(model: Model, cache: KVCache) -> Tensor:
    """Logits [batch, vocabulary] after the pending token, over the cache as decoding holds it."""
    slab = slab_of(model.backbone, cache, 1)
    round_held(model.backbone, slab)
    with torch.no_grad():
        hidden = model.backbone.forward(cache.pending[:, None], cache.pending_position[:, None], slab)
        return model.backbone.logits(hidden[:, -1])


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _greedy(model: Model, cache: KVCache, count: int = 12) -> list[list[int]]:
    out = decode(model.backbone, cache, max_new_tokens=count, temperature=0, seeds=[0] * cache.batch)
    return out.token_ids.tolist()


def _batch_noise(s: _Setup) -> float:
    """The same row alone and among longer mates."""
    long = prefill(s.model.backbone, [s.source_prompt, s.target_prompt, _longer(s.source_prompt)])
    return _off(next_logits(s.model, long)[1:2], next_logits(s.model, s.target))


def _longer(prompt: EncodedPrompt) -> EncodedPrompt:
    middle = len(prompt.token_ids) // 2
    last = len(prompt.token_ids) - 1
    return prompt.pick([*range(last), *range(middle, last), last])


def _model_logits(s: _Setup) -> tuple[float, str, float]:
    found = compare(s.model.backbone, CHECK_WORK)
    windows = sorted({w for w in s.model.geometry.windows if w and w < found.lengths[-1]})
    note = found.note + (f"; past the window of {' and '.join(map(str, windows))}" if windows else "")
    if not s.model.backbone.is_exact:
        return found.error, note, max(s.bound, found.bound)
    # In float32 as well a model may enlarge rounding: then its own two ways to attend differ by as much.
    return found.error, note, min(found.bound, max(BOUND, 3 * own_attentions_differ(s.model.backbone, found.at)))


def _model_greedy(s: _Setup) -> tuple[float, str, float]:
    ours = _greedy(s.model, s.source)[0]
    if not s.model.backbone.is_exact:
        return float("nan"), "in this dtype near-ties may fall either way", 0.0
    theirs = native_greedy(s.model.hf, list(s.source_prompt.token_ids), len(ours), s.model.backbone.device)
    return (
        float(ours[: len(theirs)] != theirs),
        "12 greedy tokens against transformers' own forward pass, without a cache",
        0.0,
    )


def _self_swap(s: _Setup) -> tuple[float, str, float]:
    patched = Patch(align="replace").apply(s.target, s.target)
    same = _greedy(s.model, patched) == _greedy(s.model, s.target)
    return (
        _off(next_logits(s.model, patched), next_logits(s.model, s.target)) + (0.0 if same else 1.0),
        "tokens too",
        0.0,
    )


def _full_swap(s: _Setup) -> tuple[float, str, float]:
    patched = Patch(align="replace").apply(s.source, s.target)
    text = EncodedPrompt(
        (*s.source_prompt.token_ids[:-1], s.target_prompt.token_ids[-1]),
        s.source_prompt.segments,
        s.source_prompt.pieces,
    )
    natural = prefill(s.model.backbone, [text, text])[0]
    return _off(next_logits(s.model, patched), next_logits(s.model, natural)), "", s.bound


def _joint_shuffle(s: _Setup) -> tuple[float, str, float]:
    if any(w is not None and w <= s.source.slots + 1 for w in s.model.geometry.windows):
        return float("nan"), "a sliding window is shorter than the prompt, so the order of slots counts", s.bound
    if any(s.model.geometry.chunks):
        return float("nan"), "attention is cut into chunks of positions, so the order of slots counts", s.bound
    plain = Patch(align="replace").apply(s.source, s.target)
    shuffled = Patch(align="replace", donor="shuffle_jointly").apply(s.source, s.target, seed=1)
    return _off(next_logits(s.model, shuffled), next_logits(s.model, plain)), "", s.bound


def _shift(s: _Setup) -> tuple[float, str, float]:
    if any(rope.keeps_its_place for rope in s.model.geometry.rope):
        return float("nan"), "this model's keys can't be moved: patches that would move one are refused", 0.0
    if any(s.model.geometry.chunks):
        return float("nan"), "attention is cut into chunks of positions, so it counts where a prompt begins", 0.0
    if _scales_queries(s):
        return float("nan"), "queries are scaled by their position, so it counts where a prompt begins", 0.0
    cache = s.source
    delta = torch.full_like(cache.positions, _SHIFT)
    moved = replace(
        cache,
        keys=tuple(rotate(k, delta, rope) for k, rope in zip(cache.keys, cache.rope, strict=True)),
        positions=cache.positions + _SHIFT,
        pending_position=cache.pending_position + _SHIFT,
    )
    before = next_logits(s.model, cache)
    by_patch, further = _moved_by_a_patch(s)
    error = max(_off(next_logits(s.model, moved), before), _off(next_logits(s.model, by_patch), before))
    # The model's own passes at the two places differ by rounding, which its layers may enlarge.
    bound = max(s.bound, 3 * _own_shift(s))
    return error, f"by {_SHIFT} positions, and by a patch by {further}", bound


@torch.no_grad()
def _own_shift(s: _Setup) -> float:
    """How far the logits of the model's own pass move with the whole prompt; no part of ours in it."""
    backbone, ids = s.model.backbone, torch.tensor([s.source_prompt.token_ids], device=s.model.backbone.device)
    at = torch.arange(ids.shape[1], device=ids.device)[None]
    runs = (backbone.decoder(**backbone.entering(ids, at + by), use_cache=False)[0] for by in (0, _SHIFT))
    here, there = (backbone.logits(hidden[:, -1]) for hidden in runs)
    return _off(there, here)


@torch.no_grad()
def _scales_queries(s: _Setup) -> bool:
    """Whether a token's queries have another length at another position: attention temperatures (Llama 4, Beam). A lone
    token's states do not depend on where it stands."""
    backbone, norms = s.model.backbone, []
    for position in (0, len(s.source_prompt.token_ids) + _SHIFT):
        at = torch.tensor([[position]], device=backbone.device)
        slab = backbone.slab(1, 1)
        slab.extend(at)
        step = Step(slab.positions, at, backbone.dtype, attended={})
        backbone.run(s.source.pending[:1, None], at, slab, step)
        norms.append(torch.stack([query.float().norm().cpu() for query, _, _ in (step.attended or {}).values()]))
    return _off(norms[1], norms[0]) > (1e-5 if backbone.is_exact else 3e-2)


def _moved_by_a_patch(s: _Setup) -> tuple[KVCache, int]:
    """The source, patched to the end of a longer prompt whose own slots are then taken away; and how far it moved."""
    longer = prefill(s.model.backbone, [_longer(s.source_prompt)])
    own = longer.slots - s.source.slots
    patched = Patch(slots="all", align="end").apply(s.source, longer)
    labels = {name: getattr(patched, name)[:, own:] for name in ("positions", "token_ids", "segments", "origins")}
    return replace(
        patched,
        keys=tuple(k[:, :, own:] for k in patched.keys),
        values=tuple(v[:, :, own:] for v in patched.values),
        pending=s.source.pending,
        **labels,
    ), own


def _residual(s: _Setup) -> tuple[float, str, float]:
    backbone, layers = s.model.backbone, range(s.model.geometry.layers)
    ids = [torch.tensor([p.token_ids[:-1]], device=backbone.device) for p in (s.source_prompt, s.target_prompt)]
    positions = torch.arange(ids[0].shape[1], device=backbone.device)[None]
    slabs = [backbone.slab(1, ids[0].shape[1]) for _ in range(2)]
    with recorded_residual(backbone, layers) as seen:
        backbone.forward(ids[0], positions, slabs[0])
    with replaced_residual(backbone, seen.seen, torch.ones_like(positions, dtype=torch.bool)) as firings:
        backbone.forward(ids[1], positions, slabs[1])
    worst = max(
        float((getattr(a, part) - getattr(b, part)).abs().max())
        for a, b in zip(slabs[0].slab_layers, slabs[1].slab_layers, strict=True)
        for part in ("keys", "values")
    )
    s.hooks = (seen.planned + firings.planned, seen.fired + firings.fired)
    return worst, "residual stream of every layer, all positions", 0.0


def _hooks(s: _Setup) -> tuple[float, str, float]:
    """Those of the residual stream, counted above, and one on the queries, keys and values of every layer."""
    backbone = s.model.backbone
    edits = {layer: LayerEdit(_as_it_is, _as_it_is, _as_it_is) for layer in range(s.model.geometry.layers)}
    ids = torch.tensor([s.target_prompt.token_ids[:-1]], device=backbone.device)
    positions = torch.arange(ids.shape[1], device=backbone.device)[None]
    backbone.forward(ids, positions, backbone.slab(1, ids.shape[1]), edits=edits)
    planned = s.hooks[0] + sum(edit.planned for edit in edits.values())
    fired = s.hooks[1] + sum(edit.fired for edit in edits.values())
    return float(abs(planned - fired)), f"{fired} of {planned} fired", 0.0


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _unchanged(s: _Setup) -> tuple[float, str, float]:
    before = s.source.checksums() + s.target.checksums()
    # The two bodies may differ in length, so that keys would move.
    is_fixed = any(rope.keeps_its_place for rope in s.model.geometry.rope)
    mixed = Patch(slots="all" if is_fixed else "body", strength=0.5).apply(s.source, s.target)
    _greedy(s.model, mixed, 4)
    _greedy(s.model, s.target, 4)
    return float(before != s.source.checksums() + s.target.checksums()), "checksums of both inputs", 0.0


def _batched(s: _Setup) -> tuple[float, str, float]:
    # In other types than float32 the bound of the other identities is made of this very noise.
    bound = s.bound if s.model.backbone.is_exact else NOISE_LIMIT
    return _batch_noise(s), "one row alone and among longer ones", bound


def _edit(s: _Setup) -> tuple[float, str, float]:
    """Reported as 0 where the edit shows, 1 where it does not. Ten times the norm, since a model whose heads rest on
    their sink hardly minds random vectors of the usual one."""
    own = s.source
    loud = replace(own, keys=tuple(10 * k for k in own.keys), values=tuple(10 * v for v in own.values))
    edited = Patch(slots="all", align="end", donor="gaussian_isotropic").apply(loud, s.target, seed=1)
    moved = _off(next_logits(s.model, edited), next_logits(s.model, s.target))
    return float(not moved > max(s.bound, 1e-3)), f"a loud random cache moves logits by {moved:.3g} of their size", 0.0


_MOVED_BY_ROUNDING = (_full_swap, _joint_shuffle, _shift, _batched)
"""Identities of two ways to compute one thing, by prefill and single passes alone."""
_IDENTITIES: dict[str, Callable[[_Setup], tuple[float, str, float]]] = {
    "own forward pass gives the model's logits": _model_logits,
    "own decoding gives transformers' greedy text": _model_greedy,
    "self-swap changes nothing": _self_swap,
    "full swap equals text": _full_swap,
    "joint shuffle of keys and values equals the source": _joint_shuffle,
    "moving all keys and the query changes nothing": _shift,
    "residual stream at all positions rebuilds the source cache": _residual,
    "every hook fired as often as planned": _hooks,
    "inputs unchanged afterwards": _unchanged,
    "batched rows equal single rows": _batched,
    "a large edit changes the logits": _edit,
}
