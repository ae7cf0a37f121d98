"""One decoding step of a Llama-like model over places, all on the device and without a look from the host.

    embed the token each place feeds
      -> layers: norm, queries/keys/values in one product, attention, output; norm, gate and up in one product, down
      -> norm -> logits -> choose with the row's own noise -> write down token and log-probability -> feed it next

`Places` are the buffers; a step changes nothing else, so that it can be captured in a CUDA graph. `PlainOps` carries it
out with torch alone; `fused.FusedOps` does the same with Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpatch.engine.places import Places, multiplies_keys
from kvpatch.engine.sampling import choose
from kvpatch.models.backbone import Backbone
from kvpatch.models.fp8 import Input, Weight
from kvpatch.models.llamalike import LayerWeights, Network
from kvpatch.models.products import LaidOut

ROWS_OF_LOGITS = 32
"""Rows whose tokens are chosen at a time on a CPU."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and which of them end a row."""

    temperature: float
    top_p: float
    end_tokens: tuple[int, ...]


class Ops(Protocol):
    """The parts of a step. Hidden states are [places, width].

    What makes rows that a product follows is told the matrix, `following`: for one of 8 floating bits it may give them
    rounded already.
    """

    def begin(self, places: Places) -> None:
        """Prepare what the layers of one step share."""
        ...

    def norm(self, hidden: Tensor, weight: Tensor, following: Weight) -> Input:
        """Root mean square norm."""
        ...

    def add_norm(
        self, hidden: Tensor, added: Tensor, after: Tensor | None, weight: Tensor, following: Weight
    ) -> tuple[Tensor, Input]:
        """hidden + added, `added` first normed where there is an `after`, and the norm of the sum. `hidden` may change
        in place."""
        ...

    def gated(self, gate_up: Tensor, following: Weight) -> Input:
        """activation(gate) * up of [places, 2 * inner]."""
        ...

    def linear(self, x: Input, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias."""
        ...

    def attend(self, layer: int, weights: LayerWeights, qkv: Tensor, places: Places) -> Tensor:
        """Turn queries and keys, write keys and values into the slab, attend; [places, query_heads * head_dim]."""
        ...

    def advance(self, logits: Tensor, places: Places) -> None:
        """Choose tokens, write them down, and feed them next. logits [places, vocabulary]."""
        ...


def decode_step(backbone: Backbone, network: Network, ops: Ops, places: Places) -> None:
    """One step of every place."""
    ops.advance(feed_step(backbone, network, ops, places), places)


def feed_step(backbone: Backbone, network: Network, ops: Ops, places: Places) -> Tensor:
    """Feed every place its token; the head's outputs [places, vocabulary]."""
    hidden = F.embedding(places.feed, network.embedding)  # [places, width]
    if network.embedding_scale is not None:
        hidden = hidden * network.embedding_scale
    ops.begin(places)
    entered = [*network.entered, (network.norm, backbone.head.weight)]
    normed = ops.norm(hidden, *entered[0])
    for index, layer in enumerate(network.layers):
        qkv = ops.linear(normed, layer.qkv, layer.qkv_bias)
        attended = ops.linear(ops.attend(index, layer, qkv, places), layer.out)
        hidden, normed = ops.add_norm(hidden, attended, layer.after_attention, layer.before_mlp, layer.gate_up)
        inner = ops.linear(ops.gated(ops.linear(normed, layer.gate_up), layer.down), layer.down)
        hidden, normed = ops.add_norm(hidden, inner, layer.after_mlp, *entered[index + 1])
    return ops.linear(normed, backbone.head.weight, backbone.head.bias)


class PlainOps:
    """The parts of a step in torch: for CPUs, and for a GPU without Triton. Rows are given whole."""

    def __init__(self, backbone: Backbone, network: Network, sampling: Sampling, positions: int) -> None:
        self.backbone, self.network, self.sampling = backbone, network, sampling
        self.tables = rotary_tables(backbone, network, positions)
        self.products, self.multiplies = LaidOut(backbone.head.weight), multiplies_keys(backbone)
        self.slot = torch.empty(0)
        self.slots: tuple[Any, ...] = ()
        self.masks: dict[int | None, Tensor] = {}
        self.turns: list[tuple[Tensor, Tensor]] = []

    def begin(self, places: Places) -> None:
        self.slot = places.area + places.step.long()  # [places]
        places.slot_positions.scatter_(1, self.slot[:, None], places.position[:, None].int())
        self.slots = self._index_of_slots()
        slots = torch.arange(places.live, device=self.slot.device)
        may = (slots >= places.first[:, None]) & (slots <= self.slot[:, None])  # [places, live slots]
        self.masks = {}
        for window in {layer.window for layer in self.network.layers}:
            seen = may
            if window is not None:
                seen = may & (places.position[:, None] - places.slot_positions[:, : places.live] < window)
            dtype = places.keys[0].numbers.dtype if places.keys[0].scale is None else torch.float32
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            bias = bias.masked_fill_(~seen, float("-inf"))
            if self.multiplies:
                self.masks[window] = bias.repeat_interleave(self.network.kv_heads, dim=0)[:, None]
            else:
                self.masks[window] = bias[:, None, None]
        self.turns = [(cos[places.position][:, None], sin[places.position][:, None]) for cos, sin in self.tables]

    def _index_of_slots(self) -> tuple[Any, ...]:
        """Where keys and values of this step go. Mostly it is one slot for all places, and writing to that is quick; a
        GPU is not asked."""
        if self.slot.device.type == "cpu" and bool((self.slot == self.slot[0]).all()):
            return slice(None), slice(None), int(self.slot[0])
        return torch.arange(len(self.slot), device=self.slot.device), slice(None), self.slot

    def norm(self, hidden: Tensor, weight: Tensor, following: Weight | None = None) -> Tensor:
        x = hidden.float()
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.network.epsilon)
        return (x * weight).to(hidden.dtype)

    def add_norm(
        self, hidden: Tensor, added: Tensor, after: Tensor | None, weight: Tensor, following: Weight
    ) -> tuple[Tensor, Tensor]:
        hidden = hidden.add_(added if after is None else self.norm(added, after))
        return hidden, self.norm(hidden, weight)

    def reuse(self, weights: Sequence[Weight]) -> None:
        """Lay these weights out for many steps, through which they must not change."""
        self.products = LaidOut(self.backbone.head.weight, weights)

    def linear(self, x: Input, weight: Weight, bias: Tensor | None = None) -> Tensor:
        return self.products.linear(x, weight, bias)

    def gated(self, gate_up: Tensor, following: Weight) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        active = F.silu(gate) if self.network.activation == "silu" else F.gelu(gate, approximate="tanh")
        return active.mul_(up)

    def attend(self, layer: int, weights: LayerWeights, qkv: Tensor, places: Places) -> Tensor:
        net, count = self.network, len(places)
        heads = qkv.view(count, net.query_heads + 2 * net.kv_heads, net.head_dim)
        qk, v = heads.split([net.query_heads + net.kv_heads, net.kv_heads], dim=1)  # [places, heads, head_dim]
        if weights.query_norm is not None and weights.key_norm is not None:
            q, k = qk.split([net.query_heads, net.kv_heads], dim=1)
            qk = torch.cat([self.norm(q, weights.query_norm), self.norm(k, weights.key_norm)], dim=1)
        q, k = _turned(qk, *self.turns[weights.rope]).split([net.query_heads, net.kv_heads], dim=1)
        if edit := places.steering.get(layer):
            v = edit.apply("value", v[:, :, None])[:, :, 0]
        places.keys[layer].write(self.slots, k)
        places.values[layer].write(self.slots, v)
        q = q.reshape(count, net.kv_heads, net.group, net.head_dim)
        live = (slice(None), slice(None), slice(0, places.live))
        keys, values = places.keys[layer].read(live), places.values[layer].read(live)
        mask = self.masks[weights.window]
        if not self.multiplies:
            q = q.to(keys.dtype)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=net.attention_scale)
            return out.reshape(count, -1).to(qkv.dtype)
        scores = torch.baddbmm(mask, q.flatten(0, 1).to(keys), keys.mT.flatten(0, 1), alpha=net.attention_scale)
        return torch.bmm(scores.softmax(dim=-1).to(values), values.flatten(0, 1)).view(count, -1)

    def advance(self, logits: Tensor, places: Places) -> None:
        # On a CPU a few rows at a time, whose logits stay in its cache through all the passes over them.
        step = ROWS_OF_LOGITS if logits.device.type == "cpu" else len(logits)
        chosen, logprobs = [], []
        for low in range(0, len(logits), step):
            rows = slice(low, low + step)
            part = self.backbone.scaled(logits[rows].float())
            chosen.append(
                choose(part, places.seeds[rows], places.step[rows], self.sampling.temperature, self.sampling.top_p)
            )
            logprobs.append(part.gather(1, chosen[-1][:, None]) - part.logsumexp(dim=-1, keepdim=True))
        note_choice(places, torch.cat(chosen), torch.cat(logprobs))


