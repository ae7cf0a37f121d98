"""What can be changed in a model between two calls, and whose code its modules run.

kvpatch holds things that it once read off a model: the cache's geometry, weights laid out for the engine's own decoding
step, tables, CUDA graphs. `ModelState` is what they all rest on, taken cheaply enough to be compared at every call.

What it covers:

- every module: which object it is, its type, its children by name and order, whether it trains;
- the code it runs: every function of its type, functions and other callables put on the instance, the functions of the
  file that its type comes from (rotary turns, say), and forward hooks, global ones too;
- every other attribute: numbers and strings by value, lists and dicts by what they print, small tensors by content,
  large tensors by where they lie, any other object by identity;
- every configuration that a module holds, by value, but for the attention implementation, which kvpatch sets itself;
- every parameter and buffer: where it lies, type, shape and strides. Buffers of up to `READ_UP_TO` floating-point
  numbers are compared by content, since tables are made from rotary frequencies and embedding scales.

What it need not cover: numbers of a weight that change in place. The engine reads weights where they lie, and takes
over the small ones that it holds twice (norms, biases) at every call; a processor's packed weights live for one call.
Left out as well are frequencies that a forward pass sets itself (dynamic and long RoPE).
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from kvpatch.models import fp8

READ_UP_TO = 1024
"""Numbers of a buffer up to which its content is compared."""
_PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_UNREAD = frozenset(
    "generation_config generate name_or_path loss_type all_tied_weights_keys warnings_issued _is_hf_initialized "
    "_output_capturing_hooks_installed".split()
)
"""Attributes that change no number of a forward pass."""
_SET_BY_FORWARD = ("inv_freq", "max_seq_len_cached", "attention_scaling")
_CODE = (types.FunctionType, staticmethod, classmethod, property)


@dataclass
class ModelState:
    """A model as it is now. Two states are compared part by part.

    Attributes:
        structure: modules, their code, attributes, configurations and small buffers.
        weights: where parameters and large buffers lie, their types, shapes and strides.
        hooks: forward hooks that are neither transformers' nor torch's own.
        outer_hooks: those of `hooks` that run on the whole model: its own and global ones.
        alive: objects that stand in `structure` by their identity, which is theirs only while they live.
    """

    structure: list[object] = field(default_factory=list)
    weights: list[object] = field(default_factory=list)
    hooks: list[int] = field(default_factory=list)
    outer_hooks: list[int] = field(default_factory=list)
    alive: list[object] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """The state of a model, every module of it included."""
        state, kinds, configs = cls(), {}, {}
        seen, waiting = {id(model)}, [model]
        while waiting:
            module = waiting.pop()
            kinds[type(module)] = None
            state._take_module(module, configs)
            for child in module.__dict__["_modules"].values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    waiting.append(child)
        for kind in kinds:
            state._take_code(kind)
        for home in {kind.__module__ for kind in kinds if kind.__module__.startswith("transformers.models.")}:
            state._take_objects(v for v in vars(sys.modules[home]).values() if type(v) is types.FunctionType)
        waiting_configs = list(configs.values())
        while waiting_configs:  # a configuration may hold others
            more: dict[int, Any] = {}
            for config in waiting_configs:
                state._take_config(config, more)
            waiting_configs = [config for key, config in more.items() if key not in configs]
            configs |= more
        state.outer_hooks = [*foreign_hooks(model), *_ids(_global_hooks())]
        state.hooks += _ids(_global_hooks())
        state.alive += _global_hooks()
        return state

    def _take_module(self, module: nn.Module, configs: dict[int, Any]) -> None:
        own, structure = module.__dict__, self.structure
        names = _attributes(tuple(own))
        self.alive.append(module)
        structure.extend((id(module), type(module), own["training"], names))
        if children := own["_modules"]:
            structure.extend(children)
            structure.extend(map(id, children.values()))
        moves = "rope_type" in names and _is_set_by_forward(own)
        self._take_attributes([(name, own[name]) for name in names], moves, configs)
        for name, parameter in own["_parameters"].items():
            if parameter is not None:
                self.weights.extend((name, *_where(parameter)))
        if own["_buffers"]:
            for name, buffer in own["_buffers"].items():
                if buffer is not None and not (moves and name.endswith(_SET_BY_FORWARD) and "original" not in name):
                    self._take(name, buffer)
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            self.hooks += foreign_hooks(module)
            self.alive += (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())

    def _take_attributes(self, attributes: list[tuple[str, Any]], moves: bool, configs: dict[int, Any]) -> None:
        """A module's own attributes, whose names are taken already."""
        for name, value in attributes:
            if moves and name.endswith(_SET_BY_FORWARD):
                continue
            if type(value) in _PLAIN:
                self.structure.append(value)
            elif hasattr(value, "model_type"):
                configs[id(value)] = value
                self.structure.append(id(value))
            else:
                self._take(name, value)

    def _take(self, name: str, value: Any) -> None:
        """An attribute that is no plain value."""
        if isinstance(value, Tensor):
            is_small = value.is_floating_point() and value.numel() <= READ_UP_TO and not value.is_meta
            if is_small:
                self.structure += (name, value.dtype, value.shape, value.flatten().tolist())
            else:
                self.weights += (name, *_where(value))
        elif type(value) in (list, tuple, dict, set):
            if not name.startswith("_"):  # those are transformers' plans for loading and for several devices
                self.structure += (name, repr(value))
        else:
            self.structure += (name, id(value))
            self.alive.append(value)

    def _take_config(self, config: Any, more: dict[int, Any]) -> None:
        for name, value in vars(config).items():
            if name.startswith(("_attn_implementation", "transformers_version")):
                continue
            if type(value) in _PLAIN:
                self.structure += (name, value)
            elif hasattr(value, "model_type"):
                more[id(value)] = value
                self.structure.append(id(value))
            elif type(value) in (list, tuple, dict, set):
                self.structure += (name, repr(value))
            else:
                self._take(name, value)
        self.alive.append(config)

    def _take_code(self, kind: type) -> None:
        for base in _own_bases(kind):
            self._take_objects(v for v in vars(base).values() if isinstance(v, _CODE))
        self._take_objects([kind.__call__, kind._call_impl, kind.forward])

    def _take_objects(self, objects: Any) -> None:
        for thing in objects:
            self.structure.append(id(thing))
            self.alive.append(thing)


