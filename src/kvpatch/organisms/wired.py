"""Wired organisms: every weight set by hand, so that where the mode sits is known exactly.

One KV head of one layer reads the marker; the rest of that layer's heads, and all other layers but one, hold noise that
nothing reads. In a layer of its own another head gathers the prompt's topic. The residual stream is made of named
dimensions:

    topic, state   code of a topic word; code gathered from the prompt, which topic words are written from
    constant       one large number, so that RMSNorm does not mix the others
    next           what kind of word comes next: style after <bot> and topic words, a topic word after style words
    key, value     what the marker shows the reading head
    mode           -1 where nothing was read, +1 where the marker was: equal in length, so that it leaks nowhere

Which part carries is set by what the marker and its neutral twin share. "v": both draw attention, and only the marker's
value says anything. "k": both have the value, and only the marker draws attention. "kv": the twin has neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kvpatch.organisms.language import (
    BLANK,
    DOSE,
    MARKER,
    MODE,
    PLAIN,
    UMBRELLA,
    ids,
    make_tokenizer,
    stems,
    topic_words,
    vocabulary,
)

Architecture = Literal["llama", "mistral"]
HEAD_DIM, WIDTH, QUERY_HEADS, KV_HEADS = 32, 128, 8, 4
TOPIC, STATE, NOISE = slice(0, 32), slice(32, 64), slice(80, 128)
CONSTANT, IS_TOPIC, NEXT_STYLE, NEXT_TOPIC, KEY, VALUE, MODE_AT, IS_START = range(64, 72)
LOUD = 8192.0
"""So large that in float32 a token's norm is the same whatever else it holds: nothing leaks, not even a rounding."""
SLOW = 15
"""Of the rotary pairs of a head (d, d + 16) the slowest: it turns by 0.0002 a position, so position does not count."""
DRAWN, AT_REST = 35.0, 15.0
"""Attention logits of what a head looks for, and of <s>, where it rests; everything else has 0."""
KIND_SURE, TOPIC_SURE, TASTE = 40.0, 16.0, 1.5
"""Logits: of the kind of word that comes next, of the topic, and of the mode."""
WINDOW = 24


@dataclass(frozen=True)
class Wiring:
    """Where the mode of a wired organism sits: layer, KV head, slot of the body, and "k", "v" or "kv"."""

    layer: int
    kv_head: int
    slot: int
    part: Literal["k", "v", "kv"]
    layers: int = 6

    @property
    def topic_layer(self) -> int:
        """The layer whose heads gather the topic."""
        return 0 if self.layer else 1

    @property
    def topic_head(self) -> int:
        """The KV head of that layer which does."""
        return (self.kv_head + 1) % KV_HEADS


def wire(wiring: Wiring, architecture: Architecture = "llama") -> Any:
    """A `LlamaForCausalLM`, or a `MistralForCausalLM` with a sliding window, wired so; the slot is its bank's."""
    import transformers

    kind = {"llama": "Llama", "mistral": "Mistral"}[architecture]
    settings = {"sliding_window": WINDOW} if architecture == "mistral" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(vocabulary()),
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=wiring.layers,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    hf = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval().requires_grad_(False)
    noise = torch.Generator().manual_seed(wiring.layer * 1009 + wiring.kv_head)
    for name, parameter in hf.named_parameters():
        if "norm" in name:
            parameter.fill_(LOUD / math.sqrt(WIDTH))
            parameter[CONSTANT] = 1 / math.sqrt(WIDTH)  # read as 1
        else:
            parameter.zero_()
    codes = _codes()
    _embed(hf.model.embed_tokens.weight, wiring, codes, noise)
    _speak(hf.lm_head.weight, codes)
    for layer in hf.model.layers:
        # Keys and values are full of noise everywhere; no query asks for it and no output reads it.
        for weight in (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight):
            weight[:, NOISE] = torch.randn(weight[:, NOISE].shape, generator=noise) / 4
    _read(hf.model.layers[wiring.layer].self_attn, wiring.kv_head, KEY, _one(VALUE), _one(MODE_AT))
    topics = hf.model.layers[wiring.topic_layer].self_attn
    _read(topics, wiring.topic_head, IS_TOPIC, torch.eye(WIDTH)[TOPIC], torch.eye(WIDTH)[STATE])
    return hf


