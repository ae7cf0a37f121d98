"""Memory of a view that was asked much: it goes back to the system once nobody asks any more.

Pages are made in many threads at once, and what each thread has freed stays with the C library, to be used again.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import pyarrow as pa
from starlette.types import ASGIApp, Receive, Scope, Send


class Rest:
    """ASGI middleware that counts answers, so that `look` can tell when there were some and there are no more.

    give_back: called by `look` then.
    """

    def __init__(self, app: ASGIApp, give_back: Callable[[], None]) -> None:
        self.app, self.give_back = app, give_back
        self._answers = self._seen = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        finally:
            self._answers += scope["type"] == "http"

    def look(self) -> None:
        """Give memory back where something was answered since that was last done, and nothing since the last look."""
        is_quiet, self._seen = self._seen == self._answers, self._answers
        if is_quiet and self._answers:
            self._answers = self._seen = 0
            self.give_back()


def give_back() -> None:
    """Give freed memory back to the system, where its C library can."""
    pa.default_memory_pool().release_unused()
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library than glibc
        return None
