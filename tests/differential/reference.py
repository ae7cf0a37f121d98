"""A slow second opinion: prompts, patches and continuations by transformers alone, one row and one slot at a time.

Nothing of kvpatch is imported here. Keys and values come from the model's own forward pass with its eager attention; a
patch is carried out slot by slot, as `Patch` documents it; a key is moved by the matrices of the model's own rotary
module; and what follows a patched cache is computed under a mask written out here: a query sees the slots written up
to its own, and a window counts positions. What follows a natural cache is the model's plain uncached forward pass.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

NAMES = ("bos", "template", "body", "trailer")
SINKS = 4
Spec = dict[str, Any]
"""A patch as plain data: the fields of `Patch`, every one present."""


class IllegalError(Exception):
    """The documented semantics refuse this."""


class UndecidedError(Exception):
    """The documentation leaves this open, so there is nothing to compare with."""


@dataclass(frozen=True)
class Prompt:
    """Tokens with the name of each one's segment and its piece of text; the last token is pending."""

    token_ids: tuple[int, ...]
    segments: tuple[str, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """One cached token. `keys` and `values` hold one [kv_heads, head_dim] a layer, keys as they are cached."""

    token_id: int
    segment: str
    piece: str
    position: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """One cached prompt. `natural` holds its tokens, the pending one too, as long as no patch has changed it."""

    slots: tuple[Slot, ...]
    pending: int
    pending_position: int
    natural: tuple[int, ...] | None


class Reference:
    """A saved model, run by transformers with eager attention in float32.

    Attributes:
        windows: attention window of each layer in tokens, None for full attention.
        context: most positions the model takes.
        switch: length past which the frequencies of the model's RoPE change, or None.
        adds_positions: whether positions enter through the embeddings, so that no key can be moved.
    """

    def __init__(self, directory: Path) -> None:
        self.hf: Any = AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self.hf.requires_grad_(False)
        config = self.config = self.hf.config
        self.layers = int(config.num_hidden_layers)
        types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        self.layer_types: list[str] | None = None if types is None else list(types)
        is_sliding = [kind == "sliding_attention" for kind in types] if types else [window is not None] * self.layers
        self.windows = [window if sliding else None for sliding in is_sliding]
        self.context = int(config.max_position_embeddings)
        rope = getattr(config, "rope_parameters", None) or {}
        self.switch = rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None
        self.rotary = getattr(self.hf.base_model, "rotary_emb", None)
        self.adds_positions = self.rotary is None
        self._cache_name = "cache" if "cache" in inspect.signature(self.hf.forward).parameters else "past_key_values"
        self._matrices: dict[tuple[str, int], Tensor] = {}
        self._mask_is_the_model_s_own()

    def _mask_is_the_model_s_own(self) -> None:
        """On a natural prompt longer than every window, the mask written here and the model's own give one result."""
        tokens = list(range(10, 10 + min(self.context, self.switch or 60, 60)))
        own = self.logits(tokens)
        written = self.after(Row((), tokens[0], 0, None), tokens[1:])
        error = float((own[: len(written)] - written).abs().max() / own.abs().max())
        assert error < 1e-5, f"{type(self.hf).__name__}: the reference's mask is not the model's: {error}"

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[tokens, vocabulary], of the model's plain uncached forward pass under its own mask."""
        return self.hf(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]

    @torch.no_grad()
    def prefill(self, prompt: Prompt) -> Row:
        """The cache of one prompt alone, in layers that drop nothing."""
        # The pending token counts: a prompt after which nothing could be fed is of no use.
        self.must_fit(len(prompt.token_ids), fed=len(prompt.token_ids))
        cached = list(prompt.token_ids[:-1])
        keys: list[Tensor] = []
        values: list[Tensor] = []
        if cached:
            cache = DynamicCache()
            self.hf(input_ids=torch.tensor([cached]), use_cache=True, **{self._cache_name: cache})
            keys, values = [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers]
        slots = tuple(
            Slot(
                token,
                prompt.segments[at],
                prompt.pieces[at],
                at,
                tuple(k[:, at] for k in keys),
                tuple(v[:, at] for v in values),
            )
            for at, token in enumerate(cached)
        )
        return Row(slots, prompt.token_ids[-1], len(cached), prompt.token_ids)

    def follow(self, row: Row, tokens: Sequence[int]) -> Tensor:
        """[tokens, vocabulary]: the logits that each of these tokens is chosen by, when they follow a cached row."""
        self.must_follow(row, tokens)
        if row.natural is None:
            return self.after(row, tokens[:-1])
        return self.logits([*row.natural, *tokens[:-1]])[len(row.natural) - 1 :]

    def must_follow(self, row: Row, tokens: Sequence[int]) -> None:
        """Raise where a cached row has no room for these tokens."""
        self.must_fit(row.pending_position + len(tokens), fed=row.pending_position + len(tokens))

    @torch.no_grad()
    def after(self, row: Row, tokens: Sequence[int]) -> Tensor:
        """Logits [1 + tokens, vocabulary] of the pending token and these, fed on top of a row's keys and values."""
        fed = [row.pending, *tokens]
        cache = DynamicCache()
        if row.slots:
            for layer in range(self.layers):
                key = torch.stack([slot.keys[layer] for slot in row.slots], dim=1)
                cache.update(key[None], torch.stack([slot.values[layer] for slot in row.slots], dim=1)[None], layer)
        queries = [row.pending_position + i for i in range(len(fed))]
        slots = [slot.position for slot in row.slots] + queries
        masks = {window: _mask(queries, slots, window) for window in set(self.windows)}
        mask: Any = masks[self.windows[0]]
        if self.layer_types is not None:
            mask = {kind: masks[self.windows[self.layer_types.index(kind)]] for kind in set(self.layer_types)}
        out = self.hf(
            input_ids=torch.tensor([fed]),
            position_ids=torch.tensor([queries]),
            attention_mask=mask,
            use_cache=True,
            **{self._cache_name: cache},
        )
        return out.logits[0]

    def must_fit(self, positions: int, fed: int) -> None:
        """Raise where so many positions are more than the context, or so many fed ones pass the switch of RoPE."""
        if positions > self.context:
            raise IllegalError(f"{positions} positions in a context of {self.context}")
        if self.switch is not None and fed > self.switch:
            raise IllegalError(f"{fed} tokens, and the frequencies change past {self.switch}")

    def moved(self, layer: int, key: Tensor, old: int, new: int) -> Tensor:
        """A cached key [kv_heads, head_dim] turned from one position to another, by way of no position at all."""
        if old == new:
            return key
        if self.adds_positions:
            raise IllegalError("keys of a model that adds positions to its embeddings can't be moved")
        turned = key.double() @ torch.linalg.inv(self._rotation(layer, old, key)) @ self._rotation(layer, new, key)
        return turned.to(key.dtype)

    @torch.no_grad()
    def _rotation(self, layer: int, position: int, key: Tensor) -> Tensor:
        """[head_dim, head_dim]: row i is what the model's rotary module makes of unit vector i at a position.

        No pass makes keys past the switch of RoPE. A key that a patch moves there keeps the frequencies below it, so
        its rotation is put together from two below; and nothing may follow such a cache (`must_follow`).
        """
        assert self.rotary is not None
        if self.switch is not None and position >= self.switch:
            last, none = self.switch - 1, torch.linalg.inv(self._rotation(layer, 0, key))
            return self._rotation(layer, last, key) @ none @ self._rotation(layer, position - last, key)
        has_kinds = "layer_type" in inspect.signature(type(self.rotary).forward).parameters
        kind = self.layer_types[layer] if has_kinds and self.layer_types is not None else ""
        if (kind, position) not in self._matrices:
            of_kind = {"layer_type": kind} if kind else {}
            cos, sin = self.rotary(torch.zeros(1), torch.tensor([[position]]), **of_kind)
            unit = torch.eye(key.shape[-1])[None, :, None, :]  # a head for every unit vector
            apply: Any = sys.modules[type(self.hf).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
            self._matrices[kind, position] = apply(unit, unit, cos, sin)[1][0, :, 0, :].double()
        return self._matrices[kind, position]


def _mask(queries: Sequence[int], slots: Sequence[int], window: int | None) -> Tensor:
    """[1, 1, queries, slots] to add to scores, from the positions of both; the queries stand in the last slots."""
    mask = torch.zeros(len(queries), len(slots))
    for i, position in enumerate(queries):
        for j, other in enumerate(slots):
            is_later = j > len(slots) - len(queries) + i
            if is_later or (window is not None and position - other >= window):
                mask[i, j] = torch.finfo(torch.float32).min
    return mask[None, None]


def patched(model: Reference, spec: Spec, sources: Sequence[Row], targets: Sequence[Row]) -> list[Row]:
    """The target rows with a patch of the source rows in them; one source row serves all targets.

    Raises:
        IllegalError: where the documented semantics refuse the patch on any of the rows.
        UndecidedError: where they do not say where a slot lands.
    """
    if len(sources) not in (1, len(targets)):
        raise IllegalError(f"{len(sources)} sources for {len(targets)} targets")
    sources = list(sources) * len(targets) if len(sources) == 1 else list(sources)
    heads = [next((len(slot.keys[0]) for row in (*targets, *sources) for slot in row.slots), 0)] * model.layers
    layers = _layers(spec["layers"], model.layers)
    kv_heads = _indices("KV head", spec["kv_heads"], heads[0]) if spec["kv_heads"] is not None else range(heads[0])
    if not layers or not list(kv_heads):
        raise IllegalError("no layer or no KV head is selected")
    whole = spec["parts"] == "kv" and spec["strength"] == 1 and len(layers) * len(kv_heads) == sum(heads)
    return [
        _patched_row(model, spec, source, target, (layers, list(kv_heads), whole))
        for source, target in zip(sources, targets, strict=True)
    ]


def _patched_row(
    model: Reference, spec: Spec, source: Row, target: Row, chosen: tuple[Sequence[int], Sequence[int], bool]
) -> Row:
    layers, kv_heads, is_whole = chosen
    of, to = _both_selections(spec, source, target)
    pairs = _pairs(spec["align"], of, to, len(target.slots))
    changes_length = spec["align"] in ("replace", "append")
    start = target.slots[0].position if target.slots else target.pending_position
    slots = []
    for place, (t, s) in enumerate(pairs):
        own = None if t is None else target.slots[t]
        put = None if s is None else source.slots[s]
        position = start + place if changes_length else (own or put).position  # type: ignore[union-attr]
        if own is not None:
            own = _landed(model, own, position, turns=True)
        if put is None:
            slots.append(own)
            continue
        counts = "k" in spec["parts"] and spec["strength"] != 0
        put = _landed(model, put, position, turns=spec["rotate"] and counts, layers=layers)
        if own is None:
            slots.append(put)
            continue
        mixed = own
        for part, letter in (("keys", "k"), ("values", "v")):
            if letter in spec["parts"]:
                tensors = list(getattr(own, part))
                for layer in layers:
                    tensors[layer] = _mixed(tensors[layer], getattr(put, part)[layer], kv_heads, spec["strength"])
                mixed = replace(mixed, **{part: tuple(tensors)})
        slots.append(replace(mixed, token_id=put.token_id, piece=put.piece) if is_whole else mixed)
    pending = start + len(slots) if changes_length else target.pending_position
    return Row(tuple(slots), target.pending, pending, None)


def _landed(model: Reference, slot: Slot, position: int, *, turns: bool, layers: Sequence[int] | None = None) -> Slot:
    """A slot at a position, its keys turned to it."""
    keys = list(slot.keys)
    if turns:
        for layer in range(model.layers) if layers is None else layers:
            keys[layer] = model.moved(layer, keys[layer], slot.position, position)
    return replace(slot, keys=tuple(keys), position=position)


def _mixed(own: Tensor, put: Tensor, kv_heads: Sequence[int], strength: float) -> Tensor:
    out = own.clone()
    for head in kv_heads:
        out[head] = ((1 - strength) * own[head].double() + strength * put[head].double()).to(own.dtype)
    return out


def _pairs(align: str, of: Sequence[int], to: Sequence[int], length: int) -> list[tuple[int | None, int | None]]:
    """(target slot, source slot) of every slot of the result."""
    own = range(length)
    if align == "append":
        return [(t, None) for t in own] + [(None, s) for s in of]
    if align == "replace":
        out: list[tuple[int | None, int | None]] = []
        for t in own:
            if t == to[0]:
                out += [(None, s) for s in of]
            if t not in to:
                out.append((t, None))
        return out
    n, m = len(of), len(to)
    lands: dict[int, int] = {}
    for i in range(m):
        if align == "stretch" and n:
            lands[to[i]] = of[round(i * (n - 1) / max(1, m - 1))]
        elif align == "start" and i < n:
            lands[to[i]] = of[i]
        elif align == "end" and i < n:
            lands[to[m - 1 - i]] = of[n - 1 - i]
    return [(t, lands.get(t)) for t in own]


def _layers(layers: Any, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    if isinstance(layers, list):
        return _indices("layer", layers, count)
    if "depth" in layers:
        return [min(math.floor(layers["depth"] * count + 0.5), count - 1)]
    low, high = (round(share * count) for share in layers["band"])
    if low >= high:
        raise IllegalError(f"band {layers['band']} holds no layer")
    return [layer for layer in range(count) if (low <= layer < high) != layers.get("inverse", False)]


def _indices(what: str, indices: Sequence[int], count: int) -> list[int]:
    for index in indices:
        if not -count <= index < count:
            raise IllegalError(f"{what} {index} of {count}")
    return sorted({index % count for index in indices})


def _both_selections(spec: Spec, source: Row, target: Row) -> tuple[list[int], list[int]]:
    """Slots of the source and of the target that a patch selects; none may be empty, but where nothing is asked of
    the target, since the source's slots are appended."""
    slots = spec["slots"]
    of = selected(slots, source)
    if not of:
        raise IllegalError("the selection finds no slot in the source")
    if spec["align"] == "append":
        return of, []
    to = _mirrored(slots["of"], of, source, target) if _is_of_source(slots) else selected(slots, target)
    if not to:
        raise IllegalError("the selection finds no slot in the target")
    return of, to


def _is_of_source(slots: Any) -> bool:
    return isinstance(slots, dict) and bool(slots.get("in_source"))


def _mirrored(stretch: str, of: Sequence[int], source: Row, target: Row) -> list[int]:
    """Slots of the target at the same relative places of a stretch."""
    there, here = _named(stretch, source), _named(stretch, target)
    if len(of) > len(here):
        raise IllegalError(f"{len(of)} slots of the source for {len(here)} of the target")
    scale = (len(here) - 1) / max(1, len(there) - 1)
    places = [round(there.index(slot) * scale) for slot in of]
    if len(set(places)) < len(places):
        raise UndecidedError("two slots have the same relative place")
    return [here[place] for place in places]


def selected(slots: Any, row: Row) -> list[int]:
    """Slots of a row that a selection means: a name, a list of indices or the fields of a `SlotQuery`."""
    if isinstance(slots, str):
        return _named(slots, row)
    if isinstance(slots, list):
        return _indices("slot", slots, len(row.slots))
    pool = _named(slots.get("of", "all"), row)
    if slots.get("without"):
        pool = [slot for slot in pool if slot not in _named(slots["without"], row)]
    if slots.get("fraction"):
        low, high = (round(share * len(pool)) for share in slots["fraction"])
        pool = pool[low:high]
    if slots.get("keywords") is not None:
        pool = [slot for slot in pool if _holds_keyword(slot, row, slots["keywords"])]
    return pool


def _named(name: str, row: Row) -> list[int]:
    places = list(range(len(row.slots)))
    if name == "all":
        return places
    if name == "last":
        return places[-1:]
    if name == "sinks":
        return places[:SINKS]
    return [place for place in places if row.slots[place].segment == name]


def _holds_keyword(place: int, row: Row, keywords: Sequence[str]) -> bool:
    pieces = [slot.piece for slot in row.slots]
    start = len("".join(pieces[:place]))
    end = start + len(pieces[place])
    matches = [match for keyword in keywords for match in re.finditer(keyword, "".join(pieces), re.IGNORECASE)]
    return any(max(start, match.start()) < min(end, match.end()) for match in matches)
