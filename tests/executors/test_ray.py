"""Runs with workers on one real Ray cluster: the local executor's rows to the bit, deaths, failures, Ctrl-C, resume."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvpatch.errors import ModelError, StoreError
from kvpatch.executors.local import LocalExecutor
from kvpatch.executors.worker import ModelSource, Task, Worker
from kvpatch.planning import plan as planner
from kvpatch.planning.listener import ProgressListener
from kvpatch.store.directory import Store
from kvpatch.store.record import Session, told_of_sessions

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.filterwarnings("ignore:::ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
HERE = Path(__file__).parent


class Troubled(Worker):
    """A worker that is told by the files of a folder what to do wrong, since it is another process.

    die-NAME: ends while it measures the batch, once. bad-NAME: the batch can't be measured. untold-NAME: ends once its
    part is written and before it tells.
    """

    def measure(self, task: Task) -> Any:
        for batch in task.batches:
            if (sign := self._trouble() / f"die-{batch.batch_id}").exists():
                sign.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().measure(task)

    def _measure(self, task: Task) -> Any:
        for batch in task.batches:
            if (self._trouble() / f"bad-{batch.batch_id}").exists():
                raise ArithmeticError("the batch is bad")
        return super()._measure(task)

    def _write(self, held: Any, limits: Any, sources: Any) -> Any:
        written = super()._write(held, limits, sources)
        for part, _ in written:
            if (sign := self._trouble() / f"untold-{part.batch}").exists():
                sign.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return written

    def _trouble(self) -> Path:
        return Path(self.settings.directory).parent / "trouble"


@pytest.fixture(scope="module")
def plan(small_plan):
    """Eight test pairs, one a batch."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planner, "ROWS_PER_BATCH", 5)
        phases = {name: {"question": "?", "n": 4, "conditions": ["A", "B", "C", "N1"]} for name in ("1", "2")}
        return small_plan(n=4, generation={"max_new_tokens": 6, "temperature": 0.7}, phases=phases, hypotheses=[])


@pytest.fixture(scope="module")
def crew(tiny_dirs, model) -> Iterator[Any]:
    """Two workers, which find this module by its name."""
    from kvpatch.executors.cluster import Asked
    from kvpatch.executors.crew import crew_of

    with pytest.MonkeyPatch.context() as patched:
        folders = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
        patched.setenv("PYTHONPATH", os.pathsep.join(folders))
        sources = {None: ModelSource(str(tiny_dirs("llama")), {"device": "cpu"})}
        with crew_of(sources, Asked(workers=2), Troubled) as made:
            yield made


@pytest.fixture(scope="module")
def undisturbed(model, plan, tmp_path_factory) -> list[str]:
    """What the local executor stores."""
    store = Store(tmp_path_factory.mktemp("local") / "run")
    with store.locked():
        LocalExecutor({None: model}).run(plan, store, on_tokens=lambda _: None, on_batch=lambda *_: None)
    return rows_of(store)


def rows_of(store: Store) -> list[str]:
    return [repr(row) for row in sorted(store.read().to_pylist(), key=lambda row: row["trial_id"])]


class Told:
    """What an executor told."""

    def __init__(self) -> None:
        self.tokens, self.batches, self.session = 0, dict[str, int](), Session(executor="none")

    def on_tokens(self, tokens: int) -> None:
        self.tokens += tokens

    def on_batch(self, batch: Any, tokens: int) -> None:
        assert batch.batch_id not in self.batches
        self.batches[batch.batch_id] = tokens

    def on_change(self, session: Session) -> None:
        self.session = session


def carried_out(crew: Any, plan: Any, store: Store, told: Told | None = None) -> Told:
    from kvpatch.executors.host import How
    from kvpatch.executors.ray import RayExecutor

    told = told or Told()
    before = crew.counts.deaths
    with held(store):
        executor = RayExecutor(crew, How({}, {}, {}), told.on_change)
        executor.run(plan, store, on_tokens=told.on_tokens, on_batch=told.on_batch)
    told.session = told.session.model_copy(update={"deaths": told.session.deaths - before})
    return told


