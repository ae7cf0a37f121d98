"""Take a model that is already in memory, with the refusals that loading from disk has."""

from __future__ import annotations

from pathlib import PurePath, PureWindowsPath
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvpatch.errors import ModelError
from kvpatch.models.checkpoint import refuse_not_finite, refuse_other_vocabulary
from kvpatch.models.load import Loaded
from kvpatch.models.placement import is_dispatched
from kvpatch.specs.arguments import shown

TOGETHER = "kv.load(model=hf_model, tokenizer=tokenizer)"


def held_model(hf: object, tokenizer: Any) -> Loaded:
    """A transformers model and its tokenizer as they are in memory, with the name that records give the model.

    The model stays the caller's own object, on its device and in its type.

    Raises:
        ModelError: where it is no transformers model, comes without its tokenizer, holds an adapter, or has weights
            that are not all there, on one device and finite.
    """
    if hasattr(hf, "peft_config") or type(hf).__module__.startswith("peft."):
        raise ModelError(
            f"the {type(hf).__name__} holds an adapter; merge it into its model (merge_and_unload) and give that"
        )
    if not isinstance(hf, PreTrainedModel):
        raise ModelError(f"model must be a transformers model, got {_told(hf)}; write {TOGETHER}")
    if tokenizer is None:
        raise ModelError(f"a {type(hf).__name__} in memory needs its tokenizer beside it: {TOGETHER}")
    if not hasattr(tokenizer, "convert_ids_to_tokens") or not callable(tokenizer):
        raise ModelError(f"tokenizer must be a transformers tokenizer, got {_told(tokenizer)}")
    places = sorted({str(tensor.device) for tensor in (*hf.parameters(), *hf.buffers())})
    if is_dispatched(hf):
        places = []  # accelerate's hooks bring weights and inputs together, offloaded ones too
    if "meta" in places:
        raise ModelError(f"weights of the {type(hf).__name__} are on the device meta, so they have no numbers yet")
    if len(places) > 1:
        raise ModelError(
            f"the {type(hf).__name__} lies on {', '.join(places)}; put it on one device with .to(), or split it with "
            "accelerate's dispatch_model"
        )
    refuse_not_finite(hf)
    refuse_other_vocabulary(hf, tokenizer)
    return Loaded(hf, tokenizer, name_of(hf), None, is_converted=False, is_held=True)


def refuse_as_name(given: object) -> None:
    """Say of a model in memory, or of nothing, that is given in place of a name how it would be right.

    Raises:
        ModelError: for anything that is no name or path.
    """
    if given is None:
        raise ModelError(f"no model is named; give a name, a hub id or a path, or write {TOGETHER}")
    raise ModelError(f"a model's name must be text or a path, got {_told(given)}; what is in memory goes by {TOGETHER}")


def name_of(hf: PreTrainedModel) -> str:
    """The last part of where a model came from, or its class: never a path of the machine."""
    origin = str(getattr(hf.config, "_name_or_path", "") or "").rstrip("/\\")
    return PurePath(PureWindowsPath(origin).name).name or type(hf).__name__


def _told(value: object) -> str:
    """A value in a few words: a module prints itself over hundreds of lines."""
    kind = type(value).__name__
    if isinstance(value, nn.Module) or not isinstance(value, (str, int, float, bool, type(None))):
        return f"a {kind}"
    return f"{kind} {shown(value)}"
