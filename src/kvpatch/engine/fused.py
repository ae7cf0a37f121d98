"""The decoding step's operations on a GPU, each one kernel of `kernels`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvpatch.engine.exact_products import Products
from kvpatch.engine.kernels import (
    INNER_BLOCK,
    SLOT_BLOCK,
    VOCABULARY_BLOCK,
    VOCABULARY_SPLIT,
    attend_kernel,
    choose_kernel,
    gated_kernel,
    norm_kernel,
    note_kernel,
)
from kvpatch.engine.reading_kernels import add_norm_kernel
from kvpatch.engine.step import Places, Sampling, rotary_tables
from kvpatch.models.backbone import Backbone
from kvpatch.models.fp8 import Weight
from kvpatch.models.llamalike import LayerWeights, Network


def what_is_unfit(network: Network) -> str | None:
    """Why these kernels can't run a network, or None."""
    half = network.head_dim // 2
    if half < 16 or half & (half - 1):
        return f"heads of {network.head_dim} dimensions"
    if network.group > 16:
        return f"{network.group} query heads to a KV head"
    return None


def norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm of [rows, width]."""
    rows, width = hidden.shape
    out = torch.empty_like(hidden)
    norm_kernel[(rows,)](hidden, weight, out, epsilon, width, **_row_of(width))
    return out


def add_norm(hidden: Tensor, added: Tensor, after: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """Add to hidden [rows, width] in place, `added` first normed where there is an `after`; the norm of the sum."""
    rows, width = hidden.shape
    out = torch.empty_like(hidden)
    add_norm_kernel[(rows,)](
        hidden,
        added,
        weight if after is None else after,
        weight,
        out,
        epsilon,
        width,
        HAS_AFTER=after is not None,
        **_row_of(width),
    )
    return out


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of [rows, 2 * inner]."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    grid = (rows, triton.cdiv(inner, INNER_BLOCK))
    gated_kernel[grid](gate_up, out, inner, IS_SILU=activation == "silu", BLOCK=INNER_BLOCK)
    return out


def _row_of(width: int) -> dict[str, int]:
    """How a kernel takes a row of so many numbers."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


class FusedOps:
    """The parts of a step that are no matrix product, fused, and products whose rows do not depend on their number."""

    def __init__(
        self, backbone: Backbone, network: Network, sampling: Sampling, positions: int, products: Products
    ) -> None:
        self.backbone, self.network, self.sampling, self.products = backbone, network, sampling, products
        self.tables = rotary_tables(backbone, network, positions)
        self.precision = "ieee" if backbone.dtype == torch.float32 else "tf32"

    def begin(self, places: Places) -> None:
        if any(layer.window is not None for layer in self.network.layers):
            slot = (places.area + places.step.long())[:, None]
            places.slot_positions.scatter_(1, slot, places.position[:, None].int())

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return norm(hidden, weight, self.network.epsilon)

    def add_norm(self, hidden: Tensor, added: Tensor, after: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, add_norm(hidden, added, after, weight, self.network.epsilon)

    def gated(self, gate_up: Tensor) -> Tensor:
        return gated(gate_up, self.network.activation)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        return self.products.linear(x, weight, bias)

    def attend(self, layer: int, weights: LayerWeights, qkv: Tensor, places: Places) -> Tensor:
        net, count = self.network, len(places)
        out = qkv.new_empty(count, net.query_heads * net.head_dim)
        cos, sin = self.tables[weights.rope]
        edit = places.steering.get(layer)
        steering = None
        if edit is not None:
            steering = edit.steer
            edit.fired += 1
        has_norm = weights.query_norm is not None
        attend_kernel[(count * net.kv_heads,)](
            qkv,
            places.keys[layer],
            places.values[layer],
            out,
            cos,
            sin,
            places.first,
            places.step,
            places.position,
            places.going.view(torch.uint8),
            places.slot_positions,
            weights.query_norm if has_norm else cos,
            weights.key_norm if has_norm else cos,
            cos if steering is None else steering,
            net.attention_scale,
            net.epsilon,
            places.area,
            places.capacity,
            weights.window or 0,
            KV_HEADS=net.kv_heads,
            GROUP=net.group,
            GROUP_BLOCK=16,
            HALF=net.head_dim // 2,
            BLOCK=SLOT_BLOCK,
            HAS_NORM=has_norm,
            HAS_WINDOW=weights.window is not None,
            HAS_STEERING=steering is not None,
            PRECISION=self.precision,
            num_warps=4,
            num_stages=2,
        )
        return out

    def advance(self, logits: Tensor, places: Places) -> None:
        count, vocabulary = logits.shape
        splits = triton.cdiv(vocabulary, VOCABULARY_SPLIT)
        factor, cap = self.backbone.logit_scaling
        numbers = logits.new_empty(3, count, splits, dtype=torch.float32)  # best score, largest logit, sum of exp
        tokens = logits.new_empty(count, splits, dtype=torch.int32)
        choose_kernel[(count, splits)](
            logits,
            places.seeds,
            places.step,
            numbers,
            tokens,
            vocabulary,
            splits,
            self.sampling.temperature,
            factor,
            cap or 1.0,
            IS_GREEDY=self.sampling.temperature == 0,
            HAS_FACTOR=factor != 1.0,
            HAS_CAP=cap is not None,
            SPLIT=VOCABULARY_SPLIT,
            BLOCK=VOCABULARY_BLOCK,
            num_warps=8,
        )
        note_kernel[(count,)](
            logits,
            numbers,
            tokens,
            places.token_ids,
            places.logprobs,
            places.feed,
            places.position,
            places.step,
            places.going.view(torch.uint8),
            places.ends,
            vocabulary,
            splits,
            places.limit,
            len(places.ends),
            factor,
            cap or 1.0,
            HAS_FACTOR=factor != 1.0,
            HAS_CAP=cap is not None,
            SPLITS=triton.next_power_of_2(splits),
            num_warps=1,
        )
