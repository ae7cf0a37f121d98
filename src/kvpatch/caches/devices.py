"""Devices as a caller names them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from kvpatch.errors import CacheError, KvpatchError
from kvpatch.specs.arguments import shown


def device_of(value: object, *, error: type[KvpatchError] = CacheError) -> torch.device:
    """A device that this machine has.

    Args:
        value: its name, such as "cpu" or "cuda:0", or a `torch.device`.
    Raises:
        KvpatchError: of the type given by `error`, for anything else.
    """
    try:
        if not isinstance(value, (str, torch.device)):
            raise TypeError
        found = torch.device(value)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as cause:
        raise error(f"no device {shown(value)} on this machine; use cpu, or cuda where there is a GPU") from cause
    return found


@contextlib.contextmanager
def one_host_thread(devices: Iterable[torch.device]) -> Iterator[None]:
    """Where all of these devices are GPUs, let torch compute on the processor in one thread within the block.

    Beside a model on a GPU that is small: a mask, a copy, a decomposition of 16 vectors. torch shares whatever has more
    than 32,768 numbers among as many threads as the host has cores, and waits for the last of them. Where other work
    takes a core, that wait is 10 ms (32 cores; a copy of 40 kB), against 6 us in one thread.
    """
    before, kinds = torch.get_num_threads(), {device.type for device in devices}
    is_worth_it = kinds == {"cuda"}
    try:
        if is_worth_it:
            torch.set_num_threads(1)
        yield
    finally:
        if is_worth_it:
            torch.set_num_threads(before)


STAGED = 64 << 20
"""Bytes of memory, pinned, that arrays go through on their way to a GPU."""


class _Stage:
    """Pinned memory that is used round and round. Half of it is written again once the GPU has read that half."""

    def __init__(self) -> None:
        self.memory = torch.empty(STAGED, dtype=torch.uint8, pin_memory=True)
        self.half, self.at = 0, 0
        self.read = (torch.cuda.Event(), torch.cuda.Event())

    def send(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor of the host on a GPU, of at most half as many bytes as there are here.

        NumPy copies it: torch would do that in several threads, see `one_host_thread`.
        """
        size = tensor.numel() * tensor.element_size()
        if self.at + size > STAGED // 2:
            self.read[self.half].record()
            self.half, self.at = 1 - self.half, 0
            self.read[self.half].synchronize()
        start = self.half * STAGED // 2 + self.at
        self.at += -(-size // 64) * 64
        place = self.memory[start : start + size].view(tensor.dtype).view(tensor.shape)
        np.copyto(place.numpy(), tensor.numpy())
        return place.to(device, non_blocking=True)


_STAGES: dict[torch.device, _Stage] = {}
_STAGING = threading.Lock()


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device. A GPU is not waited for: it reads the numbers once it gets there."""
    tensor = torch.from_numpy(numbers)
    size = tensor.numel() * tensor.element_size()
    if device.type != "cuda" or not 0 < size <= STAGED // 2:
        return tensor.to(device)
    with _STAGING, torch.cuda.device(device):
        if device not in _STAGES:
            _STAGES[device] = _Stage()
        return _STAGES[device].send(tensor, device)
