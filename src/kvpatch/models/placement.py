"""Where a model's parts lie and run: on one device, split over several, or offloaded to memory or disk.

transformers places a model by a `device_map`, and accelerate's hooks then bring inputs and weights together, module by
module. A model so dispatched is run by its own forward pass alone. Each layer's keys and values stay on the device that
runs the layer; tokens, labels and logits are where the output head runs.
"""

from __future__ import annotations

import atexit
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvpatch.errors import ModelError
from kvpatch.files import cache_directory, parse_json, read_json

POLICIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Words that let accelerate choose: fill the fastest memory first, or spread layers evenly."""
DeviceMap = str | Mapping[str, int | str | torch.device]
"""One of `POLICIES`, a file of JSON, or names of modules with their devices; "" names the whole model."""


def read_device_map(given: Any) -> str | dict[str, Any]:
    """A device map as transformers takes it.

    Args:
        given: a policy, a dictionary, the text of a JSON object, or the path of a file that holds one.
    Raises:
        ModelError: for anything else, or a device that this machine does not have.
    """
    if isinstance(given, (str, os.PathLike)) and str(given) not in POLICIES:
        given = _read_json(str(given))
    if isinstance(given, str):
        return given
    if not isinstance(given, Mapping) or not given or not all(isinstance(name, str) for name in given):
        raise ModelError(
            f"a device map must be one of {', '.join(POLICIES)}, or names of modules with their devices, such as "
            f'{{"": 0}}; got {str(given)[:80]!r}'
        )
    return {name: _device(name, device) for name, device in given.items()}


def _read_json(text: str) -> Any:
    try:
        return parse_json(text) if text.lstrip().startswith("{") else read_json(Path(text).expanduser())
    except (OSError, RuntimeError) as error:  # or no such user's home
        raise ModelError(
            f"device map {text[:80]!r} is none of {', '.join(POLICIES)}, no JSON object and no file of one"
        ) from error
    except ValueError as error:
        raise ModelError(f"device map {text[:80]!r} is no JSON object: {error}") from error


def _device(name: str, device: Any) -> Any:
    """A device of a map, checked."""
    if device == "disk":
        return device
    try:
        found = torch.device("cuda", device) if type(device) is int else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"the device map puts {name or 'the model'} on {device!r}; a device is a GPU's number, cpu or disk"
        ) from error
    have = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= have:
        raise ModelError(
            f"the device map puts {name or 'the model'} on {device!r}, and this machine has "
            f"{have or 'no'} GPU{'' if have == 1 else 's'}"
        )
    return device if type(device) is int else str(found)


def expanded(device_map: str | Mapping[str, Any], model: nn.Module) -> str | dict[str, Any]:
    """A map whose names do not overlap, as accelerate wants it: a longer name counts for more, and "" for the rest. A
    head that is tied to the embeddings goes where they go.

    Args:
        model: one of the same modules; its weights are not looked at.
    Raises:
        ModelError: for a name that the model has no module of, or parts that no name covers.
    """
    if isinstance(device_map, str):
        return device_map
    modules = {name for name, _ in model.named_modules()}
    if unknown := sorted(set(device_map) - modules):
        raise ModelError(f"the device map names {unknown[0]!r}, and {type(model).__name__} has no such module")
    found: dict[str, Any] = {}
    waiting: list[tuple[str, nn.Module, Any]] = [("", model, device_map.get(""))]
    while waiting:
        place, module, device = waiting.pop(0)
        below = [name for name in device_map if name != place and _is_inside(name, place)]
        if below:
            inner = [(f"{place}.{name}" if place else name, child) for name, child in module.named_children()]
            waiting += [(name, child, device_map.get(name, device)) for name, child in inner]
        elif device is not None:
            found[place] = device
        elif any(True for _ in (*module.parameters(), *module.buffers())):
            raise ModelError(f"the device map says no device for {place or 'the model'}; name it, or give one for ''")
    first, head = (_part(model, part) for part in ("get_input_embeddings", "get_output_embeddings"))
    if first and head and first[1].weight is head[1].weight:  # tied: one tensor can't lie in two places
        wanted, own = (next(d for name, d in found.items() if _is_inside(part[0], name)) for part in (first, head))
        if own != wanted:
            found[head[0]] = wanted
    return found


def _part(model: nn.Module, part: str) -> tuple[str, Any] | None:
    """The name and the module that one of transformers' functions gives, such as the output head."""
    wanted = getattr(model, part)()
    return next(((name, module) for name, module in model.named_modules() if module is wanted), None)


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def usual_device(device_map: str | Mapping[str, Any]) -> str:
    """The kind of device that a map runs a model on, "cuda" or "cpu"; the usual type of the weights follows from it."""
    if isinstance(device_map, str):
        return "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = any(type(device) is int or str(device).startswith("cuda") for device in device_map.values())
    return "cuda" if on_gpu else "cpu"


