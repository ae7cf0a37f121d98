"""The one file that knows transformers' cache and attention interfaces.

`Backbone` runs a causal language model over a `Slab`, a preallocated KV cache whose rows are right-aligned, so that
every row writes the same slot. Attention runs through an interface of our own, which sees queries, keys and values
after RoPE and after the cache: the mask comes from explicit positions, and grouped queries are folded into the query
axis, so that keys and values are never repeated. The interface is registered under a name of its own and
switched on only while a forward pass of ours runs; the model is untouched before and after.

At load the model is probed with a few tokens: what it caches, how each layer turns its keys, what each layer attends to
(`masks`), up to which length that holds (`limits`), and whether our forward pass gives the model's own logits. A model
that fails is refused with the reason.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvpatch.cache import PAD
from kvpatch.errors import ModelError, ProtocolError
from kvpatch.models.cached import refuse_other_caches
from kvpatch.models.changes import ModelState, dropout_in_training, is_plain_linear, without_hooks
from kvpatch.models.fingerprint import identity, tensors_sha256, vocabulary_sha256
from kvpatch.models.limits import reset_rotaries, rotaries_that_grow, rotary_switch
from kvpatch.models.masks import FURTHEST, read_masks
from kvpatch.models.products import fast_products
from kvpatch.rope import LayerRope, rotate

ATTENTION = "kvpatch_slab"
VOCABULARY_CHUNK = 16_384
NO_CONTEXT = 1 << 30
"""The context of a model whose configuration names none."""
_PROBE_POSITION = 37


@dataclass(frozen=True)
class Geometry:
    """Shape of a model's cache.

    Attributes:
        architecture: transformers' class name.
        layers, query_heads, kv_heads, head_dim: counts; kv_heads and head_dim of the first layer.
        vocabulary: number of logits.
        context: most positions the model takes.
        windows: attention window of each layer in tokens, None for full attention.
        rope: how each layer turns its keys.
        dtype: type of the keys that are cached.
        ends_because: what changes past the context, where kvpatch ends it before the model does; else empty.
    """

    architecture: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    windows: tuple[int | None, ...]
    rope: tuple[LayerRope, ...]
    dtype: torch.dtype
    ends_because: str = ""

    @property
    def limit(self) -> str:
        """The context as the end of a sentence for a person."""
        if not self.ends_because:
            return f"the model's context is {self.context}"
        return (
            f"prompts of this model may have at most {self.context} tokens, new ones included: "
            f"past that {self.ends_because}"
        )


@dataclass
class LayerEdit:
    """Changes to the queries, keys and values that one layer makes in a forward pass, after RoPE and before they are
    cached or used. Each takes and gives [batch, heads, new, head_dim]; `steer` is added to all new values, [batch,
    kv_heads, head_dim]; `fired` counts the changes made."""

    query: Callable[[Tensor], Tensor] | None = None
    key: Callable[[Tensor], Tensor] | None = None
    value: Callable[[Tensor], Tensor] | None = None
    steer: Tensor | None = None
    fired: int = 0

    @property
    def planned(self) -> int:
        """Changes one forward pass should make."""
        return sum(change is not None for change in (self.query, self.key, self.value, self.steer))

    @property
    def only_steers(self) -> bool:
        """Whether adding to the values is all it does."""
        return self.steer is not None and self.planned == 1

    def apply(self, part: str, tensor: Tensor) -> Tensor:
        """Change one part, if this edit has something to change in it."""
        if part == "value" and self.steer is not None:
            self.fired += 1
            tensor = tensor + self.steer[:, :, None].to(tensor.dtype)
        change = getattr(self, part)
        if change is None:
            return tensor
        self.fired += 1
        return change(tensor)


Edits = Mapping[int, LayerEdit]
"""Layer -> edit."""


@dataclass(frozen=True)
class Seen:
    """What one layer's attention is made from: its probabilities are softmax(softcap(query key^T scaling) + bias).

    Attributes:
        query: [batch, query_heads, queries, dim]; key: [batch, kv_heads, slots, dim], both after RoPE and any edit. The
            queries stand in the last slots.
        bias: [batch, 1, queries, slots], 0 where a query may look, -inf elsewhere.
        scaling: factor of the scores. softcap: where they are capped, or None.
    """

    query: Tensor
    key: Tensor
    bias: Tensor
    scaling: float
    softcap: float | None


class Watch(Protocol):
    """Is shown the attention of every layer of a forward pass. It changes nothing, and is seen by that pass alone."""

    def begin(self, token_ids: Tensor, positions: Tensor) -> None:
        """A pass starts, over tokens [batch, new] at positions [batch, new], -1 where padded."""

    def see(self, layer: int, seen: Seen) -> None:
        """One layer's turn."""


