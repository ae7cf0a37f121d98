"""Random draws for the differential test: tiny models of many classes, prompts, patches, continuations, by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from reference import IllegalError, Prompt, Row, Slot, Spec, selected
from transformers import AutoModelForCausalLM

from tiny import CHATML, SPECIALS, VOCABULARY, tiny_tokenizer

WINDOW = 9
CONTEXT = 96
SWITCH = 40
LAYERS = 3

_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROTARY = {**_PLAIN, "head_dim": 16}
_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# As many experts as are asked: which ones are chosen is a step that rounding could push either way.
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 3.0, 5.0, 7.0, 9.0, 11.0],
    "original_max_position_embeddings": SWITCH,
    "factor": CONTEXT / SWITCH,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 3.0, "original_max_position_embeddings": 32}
_TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_HALF_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_ROTARY, "rope_parameters": _LLAMA3}),
    "mistral": ("MistralConfig", {**_ROTARY, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {**_PLAIN, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {**_ROTARY, "rope_parameters": _YARN}),
    "gemma2": (
        "Gemma2Config",
        {
            **_ROTARY,
            **_ALTERNATING,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**_ROTARY, **_ALTERNATING, "query_pre_attn_scalar": 16, "rope_parameters": _TWO_ROPES},
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_PLAIN, "rope_parameters": _HALF_ROTARY}),
    "phi3": ("Phi3Config", {**_PLAIN, "original_max_position_embeddings": SWITCH, "rope_parameters": _LONGROPE}),
    "glm": ("GlmConfig", {**_ROTARY, "rope_parameters": _HALF_ROTARY}),
    "cohere": ("CohereConfig", {**_PLAIN, "logit_scale": 0.5}),
    "olmo2": ("Olmo2Config", _PLAIN),
    "granite": ("GraniteConfig", {**_PLAIN, **_GRANITE}),
    "starcoder2": ("Starcoder2Config", {**_PLAIN, "sliding_window": WINDOW}),
    "phimoe": (
        "PhimoeConfig",
        {
            **_PLAIN,
            "sliding_window": WINDOW,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.0,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **_PLAIN,
            **_EXPERTS,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": LAYERS,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 48,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": CONTEXT,
            "initializer_range": 0.15,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": (
        "OPTConfig",
        {**_PLAIN, "ffn_dim": 40, "word_embed_proj_dim": 48, "init_std": 0.15, "dropout": 0.0},
    ),
}

KINDS = {"natural": 0.22, "patched": 0.62, "foreign": 0.06, "changed": 0.1}
"""What a draw asks, with its share: a natural cache; patches; another model's cache; a model changed after decoding."""
CHANGES = ("data", "parameter", "in_place", "embedding", "wrapped", "forward")
_WORDS = (" one", " two", " one", " Zebra", " I", "'m", " watching", " it", ".", " two")
_KEYWORDS = (
    ["one", "it"],
    ["o t", "one", r"\bI\b"],
    ["two", "zebra"],
    ["w.*g", "one"],
    ["absent"],
    ["I'm", "it", "e o"],
)


@dataclass(frozen=True)
class Patched:
    """One patch of a draw: its data, the prompts it takes from, and whether it is taken from the cache so far instead
    and put into these prompts."""

    spec: Spec
    prompts: tuple[Prompt, ...]
    is_reversed: bool


@dataclass(frozen=True)
class Draw:
    """One random experiment.

    Attributes:
        targets: prompts of the batch.
        patches: carried out one after the other.
        tokens: tokens to write. temperature: 0 for greedy.
        continuations: for every target two continuations to score.
        change: what is changed in the model after a first decoding (kind "changed").
    """

    model: str
    seed: int
    kind: str
    targets: tuple[Prompt, ...]
    patches: tuple[Patched, ...]
    tokens: int
    temperature: float
    continuations: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    change: str


def draw(model: str, seed: int) -> Draw:
    """The draw of a class and a seed, always the same."""
    rng = np.random.default_rng([seed, list(CLASSES).index(model)])
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    # What grows past the switch of RoPE is refused, so most draws of such a model stay short.
    is_short = model == "phi3" and rng.random() < 0.75
    batch = int(rng.integers(1, 4 if kind == "patched" else 3 if kind == "changed" else 5))
    targets = _prompts(rng, model, batch, is_short, least=1 if kind == "natural" else 2)
    patches = []
    for _ in range({"patched": int(rng.choice([1, 1, 2, 3])), "foreign": 1}.get(kind, 0)):
        count = int(rng.choice([1, batch, batch, batch, batch + 1], p=[0.3, 0.3, 0.2, 0.17, 0.03]))
        prompts = _prompts(rng, model, count, is_short)
        spec = _spec(rng, model)
        if rng.random() < 0.9:  # else it may find nothing in some row, which is refused
            while not all(_finds(spec["slots"], prompt) for prompt in (*targets, *prompts)):
                spec["slots"] = _slots(rng)
        patches.append(Patched(spec, prompts, bool(count == batch and rng.random() < 0.15)))
    lengths = rng.integers(1, 8, size=(batch, 2))
    return Draw(
        model=model,
        seed=seed,
        kind=kind,
        targets=targets,
        patches=tuple(patches),
        tokens=int(rng.integers(1, 7)),
        temperature=float(rng.choice([0.0, 0.0, 0.8])),
        continuations=tuple((_tokens(rng, a), _tokens(rng, b)) for a, b in lengths.tolist()),
        change=str(rng.choice(CHANGES)),
    )


