"""What a model is, and whether that alone says that it has no KV cache to patch: refused by name, before it is run.

Nothing here lists architectures. What a class is, its configuration tells: which kind of task it is for, and, through
the layers that transformers' own cache would have, what each of its layers keeps from token to token.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from kvpatch.errors import ModelError

STATE = "a state that goes from token to token, not a KV cache"
_TASKS = {
    "ForSequenceClassification": "a classifier",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMultipleChoice": "a model that chooses among answers",
    "ForMaskedLM": "an encoder that fills in masked words",
    "ForPreTraining": "an encoder with the heads of its pretraining",
    "EncoderModel": "an encoder",
    "ForConditionalGeneration": "a model that writes from more than a prompt",
    "ForImageClassification": "a classifier of images",
}
"""What a class's name ends in, and what such a model is."""


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model of this configuration.

    Raises:
        ModelError: for a model that is not causal; says what it is instead.
    """
    kind = str(getattr(config, "model_type", ""))
    saved = next(iter(getattr(config, "architectures", None) or []), "") or type(config).__name__
    told = next((told for ending, told in _TASKS.items() if saved.endswith(ending)), None)
    both = kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    reads_more = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if both and getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{saved} has an encoder and a decoder that looks at it; kvpatch patches causal language models, whose "
            "cache holds the prompt itself"
        )
    if told and not (reads_more and saved.endswith("ForConditionalGeneration")):
        raise ModelError(
            f"config.json names {saved}, {told}; give a checkpoint of a causal language model, whose class ends in "
            "ForCausalLM"
        )
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or has_code:
        if kind in _ENCODERS and not getattr(config, "is_decoder", False):
            raise ModelError(
                f"{saved} is an encoder, whose tokens see later ones; only where its config.json says "
                "is_decoder: true is it a causal language model"
            )
        return AutoModelForCausalLM
    if reads_more:
        return AutoModelForImageTextToText
    named = getattr(transformers, saved, None)
    if saved.endswith("ForCausalLM") and isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named  # the text part of a model that reads more, saved alone
    raise ModelError(
        f"{saved} ({kind or 'no model_type'}) is no causal language model that transformers {transformers.__version__} "
        "knows"
    )


def _is_encoder_by_default(kind: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


_ENCODERS = frozenset(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _is_encoder_by_default(kind))


def decoder_of(hf: PreTrainedModel) -> nn.Module:
    """The part that turns tokens into hidden states: the model without its head; of a model that reads images or the
    like besides, its language model."""
    found: Any = hf
    if hf.config.get_text_config() is not hf.config or hf.base_model is hf:
        while (inner := _inside(found)) is not None:
            found = inner
    return hf.base_model if found is hf else found


def _inside(module: Any) -> Any:
    """The language model inside a transformers model, one step further in; None where there is no further step."""
    if not isinstance(module, PreTrainedModel):
        return None
    decoder = module.get_decoder()
    if decoder is not module:
        return decoder
    parts = [child for child in module.children() if isinstance(child, PreTrainedModel)]
    return parts[0] if len(parts) == 1 else None


def refuse_other_states(hf: PreTrainedModel, config: Any) -> None:
    """Stop where not every layer keeps keys and values, and nothing else, from token to token.

    Args:
        config: the configuration of the model's text part.
    Raises:
        ModelError: naming the layers, and what they keep in place of a KV cache.
    """
    name = type(hf).__name__
    try:
        layers: Sequence[Any] = DynamicCache(config=config).layers
    except Exception:  # a configuration that transformers' cache does not understand: what is run will tell
        layers = ()
    kept = [isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers]
    with_keys = [isinstance(layer, DynamicLayer) for layer in layers]
    if layers and all(kept) and not any(with_keys):
        raise ModelError(f"{name} keeps {STATE}, so there is nothing to patch")
    if any(kept):
        rest = "all have a KV cache beside it" if all(kept) else "only the others have one"
        raise ModelError(
            f"{name} is a hybrid: {_layers([i for i, is_kept in enumerate(kept) if is_kept])} of {len(kept)} keep "
            f"{STATE}; {rest}. kvpatch patches models in which the KV cache is all that is kept"
        )
    others = {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    if "DummyLayer" in others:
        own = [i for i, layer in enumerate(layers) if type(layer).__name__ == "DummyLayer"]
        raise ModelError(
            f"{name}: {_layers(own)} of {len(layers)} have no KV cache of their own; kvpatch can't patch that"
        )
    if others:
        own = [i for i, layer in enumerate(layers) if type(layer).__name__ in others]
        raise ModelError(
            f"{name}: {_layers(own)} of {len(layers)} keep more than keys and values (transformers' "
            f"{' and '.join(sorted(others))}), such as an index that picks slots; kvpatch can't patch that"
        )
    if getattr(hf, "_is_stateful", False):
        raise ModelError(f"{name} keeps {STATE}, in some of its layers at least; kvpatch can't patch that")


def refuse_placeless(hf: PreTrainedModel, decoder: nn.Module) -> None:
    """Stop where a model takes no positions: it counts slots, so that rows of unequal lengths, or slots that a patch
    leaves out, would shift what follows.

    Raises:
        ModelError: naming the model.
    """
    taken = [p for module in (decoder, hf) for p in inspect.signature(module.forward).parameters]
    if "position_ids" not in taken:
        raise ModelError(
            f"{type(hf).__name__} takes no positions (its forward pass has no position_ids) and counts slots by "
            "itself, so rows of unequal lengths and patched caches would be misplaced; kvpatch can't patch it"
        )


def refuse_own_attention(name: str, cached: Sequence[bool], attended: Sequence[int]) -> None:
    """Stop where layers cache keys and values, but attend in code of their own that kvpatch does not see.

    Args:
        cached: whether each layer has cached something in a pass. attended: layers whose attention was seen in it.
    Raises:
        ModelError: naming the model, and its layers where it is some of them.
    """
    hidden = [layer for layer, is_cached in enumerate(cached) if is_cached and layer not in attended]
    if hidden:
        where = "" if len(hidden) == len(cached) else f" in {_layers(hidden)}"
        raise ModelError(
            f"{name} computes attention{where} in code of its own, past transformers' attention interface, so kvpatch "
            "can't run it over its cache"
        )


def _layers(numbers: Sequence[int]) -> str:
    """Some layers, for a person: "layers 0, 2 and 4" or "layers 0 to 5"."""
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"layers {numbers[0]} to {numbers[-1]}"
    if len(numbers) > 8:
        return f"{len(numbers)} layers ({', '.join(map(str, numbers[:4]))} ...)"
    return f"layers {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