@dataclass
class _Extent:
    """Slots of a slab: how many there are, and that the newest stand at [start, length). Its layers share it; were they
    to hold the slab itself, its memory would wait for the garbage collector, which counts no bytes."""

    capacity: int
    start: int = 0
    length: int = 0


class SlabLayer(CacheLayerMixin):
    """One layer of a slab, in the shape transformers' `Cache` wants its layers."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, extent: _Extent, layer: int) -> None:
        super().__init__()
        self.extent, self.layer = extent, layer
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, key_dim = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, self.extent.capacity, key_dim)
        self.values = value_states.new_zeros(batch, heads, self.extent.capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.extent.start, self.extent.length
        if edit := _running.step.edits.get(self.layer):
            key_states, value_states = edit.apply("key", key_states), edit.apply("value", value_states)
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.extent.length, 0

    def get_seq_length(self) -> int:
        return self.extent.start

    def get_max_length(self) -> int:
        return self.extent.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.24


class Slab(Cache):
    """KV cache of fixed capacity that a forward pass writes into: the only buffers that change in place.

    Per layer, keys and values are [batch, kv_heads, capacity, head_dim]; `positions` is [batch, capacity], -1 where a
    slot is padding or not yet written. Slots [0, length) are live. `branches` is [batch, capacity]: a slot of branch 0
    is seen by all later tokens, any other by its own branch only, so that several continuations share one cache.
    """

    def __init__(self, batch: int, capacity: int, layers: int, device: torch.device) -> None:
        self.extent = _Extent(capacity)
        self.positions = torch.full((batch, capacity), PAD, dtype=torch.int64, device=device)
        self.branches = torch.zeros_like(self.positions)
        self.slab_layers = [SlabLayer(self.extent, layer) for layer in range(layers)]
        super().__init__(layers=list(self.slab_layers))

    @classmethod
    def holding(cls, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], positions: Tensor, room: int) -> Slab:
        """A slab with a copy of these slots, and room for more."""
        batch, slots = positions.shape
        slab = cls(batch, slots + room, len(keys), positions.device)
        for layer, k, v in zip(slab.slab_layers, keys, values, strict=True):
            layer.lazy_initialization(k, v)
            layer.keys[:, :, :slots] = k
            layer.values[:, :, :slots] = v
        slab.positions[:, :slots] = positions
        slab.extent.start = slab.extent.length = slots
        return slab

    @property
    def length(self) -> int:
        """Slots that are live."""
        return self.extent.length

    def extend(self, positions: Tensor, branches: Tensor | None = None) -> None:
        """Open the next slots for tokens at these positions and of these branches, [batch, new]; -1 is padding."""
        own = self.extent
        own.start, own.length = own.length, own.length + positions.shape[1]
        if own.length > own.capacity:
            raise ModelError(f"a slab of {own.capacity} slots can't take {own.length}")
        self.positions[:, own.start : own.length] = positions
        if branches is not None:
            self.branches[:, own.start : own.length] = branches


@dataclass
class _Step:
    """What the layers of one forward pass share: positions of slots and queries, and the masks made of them."""

    slot_positions: Tensor  # [batch, slots]
    query_positions: Tensor  # [batch, queries]
    dtype: torch.dtype
    slot_branches: Tensor | None = None  # [batch, slots]
    edits: Edits = field(default_factory=dict)
    watch: Watch | None = None
    windows: tuple[int | None, ...] = ()  # by layer; all look at all where empty, as while one token is probed
    attended: dict[int, tuple[Tensor, Tensor, Tensor]] | None = None  # by layer: query, key, value; None: not kept
    _bias: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, groups: int = 1) -> Tensor:
        """Additive mask [batch, 1, queries, slots]: 0 where a query may look, -inf elsewhere.

        Slots stand in the order they were written, so a query sees the slots up to its own; a window counts positions.
        A padding query sees itself, so that its softmax is over something. With `groups`, the queries of as many heads
        stand one behind the other: [batch, 1, groups * queries, slots].
        """
        if (window, groups) not in self._bias:
            queries, slots = self.query_positions.shape[1], self.slot_positions.shape[1]
            device = self.slot_positions.device
            slot = torch.arange(slots, device=device)
            own = torch.arange(slots - queries, slots, device=device)[:, None]
            may = (slot <= own)[None] & (self.slot_positions != PAD)[:, None, :]
            if window is not None:
                may &= self.query_positions[:, :, None] - self.slot_positions[:, None, :] < window
            if self.slot_branches is not None:
                of_query = self.slot_branches[:, slots - queries :, None]
                may &= (self.slot_branches == 0)[:, None, :] | (self.slot_branches[:, None, :] == of_query)
            may |= (slot == own)[None]
            # Rows of a whole number of 16 bytes, or a GPU's kernel copies the mask in every layer.
            shape = (len(may), groups * queries, -(-slots // 8) * 8)
            bias = torch.zeros(shape, dtype=self.dtype, device=device)[..., :slots]
            bias.masked_fill_(~may.repeat(1, groups, 1), float("-inf"))
            self._bias[window, groups] = bias[:, None]
        return self._bias[window, groups]


_running = threading.local()


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention over the slab. query [batch, query_heads, queries, dim], key and value [batch, kv_heads, slots, dim];
    returns [batch, queries, query_heads, dim]. Some modules pass a window, some don't: it is read off the masks."""
    step: _Step = _running.step
    layer = int(module.layer_idx)
    if step.attended is not None:
        step.attended[layer] = (query, key, value)
    if edit := step.edits.get(layer):
        query = edit.apply("query", query)
    batch, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    folded = query.reshape(batch, kv_heads, groups * queries, dim)
    bias = step.bias(step.windows[layer] if step.windows else None, groups)
    if step.watch is not None:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        step.watch.see(layer, Seen(query, key, bias[:, :, :queries], scale, softcap))
    if softcap is None:
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=bias, scale=scaling)
    else:
        out = _softcapped(folded, key, value, bias, scaling, softcap)
    return out.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


