"""Decode: let the model go on from a batch of caches, one token a step.

    feed the pending token of every row at its position
      -> hidden state -> logits -> choose with the row's own noise -> that token is fed next
until every row has stopped or the limit is reached.

A Llama-like model takes the engine's own step, with rows taking turns in places (`step`, `places`, `fast`). Any other,
any edit but steering, and a batch whose attention is watched or whose logits are changed take the model's own forward
pass, all rows writing the same slot of one slab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpatch.caches.kvcache import PAD, KVCache
from kvpatch.caches.noise import int64_seeds
from kvpatch.engine.attention import Attention, AttentionCapture, AttentionRequest
from kvpatch.engine.backend import fast_of, refuse_unheld
from kvpatch.engine.batching import Request, Written, decode_in_places
from kvpatch.engine.sampling import choose
from kvpatch.engine.step import Sampling
from kvpatch.errors import CacheError, ProtocolError
from kvpatch.models.backbone import Backbone
from kvpatch.models.fp8 import as_held
from kvpatch.models.hf import Edits, Slab

OnStep = Callable[[int], None]


@dataclass(frozen=True)
class DecodingStep:
    """What a function given as `on_logits` is shown before each token is chosen.

    Attributes:
        number: the step, from 0.
        logits: [batch, vocabulary], float32, of the token to be chosen. A copy: change it and return it.
        token_ids: [batch, number], what each row wrote so far; -1 after it has stopped.
        is_going: [batch], False for rows that have stopped, whose logits change nothing any more.
    """

    number: int
    logits: Tensor
    token_ids: Tensor
    is_going: Tensor


OnLogits = Callable[[DecodingStep], Tensor | None]
"""Logits to choose from in place of the model's, [batch, vocabulary]; None leaves them."""