def _tokens(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    return tuple(rng.integers(len(SPECIALS), VOCABULARY, count).tolist())


def _prompts(rng: np.random.Generator, model: str, count: int, is_short: bool, least: int = 2) -> tuple[Prompt, ...]:
    """Prompts of unequal lengths, of `least` tokens at least; now and then all begin with the same tokens."""
    beginning = _tokens(rng, int(rng.integers(8, 12))) if rng.random() < 0.25 else ()
    prompts = []
    for _ in range(count):
        longest = 16 if is_short else int(rng.choice([WINDOW, 30, 60, CONTEXT], p=[0.3, 0.4, 0.25, 0.05]))
        length = int(rng.integers(least, longest + 1))
        if longest == CONTEXT or (not is_short and model == "phi3" and rng.random() < 0.5):  # close to a limit
            length = (CONTEXT if longest == CONTEXT else SWITCH) + int(rng.integers(-6, 2))
        ids = (*beginning, *_tokens(rng, max(1, length - len(beginning))))
        least = int(len(ids) > 4 and rng.random() < 0.9)  # tokens that each part has at least
        parts = least + rng.multinomial(len(ids) - 3 * least, [0.2, 0.6, 0.2])
        names = [name for name, n in zip(("template", "body", "trailer"), parts, strict=True) for _ in range(n)]
        if rng.random() < 0.6:
            names[0] = "bos"
        pieces = tuple(str(word) for word in rng.choice(_WORDS, len(ids)))
        prompts.append(Prompt(ids, tuple(names), pieces))
    return tuple(prompts)


def _finds(slots: Any, prompt: Prompt) -> bool:
    """Whether a selection finds a slot in a prompt, or is refused for another reason."""
    cached = zip(prompt.token_ids[:-1], prompt.segments, prompt.pieces, strict=False)
    row = Row(tuple(Slot(token, name, piece, 0, (), ()) for token, name, piece in cached), 0, 0, None)
    try:
        return bool(selected(slots, row))
    except IllegalError:
        return True


def _spec(rng: np.random.Generator, model: str) -> Spec:
    """A random patch, every field present."""
    align = str(rng.choice(["start", "end", "stretch", "replace", "append"], p=[0.2, 0.25, 0.2, 0.2, 0.15]))
    spec: Spec = {
        "layers": None,
        "kv_heads": None,
        "slots": _slots(rng),
        "parts": "kv",
        "align": align,
        "strength": 1.0,
        "rotate": bool(rng.random() < (0.3 if model in ("gpt2", "opt") else 0.8)),  # their keys can't be turned
        "donor": "source",
    }
    if align not in ("replace", "append"):
        spec["layers"] = _some_layers(rng)
        spec["kv_heads"] = _pick(rng, [(0.6, None), (0.15, [0]), (0.13, [-1]), (0.07, [1, 0]), (0.03, [5]), (0.02, [])])
        spec["parts"] = str(rng.choice(["kv", "k", "v"], p=[0.5, 0.2, 0.3]))
        spec["strength"] = float(rng.choice([1.0, 0.5, 1.5, -0.3, 0.0], p=[0.6, 0.2, 0.08, 0.06, 0.06]))
    return spec


def _pick(rng: np.random.Generator, choices: Sequence[tuple[float, Any]]) -> Any:
    return choices[int(rng.choice(len(choices), p=[share for share, _ in choices]))][1]


def _some_layers(rng: np.random.Generator) -> Any:
    low, high = sorted(round(float(x), 2) for x in rng.random(2))
    band = {"band": [low, min(1.0, round(high + 0.3, 2))], "inverse": bool(rng.random() < 0.3)}
    some = [int(layer) for layer in rng.choice(LAYERS, int(rng.integers(1, LAYERS + 1)), replace=False)]
    depth = {"depth": round(float(rng.random()), 2)}
    choices = [(0.4, None), (0.2, some), (0.06, [-1]), (0.2, band), (0.1, depth), (0.02, []), (0.02, [LAYERS])]
    return _pick(rng, choices)


def _slots(rng: np.random.Generator) -> Any:
    """A named selection, indices or a query."""
    names = [(0.4, "all"), (0.02, "bos"), (0.08, "template"), (0.25, "body"), (0.1, "trailer"), (0.08, "last")]
    name = _pick(rng, [*names, (0.07, "sinks")])
    kind = rng.random()
    if kind < 0.5:
        return name
    if kind < 0.68:
        return [int(i) for i in rng.integers(-3, 4, int(rng.integers(0 if rng.random() < 0.1 else 1, 4)))]
    low, high = (round(float(x), 2) for x in rng.random(2))
    query: dict[str, Any] = {"of": name}
    if rng.random() < 0.2:
        query["without"] = str(rng.choice(["sinks", "last", "bos"]))
    if rng.random() < 0.6:
        query["fraction"] = [round(low / 2, 2), round(0.5 + high / 2, 2)]
    if rng.random() < 0.25:
        query["keywords"] = list(_KEYWORDS[int(rng.integers(len(_KEYWORDS)))])
    if rng.random() < 0.12:
        query["in_source"] = True
    return query


def save_model(name: str, directory: Path, seed: int = 0) -> Path:
    """Save a random float32 model of a class with its tokenizer.

    Weights are larger than a fresh model's, and norms and biases are neither one nor zero, so that all of them count.
    """
    config, settings = CLASSES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings)).float().eval()
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    hf.save_pretrained(directory)
    tiny_tokenizer(CHATML).save_pretrained(directory)
    return directory
