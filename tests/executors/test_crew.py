"""When a crew gives up on workers that end: not for kills, soon for a model that can't be loaded. Without a cluster."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import pytest

from kvpatch.errors import KvpatchError, ModelError
from kvpatch.executors import cluster
from kvpatch.executors import crew as room
from kvpatch.executors.cluster import Cluster, Size
from kvpatch.executors.crew import MOST_FAILED_STARTS, MOST_LATER_STARTS, Crew, Seat
from kvpatch.executors.worker import Arrived, ModelSource

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


class Rehearsed(Crew):
    """A crew whose workers are nobody: they arrive and end as a test says, and pauses are over at once."""

    started = 0

    def _start_one(self) -> None:
        self.seats.append(Seat(self.started, actor=None))
        self.started += 1

    def call(self, seat: Seat, method: str, *args: Any, tag: Any = None) -> None:
        """Nobody is called."""

    def arrives(self) -> None:
        """The worker that waits longest has loaded the models."""
        seat = next(seat for seat in self.seats if seat.arrived is None)
        self._arrived(seat, Arrived({None: SimpleNamespace(revision=None)}, "1", "code", "here", 1))  # pyright: ignore

    def ends(self, *, loaded: bool) -> None:
        """A worker ends, one that has loaded the models or one that has not; another is started."""
        self.replace(next(seat for seat in self.seats if (seat.arrived is not None) == loaded), "its process ended")
        self._start_due()


@pytest.fixture
def crew(monkeypatch) -> Rehearsed:
    monkeypatch.setattr(room, "LONGEST_PAUSE", 0.0)
    made = Rehearsed({None: ModelSource("m")}, Cluster(started=True), Size(2, 0, 1, 1))
    made.start()
    return made


def test_model_that_no_worker_can_load_ends_a_run_after_four_tries(crew):
    for _ in range(MOST_FAILED_STARTS - 1):
        crew.ends(loaded=False)
    with pytest.raises(ModelError, match="workers ended 4 times while they loaded the model: its process ended"):
        crew.ends(loaded=False)
    assert crew.started == MOST_FAILED_STARTS


def test_kills_of_workers_that_load_never_end_a_run_while_another_is_at_work(crew):
    crew.arrives()
    for _ in range(3 * MOST_LATER_STARTS):
        crew.ends(loaded=False)
    assert len(crew.seats) == crew.size.workers and len(crew.ready()) == 1
    crew.ends(loaded=True)  # and the next one starts from nothing
    crew.ends(loaded=False)
    crew.arrives()
    assert len(crew.ready()) == 1


def test_workers_that_all_end_while_they_load_what_others_had_loaded_end_a_run_in_the_end(crew):
    crew.arrives()
    crew.ends(loaded=True)
    for _ in range(MOST_LATER_STARTS - 1):
        crew.ends(loaded=False)
    with pytest.raises(ModelError, match=r"12 times .* none is left: .*; the same command goes on"):
        crew.ends(loaded=False)


def test_pause_before_a_start_grows_and_nothing_is_started_within_it(monkeypatch, crew):
    now = [0.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(room, "LONGEST_PAUSE", 30.0)
    crew.arrives()
    pauses = []
    for _ in range(8):
        started = crew.started
        crew.ends(loaded=False)
        pauses.append(0)
        while crew.started == started:
            now[0] += 1
            pauses[-1] += 1
            crew._start_due()
    assert pauses == [0, 1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize("folder", ["/tmp", "/" + "t" * 28, "/" + "t" * 29, "/" + "t" * 36, "/" + "é" * 20])
def test_sockets_of_a_cluster_have_names_that_a_system_allows_wherever_temporary_files_go(monkeypatch, folder):
    monkeypatch.setattr(cluster.tempfile, "gettempdir", lambda: folder)
    name = f"{cluster._short_folder()}/kvp-abcdefgh/r/session_2026-11-29_11-14-10_391662_1234567/sockets/plasma_store"
    assert len(os.fsencode(name)) <= 107


@pytest.mark.parametrize("error", [OSError("no room"), RuntimeError("no room"), ValueError("no\nroom")])
def test_cluster_that_can_not_be_started_is_told_in_one_line_and_leaves_nothing(monkeypatch, tmp_path, error):
    import ray

    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "_short_folder", lambda: str(tmp_path))
    with (
        pytest.raises(KvpatchError, match=r"Ray could not start workers on this machine \(no room\)"),
        cluster.opened(None),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
