"""Rows made in another process: the same to the bit, and nothing is lost, whatever happens to it or to the run."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

from kvpatch.errors import KvpatchError, ProtocolError
from kvpatch.executors import local, row_process
from kvpatch.executors.local import LocalExecutor
from kvpatch.executors.row_process import Asked, Made, RowMaker, RowMakers, RowsIn, rows_in
from kvpatch.planning import plan as planner
from kvpatch.planning.plan import Plan
from kvpatch.readouts.fluency import CoherenceLimits
from kvpatch.specs.readouts import Readout, register, unregister
from kvpatch.store.directory import Store
from small import CONDITIONS

pytestmark = pytest.mark.model

SETTINGS: dict[str, Any] = {
    "conditions": {name: CONDITIONS[name] for name in ("A", "B", "C", "N1")},
    "generation": {"max_new_tokens": 6, "temperature": 0.7},
    "readouts": {"r_v": {"window": 6}, "forced_tokens": 8, "likelihood_tokens": 4, "js_positions": 2},
    "hypotheses": [],
}
HANGS = "import time; time.sleep(600)  # {asked} {answers}"
BROKEN = """
import os
def broken(text):
    if "SCORER_BREAKS" in os.environ:
        raise ValueError("no word of this is known")
    return 0.0
"""
ENDS = "raise SystemExit(1)  # {asked} {answers}"


@pytest.fixture(scope="module")
def plan(small_plan) -> Plan:
    """Several batches, some of whose trials are copied, some with watched heads."""
    watched = {"attention": True, "geometry": True}
    phases = {
        "first": {"question": "?", "n": 3, "conditions": ["A", "B", "C"]},
        "second": {"question": "?", "n": 3, "conditions": ["A", "B", "C", "N1"]},
        "watched": {"question": "?", "n": 2, "conditions": ["A", "C"], **watched},
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planner, "ROWS_PER_BATCH", 3)
        return small_plan(phases=phases, **SETTINGS)


@pytest.fixture
def makers(monkeypatch: pytest.MonkeyPatch) -> list[RowMaker]:
    """Every maker of rows that was started, in order."""
    started: list[RowMaker] = []

    def start(maker: RowMaker) -> None:
        begin(maker)
        started.append(maker)

    begin = RowMaker.start
    monkeypatch.setattr(RowMaker, "start", start)
    return started


@pytest.fixture
def made_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of batches whose rows this process made itself, in order."""
    batches: list[str] = []

    def made(asked: Asked) -> Made:
        batches.append(asked.batch.batch_id)
        return make(asked)

    make = row_process.made
    monkeypatch.setattr(row_process, "made", made)
    return batches


@pytest.fixture
def asked(model, plan) -> Callable[[], Asked]:
    """`asked()`: what the first batch's rows are made of."""
    taken: list[Asked] = []

    def take(maker: RowMaker, asked: Asked) -> Made:
        taken.append(asked)
        raise KeyboardInterrupt

    def first() -> Asked:
        executor = LocalExecutor({None: model}, made_in="thread")
        nothing = lambda *_: None  # noqa: E731
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(RowMaker, "made", take)
            with pytest.raises(KeyboardInterrupt):
                executor.run(plan, Store("nowhere"), on_tokens=nothing, on_batch=nothing)
        return taken[0]

    return first


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(
    model, plan: Plan, folder: Path, made_in: RowsIn, on_batch=lambda batch, tokens: None, *, rows: int | None = None
) -> dict[str, bytes]:
    """What a run leaves, byte for byte."""
    store = Store(folder / "run")
    executor = LocalExecutor({None: model}, {None: rows}, made_in=made_in)
    with store.locked():
        executor.run(plan, store, on_tokens=lambda rows: None, on_batch=on_batch)
    return files_of(folder)


@pytest.fixture(scope="module")
def in_thread(model, plan, tmp_path_factory) -> dict[str, bytes]:
    return run(model, plan, tmp_path_factory.mktemp("thread"), "thread")


def rows_in_table(made: Made) -> list[str]:
    return [repr(row) for row in made.table.to_pylist()]  # NaN is not NaN, and "nan" is "nan"


def pid_of(maker: RowMaker) -> int:
    assert maker._process is not None
    return maker._process.pid


def wait_until_ready(maker: RowMaker) -> None:
    assert select.select([maker._answers], [], [], 120)[0]