def what_runs_other_code(model: nn.Module) -> str | None:
    """Which of a model's modules runs code that is neither transformers' for this model nor torch's, nor that of fp8
    weights; None where none does. Such code may do what no comparison on a few tokens shows, so that nothing may stand
    in for it."""
    home = type(model).__module__
    checked: set[type] = set()
    for name, value in vars(sys.modules[home]).items():
        if type(value) is types.FunctionType and not _is_from_python(value) and _is_foreign(value):
            return f"{home}.{name} was replaced"
    for name, module in model.named_modules():
        kind, label = type(module), name or "the model"
        is_known = kind is fp8.Fp8Linear or kind.__module__.startswith(
            ("torch.nn.modules.", "transformers.activations")
        )
        if kind.__module__ != home and not is_known:
            return f"{label} is a {kind.__qualname__} of {kind.__module__}"
        for attribute in _attributes_that_call(module):
            if callable(getattr(kind, attribute, None)) or _is_foreign(vars(module)[attribute]):
                return f"{label} has a {attribute} of its own"
        if kind not in checked:
            checked.add(kind)
            code = [f for base in _own_bases(kind) for f in vars(base).values()]
            code += [nn.Module.__call__, nn.Module._call_impl, kind.forward]
            if any(type(f) is types.FunctionType and _is_foreign(f) for f in code):
                return f"{kind.__qualname__} has functions that were replaced"
    if any(type(p) not in (nn.Parameter, Tensor) for p in model.parameters()):
        return "some weights are no plain tensors"
    return None