def offload_folder() -> Path:
    """A folder for weights that are offloaded to disk and have no safetensors file yet. transformers makes it where it
    needs it; it is gone when this process ends."""
    folder = cache_directory() / "offloaded" / uuid.uuid4().hex
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def refuse_too_large(model: nn.Module, device: torch.device, *, saved: int = 0) -> None:
    """Refuse a model whose weights do not fit on a GPU, before its memory is full.

    saved: bytes that the weights will take less there than now.

    Raises:
        ModelError: with both sizes, and what to do.
    """
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    size = sum(tensor.numel() * tensor.element_size() for tensor in {*model.parameters(), *model.buffers()}) - saved
    if size > free:
        raise ModelError(
            f"its weights take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}; device_map='auto' "
            "splits it over GPUs and memory, and dtype='fp8', 'int8' or 'int4' makes it smaller"
        )


def hooks_of(module: nn.Module) -> list[Any]:
    """accelerate's hooks on one module, none where it is as torch made it."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate brings inputs and weights of this model together: it is split, or partly offloaded."""
    return any(hooks_of(module) for module in model.modules())


def runs_on(module: nn.Module) -> torch.device:
    """The device that a module with a weight runs on; an offloaded weight is brought there for each call."""
    for hook in hooks_of(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if type(device) is int else torch.device(device)
    weight = next(module.parameters(recurse=True))
    return weight.device


def offloaded(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """Parameters and buffers that lie in memory or on disk until they are used: name -> where to ask for it, and how it
    is called there."""
    found: dict[str, tuple[Any, str]] = {}
    for place, module in model.named_modules(remove_duplicate=False):
        for hook in hooks_of(module):
            weights = getattr(hook, "weights_map", None)
            if weights is None or not getattr(hook, "offload", False):
                continue
            inside = [*module.named_parameters(recurse=hook.place_submodules, remove_duplicate=False)]
            inside += module.named_buffers(recurse=hook.place_submodules, remove_duplicate=False)
            for name, tensor in inside:
                if tensor.is_meta:
                    found[f"{place}.{name}" if place else name] = (weights, name)
    return found


def with_numbers(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of a model, those that are offloaded fetched one at a time."""
    elsewhere = offloaded(model)
    for name, tensor in tensors:
        if tensor.is_meta and name in elsewhere:
            weights, own = elsewhere[name]
            yield name, weights[own].to(tensor.dtype)
        else:
            yield name, tensor


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers by the device that they lie on; of offloaded ones by "cpu" or "disk"."""
    given: Any = getattr(model, "hf_device_map", None) or {}
    by_length = sorted(given, key=len, reverse=True)
    found: dict[str, int] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        place = str(tensor.device)
        if tensor.is_meta:
            place = _told(next((given[part] for part in by_length if _is_inside(name, part)), "memory or disk"))
        found[place] = found.get(place, 0) + tensor.numel() * tensor.element_size()
    return found


def told_placement(model: nn.Module) -> dict[str, str]:
    """Where the parts of a dispatched model lie, by name of the part, for records and persons; nothing of any other."""
    if not is_dispatched(model):
        return {}
    given: Any = getattr(model, "hf_device_map", None) or {}
    return {name or "the whole model": _told(device) for name, device in given.items()}


def _told(device: object) -> str:
    return f"cuda:{device}" if type(device) is int else str(device)
