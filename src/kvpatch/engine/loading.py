"""`kv.load`: a model by its name, or one that is in memory, ready to be patched."""

from __future__ import annotations

import os
from typing import Any, cast

import torch

from kvpatch.engine.backend import hold_cache_in, refuse_other_cache
from kvpatch.engine.model import Model
from kvpatch.errors import ModelError
from kvpatch.models.in_memory import held_model, refuse_as_name
from kvpatch.models.load import load_model
from kvpatch.models.named import Progress
from kvpatch.models.placement import DeviceMap
from kvpatch.models.second_opinion import second_opinion
from kvpatch.specs.arguments import switch


def load(
    name: str | os.PathLike[str] | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    batch_invariant: bool = True,
    cache_dtype: str | None = None,
) -> Model:
    """Load a model to patch, or take one that is in memory: `kv.load("smollm2-135m")`, or
    `kv.load(model=hf_model, tokenizer=tokenizer)`.

    Args:
        name: a named model, a local directory, a `.gguf` file, or a hub id. See `models.load.load_model` for `device`,
            `dtype`, `device_map`, `allow_pickle`, `trust_remote_code`, `revision` and `progress`, which say how it is
            read.
        model: a transformers model. It stays the object that it is, on its device or devices and in its type; it is put
            in evaluation mode.
        tokenizer: the tokenizer of `model`.
        batch_invariant: see `Model.batch_invariant`.
        cache_dtype: "fp8" for decoding to hold keys and values in 8 floating bits; what is prefilled, patched and
            scored stays in the model's type. The model's own type if None.
    Raises:
        ModelError: where it can't be found, read, trusted, or patched correctly.
    """
    refuse_other_cache(cache_dtype)  # before anything is read
    if model is not None:
        _refuse_for_one_in_memory(name, revision, (device, dtype, device_map))
        loaded: Any = held_model(model, tokenizer)
    else:
        if not isinstance(name, str | os.PathLike):
            refuse_as_name(name)
        if tokenizer is not None:
            raise ModelError("a tokenizer goes with a model in memory; a model that has a name brings its own")
        loaded = load_model(
            cast(str, name),
            device=device,
            dtype=dtype,
            device_map=device_map,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            revision=revision,
            progress=progress,
        )
    made = Model(loaded)
    made.batch_invariant = switch("batch_invariant", batch_invariant, error=ModelError)
    hold_cache_in(made.backbone, cache_dtype, is_in_memory=model is not None)
    made.opinion = second_opinion(made.backbone, loaded)
    return made


def _refuse_for_one_in_memory(name: object, revision: object, how: tuple[object, ...]) -> None:
    """Refuse what says which model is read, or how, where there is one already.

    Raises:
        ModelError: naming it.
    """
    if name is not None:
        raise ModelError("a name and a model in memory are given; give one of the two")
    if revision is not None:
        raise ModelError("revision says which version of a hub model is read; leave it out for one in memory")
    if any(setting is not None for setting in how):
        raise ModelError("device, dtype and device_map say how a model is read; move one in memory with .to() before")
