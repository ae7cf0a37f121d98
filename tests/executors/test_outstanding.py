"""How many measured trials may wait to be stored: those of the last group, and so many before it."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from kvpatch.executors import local
from kvpatch.executors.local import _Writer
from kvpatch.executors.row_process import RowMakers


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def writer(told):
    nothing: Any = None
    return _Writer(nothing, nothing, {}, lambda batch, tokens: told.append(batch.batch_id), RowMakers("thread"))


def hand_over(writer: _Writer, name: str, trials: int) -> Future[dict[str, int]]:
    stored: Future[dict[str, int]] = Future()
    batch: Any = SimpleNamespace(batch_id=name, trials=[None] * trials)
    writer._handed.append((batch, stored))
    return stored


def test_groups_of_before_are_waited_for_only_where_too_many_trials_are_outstanding(writer, told):
    first, second = hand_over(writer, "first", 6), hand_over(writer, "second", 5)
    hand_over(writer, "last", 100)
    writer.settle_all_but(1, most=11)
    assert told == []
    thread = threading.Thread(target=writer.settle_all_but, args=(1, 10))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and told == [] and writer.makers.hurry.is_set()
    first.set_result({"first": 1})
    thread.join(10)
    assert told == ["first"] and not writer.makers.hurry.is_set()
    second.set_result({"second": 1})
    writer.settle_all_but(1, most=10)
    assert told == ["first", "second"]


def test_an_error_of_storing_is_told_although_nothing_had_to_be_waited_for(writer, told):
    hand_over(writer, "first", 1).set_exception(OSError("no space"))
    hand_over(writer, "last", 1)
    with pytest.raises(OSError, match="no space"):
        writer.settle_all_but(1, most=10)
    assert told == []


def test_a_run_looks_for_garbage_less_often_and_leaves_python_as_it_was(writer):
    before = gc.get_threshold()
    with writer:
        assert gc.get_threshold()[0] >= local.COLLECTED_AFTER
    assert gc.get_threshold() == before