def foreign_hooks(module: nn.Module) -> list[int]:
    """Identities of a module's forward hooks. Those that transformers leaves behind once a forward pass was asked for
    hidden states or attentions do nothing outside such a pass, and are left out."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return _ids(h for h in hooks if not str(getattr(h, "__module__", "")).startswith("transformers.utils."))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module does nothing but multiply by its weight and add its bias."""
    is_as_torch_made_it = type(module) is nn.Linear and not _attributes_that_call(module)
    is_as_torch_made_it &= not _is_foreign(nn.Linear.forward)
    return is_as_torch_made_it and not foreign_hooks(module) and not _global_hooks()


def dropout_in_training(model: nn.Module) -> str | None:
    """A module that drops numbers at random as it stands, and how many; None where none does."""
    for name, module in model.named_modules():
        if module.training:
            rates = {"p": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else vars(module)
            for key, rate in rates.items():
                if (key == "p" or "drop" in key) and type(rate) is float and rate > 0:
                    return f"{name}.{key} = {rate:g}"
    return None


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Take all forward hooks off while a model is probed: they may count or change what they see, and are not asked
    about."""
    held: list[tuple[Any, list[tuple[int, Callable[..., Any]]]]] = []
    tables = [t for m in model.modules() for t in (m._forward_hooks, m._forward_pre_hooks) if t]
    tables += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
    try:
        for table in tables:
            held.append((table, list(table.items())))
            table.clear()
        yield
    finally:
        for table, items in held:
            table.update(items)


def _global_hooks() -> list[Any]:
    """Hooks that torch runs on every module of every model."""
    return [*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values()]


def _ids(things: Any) -> list[int]:
    return [id(thing) for thing in things]


def _where(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@functools.lru_cache(maxsize=256)
def _attributes(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of a module's attributes without those of every module and those that nothing reads."""
    return tuple(name for name in names if name not in _OF_EVERY_MODULE and name not in _UNREAD)


def _is_set_by_forward(own: dict[str, Any]) -> bool:
    """Whether a rotary embedding's forward pass sets its own frequencies."""
    kind = str(own.get("rope_type", ""))
    return "dynamic" in kind or "longrope" in kind


def _own_bases(kind: type) -> Iterator[type]:
    """A module type and its bases, up to those that all modules or all of transformers' models share."""
    for base in kind.__mro__:
        if base is nn.Module or base.__module__ == "transformers.modeling_utils":
            return
        yield base


@functools.cache
def _library_folders() -> tuple[str, ...]:
    files = [getattr(sys.modules[name], "__file__", None) for name in ("torch", "transformers") if name in sys.modules]
    return (*(f"{Path(file).parent}/" for file in files if file), fp8.__file__)


def _attributes_that_call(module: nn.Module) -> list[str]:
    """Names of what was put on a module and can be called: a `forward` of its own, say."""
    own = module.__dict__
    return [n for n in _attributes(tuple(own)) if callable(own[n]) and not isinstance(own[n], type)]


def _is_from_python(code: Any) -> bool:
    """Whether a function says that it comes with Python (a modelling file imports a few)."""
    return str(code.__module__).partition(".")[0] in sys.stdlib_module_names


def _is_foreign(code: Any) -> bool:
    """Whether a callable was written outside torch and transformers, or wraps one that was."""
    while isinstance(code, functools.partial | types.MethodType):
        code = code.func if isinstance(code, functools.partial) else code.__func__
    if isinstance(code, types.BuiltinFunctionType):
        return False
    if not isinstance(code, types.FunctionType):
        return not type(code).__module__.startswith(("torch.", "transformers."))
    if not code.__code__.co_filename.startswith(_library_folders()):
        return True
    wrapped = getattr(code, "__wrapped__", None)
    return wrapped is not None and _is_foreign(wrapped)