@contextmanager
def held(store: Store) -> Iterator[None]:
    with store.locked():
        yield
        store.write_text("run.json", "{}")


@pytest.fixture
def troubled(tmp_path) -> Any:
    """`troubled(kind, batch)`: let something go wrong in the run of `tmp_path / "run"`."""
    folder = tmp_path / "trouble"
    folder.mkdir()
    return lambda kind, batch: (folder / f"{kind}-{batch.batch_id}").touch()


def batches_to_test(plan: Any) -> list[Any]:
    return [batch for batch in plan.batches if batch.split == "test"]


def test_workers_store_the_rows_of_the_local_executor_to_the_bit(crew, plan, tmp_path, undisturbed):
    told = carried_out(crew, plan, store := Store(tmp_path / "run"))
    assert rows_of(store) == undisturbed
    assert set(told.batches) == {batch.batch_id for batch in plan.batches}
    written = store.read(["n_tokens", "content_id"]).to_pandas().drop_duplicates("content_id")["n_tokens"].sum()
    assert sum(told.batches.values()) == written  # what was copied is not counted again
    assert (told.session.workers, told.session.deaths, told.session.retried) == (2, 0, 0)


def test_five_deaths_leave_every_trial_once_and_are_told(crew, plan, tmp_path, undisturbed, troubled):
    tests = batches_to_test(plan)
    for batch in (plan.batches[0], tests[0], tests[2]):
        troubled("die", batch)
    for batch in (tests[1], tests[5]):
        troubled("untold", batch)
    told = carried_out(crew, plan, store := Store(tmp_path / "run"))
    assert rows_of(store) == undisturbed
    assert told.session.deaths == 5 and told.session.failed == 0 and told.session.retried >= 5
    assert "5 workers ended early and were replaced" in str(told_of_sessions([told.session]))
    assert len(store.parts()) == len(plan.batches) == len(list(store.trials.iterdir()))  # nothing lies about


def test_batch_that_fails_alone_three_times_is_stored_with_its_error_and_the_run_goes_on(
    crew, plan, tmp_path, undisturbed, troubled
):
    bad = batches_to_test(plan)[3]
    troubled("bad", bad)
    told = carried_out(crew, plan, store := Store(tmp_path / "run"))
    rows = store.read().to_pylist()
    wrong = {row["trial_id"]: row for row in rows if row["error"] is not None}
    assert {trial.trial_id for trial in bad.trials} <= wrong.keys()
    assert {row["error"] for row in wrong.values()} == {"ArithmeticError: the batch is bad"}
    copies = {trial.content_id for trial in bad.trials}
    assert all(row["content_id"] in copies for row in wrong.values())  # and those that another phase copies from it
    assert [repr(row) for row in sorted(rows, key=lambda row: row["trial_id"]) if row["error"] is None] == [
        row for row in undisturbed if not any(trial in row for trial in wrong)
    ]
    assert (told.session.failed, told.session.retried) == (1, 2)


def test_calibration_that_can_not_be_measured_ends_the_run(crew, plan, tmp_path, troubled):
    from kvpatch.executors.crew import WorkerError

    troubled("bad", plan.batches[0])
    with pytest.raises(WorkerError, match="ArithmeticError: the batch is bad"):
        carried_out(crew, plan, Store(tmp_path / "run"))


@pytest.mark.parametrize("begun", ["locally", "with workers"])
def test_run_broken_off_is_resumed_by_the_other_executor(crew, model, plan, tmp_path, undisturbed, begun):
    store, told = Store(tmp_path / "run"), Told()
    local = lambda told: LocalExecutor({None: model}).run(  # noqa: E731
        plan, store, on_tokens=told.on_tokens, on_batch=told.on_batch
    )

    def stop(batch: Any, tokens: int) -> None:
        told.batches[batch.batch_id] = tokens
        if len(told.batches) == 3:
            raise KeyboardInterrupt

    told.on_batch = stop
    if begun == "locally":
        with held(store), pytest.raises(KeyboardInterrupt):
            local(told)
        again = carried_out(crew, plan, store)
    else:
        with pytest.raises(KeyboardInterrupt):
            carried_out(crew, plan, store, told)
        store.write_text("run.json", "{}")
        assert 3 <= len(store.parts()) < len(plan.batches)
        again = Told()
        with held(store):
            local(again)
    assert rows_of(store) == undisturbed
    assert sum(tokens == 0 for tokens in again.batches.values()) >= 3  # what was stored is not run again


