"""Prefill: run prompts through the model once and keep their caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpatch.cache import PAD, KVCache, Origin
from kvpatch.errors import ProtocolError
from kvpatch.models.hf import Backbone
from kvpatch.models.template import EncodedPrompt

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 32_768}
"""Tokens, padding counted, that one pass takes; bounds its memory, not its result. On a CPU larger activations leave
the cache and cost a third of the speed (benchmarks/LOG.md)."""


@torch.no_grad()
def prefill(backbone: Backbone, prompts: Sequence[EncodedPrompt]) -> KVCache:
    """Caches of prompts, without their last tokens, which stay pending.

    Args:
        prompts: any number, of any lengths up to the model's context.
    Returns:
        A `KVCache` whose rows stand in the order of `prompts`.
    Raises:
        ProtocolError: for a prompt longer than the model's context.
    """
    if not prompts:
        raise ProtocolError("there is no prompt to prefill")
    context = backbone.geometry.context
    for prompt in prompts:
        if len(prompt.token_ids) > context:
            raise ProtocolError(f"a prompt has {len(prompt.token_ids)} tokens; the model's context is {context}")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
    parts = [
        _prefill_pass(backbone, [prompts[i] for i in part]) for part in _passes(prompts, order, backbone.device.type)
    ]
    joined = KVCache.concat(parts)
    if order == list(range(len(prompts))):
        return joined
    back = sorted(range(len(order)), key=lambda place: order[place])
    return joined[back]


def _passes(prompts: Sequence[EncodedPrompt], order: Sequence[int], device: str) -> list[list[int]]:
    """Prompts in ascending length, cut where a padded pass would grow past `TOKENS_AT_ONCE`."""
    passes: list[list[int]] = [[]]
    for index in order:
        if passes[-1] and (len(passes[-1]) + 1) * len(prompts[index].token_ids) > TOKENS_AT_ONCE.get(device, 4096):
            passes.append([])
        passes[-1].append(index)
    return passes


def _prefill_pass(backbone: Backbone, prompts: Sequence[EncodedPrompt]) -> KVCache:
    slots = max(len(prompt.token_ids) for prompt in prompts) - 1
    device = backbone.device

    def table(rows: Sequence[Sequence[int]]) -> Tensor:
        padded = [[PAD] * (slots - len(row)) + list(row) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=device).reshape(len(prompts), slots)

    token_ids = table([prompt.token_ids[:-1] for prompt in prompts])  # [batch, slots]
    positions = table([range(len(prompt.token_ids) - 1) for prompt in prompts])
    if slots:
        slab = backbone.slab(len(prompts), slots)
        backbone.forward(token_ids.clamp(min=0), positions, slab)
        keys, values = tuple(x.keys for x in slab.slab_layers), tuple(x.values for x in slab.slab_layers)
    else:
        keys, values = _no_slots(backbone, len(prompts))
    return KVCache(
        keys=keys,
        values=values,
        positions=positions,
        token_ids=token_ids,
        segments=table([prompt.segments[:-1] for prompt in prompts]),
        origins=torch.where(positions == PAD, PAD, int(Origin.own)),
        pending=torch.tensor([prompt.token_ids[-1] for prompt in prompts], device=device),
        pending_position=torch.tensor([len(prompt.token_ids) - 1 for prompt in prompts], device=device),
        pieces=tuple(prompt.pieces[:-1] for prompt in prompts),
        rope=backbone.geometry.rope,
    )


def _no_slots(backbone: Backbone, batch: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Empty layers for prompts of one token: that token is pending and nothing is cached."""
    slab = backbone.slab(batch, 1)
    zero = torch.zeros(batch, 1, dtype=torch.int64, device=backbone.device)
    backbone.forward(zero, zero, slab)
    return tuple(x.keys[:, :, :0] for x in slab.slab_layers), tuple(x.values[:, :, :0] for x in slab.slab_layers)
