"""What each layer of a model may attend to, read off the masks that transformers makes for it.

Not every attention module passes its window on, so the module's arguments do not tell it. What counts is the mask that
the model gives a layer. `read_masks` lets the model run over a few tokens with a mask interface of ours, which keeps
the rule that transformers fills each mask by; a layer is given a mask, and so tells its rule. The rule takes
any two positions, and so tells windows that are far longer than those few tokens.

This file knows transformers' mask interface; `hf` knows its cache and attention interfaces.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kvpatch.errors import ModelError

RECORDING = "kvpatch_masks"
TOKENS = 8
"""Tokens of the pass whose masks are read."""
FURTHEST = 1 << 20
"""Positions up to which a mask's rule is read, where the context is longer."""

Rule = Callable[..., Tensor]
"""(row, head, query position, slot position) -> whether the query may look there; takes tensors that broadcast."""


@dataclass(frozen=True)
class LayerMask:
    """What a layer's queries may look at, besides being causal: the last `window` positions, themselves included (None
    for all); `chunk` positions are cut into pieces of this size that do not see one another (None for no pieces)."""

    window: int | None = None
    chunk: int | None = None


@dataclass
class _Made:
    """A mask that transformers asked for: its rule, and the tensor it got."""

    rule: Rule
    mask: Tensor


@dataclass
class _Recording:
    made: list[_Made] = field(default_factory=list)
    given: dict[int, Tensor | None] = field(default_factory=dict)  # by layer
    copies: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )  # by identity: copy on another device, source


class _Copying(TorchFunctionMode):
    """Notes copies to other devices: a layer of a split model is given a copy of the mask that was made for it."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is Tensor.to and out is not args[0] and out.dtype == args[0].dtype:
            self.recording.copies[id(out)] = (out, args[0])
        return out


_running = threading.local()


def _kept_mask(mask_function: Rule, dtype: torch.dtype = torch.float32, **settings: Any) -> Tensor:
    """A mask as eager attention wants it, [batch, 1, queries, slots], always made and never left to the kernel."""
    settings |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    visible = sdpa_mask(mask_function=mask_function, **settings)
    assert visible is not None  # it may be left out only where that is allowed
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    mask.masked_fill_(~visible, torch.finfo(dtype).min)
    _running.recording.made.append(_Made(mask_function, mask))
    return mask


def _recorded_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention as usual, the layer's mask kept. Shapes as in `hf.attend`."""
    _running.recording.given[int(module.layer_idx)] = attention_mask
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(RECORDING, _recorded_attention)
AttentionMaskInterface.register(RECORDING, _kept_mask)


@contextlib.contextmanager
def _recording(configs: Sequence[Any]) -> Iterator[_Recording]:
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = RECORDING
    _running.recording = _Recording()
    try:
        yield _running.recording
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own
        del _running.recording


@torch.no_grad()
def read_masks(
    decoder: nn.Module, configs: Sequence[Any], layers: int, context: int, device: torch.device
) -> tuple[LayerMask, ...]:
    """The mask of every layer.

    Args:
        decoder: the model without its head.
        configs: the configurations that its layers take their attention from.
        layers, context: how many layers there are, and positions.
    Raises:
        ModelError: for a layer whose mask is neither full, a sliding window nor chunks.
    """
    vocabulary = configs[0].vocab_size
    tokens = torch.arange(min(TOKENS, context, vocabulary), device=device)[None] + vocabulary // 3
    with _recording(configs) as recording, _Copying(recording):
        decoder(input_ids=tokens % vocabulary, use_cache=False)
    found, known = [], {}
    for layer in range(layers):
        rule = _rule_of(recording, layer)
        if id(rule) not in known:
            known[id(rule)] = classify(rule, min(context, FURTHEST), layer, device)
        found.append(known[id(rule)])
    return tuple(found)


def _rule_of(recording: _Recording, layer: int) -> Rule:
    """The rule that a layer's mask was filled by.

    The layer must have been given that very tensor, or a copy of it on another device. One that is made from it, be it
    of the same numbers here, may hide more in longer texts: sparse attention that keeps the best so many slots does. A
    layer that is given none attends both ways or makes its mask by itself.
    """
    given = recording.given.get(layer)
    if given is None:
        raise ModelError(f"layer {layer} gets no mask from transformers, so what it attends to can't be known")
    while id(given) in recording.copies:
        given = recording.copies[id(given)][1]
    for made in recording.made:
        if given.data_ptr() == made.mask.data_ptr() and given.shape == made.mask.shape:
            return made.rule
    raise ModelError(
        f"layer {layer} makes a mask of its own from the one that transformers makes for it, which kvpatch can't follow"
    )


def classify(rule: Rule, context: int, layer: int, device: torch.device) -> LayerMask:
    """What kind of mask a rule makes over positions [0, context).

    The first position is seen by the queries of the first window or chunk, which tells its size. The kind so found is
    held against whole rows of the mask, near every end of a window and far behind it.

    Raises:
        ModelError: where it is of no known kind.
    """
    zero = torch.zeros((), dtype=torch.int64, device=device)

    def ask(query: Tensor, slot: Tensor) -> Tensor:
        answer = rule(zero, zero, query, slot)
        return torch.as_tensor(answer, device=device).broadcast_to(torch.broadcast_shapes(query.shape, slot.shape))

    try:
        of_first = ask(torch.arange(context, device=device), zero)
        size = int(of_first.sum())
        rows = sorted(
            {r for n in (1, size, 2 * size, 3 * size, context // 2, context) for r in (n - 2, n - 1, n, n + 1)}
        )
        seen = {q: ask(zero + q, torch.arange(min(q + 3, context), device=device)) for q in rows if 0 <= q < context}
    except Exception as error:
        raise ModelError(f"layer {layer} has a mask of its own making, which kvpatch can't follow") from error
    if any(bool(row[query + 1 :].any()) for query, row in seen.items()):
        raise ModelError(
            f"layer {layer} lets tokens see later ones (bidirectional attention), which kvpatch can't follow"
        )
    kinds = [LayerMask()] if size == context else [LayerMask(window=size), LayerMask(chunk=size)]
    for kind in kinds:
        if all(torch.equal(row, _row(kind, query, len(row), device)) for query, row in seen.items()):
            return kind
    raise ModelError(
        f"layer {layer} has a mask that is neither full, a sliding window nor chunks; kvpatch can't follow it"
    )


def _row(kind: LayerMask, query: int, slots: int, device: torch.device) -> Tensor:
    """What a query at a position may look at, [slots]."""
    slot = torch.arange(slots, device=device)
    may = slot <= query
    if kind.window is not None:
        may &= query - slot < kind.window
    if kind.chunk is not None:
        may &= slot // kind.chunk == query // kind.chunk
    return may
