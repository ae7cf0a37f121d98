"""Devices as a caller names them."""

from __future__ import annotations

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


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device. A GPU is not waited for: it copies the numbers once it gets there."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