def is_gone(pid: int, within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_files_of_a_run_are_the_same_to_the_byte_wherever_rows_are_made(
    model, plan, tmp_path, in_thread, made_here, makers
):
    assert run(model, plan, tmp_path, "process") == in_thread
    assert any("attention" in name for name in in_thread)
    assert made_here == []
    assert makers[0]._process is None


@pytest.mark.parametrize("kill", [False, True])
def test_several_processes_make_the_batches_of_a_group_and_one_may_be_killed(
    model, plan, tmp_path, made_here, makers, monkeypatch, kill
):
    expected = run(model, plan, tmp_path / "thread", "thread", rows=64)
    made_here.clear()
    makers.clear()
    monkeypatch.setattr(row_process, "cores_here", lambda: 12)

    def kill_one(batch, tokens):
        if kill and makers[0]._process is not None:
            os.kill(pid_of(makers[0]), signal.SIGKILL)

    assert run(model, plan, tmp_path / "process", "process", kill_one, rows=64) == expected
    assert len(set(makers)) == 3
    assert kill or made_here == []


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (4, 1), (8, 2), (64, 3)])
def test_processes_are_counted_by_the_cores_that_the_run_may_use(monkeypatch, cores, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda of: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert RowMakers("process").count == count
    assert RowMakers("thread").count == 1


def test_the_other_process_starts_without_what_loads_models():
    code = "import sys; import kvpatch.executors.row_process; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_part_waits_for_a_process_that_starts_until_the_run_waits_for_the_part(asked, made_here, monkeypatch):
    question = asked()
    monkeypatch.setattr(row_process, "_CODE", HANGS)
    makers = RowMakers("process when ready")
    makers.start()
    found: list[Made] = []
    thread = threading.Thread(target=lambda: found.append(makers.made(question)))
    thread.start()
    try:
        thread.join(0.5)
        assert made_here == [] and thread.is_alive()
        makers.hurry.set()
        thread.join(30)
        assert made_here == [question.batch.batch_id] and len(found) == 1
    finally:
        makers.hurry.set()
        makers.close()


def test_a_run_that_ends_early_stores_what_it_handed_over_without_waiting_for_a_process_that_starts(
    model, plan, tmp_path, monkeypatch
):
    monkeypatch.setattr(row_process, "_CODE", HANGS)
    groups: list[Any] = []

    def measured(executor, own, on_tokens):
        groups.append(own)
        if len(groups) == 2:
            raise KeyboardInterrupt
        return measure(executor, own, on_tokens)

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            run(model, plan, tmp_path, "process when ready")

    measure = LocalExecutor._measured
    monkeypatch.setattr(LocalExecutor, "_measured", measured)
    making: list[RowMakers] = []
    monkeypatch.setattr(local, "RowMakers", lambda where: making.append(RowMakers(where)) or making[0])
    thread = threading.Thread(target=interrupted)
    thread.start()
    try:
        thread.join(30)
        assert not thread.is_alive()
    finally:
        making[0].hurry.set()
        thread.join()
    assert len(Store(tmp_path / "run").done()) == 1


def test_a_run_whose_other_process_is_killed_between_batches_leaves_the_same(
    model, plan, tmp_path, in_thread, made_here, makers
):
    told: list[int] = []

    def kill_after_the_second(batch, tokens):
        told.append(tokens)
        if len(told) == 2:
            os.kill(pid_of(makers[0]), signal.SIGKILL)

    assert run(model, plan, tmp_path, "process", kill_after_the_second) == in_thread
    assert 0 < len(made_here) < len(plan.batches) == len(told)


def test_a_batch_during_which_the_other_process_is_killed_is_made_here(asked, made_here):
    maker, question = RowMaker("process"), asked()
    maker.start()
    wait_until_ready(maker)
    expected = row_process.made(question)
    pid = pid_of(maker)
    os.kill(pid, signal.SIGSTOP)  # it is asked, and does not answer
    killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killer.start()
    made = maker.made(question)
    killer.join()
    assert rows_in_table(made) == rows_in_table(expected)
    assert made_here == [question.batch.batch_id] * 2
    assert is_gone(pid)
    assert rows_in_table(maker.made(question)) == rows_in_table(expected)
    maker.close()


@pytest.mark.parametrize("module", [__name__, "of_a_notebook"])
def test_a_batch_that_can_t_be_sent_or_not_be_read_there_is_made_here_and_the_next_one_there(
    asked, made_here, monkeypatch, module
):
    class Known(CoherenceLimits):
        """To this process alone."""

    notebook = ModuleType("of_a_notebook")
    monkeypatch.setitem(sys.modules, notebook.__name__, notebook)
    Known.__module__ = module
    Known.__qualname__ = "Known"
    notebook.__dict__["Known"] = Known  # can be sent under this name, and there is no such module elsewhere
    maker, question = RowMaker("process"), asked()
    maker.start()
    try:
        here = maker.made(replace(question, limits=Known(excess_context=9.0, repetition_4=0.5)))
        assert made_here == [question.batch.batch_id]
        there = maker.made(replace(question, limits=CoherenceLimits(excess_context=9.0, repetition_4=0.5)))
        assert made_here == [question.batch.batch_id]
    finally:
        maker.close()
    assert rows_in_table(here) == rows_in_table(there)


@pytest.mark.parametrize("code", [HANGS, ENDS])
def test_rows_are_made_here_while_the_other_process_starts_or_when_it_could_not(asked, made_here, monkeypatch, code):
    monkeypatch.setattr(row_process, "_CODE", code)
    maker, question = RowMaker("process when ready" if code == HANGS else "process"), asked()
    maker.start()
    pid = pid_of(maker)
    assert maker.made(question).table.num_rows == len(question.order)
    assert made_here == [question.batch.batch_id]
    maker.close()
    assert is_gone(pid, within=0)


def test_an_error_of_a_scorer_is_told_as_without_another_process(model, small_plan, tmp_path, monkeypatch):
    (tmp_path / "scorer.py").write_text(BROKEN)
    readouts = {**SETTINGS["readouts"], "lexicon": f"{tmp_path / 'scorer.py'}:broken"}
    phases = {"1": {"question": "?", "n": 2, "conditions": ["A", "B"]}}
    plan = small_plan(phases=phases, **{**SETTINGS, "readouts": readouts})
    monkeypatch.setenv("SCORER_BREAKS", "yes")
    told = []
    for where in ("thread", "process"):
        with pytest.raises(ProtocolError, match="no word of this is known") as error:
            run(model, plan, tmp_path / where, where)
        told.append(str(error.value))
    assert told[0] == told[1]


def test_a_scorer_of_the_user_s_own_scores_there_too_and_may_print(model, small_plan, tmp_path, made_here):
    (tmp_path / "scorer.py").write_text("def half(text):\n    print('scored')\n    return len(text) / 2\n")
    readouts = {**SETTINGS["readouts"], "lexicon": f"{tmp_path / 'scorer.py'}:half"}
    phases = {"1": {"question": "?", "n": 2, "conditions": ["A", "B"]}}
    plan = small_plan(phases=phases, **{**SETTINGS, "readouts": readouts})
    there = run(model, plan, tmp_path / "there", "process")
    assert made_here == []
    assert there == run(model, plan, tmp_path / "here", "thread")


def test_a_readout_that_this_process_alone_may_know_is_measured_here(model, plan, tmp_path, made_here, makers):
    register(Readout(name="letters", label="Letters", about="letters of the text", measure=lambda of: len(of.text) + 1))
    try:
        run(model, plan, tmp_path, "process")
        rows = Store(tmp_path / "run").read(["text", "letters"]).to_pylist()
    finally:
        unregister("letters")
    assert [row["letters"] for row in rows] == [len(row["text"]) + 1 for row in rows]
    assert len(made_here) == len(plan.batches)
    assert makers[0]._process is None


def test_interrupted_run_stores_what_was_handed_over_and_leaves_no_process(model, plan, tmp_path, in_thread, makers):
    pids: list[int] = []

    def interrupt(batch, tokens):
        pids.append(pid_of(makers[0]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, plan, tmp_path, "process", interrupt)
    assert is_gone(pids[0])
    stored = len(Store(tmp_path / "run").done())
    assert 2 <= stored < len(plan.batches)
    assert run(model, plan, tmp_path, "process") == in_thread


SCRIPT = """
import select, signal
from kvpatch.executors.row_process import RowMaker
maker = RowMaker("process")
maker.start()
select.select([maker._answers], [], [])
try:
    print(maker._process.pid, flush=True)
    signal.pause()
except KeyboardInterrupt:
    print("alive" if maker._process.poll() is None else "gone", flush=True)
finally:
    maker.close()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_of_a_run_that_is_interrupted_or_killed(how):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True, text=True
    ) as script:
        assert script.stdout is not None
        pid = int(script.stdout.readline())
        os.killpg(script.pid, how)  # as a terminal does
        said, err = script.communicate(timeout=60)
    assert said == ("alive\n" if how is signal.SIGINT else "")
    assert err == ""
    assert is_gone(pid)


def test_rows_are_made_in_a_thread_beside_a_processor_and_in_a_process_beside_a_gpu(monkeypatch):
    monkeypatch.delenv(row_process.SETTING, raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert rows_in([cpu]) == "thread"
    assert rows_in([cpu, gpu]) == "process when ready"
    monkeypatch.setenv(row_process.SETTING, "process")
    assert rows_in([cpu]) == "process"
    monkeypatch.setenv(row_process.SETTING, "thread")
    assert rows_in([gpu]) == "thread"
    monkeypatch.setenv(row_process.SETTING, "elsewhere")
    with pytest.raises(KvpatchError, match="KVPATCH_ROWS_IN is 'elsewhere'; give 'thread' or 'process'"):
        rows_in([cpu])
