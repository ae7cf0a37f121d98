"""Model: a loaded model with prefill, generate and score. What a notebook holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from kvpatch.caches.kvcache import PAD, KVCache
from kvpatch.caches.selection import beside_mask, chosen_layers, indices_within, slot_mask, told
from kvpatch.engine.attention import Attention, AttentionRequest, Maps
from kvpatch.engine.decode import OnLogits, OnStep, decode
from kvpatch.engine.generated import Generated, end_tokens_of
from kvpatch.engine.prefill import labels_of, prefill, prefill_with_attention
from kvpatch.engine.score import score
from kvpatch.errors import CacheError, EmptySelection, ModelError, ProtocolError
from kvpatch.models.backbone import Backbone
from kvpatch.models.geometry import Geometry
from kvpatch.models.load import Loaded
from kvpatch.models.scaffold import Messages, Scaffold, scaffold_of
from kvpatch.models.second_opinion import Opinion
from kvpatch.models.template import EncodedPrompt, conversation, encode, has_template, settings_of
from kvpatch.specs import arguments
from kvpatch.specs.base import Change
from kvpatch.specs.patch import Patch
from kvpatch.specs.selectors import SlotQuery

if TYPE_CHECKING:
    from kvpatch.sweeps.grid import Sweep

Prompt = str | Sequence[Mapping[str, str]]
"""A prompt as text, or as chat messages."""
REMEMBERED = 10_000
"""Texts whose tokens a model remembers."""


class Model:
    """A causal language model, ready to be patched.

    Attributes:
        hf: the transformers model.
        tokenizer: its tokenizer.
        backbone: the model as the engine sees it.
        opinion: how its logits compared with transformers' own when it was loaded; None if it was not loaded by `load`.
    """

    opinion: Opinion | None = None

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self.backbone = Backbone(loaded.hf, loaded.tokenizer)
        self._encoded: dict[tuple[object, ...], EncodedPrompt] = {}
        self._continuations: dict[tuple[object, ...], list[int]] = {}
        self._scaffolds: dict[tuple[object, ...], Scaffold] = {}

    def __repr__(self) -> str:
        g = self.geometry
        return (
            f"Model({self.loaded.name!r}, {g.architecture}, layers={g.layers}, query_heads={g.query_heads}, "
            f"kv_heads={g.kv_heads}, head_dim={g.head_dim}, torch.{self.backbone.told_type}, {self.backbone.device})"
        )

    @property
    def hf(self) -> Any:
        """The transformers model. It may be changed in any way between two calls, but for its place here: put another
        model into a `Model` of its own."""
        return self.backbone.hf

    @property
    def geometry(self) -> Geometry:
        """Shape of the model's cache."""
        return self.backbone.geometry

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's tokens and log-probabilities are to be the same to the bit whatever rows it runs with, on a
        GPU (docs/decisions/020-batch-invariance.md). `run.json` says whether they are. May be set at any time."""
        return self.backbone.batch_invariant

    @batch_invariant.setter
    def batch_invariant(self, wanted: bool) -> None:
        self.backbone.batch_invariant = arguments.switch("batch_invariant", wanted, error=ModelError)
        self.backbone.kept.clear()  # the way of running it is chosen anew

    @property
    def end_tokens(self) -> list[int]:
        """Tokens that end a reply: those that the generation settings name, else the configuration, else the tokenizer.

        Raises:
            ModelError: where what they name is no token id.
        """
        return end_tokens_of(self.hf, self.tokenizer)

    @property
    def scaffold(self) -> Scaffold | None:
        """What the chat template writes around a prompt's words; None without a template.

        A template that writes the date goes on with the moment of the first prompt, however long the model is used.

        Raises:
            ModelError: where the template does not write the user's words once and unchanged.
        """
        return self._scaffold_after(()) if has_template(self.tokenizer) else None

    def _scaffold_after(self, earlier: Messages) -> Scaffold:
        """The scaffold of the user's words after earlier messages, rendered at the moment of the first prompt."""
        key = (*settings_of(self.tokenizer), earlier)
        if key not in self._scaffolds:
            if len(self._scaffolds) >= REMEMBERED:
                self._scaffolds.clear()
            time = self._scaffold_after(()).time if earlier else None
            self._scaffolds[key] = scaffold_of(self.tokenizer, self.loaded.name, earlier, time)
        return self._scaffolds[key]

    def encode(self, text: Prompt, *, chat: bool | None = None, may_be_empty: bool = False) -> EncodedPrompt:
        """Tokenise one prompt, text or chat messages; see `models.template.encode`. A run asks for its few prompts in
        every phase, so they are remembered."""
        if isinstance(text, str):
            earlier: Messages = ()
        elif isinstance(text, list | tuple) and any(isinstance(message, Mapping) for message in text):
            earlier, text = conversation(text)
            if chat is False:
                raise ProtocolError("chat messages need the model's chat template; leave chat=False out, or give text")
            chat = True
        else:
            raise ProtocolError(f"a prompt must be text, got {arguments.shown(text)}")
        key = (text, earlier, chat, may_be_empty, settings_of(self.tokenizer))
        if key not in self._encoded:
            if len(self._encoded) >= REMEMBERED:
                self._encoded.clear()
            is_chat = chat is not False and has_template(self.tokenizer)
            scaffold = self._scaffold_after(earlier) if is_chat else None
            self._encoded[key] = encode(self.tokenizer, text, chat=chat, may_be_empty=may_be_empty, scaffold=scaffold)
        return self._encoded[key]

    def prefill(self, prompts: str | Sequence[Prompt | EncodedPrompt], *, chat: bool | None = None) -> KVCache:
        """Run prompts through the model and keep their caches.

        Args:
            prompts: one or more prompts: text, encoded, or lists of chat messages {"role": ..., "content": ...} that
                end with the user's. The body is the last user's words; all before them belongs to the template.
            chat: True puts text in the model's chat template, False takes it as it is; None is True where there is one.
        Returns:
            `KVCache`, a row a prompt.
        Raises:
            ProtocolError: for an empty prompt, one longer than the context, or what is no prompt.
            CacheError: for a token the model does not have.
        """
        return prefill(self.backbone, self._encoded_prompts(prompts, chat))

    def _encoded_prompts(self, prompts: Any, chat: bool | None) -> list[EncodedPrompt]:
        """One or more prompts, as text or encoded, all encoded."""
        is_one = isinstance(prompts, str | EncodedPrompt | bytes | dict)
        rows = [prompts] if is_one or not isinstance(arguments.plain(prompts), Iterable) else list(prompts)
        if rows and all(isinstance(row, Mapping) for row in rows) and not is_one:
            rows = [rows]  # one conversation
        if chat is not None:
            chat = arguments.switch("chat", chat, error=ProtocolError)
        encoded: list[EncodedPrompt] = []
        row: Any
        for row in rows:
            if not isinstance(row, str | EncodedPrompt | list | tuple):
                raise ProtocolError(f"a prompt must be text or an EncodedPrompt, got {arguments.shown(row)}")
            encoded.append(row if isinstance(row, EncodedPrompt) else self.encode(row, chat=chat))
        for prompt in encoded:
            arguments.refuse_foreign_tokens("a prompt's tokens", prompt.token_ids, self.geometry.vocabulary)
        return encoded

    def attention(
        self,
        prompts: str | Sequence[str | EncodedPrompt],
        *,
        marked: str | SlotQuery | Sequence[int] | None = None,
        maps: Maps | None = None,
        chat: bool | None = None,
    ) -> Attention:
        """What every head does while the model reads prompts, reduced as it reads: no map is held but those asked for.

        Args:
            prompts: one or more prompts, as text or encoded; their last tokens are not read yet.
            marked: slots whose share of attention is `mass_marked`.
            maps: layers, heads and queries whose whole attention is to be kept; `Attention.map(layer)` labels them.
        Returns:
            `Attention`; `attention["entropy"]` is [batch, layers, query_heads]. `specs.attention.STATISTICS` names all
            statistics.
        Raises:
            CacheError: where no prompt has a slot that is marked, or for maps that the model does not have.
        """
        encoded = self._encoded_prompts(prompts, chat)
        mask = beside = None
        if marked is not None and encoded:
            given: Any = marked
            chosen = Patch(slots=given).slots  # refuses what is no selection
            labels = KVCache(keys=(), values=(), rope=(), **labels_of(encoded, self.backbone.device))
            mask, beside = slot_mask(labels, chosen), beside_mask(labels, chosen)
            if not mask.any():
                raise EmptySelection(
                    f"marked {told(chosen)} find no slot in any of the prompts; mark slots that they have"
                )
        request = AttentionRequest(mask, self._maps(maps), beside)
        cache, attention = prefill_with_attention(self.backbone, encoded, request)
        return self._with_tokens(attention, cache)

    def _with_tokens(self, attention: Attention, cache: KVCache, new: Tensor | None = None) -> Attention:
        """Attention with each token's text: of a cache, and of what was fed after it (all but the last written)."""
        rows = [list(pieces) for pieces in cache.pieces]
        if new is not None:
            for row, pending, written in zip(rows, cache.pending.tolist(), new.tolist(), strict=True):
                fed = (pending, *written[: attention.fed - 1])
                row += [self.tokenizer.decode([token]) if token != PAD else "" for token in fed]
        return replace(attention, tokens=tuple(tuple(row) for row in rows))

    def _maps(self, maps: Maps | None) -> Maps | None:
        """Maps to keep, as plain numbers that the model has."""
        if maps is None:
            return None
        arguments.refuse_other("maps", maps, Maps)
        layers = chosen_layers(arguments.whole_numbers("layers", maps.layers), self.geometry.layers)
        count = self.geometry.query_heads
        heads = list(range(count)) if maps.heads is None else arguments.whole_numbers("heads", maps.heads)
        if not heads:
            raise CacheError("maps of no query head are asked for; name at least one")
        indices_within("query head", heads, count)  # refuses one that there is not; the order asked for stays
        queries = None if maps.queries is None else arguments.whole_numbers("queries", maps.queries)
        return Maps(layers, heads, queries)

    def generate(
        self,
        cache: KVCache,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.7,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        stop: bool = True,
        on_step: OnStep | None = None,
        on_logits: OnLogits | None = None,
        attention: bool | Maps = False,
    ) -> Generated:
        """Let the model go on from a cache. The cache is not changed.

        Args:
            cache: any batch.
            max_new_tokens: most tokens a row may write.
            temperature: 0 for greedy; otherwise at least `arguments.LEAST_TEMPERATURE`.
            top_p: keep the likeliest tokens up to this probability.
            seeds: one a row (0, 1, 2, ... if None); a row's text does not depend on the other rows.
            stop: False goes on past an end token.
            on_step: called after every step with the number of rows that still write.
            on_logits: a function that is shown each step before its tokens are chosen, a `DecodingStep` of all rows,
                and may return other logits [batch, vocabulary]; `logprobs` stay the model's own.
            attention: True for statistics of every head over what is fed; `Maps` for whole maps as well.
        Raises:
            ProtocolError: for a number out of its range, or more tokens than the context has room for.
            CacheError: for seeds that are no whole numbers of 64 bits, one a row.
        """
        arguments.refuse_other("cache", cache, KVCache)
        max_new_tokens = arguments.whole("max_new_tokens", max_new_tokens, least=1, error=ProtocolError)
        temperature, top_p = arguments.sampling(temperature, top_p)
        stop = arguments.switch("stop", stop, error=ProtocolError)
        for name, of, given in (("on_step", "number", on_step), ("on_logits", "DecodingStep", on_logits)):
            if given is not None and not callable(given):
                raise ProtocolError(f"{name} must be a function of one {of}, got {arguments.shown(given)}")
        if not isinstance(attention, bool):
            attention = self._maps(attention) or False
        out = decode(
            self.backbone,
            cache,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seeds=range(cache.batch) if seeds is None else arguments.seeds(seeds, cache.batch),
            end_tokens=self.end_tokens if stop else (),
            on_step=on_step,
            on_logits=on_logits,
            to_capture=AttentionRequest(maps=None if attention is True else attention) if attention else None,
        )
        longest = max(out.lengths)
        tokens, logprobs = out.token_ids[:, :longest], out.logprobs[:, :longest]
        seen = None if out.attention is None else self._with_tokens(out.attention, cache, tokens)
        return Generated(self.texts(out.token_ids), tokens, logprobs, out.stopped, seen)

    def score(self, cache: KVCache, continuations: str | Sequence[str | Sequence[int]]) -> Tensor:
        """Teacher-forced log-probabilities of given continuations. The cache is not changed.

        Args:
            cache: a row a continuation, or one row for all.
            continuations: texts (tokenised as they are, nothing added) or token ids; a text alone is one continuation.
        Returns:
            [continuations, tokens], natural logarithm; NaN past a continuation's own length.
        Raises:
            CacheError: for a token the model does not have, or continuations that do not fit the batch.
            ProtocolError: for an empty continuation, or one that the context has no room for.
        """
        arguments.refuse_other("cache", cache, KVCache)
        ids = self._continuations_of(continuations)
        if cache.batch == 1 and len(ids) > 1:
            cache = cache[[0] * len(ids)]
        if cache.batch != len(ids):
            raise CacheError(f"{len(ids)} continuations for a batch of {cache.batch}")
        return score(self.backbone, cache, [[row] for row in ids]).logprobs[:, 0]

    def logits(self, cache: KVCache) -> Tensor:
        """Logits of the token behind the pending one, [batch, vocabulary], float32. The cache is not changed."""
        arguments.refuse_other("cache", cache, KVCache)
        found = score(self.backbone, cache, [[[0]]] * cache.batch, keep_logits=1).logits
        return cast(Tensor, found)[:, 0]

    def sweep(
        self,
        source: KVCache,
        target: KVCache,
        over: Mapping[str, Any],
        metric: Any,
        patch: Patch | None = None,
        *,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Sweep:
        """Patch the target with the source, cell by cell, and read a metric at the token behind the pending one.

        Each cell is what `Patch(...).apply(source, target, seed=seed)` gives; none of the caches is changed.

        Args:
            source: batch of 1 or of the target's. target: rows of one length.
            over: what to go over: "layers", "slots", "kv_heads", "parts", each with several values or "each". One value
                ("all", 3, "kv") is the same in all cells. Prompts of unequal length are paired as `align` pairs them.
            metric: `kv.logit_difference(...)` or another of `kvpatch.sweeps.metrics`, or a function of logits, from
                [rows, vocabulary] to [rows].
            patch: what else a cell's patch says, such as `strength` or `donor`.
            progress: True shows a bar; None does in a notebook or a terminal.
        Raises:
            CacheError: where caches, layers, slots or KV heads do not fit. ProtocolError: for a metric or an axis that
                can't be meant.
        """
        from kvpatch.sweeps.sweep import sweep

        return sweep(self, source, target, over, metric, patch, {"seed": seed, "progress": progress})

    def intervene(
        self,
        change: Change,
        target: Any,
        source: Any = None,
        *,
        calibration: tuple[Sequence[str], Sequence[str]] | None = None,
        chat: bool | None = None,
        seed: int = 0,
    ) -> KVCache:
        """Caches of prompts made with any intervention of a protocol: `kv.InPrefill(site="residual", layers=[4])`.

        Args:
            change: `Patch`, `InPrefill`, `ValueSteering`, `CacheSteering`, `Joined` or `Reshape`, or one of a package.
            target: prompts that receive, as `prefill` takes them.
            source: prompts that something is taken from: one, or one for each target.
            calibration: texts of sources and of targets, for an intervention that is fitted, such as steering.
        Raises:
            CacheError, ProtocolError: where something is missing, or does not fit the model or the prompts.
        """
        from kvpatch.interventions.from_notebook import intervene

        encoded = [None if prompts is None else self._encoded_prompts(prompts, chat) for prompts in (target, source)]
        return intervene(self, change, encoded[0] or [], encoded[1], calibration, seed)

    def _continuations_of(self, given: object) -> list[list[int]]:
        """The token ids of every continuation."""
        rows = [given] if isinstance(given, str) else arguments.plain(given)
        if not isinstance(rows, Iterable) or isinstance(rows, bytes | dict):
            raise CacheError(f"continuations must be texts or lists of token ids, got {arguments.shown(given)}")
        found = []
        for row in rows:
            if not isinstance(row, str) and isinstance(arguments.plain(row), int):
                raise CacheError(
                    f"continuations must be texts or lists of token ids, got {arguments.shown(row)} among them; "
                    "put the ids of one continuation in a list of their own"
                )
            ids = self.continuation_ids(row) if isinstance(row, str) else row
            found.append(arguments.token_ids("a continuation's tokens", ids, self.geometry.vocabulary))
        return found

    def continuation_ids(self, text: str) -> list[int]:
        """Token ids of a continuation: the text as it is, no special token added."""
        arguments.unicode_text("a continuation", text)
        key = (text, settings_of(self.tokenizer))
        if key not in self._continuations:
            if len(self._continuations) >= REMEMBERED:
                self._continuations.clear()
            self._continuations[key] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(self._continuations[key])

    def texts(self, token_ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Decode rows of token ids, -1 left out, special tokens skipped."""
        lists = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        rows = [[t for t in row if t != PAD] for row in lists]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
