"""Read many tokens at once with the engine's own kernels: prefill and scoring of Llama-like models on a GPU.

    pack the tokens of all rows, without padding
      -> layers: queries/keys/values in one product, turned in place, attention; norms and sums between products in one
         pass over memory each
      -> states that are asked for -> products with the head, some thousand rows at a time, reduced at once

A row's numbers depend on its own tokens and its own cache alone, to the bit: see `reading_kernels` and
`exact_products`. Caches are read where they lie; several rows may go on from one row of a cache.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kvpatch.caches.devices import sent
from kvpatch.caches.kvcache import KVCache
from kvpatch.engine.exact_products import Products
from kvpatch.engine.fused import add_norm, gated, norm
from kvpatch.engine.pack import Held, Pack
from kvpatch.engine.reading_kernels import (
    KEY_BLOCK,
    QUERY_BLOCK,
    VOCABULARY_BLOCK,
    packed_attend_kernel,
    read_kernel,
    turn_kernel,
)
from kvpatch.engine.step import rotary_tables
from kvpatch.models.backbone import Backbone
from kvpatch.models.hf import Edits, LayerEdit
from kvpatch.models.llamalike import LayerWeights, Network

LOGITS_AT_ONCE = 1 << 28
"""Numbers of the head's outputs that are made at a time."""
OnLayer = Callable[[int, Tensor, Tensor], None]
"""Takes a layer's new keys and values, [tokens, kv_heads, head_dim] each, after RoPE and any edit."""