def test_rows_that_can_not_be_written_end_the_run_in_one_line(crew, plan, tmp_path):
    store = Store(tmp_path / "run")
    with store.locked():
        store.trials.write_text("in the way")
    with pytest.raises(StoreError, match="can't be written"):
        carried_out(crew, plan, store)


def asked_back(models: Any, listener: ProgressListener, what: str) -> str:
    """What a host is asked here."""
    listener.stage("asked")
    if what == "wrong":
        raise ModelError("the model is wrong")
    return f"{what} of {models[None].geometry.layers} layers"


def test_what_needs_a_model_is_asked_of_a_worker(crew):
    stages: list[str] = []
    listener = ProgressListener()
    listener.stage = stages.append
    assert crew.ask(asked_back, "a model", listener=listener) == "a model of 4 layers"
    with pytest.raises(ModelError, match="the model is wrong"):
        crew.ask(asked_back, "wrong", listener=listener)


def test_workers_listen_on_this_machine_alone(crew):
    psutil = pytest.importorskip("psutil")
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and set(listening) <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("first", ["", "import ray"])
def test_cluster_listens_on_this_machine_alone_whether_or_not_ray_was_imported_before(first, tmp_path):
    pytest.importorskip("psutil")
    script = (
        f"{first}\n"
        "import psutil\n"
        "from kvpatch.executors.cluster import opened\n"
        "with opened(None):\n"
        "    of_the_run = [psutil.Process(), *psutil.Process().children(recursive=True)]\n"
        "    open_ones = [c for process in of_the_run for c in process.net_connections('inet')]\n"
        "    print(*{c.laddr.ip for c in open_ones if c.status == psutil.CONN_LISTEN})\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    listening = {address.removeprefix("::ffff:") for address in done.stdout.split()}
    assert listening and listening <= {"127.0.0.1", "::1"}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Where a cluster's files go if TMPDIR names it; in a longer one the names of its sockets would be too long."""
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as name:
        yield Path(name)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_ended_driver_leaves_no_process_and_no_file(short_folder, tiny_dirs, how):
    """After SIGKILL the next cluster clears what is left, and Ray's agents end by themselves within about a minute."""
    psutil = pytest.importorskip("psutil")
    script = (
        "import sys, time, psutil\n"
        "from kvpatch.executors.cluster import Asked\n"
        "from kvpatch.executors.crew import crew_of\n"
        "from kvpatch.executors.worker import ModelSource\n"
        f"source = ModelSource({str(tiny_dirs('llama'))!r}, {{'device': 'cpu'}})\n"
        "with crew_of({None: source}, Asked(workers=1)):\n"
        "    print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)\n"
        "    time.sleep(100)\n"
    )
    folder = short_folder
    environment = os.environ | {"TMPDIR": str(folder)}
    driver = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert driver.stdout is not None and driver.stderr is not None
    pids = [int(word) for word in driver.stdout.readline().split()]
    assert len(pids) >= 3
    (own,) = folder.iterdir()
    assert own.stat().st_mode & 0o77 == 0
    driver.send_signal(how)
    _, said = driver.communicate(timeout=120)
    assert driver.returncode == (143 if how == signal.SIGTERM else -how) and said == ""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    alive = [process for process in alive if process.is_running() and process.status() != "zombie"]
    if how == signal.SIGKILL:
        agents = [process for process in alive if process.name().endswith("Agent")]
        alive = [process for process in alive if process not in agents]
        for agent in agents:
            agent.kill()
    assert not alive
    if how == signal.SIGKILL:
        from kvpatch.executors.temporary import clear_left

        assert list(folder.iterdir()) == [own]
        clear_left(folder)
    assert list(folder.iterdir()) == []