@dataclass(frozen=True)
class Continuations:
    """What the model wrote from each row of a batch.

    Attributes:
        token_ids: [batch, new_tokens], the end token included; -1 after a row has stopped.
        logprobs: [batch, new_tokens], log-probability of each chosen token under the model's own distribution
            (temperature 1, nothing cut off), natural logarithm, float32; NaN after a row has stopped.
        stopped: per row "eos" or "length".
        values: one tensor a layer asked for, [batch, kv_heads, new_tokens, head_dim]: cached values of the tokens fed
            after the pending one. The last token written is not fed, so its slot is empty (zeros), as are slots after
            a row has stopped.
        attention: statistics of every head over the tokens fed to write the text, where they were asked for.
    """

    token_ids: Tensor
    logprobs: Tensor
    stopped: tuple[str, ...]
    values: dict[int, Tensor]
    attention: Attention | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens each row wrote, end token included."""
        return (self.token_ids != PAD).sum(dim=1).tolist()


@torch.no_grad()
def decode(
    backbone: Backbone,
    cache: KVCache,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    seeds: Sequence[int],
    end_tokens: Sequence[int] = (),
    keep_values: Sequence[int] = (),
    on_step: OnStep | None = None,
    edits: Edits | None = None,
    to_capture: AttentionRequest | None = None,
    places: int | None = None,
    on_logits: OnLogits | None = None,
) -> Continuations:
    """Generate from every row of a cache.

    Args:
        cache: any batch; it is copied into a slab and not changed.
        max_new_tokens: most tokens a row may write.
        temperature, top_p: see `sampling.choose`.
        seeds: one a row; a row's text depends on its cache and its seed, not on its batch.
        end_tokens: tokens that stop a row.
        keep_values: layers whose cached values of the new tokens are returned.
        on_step: called after every step with the number of rows still going.
        edits: changes that every step makes to its queries, keys and values.
        to_capture: what to capture of attention; `marked` is of the cache's slots.
        places: rows decoded at a time; as many as there are, or as fit on the GPU, if None.
        on_logits: shown every step of all rows; what it returns is chosen from.
    Raises:
        CacheError: where the seeds do not fit the batch, or another model made the cache.
        ProtocolError: where the context has no room for the new tokens.
        ModelError: for a cache in 8 bits where the engine's own step does not run.
    """
    if len(seeds) != cache.batch:
        raise CacheError(f"{len(seeds)} seeds for a batch of {cache.batch}; give one a row")
    if max_new_tokens < 1:
        raise ProtocolError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    fast = fast_of(backbone)  # first, since it takes over what was changed in the model
    refuse_unheld(backbone, fast)
    refuse_foreign(backbone, cache)
    longest = max(cache.row_pending_position) + max_new_tokens
    if longest > backbone.geometry.context:
        raise ProtocolError(f"{longest} positions are needed; {backbone.geometry.limit}")
    request = Request(
        limit=max_new_tokens,
        sampling=Sampling(temperature, top_p, tuple(end_tokens)),
        seeds=int64_seeds(seeds, backbone.device),
        keep_values=tuple(keep_values),
        steering={layer: edit.steer for layer, edit in (edits or {}).items() if edit.steer is not None},
        on_step=on_step,
    )
    capture = None if to_capture is None else AttentionCapture.after(cache, to_capture)
    must_be_plain = (
        capture is not None or on_logits is not None or any(not edit.only_steers for edit in (edits or {}).values())
    )
    if fast.network is None or must_be_plain:
        written = _decode_plainly(backbone, cache, request, edits, (capture, on_logits))
    else:
        written = decode_in_places(backbone, fast, cache, request, places)
        longest_row = int(written.lengths.max())
        for layer, edit in (edits or {}).items():
            # Steps past the last row's end, which a GPU may run, count neither way.
            edit.fired += longest_row - (written.steps - written.steered[layer])
    stopped = _stopped(written, request.sampling)
    seen = None if capture is None else capture.result()
    return Continuations(written.token_ids, written.logprobs, stopped, written.values, seen)


def _decode_plainly(
    backbone: Backbone,
    cache: KVCache,
    request: Request,
    edits: Edits | None,
    watchers: tuple[AttentionCapture | None, OnLogits | None],
) -> Written:
    """The same by the model's own forward pass, for every architecture and every edit; the watchers are shown its
    attention and its logits."""
    capture, on_logits = watchers
    shape = (cache.batch, request.limit)
    slab = slab_of(backbone, cache, request.limit)
    round_held(backbone, slab)
    token_ids = torch.full(shape, PAD, dtype=torch.int64, device=backbone.device)
    logprobs = torch.full(shape, float("nan"), device=backbone.device)
    ends = torch.tensor(request.sampling.end_tokens, dtype=torch.int64, device=backbone.device)
    is_going = torch.ones(cache.batch, dtype=torch.bool, device=backbone.device)
    feed, position, steps = cache.pending, cache.pending_position, 0
    for step in range(request.limit):
        if capture is not None:
            capture.only(is_going[:, None])
        hidden = backbone.forward(feed[:, None], position[:, None], slab, edits=edits, observer=capture)
        logits = backbone.logits(hidden)[:, -1]  # [batch, vocabulary]
        asked = logits if on_logits is None else _changed(on_logits, step, logits, token_ids[:, :step], is_going)
        chosen = choose(asked, request.seeds, step, request.sampling.temperature, request.sampling.top_p)
        logprob = logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(dim=-1)
        token_ids[:, step] = torch.where(is_going, chosen, PAD)
        logprobs[:, step] = torch.where(is_going, logprob, float("nan"))
        is_going = is_going & ~torch.isin(chosen, ends)
        feed, position, steps = chosen, position + 1, step + 1
        left = int(is_going.sum())
        if request.on_step is not None:
            request.on_step(left)
        if left == 0:
            break
    values = {
        layer: _new_values(slab, layer, cache.slots, token_ids).to(backbone.device) for layer in request.keep_values
    }
    return Written(token_ids, logprobs, (token_ids != PAD).sum(dim=1), values, steps, {})


def _changed(on_logits: OnLogits, step: int, logits: Tensor, token_ids: Tensor, is_going: Tensor) -> Tensor:
    """The logits that a function makes of a step's.

    Raises:
        ProtocolError: where it returns anything but finite or -inf logits of the same shape, with one finite a row.
    """
    given = on_logits(DecodingStep(step, logits.clone(), token_ids.clone(), is_going.clone()))
    if given is None:
        return logits
    if not isinstance(given, Tensor) or given.shape != logits.shape:
        got = f"a tensor of shape {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise ProtocolError(f"on_logits must return logits of shape {list(logits.shape)}, or None, got {got}")
    given = given.to(logits)
    if bool((given.isnan() | (given == float("inf"))).any()) or not bool(given.isfinite().any(dim=1).all()):
        raise ProtocolError(
            f"on_logits left a row without a token to choose, or with a logit that is no number, at step {step}"
        )
    return given


def _stopped(written: Written, sampling: Sampling) -> tuple[str, ...]:
    """How each row stopped: its last token is an end token, or it is not."""
    last = written.token_ids.gather(1, (written.lengths - 1).clamp(min=0)[:, None]).flatten().tolist()
    return tuple("eos" if token in sampling.end_tokens else "length" for token in last)


def refuse_foreign(backbone: Backbone, cache: KVCache) -> None:
    """Refuse a cache that this model did not make.

    Raises:
        CacheError: for another shape, type, device or identity.
    """
    geometry = backbone.geometry
    if not cache.model and any(rope.layout == "unknown" for rope in cache.rope):
        raise CacheError("this cache does not say which model made it; write KVCache.from_dynamic(..., model=model)")
    first = (cache.keys[0].shape[1], cache.keys[0].shape[3]) if cache.keys else None
    if cache.rope != geometry.rope or first != (geometry.kv_heads, geometry.head_dim):
        raise CacheError("this cache was made by another model: its layers, heads or rotations are not this one's")
    if dtypes := {tensor.dtype for tensor in (*cache.keys, *cache.values)} - {geometry.dtype}:
        raise CacheError(
            f"this cache holds {dtypes.pop()}, the model makes {geometry.dtype}; load the model in one type"
        )
    _refuse_elsewhere(backbone, cache)
    if cache.model != backbone.identity:
        raise CacheError(
            f"this cache was made by another model ({cache.model or 'unknown'}, this one is {backbone.identity}); "
            "prefill the prompts with this model"
        )


def _refuse_elsewhere(backbone: Backbone, cache: KVCache) -> None:
    """Refuse a cache of which a part is on another device than the model has it."""
    if cache.positions.device != backbone.device:
        raise CacheError(
            f"this cache is on {cache.positions.device}, the model on {backbone.device}; move it with .to()"
        )
    for layer, (keys, values, device) in enumerate(zip(cache.keys, cache.values, backbone.layer_devices, strict=True)):
        if keys.device != device or values.device != device:
            where = f"this cache is on {keys.device}, the model on {device}"
            if backbone.is_split:
                where = f"layer {layer} of this cache is on {keys.device}, the model runs it on {device}"
            raise CacheError(f"{where}; move it with .to(model.backbone.device, model.backbone.layer_devices)")


def slab_of(backbone: Backbone, cache: KVCache, room: int) -> Slab:
    """A slab holding a copy of a cache, with room for `room` more slots."""
    refuse_foreign(backbone, cache)
    return Slab.holding(cache.keys, cache.values, cache.positions, room)


def round_held(backbone: Backbone, slab: Slab) -> None:
    """Round what the live slots of a slab hold, and whatever is written from now on, as decoding in places holds it:
    where the model's cache is in 8 bits."""
    if not backbone.rounds_cache:
        return
    slab.extent.rounds, live = as_held, slice(0, slab.length)
    for layer in slab.slab_layers:
        for held in (layer.keys, layer.values):
            held[:, :, live] = as_held(held[:, :, live])


def _new_values(slab: Slab, layer: int, slots: int, token_ids: Tensor) -> Tensor:
    """Cached values of the new tokens: token t sits in the slot behind the pending token's, t slots on."""
    new = token_ids.shape[1]
    values = slab.slab_layers[layer].values
    out = values.new_zeros(values.shape[0], values.shape[1], new, values.shape[3])
    have = max(0, slab.length - slots - 1)
    out[:, :, :have] = values[:, :, slots + 1 : slots + 1 + have]
    is_fed = torch.arange(new, device=token_ids.device) < (token_ids != PAD).sum(dim=1, keepdim=True) - 1
    return out * is_fed[:, None, :, None].to(out.device)