class Reader:
    """Reads packs with one Llama-like network."""

    def __init__(self, backbone: Backbone, network: Network, products: Products) -> None:
        self.backbone, self.network, self.products = backbone, network, products
        self.group_block = triton.next_power_of_2(network.group)
        self.queries = max(1, QUERY_BLOCK // self.group_block)
        self.precision = "ieee" if backbone.dtype == torch.float32 else "tf32"
        self._tables: list[tuple[Tensor, Tensor]] = []

    def makes(self, edits: Edits | None) -> bool:
        """Whether `read` makes these edits: not those of what attention gives."""
        return all(edit.output is None for edit in (edits or {}).values())

    @torch.no_grad()
    def read(
        self,
        pack: Pack,
        cache: KVCache | Held | None = None,
        *,
        edits: Edits | None = None,
        on_layer: OnLayer | None = None,
        wants_states: bool = True,
    ) -> Tensor:
        """Run a pack through the network.

        Args:
            cache: what the stretches go on from; not changed.
            edits: changes to queries, keys and values, made in the pack's padded table; there the residual stream is
                changed too, as `Backbone.changed_streams` says.
            on_layer: is given every layer's new keys and values.
            wants_states: False where keys and values are all that is asked for.
        Returns:
            States behind the last norm, [tokens, width]; of no tokens where they are not wanted.
        """
        network, device = self.network, self.backbone.device
        count = len(pack.token_ids)
        room = _rounded(count)
        token_ids, positions = (_padded(numbers, room, device) for numbers in (pack.token_ids, pack.positions))
        streams = self.backbone.changed_streams
        place = tuple(sent(at, device) for at in (pack.row, pack.column)) if edits or streams else ()
        tiles = sent(pack.segments.tiles(self.queries), device)
        tables = self._tables_for(int(pack.positions.max(initial=0)) + 1)
        hidden = F.embedding(token_ids, network.embedding)  # [room, width]
        if network.embedding_scale is not None:
            hidden = hidden * network.embedding_scale
        normed = norm(hidden, network.layers[0].before_attention, network.epsilon, network.layers[0].qkv)
        entered = [*network.entered, (network.norm, None)]  # states are given as they are
        for index, layer in enumerate(network.layers):
            for change in streams.get(index, ()):
                hidden[:count] = change(_table(hidden[:count], pack.shape, place))[place]
                normed = norm(hidden, layer.before_attention, network.epsilon, layer.qkv)
            qkv = self.products.linear(normed, layer.qkv, layer.qkv_bias)
            self._turn(qkv, layer, tables[layer.rope], positions)
            heads = qkv.view(room, -1, network.head_dim)[:count]
            if edits and (edit := edits.get(index)):
                self._edit(heads, edit, pack.shape, place)
            if on_layer is not None:
                _, keys, values = heads.split([network.query_heads, network.kv_heads, network.kv_heads], dim=1)
                on_layer(index, keys, values)
            if index + 1 == len(network.layers) and not wants_states:
                return hidden[:0]
            attended = self._attend(index, layer, qkv, tiles, positions, cache)
            added = self.products.linear(attended, layer.out)
            normed = add_norm(hidden, added, layer.after_attention, layer.before_mlp, network.epsilon, layer.gate_up)
            inner = gated(self.products.linear(normed, layer.gate_up), network.activation, layer.down)
            added = self.products.linear(inner, layer.down)
            weight, following = entered[index + 1]
            normed = add_norm(hidden, added, layer.after_mlp, weight, network.epsilon, following)
        return normed[:count]

    def token_logprobs(self, states: Tensor, token_ids: Tensor, of: np.ndarray) -> tuple[Tensor, Tensor]:
        """Log-probability of tokens [n] at the states [n] that `of` names, and the entropies of what they were drawn
        from; states [states, width] are as `read` gives them. Both [n], float32, nats."""
        order = np.argsort(of, kind="stable")
        step = self._states_at_once
        bounds = range(0, len(states), step)
        ends = np.searchsorted(of[order], [*bounds, len(states)]).tolist()
        places, states_of = sent(order, states.device), sent(of[order], states.device)
        logprobs, entropies = (torch.empty(len(of), device=states.device) for _ in range(2))
        for low, first, end in zip(bounds, ends[:-1], ends[1:], strict=True):
            logits = self._head(states[low : low + step])
            totals, means = self._reduced(logits)
            at, state = places[first:end], states_of[first:end] - low
            chosen = self.backbone.scaled(logits[state, token_ids[at]].float())
            logprobs[at] = chosen - totals[state]
            entropies[at] = totals[state] - means[state]
        return logprobs, entropies

    def logits(self, states: Tensor) -> Tensor:
        """Logits [states, vocabulary], float32."""
        parts = states.split(self._states_at_once)
        return torch.cat([self.backbone.scaled(self._head(part)[: len(part)].float()) for part in parts])

    @property
    def _states_at_once(self) -> int:
        """States whose logits are made at a time: a number that `_rounded` leaves as it is."""
        return max(512, LOGITS_AT_ONCE // len(self.backbone.head.weight) // 512 * 512)

    def _head(self, states: Tensor) -> Tensor:
        """The head's outputs of states, in the model's type; rows past the states' number mean nothing."""
        room = _rounded(len(states))
        filled = F.pad(states, (0, 0, 0, room - len(states))) if room > len(states) else states
        head = self.backbone.head
        return self.products.linear(filled, head.weight, head.bias)

    def _reduced(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the sum of each row's softmax, and the mean of its logits under it."""
        rows, vocabulary = logits.shape
        totals, means = (torch.empty(rows, device=logits.device) for _ in range(2))
        factor, cap = self.backbone.logit_scaling
        read_kernel[(rows,)](
            logits,
            totals,
            means,
            vocabulary,
            factor,
            cap or 1.0,
            HAS_FACTOR=factor != 1.0,
            HAS_CAP=cap is not None,
            BLOCK=VOCABULARY_BLOCK,
            num_warps=8,
        )
        return totals, means

    def _tables_for(self, positions: int) -> list[tuple[Tensor, Tensor]]:
        if not self._tables or len(self._tables[0][0]) < positions:
            self._tables = rotary_tables(self.backbone, self.network, -(-positions // 256) * 256)
        return self._tables

    def _turn(self, qkv: Tensor, layer: LayerWeights, table: tuple[Tensor, Tensor], positions: Tensor) -> None:
        net = self.network
        cos, sin = table
        has_norm = layer.query_norm is not None
        turn_kernel[(len(qkv),)](
            qkv,
            cos,
            sin,
            positions,
            layer.query_norm if has_norm else cos,
            layer.key_norm if has_norm else cos,
            net.epsilon,
            QUERY_HEADS=net.query_heads,
            KV_HEADS=net.kv_heads,
            HEADS_BLOCK=triton.next_power_of_2(net.query_heads + net.kv_heads),
            HALF=net.head_dim // 2,
            HAS_NORM=has_norm,
            num_warps=4,
        )

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        qkv: Tensor,
        tiles: Tensor,
        positions: Tensor,
        cache: KVCache | Held | None,
    ) -> Tensor:
        """[tokens, query_heads * head_dim]; of tokens in no tile whatever lies there."""
        net = self.network
        out = qkv.new_empty(len(qkv), net.query_heads * net.head_dim)
        keys, values = (qkv, qkv) if cache is None else (cache.keys[index], cache.values[index])
        strides = [0] * 6 if cache is None else [*keys.stride()[:3], *values.stride()[:3]]
        packed_attend_kernel[(len(tiles), net.kv_heads)](
            qkv,
            keys,
            values,
            out,
            tiles,
            positions,
            positions if cache is None else cache.positions.contiguous(),
            net.attention_scale,
            0 if cache is None else cache.positions.shape[1],
            *strides,
            layer.window or 0,
            KV_HEADS=net.kv_heads,
            GROUP=net.group,
            GROUP_BLOCK=self.group_block,
            QUERIES=self.queries,
            DIM=net.head_dim,
            BLOCK=KEY_BLOCK if net.head_dim <= 128 else KEY_BLOCK // 2,
            HAS_CACHE=cache is not None,
            HAS_WINDOW=layer.window is not None,
            PRECISION=self.precision,
            num_warps=4,
            num_stages=2,
        )
        return out

    def _edit(self, heads: Tensor, edit: LayerEdit, shape: tuple[int, int], place: tuple[Tensor, ...]) -> None:
        """Make an edit in the padded table it is written for, [rows, heads, columns, head_dim]. heads: [tokens, heads,
        head_dim], changed in place; place: row and column of each token, of a table of this shape."""
        net = self.network
        parts = zip(
            ("query", "key", "value"), heads.split([net.query_heads, net.kv_heads, net.kv_heads], dim=1), strict=True
        )
        for part, own in parts:
            if getattr(edit, part) is None and not (part == "value" and edit.steer is not None):
                continue
            table = _table(own, shape, place).transpose(1, 2)
            own.copy_(edit.apply(part, table).transpose(1, 2)[place])


def _table(own: Tensor, shape: tuple[int, int], place: tuple[Tensor, ...]) -> Tensor:
    """Tokens [tokens, ...] in their padded table [rows, columns, ...], zeros where padded. place: row and column of
    each token."""
    table = own.new_zeros(*shape, *own.shape[1:])
    table[place] = own
    return table


def _rounded(rows: int) -> int:
    """Few numbers of rows, so that few shapes of products are tried: multiples of 64, 128 and 512, and beyond 16,384,
    which narrow models alone take at a time, of a sixteenth of the power of two below."""
    step = 64 if rows <= 512 else 128 if rows <= 2048 else max(512, 1 << (rows - 1).bit_length() - 5)
    return max(step, -(-rows // step) * step)


def _padded(numbers: np.ndarray, room: int, device: torch.device) -> Tensor:
    """[room] on the device, zeros behind the numbers."""
    filled = np.zeros(room, dtype=np.int64)
    filled[: len(numbers)] = numbers
    return sent(filled, device)
