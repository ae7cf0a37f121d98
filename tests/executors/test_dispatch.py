"""Which group is handed out when, and what becomes of one that fails; without workers."""

from __future__ import annotations

import pytest

from idle import idle_plan
from kvpatch.errors import KvpatchError
from kvpatch.executors.cluster import Asked, Size, sized
from kvpatch.executors.dispatch import MOST_DEATHS, Dispatcher
from kvpatch.executors.repeats import Repeats
from kvpatch.store.directory import Store
from kvpatch.store.growing import GrowingIndex
from kvpatch.store.parts import Part
from kvpatch.store.record import Session, told_of_sessions


@pytest.fixture(scope="module")
def plan():
    return idle_plan(12, 2)


def dispatcher(plan, tmp_path, *, together=1, done=(), split=None, calibrating=0):
    """Groups of so many batches each; the first `calibrating` batches are the calibration of the others."""
    batches = [
        b if place < calibrating else b.model_copy(update={"split": split or b.split, "phase": "1"})
        for place, b in enumerate(plan.batches)
    ]
    changed = plan.model_copy(update={"batches": batches})
    found: list[str] = []
    groups = [batches[at : at + together] for at in range(0, len(batches), together)]
    repeats = Repeats(changed, Store(tmp_path))
    return Dispatcher(groups, set(done), repeats, lambda batch: found.append(batch.batch_id)), found


def test_groups_come_in_the_plans_order_and_what_is_stored_is_told_and_left_out(plan, tmp_path):
    names = [batch.batch_id for batch in plan.batches]
    handed, found = dispatcher(plan, tmp_path, together=2, done=[names[0], names[2], names[3]])
    first, second = handed.next(), handed.next()
    assert first is not None and second is not None and handed.next() is None and not handed.is_more
    # the first group runs whole, in the company that it was planned in, and only what is left of it is stored
    assert [b.batch_id for b in first.batches] == names[:2] and first.left == {names[1]}
    assert [b.batch_id for b in second.batches] == names[4:]
    assert found == [names[0], names[2], names[3]]


def test_group_that_comes_back_is_handed_out_before_later_ones_also_to_a_worker_that_is_full(plan, tmp_path):
    handed, _ = dispatcher(plan, tmp_path)
    first, second, third = (handed.next() for _ in range(3))
    assert handed.next(before=third.number) is None  # nothing came back
    handed.give_back(second)
    handed.give_back(first)
    assert handed.next(before=third.number) == first
    assert handed.next(before=second.number) is None
    assert handed.next() == second


def test_rows_wait_for_the_calibration_and_for_those_that_they_copy(plan, tmp_path):
    handed, _ = dispatcher(plan, tmp_path, split="test", calibrating=1)
    calibration, trials = handed.next(), handed.next()
    assert handed.is_ready(calibration) and not handed.is_ready(trials)
    handed.stored(calibration.batches[0])
    assert handed.is_ready(trials)


def test_error_takes_a_group_apart_and_a_batch_that_fails_alone_three_times_is_told(plan, tmp_path):
    handed, _ = dispatcher(plan, tmp_path, together=3)
    work = handed.next()
    assert handed.erred(work) is None
    again = handed.next()
    assert again.batches == work.batches and again.errors == 1
    assert handed.erred(again) is None
    alone = [handed.next() for _ in range(3)]
    assert [w.batches for w in alone] == [(batch,) for batch in work.batches]
    bad = alone[1]
    for _ in range(2):
        assert handed.erred(bad) is None
        bad = handed.next()
    assert handed.erred(bad) == work.batches[1]
    assert handed.next().number == (1, 0)  # the next group of the plan


def test_deaths_of_workers_cost_a_batch_more_patience_than_errors(plan, tmp_path):
    handed, _ = dispatcher(plan, tmp_path)
    work = handed.next()
    for _ in range(MOST_DEATHS - 1):
        assert handed.died(work) is None
        work = handed.next()
    assert handed.died(work).batch_id == plan.batches[0].batch_id
    assert MOST_DEATHS > 5


@pytest.mark.parametrize(
    ("asked", "cores", "gpus", "size"),
    [
        (Asked(workers=2), 2, 0, Size(2, 0, 1, 1)),
        (Asked(workers=4), 2, 0, Size(4, 0, 0.5, 1)),
        (Asked(workers=2), 9, 0, Size(2, 0, 4, 4)),
        (Asked(gpus="all"), 64, 8, Size(8, 1, 8, 8)),
        (Asked(gpus="4"), 16, 8, Size(4, 1, 4, 4)),
    ],
)
def test_cores_and_gpus_are_shared_out(asked, cores, gpus, size):
    assert sized(asked, cores, gpus) == size


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked(gpus="2"), "--gpus 2: this machine has no GPUs and 2 processor cores"),
        (Asked(gpus="all"), "has no GPUs"),
        (Asked(gpus="some"), "give a number, or all"),
        (Asked(gpus="0"), "give a number, or all"),
        (Asked(gpus="2", workers=2), "give one of them"),
        (Asked(workers=0), "at least 1"),
        (Asked(gpus="2", address="10.0.0.1:6379"), "the cluster has no GPUs"),
    ],
)
def test_more_than_there_is_is_refused_by_what_is_there(asked, words):
    with pytest.raises(KvpatchError, match=words):
        sized(asked, 2, 0)


def test_lines_are_added_behind_whole_ones_and_a_torn_one_is_taken_away(tmp_path):
    store, parts = Store(tmp_path), [Part(part=f"1-{n}-x.parquet", rows=n, sha256=f"{n:064x}") for n in range(5)]
    GrowingIndex(store).name(parts[:2])
    with open(store.index, "ab") as file:
        file.write(parts[2].line()[:40])  # a process was killed here
    index = GrowingIndex(store)
    index.name(parts[2:3])
    before = store.index.read_bytes()
    index.name(parts[3:])
    assert store.index.read_bytes().startswith(before)
    assert store.parts() == parts
    GrowingIndex(store).name(parts[:1])  # written again: it stands there once
    assert sorted(store.parts(), key=lambda part: part.part) == parts


def test_what_happened_is_one_sentence():
    assert told_of_sessions([Session(executor="local")]) is None
    of_ray = Session(executor="ray", workers=2, deaths=1, retried=3, failed=1)
    assert told_of_sessions([Session(executor="local"), of_ray]) == (
        "Carried out by 2 Ray workers, and partly by one process: 1 worker ended early and was replaced, 3 batches "
        "were measured again, 1 batch is stored as failed."
    )
    assert told_of_sessions([Session(executor="ray", workers=8, gpus=1)]) == (
        "Carried out by 8 Ray workers of 1 GPU each: no worker ended early, no batch was measured again, none is "
        "stored as failed."
    )
