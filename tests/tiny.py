"""Tiny random models of every architecture the tests need, saved as ordinary directories; and prompts for them.

Weights come from a fixed seed. They are larger than a fresh model's, and biases and norms are not zero or one, so that
attention, positions and every bias really move the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvpatch.caches.kvcache import Segment
from kvpatch.models.template import EncodedPrompt

WINDOW = 16
CONTEXT = 256
LAYERS = 4
VOCABULARY = 384
SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SPECIALS += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = [
    "Explain how bread rises in a warm oven, and which of the usual steps a beginner can leave out safely.",
    "Watch how each of these words arrives, and say what it is like to be the one that is choosing them now.",
    "user assistant system: the model writes what the words of the user ask for, and then the turn ends.",
]

_ROTARY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PLAIN = {name: value for name, value in _ROTARY.items() if name != "head_dim"}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 48,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": CONTEXT,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _ROTARY),
    "mistral": ("MistralConfig", {**_ROTARY, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", _PLAIN),
    "qwen3": ("Qwen3Config", _ROTARY),
    "gemma2": ("Gemma2Config", {**_ROTARY, **_GEMMA, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_ROTARY,
            **_GEMMA,
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {**_PLAIN, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3": ("Phi3Config", _PLAIN),
    "cohere": ("CohereConfig", _PLAIN),
    "gpt2": ("GPT2Config", _GPT2),
    "gptj": ("GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "gpt_oss": ("GptOssConfig", {**_ROTARY, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # These two are refused.
    "mamba": ("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 4}),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
}
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_neox", "phi3", "cohere", "gpt2")
REFUSED = ("mamba", "bloom")


def tiny_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` tokens that takes any text; `tokenizer(text)` puts <s> before it."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS, trainer)
    assert core.get_vocab_size() == VOCABULARY
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIALS.index("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIALS[3:],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_hf(architecture: str) -> PreTrainedModel:
    """A random float32 model, the same every time."""
    name, settings = CONFIGS[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings)).float().eval()
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return hf.requires_grad_(False)


def tiny_of(kind: str, **settings: Any) -> PreTrainedModel:
    """A random float32 model of a configuration class by its name; `settings` replaces or adds to the common ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**{**_PLAIN, **settings})
        return AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


def tiny_model_dir(architecture: str, tmp: Path, *, chat: bool = True) -> Path:
    """Save a tiny model and its tokenizer as a directory that `kv.load` reads.

    Args:
        architecture: a key of `CONFIGS`.
        tmp: the directory is made in here.
        chat: whether the tokenizer brings a chat template (ChatML).
    """
    out = Path(tmp) / (architecture if chat else f"{architecture}-no-template")
    tiny_hf(architecture).save_pretrained(out)
    tiny_tokenizer(CHATML if chat else None).save_pretrained(out)
    return out


def prompt_of(token_ids: Sequence[int]) -> EncodedPrompt:
    """A prompt of these tokens, all of them body."""
    ids = tuple(int(token) for token in token_ids)
    return EncodedPrompt(ids, (int(Segment.body),) * len(ids), tuple(f"[{token}]" for token in ids))


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[EncodedPrompt]:
    """Prompts of random tokens (no specials) of these lengths."""
    rng = np.random.default_rng(seed)
    return [prompt_of(rng.integers(len(SPECIALS), VOCABULARY, length).tolist()) for length in lengths]
