"""A Ray cluster for a run: one that is started on this machine, reachable from it alone, or one that is joined."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from kvpatch.errors import KvpatchError
from kvpatch.executors.temporary import Temporary, temporary_folder

OBJECTS = 512 << 20
"""Bytes that Ray may hold in shared memory; a plan goes through it."""
LONGEST_SOCKET = 107
"""Bytes that a system allows the name of a socket."""
BELOW = "/kvp-12345678/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""What of a socket's name stands behind the folder for temporary files, at its longest."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "GLOG_minloglevel": "3",
}
LOOPBACK = ("127.0.0.1", "::1")
STARTED_HERE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}
"""Of a cluster that is started for a run. As Ray does on other systems by itself, every one of its processes listens on
127.0.0.1 alone; and workers run with the priority of the command, and not below it."""


@dataclass(frozen=True)
class Asked:
    """How many workers a run asks for, and where.

    workers: on processors; gpus: how many GPUs to use in all, "all" for those that are there, None for none.
    address: of a cluster to join; None starts one here.
    """

    workers: int | None = None
    gpus: int | str | None = None
    address: str | None = None


@dataclass(frozen=True)
class Size:
    """Workers, and what each has: GPUs, processor cores as Ray counts them, threads."""

    workers: int
    gpus: int
    cores: float
    threads: int


def sized(asked: Asked, cores: int, gpus: int, largest: int | None = None) -> Size:
    """How many workers there will be.

    Args:
        cores, gpus: what is there. largest: cores of the largest machine, where there are several.
    Raises:
        KvpatchError: where more is asked for than is there, or both kinds at once.
    """
    there = f"{gpus or 'no'} GPU{'s' * (gpus != 1)} and {cores} processor core{'s' * (cores != 1)}"
    place = "this machine has" if asked.address is None else "the cluster has"
    if asked.workers is not None and asked.gpus is not None:
        raise KvpatchError(
            "--workers is for workers on processors, and --gpus for one worker per GPU; give one of them"
        )
    if asked.workers is not None:
        if asked.workers < 1:
            raise KvpatchError(f"--workers {asked.workers}: it must be at least 1")
        threads = max(1, min(cores // asked.workers, largest or cores))
        return Size(asked.workers, 0, threads if cores >= asked.workers else cores / asked.workers, threads)
    if asked.gpus == "all":
        wanted = gpus
    elif str(asked.gpus).isdigit() and int(str(asked.gpus)):
        wanted = int(str(asked.gpus))
    else:
        raise KvpatchError(f"--gpus {asked.gpus}: give a number, or all")
    if wanted > gpus or not wanted:
        raise KvpatchError(
            f"--gpus {asked.gpus}: {place} {there}; `--on ray --workers 2` runs two workers on processor cores"
        )
    threads = max(1, min(cores // wanted, largest or cores))
    return Size(wanted, 1, threads, threads)


class Cluster:
    """A cluster that is open. started: whether it was started here, and ends with the run."""

    def __init__(self, *, started: bool) -> None:
        self.started = started

    def size(self, asked: Asked) -> Size:
        """How many workers there will be, of what is there."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = [int(node.get("CPU", 0)) for node in nodes]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        return sized(asked, sum(cores), gpus, max(cores, default=0))


def cores_here() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def opened(address: str | None) -> Iterator[Cluster]:
    """Join a cluster, or start one on this machine, without a dashboard and without a word.

    A signal that asks this process to end ends the block as Ctrl-C does, and what was started is taken down.

    Raises:
        KvpatchError: where there is no cluster at the address, or none can be started here.
        MissingExtra: where Ray is not installed.
    """
    os.environ.update(QUIET)
    if address is None:
        os.environ.update(STARTED_HERE)
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL", "configure_logging": True}
    folder = None
    with ended_by_signals():
        try:
            if address is None:
                os.environ.pop("RAY_ADDRESS", None)
                folder = _start(quiet)
            else:
                _join(address, quiet)
            with ended_by_signals():  # Ray puts a handler of its own in place
                yield Cluster(started=address is None)
        finally:
            ray.shutdown()
            if folder is not None:
                folder.remove()


def _start(quiet: dict[str, Any]) -> Temporary:
    """Start a cluster on this machine; returns the folder that its files are in."""
    import ray
    from ray.exceptions import RayError

    folder = None
    settings = {"include_dashboard": False, "num_cpus": cores_here(), "object_store_memory": OBJECTS}
    try:
        folder = temporary_folder(_short_folder())
        with _on_this_machine_alone(), _with_own_token():
            ray.init(address="local", _temp_dir=folder.inner, **settings, **quiet)
            if (address := ray.util.get_node_ip_address()) not in LOOPBACK:
                raise RuntimeError(f"it would listen on {address}, where other machines reach it")
    except BaseException as error:
        if folder is not None:
            ray.shutdown()
            folder.remove()
        if not isinstance(error, (OSError, RuntimeError, ValueError, RayError)):
            raise
        told = " ".join(str(error).split())[:160]
        raise KvpatchError(
            f"Ray could not start workers on this machine ({told}); without --on ray and --workers the run goes on in "
            "this process"
        ) from error
    return folder


@contextmanager
def _on_this_machine_alone() -> Iterator[None]:
    """Have Ray take 127.0.0.1 for this machine's address, also where it has read its environment already."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _with_own_token() -> Iterator[None]:
    """Keep the token that Ray writes into the user's home, and that lets whoever has it run code, from other users."""
    token = Path(os.path.expanduser("~"), ".ray", "auth_token")
    is_there = token.exists()
    try:
        yield
    finally:
        if not is_there:
            with suppress(OSError):
                token.chmod(0o600)


def _join(address: str, quiet: dict[str, Any]) -> None:
    import ray

    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        told = " ".join(str(error).split())[:160]
        raise KvpatchError(
            f"no Ray cluster answers at {address!r} ({told}); give the address that `ray status` or `ray start` "
            "printed, or leave --address out to start workers on this machine"
        ) from error


def _short_folder() -> str | None:
    """A folder for temporary files whose name is short enough for sockets in it."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual) + BELOW.encode()) <= LONGEST_SOCKET else "/tmp"


class Ended(SystemExit):
    """A signal asked this process to end."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM end the block by an exception, so that what was started is taken down."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
