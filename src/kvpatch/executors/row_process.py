"""Rows made in a process of their own, so that the thread which feeds a GPU has Python to itself.

    batch and what was measured -> pipe -> the other process makes rows, and an Arrow table of them -> pipe -> stored

A process runs one Python thread at a time. Where a run waits for Python rather than for its device, a thread that makes
rows takes from the one that launches kernels what it uses, and lets each launch wait for it.

The other process holds nothing that could be lost. It is a plain child that knows no model, and not a worker of
`multiprocessing`, which would import the user's script again. Whatever it can't do is done in the process that asks:
the batches of before it is ready (it imports torch for seconds, while the first batches are measured), the batch in
which it ends or is killed and all after that, and a batch whose rows can't be made, so that the error is told as if
there were no other process. It reads from a pipe that is closed when the run's process ends, in whatever way, and then
ends too.
"""

from __future__ import annotations

import os
import pickle
import queue
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, get_args

import pyarrow as pa
import torch

from kvpatch.errors import KvpatchError
from kvpatch.executors.cluster import cores_here
from kvpatch.executors.repeats import Row
from kvpatch.executors.rows import Measured, rows_of
from kvpatch.planning.plan import Batch
from kvpatch.readouts.fluency import CoherenceLimits
from kvpatch.readouts.specific_mode import SpecificMode
from kvpatch.specs.readouts import from_outside
from kvpatch.store.columns import trial_schema