def note_choice(places: Places, chosen: Tensor, logprob: Tensor) -> None:
    """Write down tokens [places] and their log-probabilities [places, 1], and feed the tokens next."""
    going = places.going
    at = places.step.long().clamp(max=places.limit - 1)[:, None]
    places.token_ids.scatter_(1, at, torch.where(going[:, None], chosen[:, None], places.token_ids.gather(1, at)))
    places.logprobs.scatter_(1, at, torch.where(going[:, None], logprob, places.logprobs.gather(1, at)))
    places.feed.copy_(torch.where(going, chosen, places.feed))
    places.position.add_(going)
    places.step.add_(going)
    is_end = (chosen[:, None] == places.ends).any(dim=1)
    going.logical_and_(~is_end & (places.step < places.limit))


def rotary_tables(backbone: Backbone, network: Network, positions: int) -> list[tuple[Tensor, Tensor]]:
    """Cosines and sines, [positions, head_dim / 2] each, for each set of frequencies; rounded as the model rounds them,
    kept in float32."""
    at = torch.arange(positions, device=backbone.device, dtype=torch.float32)[:, None]
    tables = []
    for frequencies in network.frequencies:
        angle = at * torch.tensor(frequencies, dtype=torch.float64, device=backbone.device).float()
        cos, sin = angle.cos() * network.rope_scale, angle.sin() * network.rope_scale
        tables.append((cos.to(backbone.dtype).float(), sin.to(backbone.dtype).float()))
    return tables


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [places, heads, head_dim] by [places, 1, head_dim / 2]."""
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(heads.dtype)
