"""Changes to what enters a model's layers, made by hooks that live for one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]
"""Takes and gives the residual stream that enters a layer, [batch, tokens, width]."""
Changes = Mapping[int, tuple[Change, ...]]
"""Layer -> what is done to the stream before it, one after the other."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with: by place and by name."""


@contextmanager
def changed_streams(blocks: nn.ModuleList, changes: Changes) -> Iterator[None]:
    """Hooks on what enters some layers, gone on any exit."""
    handles = [
        blocks[layer].register_forward_pre_hook(_hook(change), with_kwargs=True)
        for layer, of_layer in changes.items()
        for change in of_layer
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(change: Change) -> Callable[..., Arguments]:
    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return run