RowsIn = Literal["thread", "process", "process when ready"]
"""Where rows are made: in a thread; in another process, for which the first batch waits; or there once it is ready."""
SETTING = "KVPATCH_ROWS_IN"
"""Environment variable that says "thread" or "process" in place of what `rows_in` would choose."""
READY = b"!"
LENGTH = struct.Struct("<Q")
"""What stands before each question: how many bytes it has."""
PROTOCOL = 5
"""Of pickle; arrays are copied once."""
MOST_PROCESSES, CORES_EACH = 3, 4
"""Processes that make rows: at most so many, and one for each so many cores that the run may use. Each takes 400 MB."""
ASKED_AGAIN = 50
"""Milliseconds after which it is asked again whether a process is ready, or the run waits for its rows."""
CLOSED = -1
"""In the place of a pipe's end."""
_HERE = threading.Lock()
"""One thread of this process makes rows at a time; more would only take Python from one another."""
PATIENCE = 2.0
"""Seconds in which an idle process ends by itself when its pipe is closed; then it is killed."""
_CODE = "from kvpatch.executors.row_process import serve; serve({asked}, {answers})"
_ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Environment of the other process: one thread, and no memory on a GPU."""


@dataclass(frozen=True)
class Asked:
    """What rows are made of.

    batch: without the trials that an earlier batch computed. measured: of its trials, without their heads.
    order: ids of all trials of the part, in their order. copies: rows of those that an earlier batch computed, by id.
    kept: ids of those whose rows later batches copy. limits, rule: as in `rows_of`.
    """

    batch: Batch
    measured: Sequence[Measured]
    order: Sequence[str]
    copies: Mapping[str, Row]
    kept: Collection[str]
    limits: CoherenceLimits | None
    rule: SpecificMode | None


@dataclass(frozen=True)
class Made:
    """The rows of a part, with the columns of `store.columns.trial_schema`; those that later batches copy, by trial id;
    and the tokens that its own trials wrote."""

    table: pa.Table
    kept: Mapping[str, Row]
    tokens: int


def rows_in(devices: Iterable[torch.device]) -> RowsIn:
    """Where a run makes its rows: in a thread on a processor, in another process once it is ready on a GPU.

    On a processor a trial takes a thousand times as long as its row, nearly all of it arithmetic, during which Python
    is free. Another process would take 3 s of a core and 400 MB for its start, and save none of it.

    Raises:
        KvpatchError: where the environment asks for a place that there is not.
    """
    told = os.environ.get(SETTING)
    for place in ("thread", "process"):
        if told == place:
            return place
    if told:
        raise KvpatchError(f"{SETTING} is {told!r}; give 'thread' or 'process', or leave it away")
    on_gpu = any(device.type == "cuda" for device in devices)
    return "process when ready" if on_gpu and sys.platform != "win32" else "thread"


def made(asked: Asked) -> Made:
    """The rows of a part, made in this process.

    Raises:
        ProtocolError, ExtensionError: as `rows_of`.
    """
    own = {row["trial_id"]: row for row in rows_of(asked.batch, asked.measured, asked.limits, asked.rule)}
    rows = [own[trial] if trial in own else asked.copies[trial] for trial in asked.order]
    tokens = sum(row["n_tokens"] for row in own.values())
    table = pa.Table.from_pylist(rows, schema=trial_schema())
    return Made(table, {trial: own[trial] for trial in asked.kept}, tokens)


class RowMakers:
    """Makes rows where it was told to, several parts at a time where there are several processes.

    where: as `rows_in` gives it.
    hurry: set while the run waits for its rows. Until then a part of before a process is ready waits for it, so that
    nothing takes Python from the thread that feeds the device.
    """

    def __init__(self, where: RowsIn) -> None:
        self.hurry = threading.Event()
        self.count = 1 if where == "thread" else min(MOST_PROCESSES, max(1, cores_here() // CORES_EACH))
        self._all = [RowMaker(where, self.hurry) for _ in range(self.count)]
        self._free: queue.SimpleQueue[RowMaker] = queue.SimpleQueue()
        for maker in self._all:
            self._free.put(maker)

    def start(self) -> None:
        """Start the processes; comes back at once."""
        for maker in self._all:
            maker.start()

    def made(self, asked: Asked) -> Made:
        """The rows of a part, by the first maker that is free. Any number of threads may ask.

        Raises:
            ProtocolError, ExtensionError: as `rows_of`.
        """
        maker = self._free.get()
        try:
            return maker.made(asked)
        finally:
            self._free.put(maker)

    def close(self) -> None:
        """End the processes, once they have answered what they were asked."""
        for maker in self._all:
            maker.leave()
        for maker in self._all:
            maker.close()


class RowMaker:
    """Makes rows where it was told to. One thread may ask at a time.

    where: as `rows_in` gives it.
    hurry: as in `RowMakers`; without it no part waits for a process, unless they are to be made in one.
    """

    def __init__(self, where: RowsIn, hurry: threading.Event | None = None) -> None:
        assert where in get_args(RowsIn), where
        self.where, self.hurry = where, hurry
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._asks = self._answers = CLOSED
        self._lock = threading.Lock()  # whoever is interrupted may close it while another thread asks

    def start(self) -> None:
        """Start the other process where rows are made in one and it was not started before; comes back at once."""
        if self.where == "thread" or self._process is not None or from_outside():
            return
        there_reads, self._asks = os.pipe()
        self._answers, there_writes = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE.format(asked=there_reads, answers=there_writes)],
                stdin=subprocess.DEVNULL,
                pass_fds=(there_reads, there_writes),
                env=os.environ | _ALONE | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                process_group=0,  # Ctrl-C is the run's own, which first stores what was handed over
            )
        except OSError:  # no memory for a process: rows are made here
            self.where = "thread"
            self._close_pipes()
        finally:
            os.close(there_reads)
            os.close(there_writes)

    def made(self, asked: Asked) -> Made:
        """The rows of a part, from the other process or, where that can't make them, from this one.

        Raises:
            ProtocolError, ExtensionError: as `rows_of`.
        """
        with self._lock:
            answer = self._made_there(asked) if self._can_ask() else None
        if answer is not None:
            return answer
        with _HERE:
            return made(asked)

    def leave(self) -> None:
        """Tell the other process, once it has answered what it was asked, that nothing more will be."""
        with self._lock:
            self._close_pipes()

    def close(self) -> None:
        """End the other process, once it has answered what it was asked."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is None:
            return
        self._close_pipes()
        if self._is_ready:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
        self._process.kill()  # it holds nothing
        self._process.wait()
        self._process, self._is_ready = None, False

    def _can_ask(self) -> bool:
        """Whether the other process can be asked now. Readouts from outside may be known to this process alone."""
        if self._process is None or self._asks == CLOSED or from_outside():
            return False
        if not self._is_ready:
            answers = select.poll()
            answers.register(self._answers, select.POLLIN)
            while not answers.poll(ASKED_AGAIN):
                if self.where != "process" and (self.hurry is None or self.hurry.is_set()):
                    return False
            self._is_ready = os.read(self._answers, 1) == READY
            if not self._is_ready:  # it could not start
                self._give_up()
        return self._is_ready

    def _made_there(self, asked: Asked) -> Made | None:
        """None where the other process could not make the rows, or ended."""
        without_heads = replace(asked, measured=[replace(of, attention={}) for of in asked.measured])
        try:
            question = pickle.dumps(without_heads, PROTOCOL)
        except Exception:  # such as an intervention that was written in a notebook, whose class has no module
            return None
        try:
            with open(self._asks, "wb", closefd=False) as pipe:
                pipe.write(LENGTH.pack(len(question)))
                pipe.write(question)
            with open(self._answers, "rb", closefd=False) as pipe:
                answer = pickle.load(pipe)
        except (OSError, EOFError, pickle.UnpicklingError):
            self._give_up()
            return None
        if answer is None or not answer.table.schema.equals(trial_schema()):
            return None
        return answer

    def _give_up(self) -> None:
        """Make all further rows here."""
        self._end()
        self.where = "thread"

    def _close_pipes(self) -> None:
        for end in (self._asks, self._answers):
            if end != CLOSED:
                os.close(end)
        self._asks = self._answers = CLOSED


def serve(asked: int, answers: int) -> None:
    """Answer what comes through a pipe until it is closed; the other process does nothing else.

    asked, answers: descriptors of the pipes' ends.
    """
    torch.set_num_threads(1)
    with suppress(Exception), open(asked, "rb") as questions, open(answers, "wb") as out:
        out.write(READY)
        out.flush()
        while len(length := questions.read(LENGTH.size)) == LENGTH.size:
            question = questions.read(*LENGTH.unpack(length))
            try:
                answer = made(pickle.loads(question))
            except Exception:  # the process that asks makes them itself, and tells what is wrong
                answer = None
            pickle.dump(answer, out, PROTOCOL)
            out.flush()
    os._exit(0)  # there is nothing to clear away, and torch takes its time
