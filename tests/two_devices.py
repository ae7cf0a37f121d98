"""A second device that every machine has, so that a model split over devices can be tested without a GPU.

`TwoDevices` is a mode in which a tensor may be said to lie on `OTHER`. Its numbers stay in the processor's memory, but
torch's rules hold: what lies on two devices can't be added, multiplied, joined, compared or indexed with one another,
and comes together only by `.to()` or by a copy. What breaks one of them raises what torch raises on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

CPU, OTHER = torch.device("cpu"), torch.device("xpu", 0)
_ASKS_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
_MAY_MIX = {"copy_", "to", "type_as"}
"""Calls whose tensors may lie on different devices."""


class TwoDevices(TorchFunctionMode):
    """While entered, tensors remember which of two devices they are on."""

    def __init__(self) -> None:
        super().__init__()
        self.places: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of(self, tensor: Tensor) -> torch.device:
        """Where a tensor is."""
        return self.places.get(tensor, CPU)

    def put(self, module: nn.Module) -> None:
        """Put a module's parameters and buffers on the other device."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.places[tensor] = OTHER

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == _ASKS_DEVICE:
            return self.of(args[0])
        if func is Tensor.to:
            return self._moved(args, given)
        if func is Tensor.cpu:
            return self._moved((args[0], CPU), {})
        if name == "numpy" and self.of(args[0]) != CPU:
            raise TypeError("can't convert a tensor of the other device to numpy; use Tensor.cpu() first")
        wanted = given.pop("device", None)
        tensors = list(_tensors((args, given)))
        place = self._common(name, args, tensors)
        if wanted is not None:
            place = torch.device(wanted)
        out = func(*args, **given)
        if place != CPU:
            for tensor in _tensors(out):
                self.places[tensor] = place
        return out

    def _moved(self, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
        tensor, rest = args[0], list(args[1:])
        wanted: Any = given.pop("device", None)
        for i, value in enumerate(rest):
            if isinstance(value, Tensor):
                wanted, rest[i] = self.of(value), value.dtype
            elif isinstance(value, (str, torch.device)):
                wanted, rest[i] = torch.device(value), None
        rest = [value for value in rest if value is not None and not isinstance(value, bool)]
        given.pop("non_blocking", None)
        place = self.of(tensor) if wanted is None else torch.device(wanted)
        out = Tensor.to(tensor, *rest, **given) if rest or given else tensor
        if place != self.of(tensor):
            out = out.clone() if out is tensor else out
        if out is not tensor:
            self.places[out] = place
        return out

    def _common(self, name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> torch.device:
        """The device that a call's tensors are on; numbers on the processor go with anything."""
        places = {self.of(t) for t in tensors if t.ndim or self.of(t) != CPU}
        if len(places) < 2:
            return places.pop() if places else CPU
        own = self.of(args[0]) if args and isinstance(args[0], Tensor) else None
        if name in _MAY_MIX:
            return own or CPU
        if name == "__getitem__" and own is not None and {self.of(t) for t in _tensors(args[1])} <= {own, CPU}:
            return own  # an index may be on the processor
        if name == "__setitem__" and own is not None and not list(_tensors(args[1])):
            return own  # a copy into a slice
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {sorted(map(str, places))}: {name}"
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)


class _Here(AlignDevicesHook):
    """accelerate's hook of a module whose weights are where they belong already."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def split(devices: TwoDevices, hf: PreTrainedModel, blocks: list[nn.Module], others: list[nn.Module]) -> None:
    """Split a model as accelerate does: some blocks and other parts on the other device, the rest on the processor."""
    there = [*blocks, *others]
    moved = {id(inner) for module in there for inner in module.modules()}
    for module in there:
        devices.put(module)
        add_hook_to_module(module, _Here(execution_device=OTHER, skip_keys=hf._skip_keys_device_placement))
    for module in list(hf.modules()):
        is_leaf = not list(module.children())
        if is_leaf and id(module) not in moved and any(True for _ in (*module.parameters(), *module.buffers())):
            add_hook_to_module(module, _Here(execution_device=CPU, skip_keys=hf._skip_keys_device_placement))
    for block in _blocks(hf):
        if block not in blocks:
            add_hook_to_module(block, _Here(execution_device=CPU, skip_keys=hf._skip_keys_device_placement))
    add_hook_to_module(hf, _Here(io_same_device=True, skip_keys=hf._skip_keys_device_placement))
    hf.hf_device_map = {"": "cpu", "the second half": "xpu:0"}


def _blocks(hf: PreTrainedModel) -> list[nn.Module]:
    lists = [m for m in hf.base_model.children() if isinstance(m, nn.ModuleList)]
    return list(lists[0])


def split_in_half(devices: TwoDevices, hf: PreTrainedModel) -> None:
    """The second half of the layers, what follows them and the output head on the other device."""
    blocks = _blocks(hf)
    half = blocks[len(blocks) // 2 :]
    behind = [
        m for n, m in hf.base_model.named_children() if n in ("norm", "final_layernorm", "ln_f", "final_layer_norm")
    ]
    head: Any = hf.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # it may be tied to the embeddings
    split(devices, hf, half, [*behind, head])