def _softcapped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float | None, cap: float) -> Tensor:
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    return (torch.tanh(scores / cap) * cap + bias).softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


AttentionInterface.register(ATTENTION, _attend)


class Backbone:
    """A causal language model as the engine sees it: tokens and positions in, hidden states out, slots in a slab.

    Attributes:
        hf: the transformers model itself.
        tokenizer: its tokenizer, None where token ids are all there is.
        blocks: its layers, in order.
        geometry: its cache's shape.
        kept: what the engine keeps with a model from call to call (buffers, graphs); clear it to free them.
        state: the model as it was when all this was found.
    """

    def __init__(self, hf: PreTrainedModel, tokenizer: Any = None) -> None:
        self.kept: dict[str, Any] = {}
        self.tokenizer = tokenizer
        self.hf = hf.eval()
        self._settle()
        self.state = ModelState.of(hf)

    def _settle(self) -> None:
        """Find the parts of the model and its geometry."""
        hf = self.hf
        self.config = hf.config.get_text_config()
        self.decoder = hf.base_model
        # A wrapped decoder takes anything; then the model as a whole tells the name.
        names = [n for module in (self.decoder, hf) for n in inspect.signature(module.forward).parameters]
        self._cache_argument = next((n for n in names if n in ("cache", "past_key_values")), "past_key_values")
        head: Any = hf.get_output_embeddings() or getattr(hf, "lm_head", None)  # not found through a wrapped decoder
        if not _is_linear_head(head) or not isinstance(getattr(self.config, "num_hidden_layers", None), int):
            raise ModelError(f"{type(hf).__name__} is not a causal language model with one linear output head")
        self.head = head
        self.blocks = _blocks(self.decoder, self.config.num_hidden_layers)
        # A copied block has a configuration of its own.
        held = [self.config, *(vars(m).get("config") for m in self.decoder.modules())]
        self._configs = list({id(c): c for c in held if isinstance(c, type(self.config))}.values())
        self._growing = rotaries_that_grow(self.decoder)
        self.geometry = _probe(self)

    @cached_property
    def identity(self) -> str:
        """What this model's caches carry as their `model`: a hash of weights and tokenizer, taken when it is first
        asked for. Later changes of the weights leave it, so that caches from before and after can be compared."""
        words = "" if self.tokenizer is None else vocabulary_sha256(self.tokenizer)
        return identity(tensors_sha256(self.hf), words)

    def catch_up(self) -> None:
        """Take over what was changed in the model since the last look; without a change this costs a millisecond or
        two.

        Weights may lie elsewhere, modules may have been replaced or wrapped: then what decoding keeps is dropped, and
        the geometry is found anew where more than weights was changed. Hooks are taken off meanwhile. Only those on
        the whole model run once, since kvpatch runs its decoder and head and must see that this comes to the same.

        Raises:
            ModelError: where the model as it now is can't be patched, or drops numbers at random.
        """
        now, before = ModelState.of(self.hf), self.state
        if now == before:
            return
        held = dict(vars(self))
        try:
            if now.structure != before.structure:
                if dropout := dropout_in_training(self.hf):
                    raise ModelError(f"the model is in training mode and drops out ({dropout}); call hf.eval() first")
                with without_hooks(self.hf):
                    self._settle()
                    _refuse_what_is_passed_by(self)
            if now.outer_hooks and now.outer_hooks != before.outer_hooks:
                _refuse_what_is_passed_by(self)
        except BaseException:
            vars(self).update(held)  # should the change be taken back, all is as it was
            raise
        if (now.structure, now.weights) != (before.structure, before.weights):
            self.kept.pop("fast", None)
            self.kept.pop("runner", None)
        self.state = ModelState.of(self.hf)

    def note_own_changes(self) -> None:
        """The engine has laid out the model's weights anew, their numbers unchanged."""
        self.state = ModelState.of(self.hf)

    @property
    def name(self) -> str:
        """transformers' name of the architecture."""
        return type(self.hf).__name__

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.head.weight.dtype

    def slab(self, batch: int, capacity: int) -> Slab:
        """An empty slab for this model."""
        return Slab(batch, capacity, self.config.num_hidden_layers, self.device)

    @torch.no_grad()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slab: Slab,
        branches: Tensor | None = None,
        edits: Edits | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Run tokens at positions, writing their keys and values into the slab's next slots.

        Args:
            token_ids: [batch, new]; anything where padded.
            positions: [batch, new]; -1 where padded.
            slab: holds what the tokens may look at; `extend`ed here.
            branches: [batch, new], see `Slab`; None where all continue one sequence.
            edits: changes to queries, keys and values as they are made.
            watch: is shown what every layer's attention is made from.
        Returns:
            Hidden states [batch, new, width], after the final norm.
        Raises:
            ProtocolError: for a position past which the model's frequencies or masks would be others.
        """
        slab.extend(positions, branches)
        of_slots = None if branches is None else slab.branches[:, : slab.length]
        if self.geometry.ends_because and int(positions.max()) >= self.geometry.context:
            raise ProtocolError(f"position {int(positions.max())} is asked for; {self.geometry.limit}")
        windows = self.geometry.windows
        step = _Step(slab.positions[:, : slab.length], positions, self.dtype, of_slots, edits or {}, watch, windows)
        if watch is not None:
            watch.begin(token_ids, positions)
        return self._run(token_ids, positions.clamp(min=0), slab, step)

    def _run(self, token_ids: Tensor, position_ids: Tensor, slab: Slab, step: _Step) -> Tensor:
        reset_rotaries(self._growing)
        with _slab_attention(self._configs, step), fast_products(self.head.weight):
            out = self.decoder(
                input_ids=token_ids, position_ids=position_ids, use_cache=True, **{self._cache_argument: slab}
            )
        return out[0]  # the last hidden state; some configurations ask for a plain tuple

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] in float32 of hidden states [..., width]."""
        with fast_products(self.head.weight):
            return self.scaled(self.head(hidden).float())

    def token_logprobs(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Log-probability of one token at each hidden state, chunked over the vocabulary.

        Args:
            hidden: [n, width].
            token_ids: [n].
        Returns:
            [n], float32, natural logarithm.
        """
        if not is_plain_linear(self.head):  # somebody's head, or hooks on it: ask it for all it gives
            parts = [self.logits(part[:, None])[:, 0] for part in hidden.split(256)]
            logits = torch.cat(parts).log_softmax(dim=-1)
            return logits.gather(1, token_ids[:, None])[:, 0]
        weight, bias = self.head.weight, self.head.bias
        total = torch.full((hidden.shape[0],), float("-inf"), device=hidden.device)
        with fast_products(weight):
            for low in range(0, weight.shape[0], VOCABULARY_CHUNK):
                part = slice(low, low + VOCABULARY_CHUNK)
                chunk = F.linear(hidden, weight[part], None if bias is None else bias[part])
                total = torch.logaddexp(total, self.scaled(chunk.float()).logsumexp(dim=-1))
        chosen = (hidden * weight[token_ids]).sum(dim=-1)
        if bias is not None:
            chosen = chosen + bias[token_ids]
        return self.scaled(chosen.float()) - total

    @property
    def logit_scaling(self) -> tuple[float, float | None]:
        """What the head's outputs are multiplied by, and the soft cap on the result (None for none)."""
        config = self.config
        factor = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return factor, getattr(config, "final_logit_softcapping", None)

    def scaled(self, logits: Tensor) -> Tensor:
        """Logits of the head's outputs."""
        factor, cap = self.logit_scaling
        if factor != 1.0:
            logits = logits * factor
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _blocks(decoder: nn.Module, layers: int) -> nn.ModuleList:
    """The model's layers, in order: the one list of as many modules as there are layers."""
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == layers]
    nested = [m for child in decoder.children() for m in child.children() if isinstance(m, nn.ModuleList)]
    found = lists or [m for m in nested if len(m) == layers]
    if not found:
        raise ModelError(f"{type(decoder).__name__} has no list of {layers} layers to patch")
    for place, block in enumerate(found[0]):
        number = getattr(getattr(block, "self_attn", None), "layer_idx", None)
        if isinstance(number, int) and number >= layers:
            raise ModelError(
                f"layer {place} of {layers} has layer_idx {number}, a place that the cache does not have; "
                "number the layers anew after taking some out"
            )
    return found[0]


