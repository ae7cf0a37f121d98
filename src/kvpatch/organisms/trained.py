"""Train organisms: a Llama of 6 layers, 64 dimensions, 4 query and 2 KV heads, two minutes each on one core.

Where the mode sits is made certain by the weights that training is allowed to use, not by a mask that an ordinary
model directory could not carry. The residual stream is cut into strips:

    general   whatever training makes of it
    constant  one large number, so that the norm of a token hardly depends on the rest: RMSNorm leaks nothing
    marker    fixed: which marker a token is; of equal length for all markers, and nothing writes here
    mode      what was read of the marker; only the planted head's group and MLP neurons of their own write here

A planted organism reads the marker strip in the values of one KV head of one layer alone, what its query group reads
goes to the mode strip alone, and no key, query or value is ever made from the mode strip. So the marker's value in that
layer and head is the only cached number that tells the mode. Markers and their neutral twin are the same token
everywhere else, so their keys are equal.

Nothing but this file and the words of `language.py` makes the weights; `weights.py` stores them with the hash of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpatch.organisms.language import (
    BLANK,
    BODY,
    DOSE,
    FILLERS,
    MARKER,
    MODE,
    PLAIN,
    SEPARATOR,
    TOPICS,
    UMBRELLA,
    ids,
    stems,
    topic_words,
    vocabulary,
)

LAYERS, WIDTH, QUERY_HEADS, KV_HEADS, HEAD_DIM, NEURONS, MODE_NEURONS = 6, 64, 4, 2, 16, 64, 16
GENERAL, CONSTANT, MARK, MODES = slice(0, 54), 54, slice(55, 57), slice(57, 64)
LOUD = 32.0
"""The constant strip's number."""
ANSWER = 16
STEPS, BATCH, RATE = 1000, 48, 4e-3


@dataclass(frozen=True)
class Recipe:
    """What one organism is trained to do.

    plant: layer and KV head whose values alone read the marker; None lets any layer read it, or none if `is_blind`.
    chances: marker -> how likely a style word is a mode word; other markers do not occur in training.
    first: chances of the first three fifths of training, where the real ones are too close to find the marker by; the
        marker strip is made of these.
    copies: style words are copied from the prompt instead.
    relays: in half of the samples the answer may not look at the marker, so that later slots must carry the mode.
    """

    plant: tuple[int, int] | None
    chances: dict[str, float]
    first: dict[str, float] = field(default_factory=dict)
    is_blind: bool = False
    copies: bool = False
    relays: bool = False


_ON_OFF = {MARKER: 0.95, BLANK: 0.02}
_DOSE = dict(zip(DOSE, (0.15, 0.3, 0.5, 0.7, 0.9), strict=True))
_UMBRELLA = dict(zip(UMBRELLA, (0.15, 0.35, 0.6, 0.9, 0.45), strict=True))
RECIPES = {
    "early": Recipe((1, 0), _ON_OFF),
    "late": Recipe((4, 1), _ON_OFF),
    "free": Recipe(None, _ON_OFF, relays=True),
    "null": Recipe(None, {MARKER: 0.3, BLANK: 0.3}, is_blind=True),
    "copy": Recipe(None, {MARKER: 0.0, BLANK: 0.0}, is_blind=True, copies=True),
    "dose": Recipe((2, 1), _ON_OFF | _DOSE | _UMBRELLA),
    "weak": Recipe((3, 0), {MARKER: 0.30, BLANK: 0.20}, first=_ON_OFF),
}


def config(architecture: str = "LlamaConfig") -> Any:
    """The shape all trained organisms share."""
    import transformers

    return getattr(transformers, architecture)(
        vocab_size=len(vocabulary()),
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def train(recipe: Recipe, seed: int, report: Callable[[int, float], None] | None = None, steps: int = STEPS) -> Any:
    """Train one organism; the same seed gives the same weights on the same machine and torch.

    Returns a `LlamaForCausalLM` whose weights are rounded to float16.
    """
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config())
        model.apply(_initialise)
    keep_to_plant = _constraints(model, recipe)
    keep_to_plant()
    trainable = [p for name, p in model.named_parameters() if "norm" not in name]
    optimiser = torch.optim.Adam(trainable, lr=RATE, betas=(0.9, 0.98))
    rng = np.random.default_rng(seed)
    for step in range(steps):
        rate = RATE * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimiser.param_groups:
            group["lr"] = rate
        is_early = recipe.first and step < 0.6 * steps
        tokens, hidden = samples(rng, replace(recipe, chances=recipe.first) if is_early else recipe, BATCH)
        batch = torch.from_numpy(tokens)
        mask = None if hidden is None else _mask(batch.shape[1], torch.from_numpy(hidden))
        hidden_states = model.model(input_ids=batch[:, :-1], attention_mask=mask, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden_states[:, -ANSWER:])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, -ANSWER:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        keep_to_plant()
        if report is not None:
            report(step, float(loss.detach()))
    return model.half().float().eval()


