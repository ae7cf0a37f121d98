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
    rounded_gated_kernel,
)
from kvpatch.engine.places import Places
from kvpatch.engine.reading_kernels import add_norm_kernel
from kvpatch.engine.step import Sampling, rotary_tables
from kvpatch.models.backbone import Backbone
from kvpatch.models.e4m3 import NUMBERS, Rounded
from kvpatch.models.fp8 import Input, Weight, are_rounded_for
from kvpatch.models.fp8_kernels import row_of
from kvpatch.models.llamalike import LayerWeights, Network

WHOLE_SLOTS = {"BLOCK": SLOT_BLOCK, "num_warps": 4, "num_stages": 2}
"""How attention walks the slots of a row."""
SLOTS_IN_8_BITS = {"BLOCK": 32, "num_warps": 1, "num_stages": 3}
"""The same where slots hold 8 bits: turning those into float16 takes instructions, of which fewer warps run fewer, and
registers, which larger heads have none left of (benchmarks/LOG.md has the ways that were timed)."""


def what_is_unfit(network: Network) -> str | None:
    """Why these kernels can't run a network, or None."""
    half = network.head_dim // 2
    if half < 16 or half & (half - 1):
        return f"heads of {network.head_dim} dimensions"
    if network.group > 16:
        return f"{network.group} query heads to a KV head"
    return None


def norm(hidden: Tensor, weight: Tensor, epsilon: float, following: Weight | None = None) -> Input:
    """Root mean square norm of [rows, width], as the matrix that multiplies it next takes it."""
    rows, width = hidden.shape
    made, out, scale = _room(hidden, width, following)
    norm_kernel[(rows,)](hidden, weight, out, scale, epsilon, width, **row_of(width))
    return made


def add_norm(
    hidden: Tensor, added: Tensor, after: Tensor | None, weight: Tensor, epsilon: float, following: Weight | None = None
) -> Input:
    """Add to hidden [rows, width] in place, `added` first normed where there is an `after`; the norm of the sum, as the
    matrix that multiplies it next takes it."""
    rows, width = hidden.shape
    made, out, scale = _room(hidden, width, following)
    add_norm_kernel[(rows,)](
        hidden,
        added,
        weight if after is None else after,
        weight,
        out,
        scale,
        epsilon,
        width,
        HAS_AFTER=after is not None,
        **row_of(width),
    )
    return made


def gated(gate_up: Tensor, activation: str, following: Weight | None = None) -> Input:
    """activation(gate) * up of [rows, 2 * inner], as the matrix that multiplies it next takes it."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    is_silu = activation == "silu"
    made, out, scale = _room(gate_up, inner, following)
    if isinstance(made, Rounded):
        rounded_gated_kernel[(rows,)](gate_up, out, scale, inner, IS_SILU=is_silu, **row_of(inner))
    else:
        grid = (rows, triton.cdiv(inner, INNER_BLOCK))
        gated_kernel[grid](gate_up, out, inner, IS_SILU=is_silu, BLOCK=INNER_BLOCK)
    return made


def _room(like: Tensor, inner: int, following: Weight | None) -> tuple[Input, Tensor, Tensor]:
    """Room for rows [rows, inner] that a matrix multiplies next, and what a kernel is to write into: the numbers and
    their scales, which rows of the model's own type have none of."""
    if not are_rounded_for(following):
        whole = like.new_empty(len(like), inner)
        return whole, whole, whole
    numbers = like.new_empty(len(like), inner, dtype=NUMBERS)
    scale = like.new_empty(len(like), 1, dtype=torch.float32)
    return Rounded(numbers, scale), numbers, scale


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

    def norm(self, hidden: Tensor, weight: Tensor, following: Weight) -> Input:
        return norm(hidden, weight, self.network.epsilon, following)

    def add_norm(
        self, hidden: Tensor, added: Tensor, after: Tensor | None, weight: Tensor, following: Weight
    ) -> tuple[Tensor, Input]:
        return hidden, add_norm(hidden, added, after, weight, self.network.epsilon, following)

    def gated(self, gate_up: Tensor, following: Weight) -> Input:
        return gated(gate_up, self.network.activation, following)

    def linear(self, x: Input, weight: Weight, bias: Tensor | None = None) -> Tensor:
        return self.products.linear(x, weight, bias)

    def attend(self, layer: int, weights: LayerWeights, qkv: Tensor, places: Places) -> Tensor:
        net, count = self.network, len(places)
        out = qkv.new_empty(count, net.query_heads * net.head_dim)
        cos, sin = self.tables[weights.rope]
        keys, values = places.keys[layer], places.values[layer]
        edit = places.steering.get(layer)
        steering = None
        if edit is not None:
            steering = edit.steer
            edit.fired += 1
        has_norm = weights.query_norm is not None
        attend_kernel[(count * net.kv_heads,)](
            qkv,
            keys.numbers,
            values.numbers,
            cos if keys.scale is None else keys.scale,
            cos if values.scale is None else values.scale,
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
            HAS_NORM=has_norm,
            HAS_WINDOW=weights.window is not None,
            HAS_STEERING=steering is not None,
            PRECISION=self.precision,
            **(WHOLE_SLOTS if keys.scale is None or net.head_dim > 128 else SLOTS_IN_8_BITS),
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