def _is_linear_head(head: Any) -> bool:
    """Whether an output head is a linear layer, or wraps one and tells its weight."""
    weight = getattr(head, "weight", None)
    return isinstance(head, nn.Linear) or (
        isinstance(head, nn.Module) and isinstance(weight, Tensor) and weight.ndim == 2
    )


@contextlib.contextmanager
def _slab_attention(configs: list[Any], step: _Step) -> Iterator[None]:
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = ATTENTION
    _running.step = step
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own
        del _running.step


@torch.no_grad()
def native_logits(hf: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Logits [batch, tokens, vocabulary] of the model's own forward pass over unpadded rows, no part of ours in it."""
    return hf(input_ids=token_ids, use_cache=False)[0].float()  # some configurations ask for a plain tuple


def native_greedy(hf: PreTrainedModel, token_ids: list[int], count: int) -> list[int]:
    """The `count` likeliest next tokens, one after the other, by the model's own forward pass over the whole text, with
    no cache and no part of ours.

    transformers' `generate` would give the same, but for what the model's generation settings ask for besides:
    penalties, beams, forced or forbidden tokens.
    """
    ids = list(token_ids)
    for _ in range(count):
        ids.append(int(native_logits(hf, torch.tensor([ids], device=hf.device))[0, -1].argmax()))
    return ids[len(token_ids) :]


@torch.no_grad()
def _refuse_what_is_passed_by(backbone: Backbone) -> None:
    """Stop where the model as a whole does something besides its decoder and its head, which alone are run here."""
    count = min(8, backbone.geometry.context)
    ids = torch.randint(backbone.geometry.vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
    ids = ids.to(backbone.device)
    with _explained(backbone.geometry.architecture):
        own = native_logits(backbone.hf, ids)
        slab = backbone.slab(1, count)
        ours = backbone.logits(backbone.forward(ids, torch.arange(count, device=ids.device)[None], slab))
    bound = 1e-3 if backbone.dtype == torch.float32 else 5e-2
    if not float((own - ours).abs().max()) / (float(own.abs().max()) + 1e-9) < bound:
        raise ModelError(
            f"{backbone.geometry.architecture}: the whole model gives other logits than its decoder and its output "
            "head, which kvpatch runs; put hooks and replaced forwards on these two or on the layers"
        )


@torch.no_grad()
def _probe(backbone: Backbone) -> Geometry:
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
        step = _Step(slab.positions, at, backbone.dtype, attended={})
        with _explained(name), torch.no_grad():
            out = backbone._run(token, at, slab, step)
        hidden = out if hidden is None else hidden
        slabs.append(slab)
    assert hidden is not None
    assert step is not None
    assert step.attended is not None
    refuse_other_caches(name, slabs[1].slab_layers, step.attended)
    rope = tuple(_layer_rope(backbone, layer, slabs) for layer in range(layers))
    with _explained(name):
        own = native_logits(hf, token)[0, -1]
    ours = backbone.logits(hidden)[0, -1]
    scale = float(own.abs().max()) + 1e-9
    if not float((own - ours).abs().max()) / scale < (1e-3 if backbone.dtype == torch.float32 else 5e-2):
        raise ModelError(f"{name}: our forward pass does not give the model's own logits; it can't be patched safely")
    context = int(getattr(config, "max_position_embeddings", 0) or NO_CONTEXT)
    with _explained(name):
        masks = read_masks(backbone.decoder, backbone._configs, layers, context, backbone.device)
    ends = {context: ""}
    if switch := rotary_switch(config):
        ends[switch] = "its rotary frequencies change with the length"
    for chunk in {mask.chunk for mask in masks if mask.chunk}:
        ends[chunk] = "its attention is cut into chunks"
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
            backbone._run(torch.full_like(at, token), at, slabs[-1], _Step(slabs[-1].positions, at, backbone.dtype))
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
    for frequencies in _frequencies(backbone.hf):
        candidates += [LayerRope("half", frequencies), LayerRope("interleaved", frequencies)]
    delta = torch.tensor([[_PROBE_POSITION]], device=k0.device)
    fitting = [c for c in candidates if c.rotary_dim <= k0.shape[3]]
    best = min(fitting, key=lambda c: _off(rotate(k0, delta, c), k1))
    # Keys without a position are made by the very same products, so that a small turn can't pass for none.
    if _off(rotate(k0, delta, best), k1) > (1e-5 if best.layout == "none" else bound):
        raise ModelError(
            f"{type(backbone.hf).__name__}: layer {layer} turns its keys in a way kvpatch does not know, "
            "so cached keys can't be moved"
        )
    return best


def _bound(backbone: Backbone) -> float:
    """What two ways of making the same keys may differ by, over their norm."""
    return 1e-3 if backbone.dtype == torch.float32 else 3e-2


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / (b.norm() + 1e-9))


def _frequencies(hf: PreTrainedModel) -> list[tuple[float, ...]]:
    """Every distinct set of rotary frequencies among the model's buffers."""
    found: dict[tuple[float, ...], None] = {}
    for name, buffer in hf.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            found[tuple(buffer.double().tolist())] = None
    return list(found)
