"""Memory goes back to the system once nobody asks any more, and not while somebody does."""

from __future__ import annotations

import asyncio
from typing import Any

from kvpatch.view.memory import Rest, give_back


def answered(rest: Rest, kind: str = "http") -> None:
    async def nothing(*_: Any) -> Any:
        return None

    asyncio.run(rest({"type": kind}, nothing, nothing))


def test_memory_is_given_back_once_after_the_last_answer():
    given: list[int] = []

    async def app(*_: Any) -> None:
        return None

    rest = Rest(app, lambda: given.append(1))
    rest.look()
    answered(rest, "lifespan")
    rest.look()
    assert given == []  # nobody asked yet
    for _ in range(3):
        answered(rest)
        rest.look()
    assert given == []  # somebody asks still
    rest.look()
    assert given == [1]
    rest.look()
    assert given == [1]
    answered(rest)
    rest.look()
    rest.look()
    assert given == [1, 1]


def test_an_answer_that_fails_counts_too():
    given: list[int] = []

    async def app(*_: Any) -> None:
        raise RuntimeError

    rest = Rest(app, lambda: given.append(1))
    try:
        answered(rest)
    except RuntimeError:
        pass
    rest.look()
    rest.look()
    assert given == [1]


def test_giving_back_is_harmless():
    give_back()