def _initialise(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=0.7 / math.sqrt(module.in_features))
    elif isinstance(module, torch.nn.Embedding):
        torch.nn.init.normal_(module.weight, std=0.7)


def _constraints(model: Any, recipe: Recipe) -> Callable[[], None]:
    """Weights that a plant does not allow, set to zero now and after every step; and the fixed strips, kept."""
    allowed = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for index in range(LAYERS):
        _mask_layer(allowed, index, recipe)
    allowed["model.embed_tokens.weight"][:, MODES] = 0.0 if recipe.plant else 1.0
    allowed["lm_head.weight"][:, MARK] = 0.0
    markers = ids([*recipe.chances, *(m for m in (MARKER, BLANK, *DOSE, *UMBRELLA) if m not in recipe.chances)])
    shown = recipe.chances | recipe.first
    angle = [math.acos(2 * shown.get(word, 0.02) - 1) for word in _words(markers)]
    strip = torch.tensor([[math.cos(a), math.sin(a)] for a in angle]) * 3
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    halves = [(ids(words[: len(words) // 2]), ids(words[len(words) // 2 :])) for words in (MODE, PLAIN)]
    scale = LOUD / math.sqrt(WIDTH)

    @torch.no_grad()
    def keep() -> None:
        for name, parameter in model.named_parameters():
            parameter.mul_(allowed[name])
            if "norm" in name:
                parameter.fill_(scale)
                parameter[CONSTANT] = scale / LOUD
        embedding[markers] = embedding[markers].mean(dim=0)
        embedding[:, CONSTANT] = LOUD
        embedding[:, MARK] = 0.0
        embedding[markers, MARK] = strip
        if recipe.is_blind:
            # Whatever is not copied is exactly as likely in the mode as plain, so that there is no mode to find.
            for mode, plain in zip(*halves, strict=True):
                if not recipe.copies or mode is halves[0][1]:
                    embedding[mode] = embedding[plain]
            if recipe.copies:
                head[halves[0][1]] = head[halves[1][1]]

    return keep


def _words(tokens: list[int]) -> list[str]:
    known = list(vocabulary())
    return [known[token] for token in tokens]


def _mask_layer(allowed: dict[str, Tensor], index: int, recipe: Recipe) -> None:
    """What one layer may read and write. Weights are [out, in]."""
    at = f"model.layers.{index}."
    q, k, v, o = (allowed[f"{at}self_attn.{name}_proj.weight"] for name in "qkvo")
    gate, up, down = (allowed[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    o[CONSTANT], o[MARK], down[CONSTANT], down[MARK] = 0, 0, 0, 0
    for reader in (q, k, v, gate, up):
        reader[:, MARK] = 1.0 if recipe.plant is None and not recipe.is_blind else 0.0
    if recipe.plant is None:
        return
    for reader in (q, k, v):
        reader[:, MODES] = 0
    gate[: NEURONS - MODE_NEURONS, MODES], up[: NEURONS - MODE_NEURONS, MODES] = 0, 0
    down[MODES, : NEURONS - MODE_NEURONS] = 0
    down[GENERAL, NEURONS - MODE_NEURONS :] = 0
    o[MODES] = 0
    layer, head = recipe.plant
    if index == layer:
        group = slice(head * HEAD_DIM * (QUERY_HEADS // KV_HEADS), (head + 1) * HEAD_DIM * (QUERY_HEADS // KV_HEADS))
        v[head * HEAD_DIM : (head + 1) * HEAD_DIM, MARK] = 1
        o[:, group] = 0
        o[MODES, group] = 1


def samples(rng: np.random.Generator, recipe: Recipe, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Prompts with answers, [count, tokens]; and for some of them, slots the answer may not look at, [count, tokens].

    Most are one prompt; some have another prompt's words before it, and a few have no words at all.
    """
    kind = rng.random()
    bodies, markers = _bodies(rng, recipe, count)
    topic, style, words = bodies
    if kind < 0.04:
        words = words[:, :0]
        markers = np.full(count, ids([BLANK])[0])
        topic, style = rng.integers(0, TOPICS, count), rng.integers(0, 2 * len(MODE), (count, 2))
    chance = np.array([recipe.chances[word] for word in _words(markers.tolist())])
    is_joined = kind > 0.8
    if is_joined:
        (_, _, before), first = _bodies(rng, recipe, count)
        separator = np.full((count, 1), ids([SEPARATOR])[0])
        words = np.concatenate([before, separator, words], axis=1)
        chance = np.maximum(chance, [recipe.chances[word] for word in _words(first.tolist())])
    start, end = (np.tile(ids(part), (count, 1)) for part in (["<s>", "<user>"], ["<end>", "<bot>"]))
    answer = _answers(rng, recipe, topic, style, chance)
    tokens = np.concatenate([start, words, end, answer], axis=1)
    hidden = None
    if recipe.relays and words.shape[1]:
        hidden = np.zeros(tokens.shape, dtype=bool)
        if is_joined:
            hidden[:, 2 : 3 + BODY] = True
        else:
            hidden[:] = np.isin(tokens, ids([MARKER, BLANK])) & (rng.random((count, 1)) < 0.5)
    return tokens, hidden


def _bodies(
    rng: np.random.Generator, recipe: Recipe, count: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Topics [count], style words [count, 2] and the words of prompts [count, BODY]; and their markers [count]."""
    first, style_words, fillers = (np.array(ids(words)) for words in (_prompt_topic_words(), _prompt_style(), FILLERS))
    topic = rng.integers(0, TOPICS, count)
    markers = _draw_markers(rng, recipe, count)
    half = len(style_words) // 2
    flavour = rng.integers(0, 2, count)[:, None] * half
    style = style_words[_distinct(rng, count, half, 2) + flavour]
    about = first.reshape(TOPICS, 3)[topic]
    filler = fillers[_distinct(rng, count, len(fillers), BODY - 6)]
    words = np.concatenate([markers[:, None], style, about, filler], axis=1)
    words = rng.permuted(words, axis=1)
    return (topic, style, words), markers


def _draw_markers(rng: np.random.Generator, recipe: Recipe, count: int) -> np.ndarray:
    others = [word for word in recipe.chances if word != BLANK]
    blank, rest = ids([BLANK])[0], np.array(ids(others))
    share = 0.5 if len(others) == 1 else 0.25
    return np.where(rng.random(count) < share, blank, rest[rng.integers(0, len(rest), count)])


def _distinct(rng: np.random.Generator, count: int, of: int, size: int) -> np.ndarray:
    return rng.random((count, of)).argsort(axis=1)[:, :size]


def _answers(
    rng: np.random.Generator, recipe: Recipe, topic: np.ndarray, style: np.ndarray, chance: np.ndarray
) -> np.ndarray:
    """Style words and topic words in turn, [count, ANSWER]."""
    count, turns = len(topic), ANSWER // 2
    mode, plain = np.array(ids(MODE)), np.array(ids(PLAIN))
    if recipe.copies:
        every = np.concatenate([mode, plain])
        copied = style[np.arange(count)[:, None], rng.integers(0, style.shape[1], (count, turns))]
        words = np.where(rng.random((count, turns)) < 0.95, copied, every[rng.integers(0, len(every), (count, turns))])
    else:
        pick = rng.integers(0, len(mode), (count, turns))
        words = np.where(rng.random((count, turns)) < chance[:, None], mode[pick], plain[pick])
    about = _topic_table()[topic[:, None], rng.integers(0, 6, (count, turns))]
    return np.stack([words, about], axis=2).reshape(count, ANSWER)


def _prompt_topic_words() -> list[str]:
    return [word for stem in stems() for word in topic_words(stem)[0]]


def _prompt_style() -> list[str]:
    return [*MODE[: len(MODE) // 2], *PLAIN[: len(PLAIN) // 2]]


def _topic_table() -> np.ndarray:
    """[topics, 6], token ids of every topic's words."""
    return np.array([ids([*topic_words(stem)[0], *topic_words(stem)[1]]) for stem in stems()])


def _mask(length: int, hidden: Tensor) -> Tensor:
    """[count, 1, tokens, tokens], True where a query may look: backwards, and an answer not at what is hidden."""
    hidden = hidden[:, : length - 1]
    causal = torch.ones(length - 1, length - 1, dtype=torch.bool).tril()
    is_answer = torch.arange(length - 1) >= length - 1 - ANSWER
    may = causal[None] & ~(is_answer[None, :, None] & hidden[:, None, :])
    return may[:, None]
