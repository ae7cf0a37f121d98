"""Devices as a caller names them."""

from __future__ import annotations

import torch

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
