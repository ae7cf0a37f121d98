"""Which of torch's products on a GPU give the bits of a kernel of ours, tried once per shape."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Tried:
    """For which shapes torch's product was found to give the bits of our kernel."""

    def __init__(self) -> None:
        self.found: dict[tuple[object, ...], bool] = {}

    def holds(self, key: tuple[object, ...], agrees: Callable[[], bool]) -> bool:
        """Whether it does for a shape; compared once."""
        if (known := self.found.get(key)) is None:
            if torch.cuda.is_current_stream_capturing():
                return False  # nothing can be compared now; ours is right
            known = self.found[key] = agrees()
        return known
