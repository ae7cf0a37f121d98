"""Model: a loaded model with prefill, generate and score. What a notebook holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpatch.cache import PAD, KVCache
from kvpatch.engine.attention import Attention, Look, Maps
from kvpatch.engine.decode import OnStep, decode
from kvpatch.engine.prefill import labels_of, prefill, watched_prefill
from kvpatch.engine.score import score
from kvpatch.errors import CacheError, ProtocolError
from kvpatch.models.hf import Backbone, Geometry
from kvpatch.models.load import Loaded, load_model
from kvpatch.models.named import Progress
from kvpatch.models.second_opinion import Opinion, second_opinion
from kvpatch.models.template import EncodedPrompt, encode
from kvpatch.patch import SlotQuery
from kvpatch.selection import slot_mask

REMEMBERED = 10_000
"""Texts whose tokens a model remembers."""


@dataclass(frozen=True)
class Generated:
    """What the model wrote.

    Attributes:
        texts: one a row, without special tokens.
        token_ids: [batch, new_tokens], end token included; -1 after a row has stopped.
        logprobs: [batch, new_tokens] of the chosen tokens, under the model's own distribution (temperature 1), natural
            logarithm; NaN after a row has stopped.
        stopped: per row "eos" or "length".
        attention: statistics of every head over the tokens that were fed, where they were asked for.
    """

    texts: list[str]
    token_ids: Tensor
    logprobs: Tensor
    stopped: tuple[str, ...]
    attention: Attention | None = None


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
        self.hf = loaded.hf
        self.tokenizer = loaded.tokenizer
        self.backbone = Backbone(loaded.hf)
        self._encoded: dict[tuple[str, bool | None, bool, str], EncodedPrompt] = {}
        self._continuations: dict[str, list[int]] = {}

    def __repr__(self) -> str:
        g = self.geometry
        return (
            f"Model({self.loaded.name!r}, {g.architecture}, layers={g.layers}, query_heads={g.query_heads}, "
            f"kv_heads={g.kv_heads}, head_dim={g.head_dim}, {self.backbone.dtype}, {self.backbone.device})"
        )

    @property
    def geometry(self) -> Geometry:
        """Shape of the model's cache."""
        return self.backbone.geometry

    @property
    def end_tokens(self) -> list[int]:
        """Tokens that end a reply."""
        for config in (self.hf.generation_config, self.hf.config.get_text_config(), self.tokenizer):
            ends = getattr(config, "eos_token_id", None)
            if ends is not None:
                return list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]
        return []

    def encode(self, text: str, *, chat: bool | None = None, may_be_empty: bool = False) -> EncodedPrompt:
        """Tokenise one prompt; see `models.template.encode`. A run asks for its few prompts in every phase, so
        they are remembered."""
        key = (text, chat, may_be_empty, str(self.tokenizer.chat_template))
        if key not in self._encoded:
            if len(self._encoded) >= REMEMBERED:
                self._encoded.clear()
            self._encoded[key] = encode(self.tokenizer, text, chat=chat, may_be_empty=may_be_empty)
        return self._encoded[key]

    def prefill(self, prompts: str | Sequence[str | EncodedPrompt], *, chat: bool | None = None) -> KVCache:
        """Run prompts through the model and keep their caches.

        Args:
            prompts: one or more prompts, as text or encoded.
            chat: True puts text in the model's chat template, False takes it as it is; None is True where there is one.
        Returns:
            `KVCache`, a row a prompt.
        Raises:
            ProtocolError: for an empty prompt, or one longer than the context.
        """
        rows = [prompts] if isinstance(prompts, str) else list(prompts)
        return prefill(self.backbone, [self.encode(p, chat=chat) if isinstance(p, str) else p for p in rows])

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
            maps: layers, heads and queries whose whole attention is to be kept.
        Returns:
            `Attention`; `attention["entropy"]` is [batch, layers, query_heads]. `heads.STATISTICS` says what there is.
        """
        rows = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded = [self.encode(p, chat=chat) if isinstance(p, str) else p for p in rows]
        mask = None
        if marked is not None:
            mask = slot_mask(KVCache(keys=(), values=(), rope=(), **labels_of(encoded, self.backbone.device)), marked)
        return watched_prefill(self.backbone, encoded, Look(mask, maps))[1]

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
        attention: bool | Maps = False,
    ) -> Generated:
        """Let the model go on from a cache. The cache is not changed.

        Args:
            cache: any batch.
            max_new_tokens: most tokens a row may write.
            temperature: 0 for greedy.
            top_p: keep the likeliest tokens up to this probability.
            seeds: one a row (0, 1, 2, ... if None); a row's text does not depend on the other rows.
            stop: False goes on past an end token.
            attention: True for statistics of every head over what is fed; `Maps` for whole maps as well.
        """
        if not temperature >= 0 or not 0 < top_p <= 1:
            raise ProtocolError(f"temperature must be at least 0 and top_p in (0, 1], got {temperature} and {top_p}")
        out = decode(
            self.backbone,
            cache,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seeds=range(cache.batch) if seeds is None else seeds,
            end_tokens=self.end_tokens if stop else (),
            on_step=on_step,
            look=Look(maps=None if attention is True else attention) if attention else None,
        )
        longest = max(out.lengths)
        tokens, logprobs = out.token_ids[:, :longest], out.logprobs[:, :longest]
        return Generated(self.texts(out.token_ids), tokens, logprobs, out.stopped, out.attention)

    def score(self, cache: KVCache, continuations: Sequence[str | Sequence[int]]) -> Tensor:
        """Teacher-forced log-probabilities of given continuations. The cache is not changed.

        Args:
            cache: a row a continuation, or one row for all.
            continuations: texts (tokenised as they are, nothing added) or token ids.
        Returns:
            [continuations, tokens], natural logarithm; NaN past a continuation's own length.
        """
        ids = [self.continuation_ids(c) if isinstance(c, str) else list(c) for c in continuations]
        if cache.batch == 1 and len(ids) > 1:
            cache = cache[[0] * len(ids)]
        if cache.batch != len(ids):
            raise CacheError(f"{len(ids)} continuations for a batch of {cache.batch}")
        return score(self.backbone, cache, [[row] for row in ids]).logprobs[:, 0]

    def continuation_ids(self, text: str) -> list[int]:
        """Token ids of a continuation: the text as it is, no special token added."""
        if text not in self._continuations:
            if len(self._continuations) >= REMEMBERED:
                self._continuations.clear()
            self._continuations[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(self._continuations[text])

    def texts(self, token_ids: Tensor) -> list[str]:
        """Decode rows of token ids, -1 left out, special tokens skipped."""
        rows = [[t for t in row if t != PAD] for row in token_ids.tolist()]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def load(
    name: str | os.PathLike[str],
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Model:
    """Load a model to patch; see `models.load.load_model` for the arguments.

    Raises:
        ModelError: where it can't be found, read, trusted, or patched correctly.
    """
    loaded: Any = load_model(
        name,
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    model = Model(loaded)
    model.opinion = second_opinion(model.backbone, loaded)
    return model
