"""Backbone: a model without its output head, run over kvpatch's own KV cache."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from kvpatch.errors import ModelError, ProtocolError
from kvpatch.models.changes import ModelState, dropout_in_training, is_plain_linear, without_hooks
from kvpatch.models.entering import Change, changed_streams
from kvpatch.models.fingerprint import identity, tensors_sha256, vocabulary_sha256
from kvpatch.models.fp8 import FP8, are_activations_whole, has_fp8
from kvpatch.models.hf import AttentionObserver, Edits, Slab, Step, slab_attention
from kvpatch.models.kept import Kept
from kvpatch.models.kinds import decoder_of, refuse_other_states, refuse_placeless
from kvpatch.models.limits import reset_rotaries, rotaries_that_grow
from kvpatch.models.placement import is_dispatched, runs_on
from kvpatch.models.probe import geometry_of, refuse_what_is_passed_by
from kvpatch.models.products import fast_products

VOCABULARY_CHUNK = 16_384


class Backbone:
    """A causal language model as the engine sees it: tokens and positions in, hidden states out, slots in a slab.

    Attributes:
        hf: the transformers model itself.
        tokenizer: its tokenizer, None where token ids are all there is.
        blocks: its layers, in order.
        geometry: its cache's shape.
        kept: what the engine keeps with the model from call to call.
        state: the model as it was when all this was found.
        is_dispatched: whether it is split over devices or partly offloaded; its own forward pass alone then runs it.
        quantization: how its weights are quantised ("int4", say), empty where they are not.
        batch_invariant: whether a GPU's products are to give a row the same bits whatever rows it runs with.
        cache_dtype: "fp8" where decoding holds keys and values in 8 floating bits, empty for the model's own type.
        changed_streams: what passes over it do to the residual stream that enters some layers (`engine.residual`).
        is_left_alone: whether nobody changes the model for now, so that it need not be looked at again.
    """

    def __init__(self, hf: PreTrainedModel, tokenizer: Any = None, *, batch_invariant: bool = True) -> None:
        self.kept = Kept()
        self.changed_streams: dict[int, tuple[Change, ...]] = {}
        self.is_left_alone = False
        self.batch_invariant = batch_invariant
        self.cache_dtype = ""
        self.tokenizer = tokenizer
        self.hf = hf.eval()
        self._settle()
        self.state = ModelState.of(hf)

    def _settle(self) -> None:
        """Find the parts of the model and its geometry."""
        hf = self.hf
        self.config = hf.config.get_text_config()
        self.decoder = decoder_of(hf)
        refuse_other_states(hf, self.config)
        refuse_placeless(hf, self.decoder)
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
        self.configs = list({id(c): c for c in held if isinstance(c, type(self.config))}.values())
        self._growing = rotaries_that_grow(self.decoder)
        self.is_dispatched = is_dispatched(hf)
        self.quantization = quantization_of(hf)
        self.geometry = geometry_of(self)

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
        if self.is_left_alone:
            return
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
                    refuse_what_is_passed_by(self)
            if now.outer_hooks and now.outer_hooks != before.outer_hooks:
                refuse_what_is_passed_by(self)
        except BaseException:
            vars(self).update(held)  # should the change be taken back, all is as it was
            raise
        if (now.structure, now.weights) != (before.structure, before.weights):
            self.kept.clear()
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
        """Where logits come out, and with them tokens and labels of slots; all of a model that is not split."""
        return runs_on(self.head) if self.is_dispatched else self.head.weight.device

    @property
    def layer_devices(self) -> tuple[torch.device, ...]:
        """Where each layer runs, and its keys and values are."""
        found = self.geometry.devices
        return found if self.is_dispatched and found else (self.device,) * self.config.num_hidden_layers

    @property
    def is_split(self) -> bool:
        """Whether parts of the model run on different devices."""
        return len({self.device, *self.layer_devices}) > 1

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, of those that are not quantised."""
        return self.head.weight.dtype

    @property
    def told_type(self) -> str:
        """The type of the weights, of those that are quantised how, and of the cache that decoding holds where it is
        another."""
        parts = [str(self.dtype).removeprefix("torch.")]
        parts += [f"{self.quantization} weights"] if self.quantization else []
        parts += [f"{self.cache_dtype} cache"] if self.cache_dtype else []
        return ", ".join(parts)

    @property
    def rounds_cache(self) -> bool:
        """Whether decoding now holds keys and values in 8 floating bits: not within `fp8.whole_activations`."""
        return self.cache_dtype == FP8 and not are_activations_whole()

    @property
    def rounding(self) -> float:
        """What one rounding moves a number by at most, as a share of it: half a unit in the last place of the type, or
        half of one of the 127 steps that products of int8 round to. With fp8 weights it is that of the rest: how far
        activations are rounded is left out where numbers are compared (`fp8.whole_activations`)."""
        of_type = torch.finfo(self.dtype).eps / 2
        return max(of_type, 1 / 254) if self.quantization == "int8" else of_type

    @property
    def is_exact(self) -> bool:
        """Whether all it computes is float32, so that two ways to compute the same differ by its rounding alone."""
        return self.dtype == torch.float32 and not self.quantization

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
        observer: AttentionObserver | None = None,
    ) -> Tensor:
        """Run tokens at positions, writing their keys and values into the slab's next slots.

        Args:
            token_ids: [batch, new]; anything where padded.
            positions: [batch, new]; -1 where padded.
            slab: holds what the tokens may look at; `extend`ed here.
            branches: [batch, new], see `Slab`; None where all continue one sequence.
            edits: changes to queries, keys and values as they are made.
            observer: is shown what every layer's attention is made from.
        Returns:
            Hidden states [batch, new, width], after the final norm.
        Raises:
            ProtocolError: for a position past which the model's frequencies or masks would be others.
        """
        slab.extend(positions, branches)
        of_slots = None if branches is None else slab.branches[:, : slab.length]
        if self.geometry.ends_because and int(positions.max()) >= self.geometry.context:
            raise ProtocolError(f"position {int(positions.max())} is asked for; {self.geometry.limit}")
        step = Step(
            slab.positions[:, : slab.length],
            positions,
            self.dtype,
            of_slots,
            edits or {},
            observer,
            self.geometry.windows,
            self.geometry.chunks,
        )
        if observer is not None:
            observer.begin(token_ids, positions)
        return self.run(token_ids, positions.clamp(min=0), slab, step)

    def run(self, token_ids: Tensor, position_ids: Tensor, slab: Cache, step: Step) -> Tensor:
        reset_rotaries(self._growing)
        streams = changed_streams(self.blocks, self.changed_streams)
        with slab_attention(self.configs, step), fast_products(self.head.weight), streams:
            out = self.decoder(**self.entering(token_ids, position_ids), use_cache=True, **{self._cache_argument: slab})
        return out[0].to(self.device)  # the last hidden state; some configurations ask for a plain tuple

    def entering(self, token_ids: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        """Tokens and positions by the names that the decoder takes, on the device that it begins on."""
        given = {"input_ids": token_ids, "position_ids": position_ids}
        if not self.is_dispatched:
            return given
        first: Any = self.hf.get_input_embeddings()
        return {name: tensor.to(runs_on(first)) for name, tensor in given.items()}

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] in float32 of hidden states [..., width]."""
        with fast_products(self.head.weight):
            return self.scaled(self.head(hidden).float())

    def token_logprobs(self, hidden: Tensor, token_ids: Tensor, of: Tensor | None = None) -> Tensor:
        """Log-probability of tokens at hidden states, chunked over the vocabulary.

        Args:
            hidden: [states, width].
            token_ids: [n].
            of: [n], the state that each token is read from; token i from state i where not given.
        Returns:
            [n], float32, natural logarithm.
        """
        return self._read_tokens(hidden, token_ids, of, with_entropies=False)[0]

    def token_logprobs_and_entropies(
        self, hidden: Tensor, token_ids: Tensor, of: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same, and the entropy of the distribution that each token was read from, of one product with the head.

        Returns:
            [n] and [n], float32, nats.
        """
        return self._read_tokens(hidden, token_ids, of, with_entropies=True)

    def _read_tokens(
        self, hidden: Tensor, token_ids: Tensor, of: Tensor | None, *, with_entropies: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies; what is returned for entropies that are not asked for means nothing."""
        of = torch.arange(len(token_ids), device=hidden.device) if of is None else of
        if not is_plain_linear(self.head):  # somebody's head, or hooks on it: ask it for all it gives
            parts = [self.logits(part[:, None])[:, 0].float().log_softmax(dim=-1) for part in hidden.split(256)]
            found = torch.cat(parts)
            return found[of, token_ids], -(found.exp() * found).sum(dim=-1)[of]
        weight, bias = self.head.weight, self.head.bias
        total = torch.full((hidden.shape[0],), float("-inf"), device=hidden.device)
        mean = torch.zeros_like(total)  # of the logits, weighted by the probabilities so far
        with fast_products(weight):
            for low in range(0, weight.shape[0], VOCABULARY_CHUNK):
                part = slice(low, low + VOCABULARY_CHUNK)
                logits = self.scaled(F.linear(hidden, weight[part], None if bias is None else bias[part]).float())
                own = logits.logsumexp(dim=-1)
                both = torch.logaddexp(total, own)
                if with_entropies:
                    of_chunk = (logits.softmax(dim=-1) * logits).sum(dim=-1)
                    mean = mean * (total - both).exp() + of_chunk * (own - both).exp()
                total = both
        chosen = (hidden[of] * weight[token_ids]).sum(dim=-1)
        if bias is not None:
            chosen = chosen + bias[token_ids]
        return self.scaled(chosen.float()) - total[of], (total - mean)[of]

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
        raise ModelError(
            f"{type(decoder).__name__} has no list of {layers} layers, one for each of its cache, to patch"
        )
    for place, block in enumerate(found[0]):
        number = getattr(getattr(block, "self_attn", None), "layer_idx", None)
        if isinstance(number, int) and number >= layers:
            raise ModelError(
                f"layer {place} of {layers} has layer_idx {number}, a place that the cache does not have; "
                "number the layers anew after taking some out"
            )
    return found[0]


def quantization_of(hf: PreTrainedModel) -> str:
    """How a model's weights are quantised: "fp8", "int8", "int4" or the method's name; empty where they are not."""
    if has_fp8(hf):
        return FP8
    if not getattr(hf, "is_quantized", False) and getattr(hf, "hf_quantizer", None) is None:
        return ""
    for attribute, name in (("is_loaded_in_8bit", "int8"), ("is_loaded_in_4bit", "int4")):
        if getattr(hf, attribute, False):
            return name
    method = getattr(hf, "quantization_method", None)
    return str(getattr(method, "value", method) or "quantised")


def _is_linear_head(head: Any) -> bool:
    """Whether an output head is a linear layer, or wraps one and tells its weight."""
    weight = getattr(head, "weight", None)
    return isinstance(head, nn.Linear) or (
        isinstance(head, nn.Module) and isinstance(weight, Tensor) and weight.ndim == 2
    )