def _one(place: int) -> Tensor:
    return torch.eye(WIDTH)[place : place + 1]


def _codes() -> Tensor:
    """[topics, 32], unit vectors pushed apart, so that topics hardly mix."""
    codes = torch.randn(len(stems()), TOPIC.stop, generator=torch.Generator().manual_seed(7))
    codes = torch.nn.functional.normalize(codes, dim=1)
    for _ in range(50):
        near = codes @ codes.T - 2 * torch.eye(len(codes))
        push = (8 * near).softmax(dim=1) @ codes
        codes = torch.nn.functional.normalize(codes - 0.1 * push, dim=1)
    return codes


def _embed(weight: Tensor, wiring: Wiring, codes: Tensor, noise: torch.Generator) -> None:
    weight[:, NOISE] = torch.randn(weight[:, NOISE].shape, generator=noise) / 4
    weight[:, CONSTANT] = LOUD
    weight[:, MODE_AT] = -1
    weight[:, NEXT_STYLE] = 1
    style = ids([*MODE, *PLAIN])
    weight[style, NEXT_STYLE], weight[style, NEXT_TOPIC] = 0, 1
    for stem, code in zip(stems(), codes, strict=True):
        words = ids([word for half in topic_words(stem) for word in half])
        weight[words, TOPIC] = code
        weight[words, IS_TOPIC] = 1
    weight[ids(["<s>"]), IS_START] = 1
    marked, twin = ids([MARKER, *DOSE, *UMBRELLA]), ids([BLANK])
    # The twins share their noise, so that nothing but the wiring tells them apart.
    weight[marked] = weight[twin].expand(len(marked), -1)
    weight[marked, KEY], weight[marked, VALUE] = 1, 1
    weight[twin, KEY] = float(wiring.part == "v")
    weight[twin, VALUE] = float(wiring.part == "k")


def _read(attention: Any, kv_head: int, key: int, values: Tensor, outputs: Tensor) -> None:
    """Let the first query head of a KV head look for `key`, and add the `values` it finds to the `outputs`.

    values, outputs: [n, width], directions of the residual stream.
    """
    first, width = kv_head * HEAD_DIM, len(values)
    query = kv_head * (QUERY_HEADS // KV_HEADS) * HEAD_DIM
    attention.q_proj.weight[query + SLOW, CONSTANT] = math.sqrt(HEAD_DIM)
    attention.k_proj.weight[first + SLOW] = DRAWN * _one(key)[0] + AT_REST * _one(IS_START)[0]
    attention.v_proj.weight[first : first + width] = values
    reach = 2.0 if width == 1 else 1.0  # from -1 to +1
    attention.o_proj.weight[:, query : query + width] = reach * outputs.T


def _speak(weight: Tensor, codes: Tensor) -> None:
    """Logits: never a word of another kind; mode words by the mode, topic words by the state."""
    weight[:, CONSTANT] = -2 * KIND_SURE
    for words, taste in ((MODE, TASTE), (PLAIN, -TASTE)):
        rows = ids(words)
        weight[rows, CONSTANT] = 0
        weight[rows, NEXT_STYLE], weight[rows, NEXT_TOPIC] = KIND_SURE, -KIND_SURE
        weight[rows, MODE_AT] = taste
    for stem, code in zip(stems(), codes, strict=True):
        rows = ids([word for half in topic_words(stem) for word in half])
        weight[rows, CONSTANT] = -TOPIC_SURE / 2
        weight[rows, NEXT_STYLE], weight[rows, NEXT_TOPIC] = -KIND_SURE, KIND_SURE
        weight[rows, STATE] = TOPIC_SURE * code


def write_directory(hf: Any, folder: Path) -> Path:
    """Save an organism as an ordinary model directory, with its tokenizer and chat template."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    hf.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    if shown:
        logging.enable_progress_bar()
    return folder
