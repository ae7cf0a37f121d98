"""Progress on the terminal: what is being loaded, and how far a run is, with tokens a second and time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from kvpatch.cli.console import PlainConsole
from kvpatch.errors import visible
from kvpatch.models.named import Progress as Report
from kvpatch.planning.listener import ProgressListener
from kvpatch.planning.listener import Report as PlanReport
from kvpatch.planning.plan import Batch, Plan

if TYPE_CHECKING:
    from kvpatch.validation.jobs import Job

SHORT = 1.0
"""Seconds that a plan may take without a word."""
PLAIN_EVERY = 15.0
"""Seconds between lines where the output is not a terminal."""


@contextmanager
def loading() -> Iterator[Report]:
    """A bar for downloads and conversions; nothing shows where nothing is fetched."""
    console = PlainConsole(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(visible(what), total=total)
                if not console.is_terminal:
                    console.print(what)
            bar.update(tasks[what], completed=done, total=total)

        yield report


@contextmanager
def planning_progress() -> Iterator[PlanReport]:
    """A line of a plan that takes longer than a second: a bar, or plain lines where there is no terminal."""
    console = PlainConsole(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[of]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("planning", total=None, of="", visible=False)
        said, stage, line, is_late = 0.0, "", "planning", False

        def say_it() -> None:
            nonlocal said
            said = time.monotonic()
            if not console.is_terminal:
                console.print(line)

        def late() -> None:
            nonlocal is_late
            is_late = True
            bar.update(task, visible=True)
            say_it()

        def report(what: str, done: int, total: int) -> None:
            nonlocal stage, line
            of = f"{done:,} of {total:,}" if total else ""
            is_new, stage, line = what != stage, what, f"{what}: {of}" if of else what
            bar.update(task, description=what, completed=done, total=total or None, of=of)
            if is_late and (is_new or time.monotonic() - said > PLAIN_EVERY):
                say_it()

        timer = threading.Timer(SHORT, late)
        timer.daemon = True
        timer.start()
        try:
            yield report
        finally:
            timer.cancel()


@contextmanager
def validating() -> Iterator[Callable[[Job, int, int], None]]:
    """A bar of a validation's jobs; plain lines where there is no terminal."""
    console = PlainConsole(stderr=True)
    what = TextColumn("{task.description}", markup=False)
    columns = (what, BarColumn(), TextColumn("{task.completed} of {task.total} jobs"))
    said = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("validating", total=None)

        def on_job(job: Job, done: int, total: int) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total, description=f"{job.kind} {job.organism}")
            if not console.is_terminal and time.monotonic() - said > PLAIN_EVERY:
                said = time.monotonic()
                console.print(f"{done} of {total} jobs done")

        yield on_job


@contextmanager
def retraining() -> Iterator[Callable[[str, int, int, float], None]]:
    """A line for every trained organism: its name, the step, of how many, and the loss."""
    console = PlainConsole(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def report(name: str, step: int, steps: int, loss: float) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(f"training {name}", total=steps)
                if not console.is_terminal:
                    console.print(f"training {name}")
            bar.update(tasks[name], completed=step + 1, description=f"training {name}, loss {loss:.2f}")

        yield report


class _Left(ProgressColumn):
    """Time left, from the trials done in this session."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return Text("ETA " + ("-:--" if left is None else f"{int(left) // 60}:{int(left) % 60:02d}"))


class _ProgressBar(ProgressListener):
    """Shows a run. Tokens still being written count too, so that the bar moves inside a batch."""

    def __init__(self, bar: Progress, console: PlainConsole, begin: Callable[[], None]) -> None:
        self.bar, self.console, self.begin = bar, console, begin
        self.has_begun = False
        self.new_tokens: list[int] = []
        self.task = bar.add_task("loading", total=None, left=None, speed="")
        self.start = self.said = time.monotonic()
        self.total = self.done = self.new = self.tokens_new = self.tokens_of_done = 0

    def planned(self, plan: Plan) -> None:
        self.total = plan.n_trials
        self.new_tokens = [batch.generation.max_new_tokens for batch in plan.batches]
        self.bar.update(self.task, total=self.total)

    def stage(self, what: str) -> None:
        if not self.has_begun:
            self.has_begun = True
            self.begin()
        self.start = time.monotonic()
        self.bar.update(self.task, description=visible(what))
        if not self.console.is_terminal:
            self.console.print(f"{what} ({self.total} trials)" if what == "running" else what)

    def tokens(self, rows_going: int) -> None:
        self.tokens_new += rows_going
        self._show()

    def batch(self, batch: Batch, tokens: int) -> None:
        self.done += len(batch.trials)
        if tokens:
            self.new += len(batch.trials)
        self.tokens_of_done = self.tokens_new
        self._show()

    def _inside(self) -> float:
        """Trials' worth of tokens that the batch at hand has written, of rows that may all be as long as allowed."""
        longest = max(self.new_tokens, default=0) or 1
        return min((self.tokens_new - self.tokens_of_done) / longest, 0.95 * (self.total - self.done))

    def _show(self) -> None:
        passed = time.monotonic() - self.start
        so_far = self.new + self._inside()
        left = (self.total - self.done - self._inside()) * passed / so_far if so_far >= 1 else None
        speed = f"{self.tokens_new / max(passed, 1e-9):.0f} tok/s"
        self.bar.update(self.task, completed=self.done, left=left, speed=speed)
        if not self.console.is_terminal and time.monotonic() - self.said > PLAIN_EVERY:
            self.said = time.monotonic()
            eta = "" if left is None else f", ETA {int(left) // 60}:{int(left) % 60:02d}"
            self.console.print(f"{self.done} of {self.total} trials done, {self.total - self.done} left, {speed}{eta}")


@contextmanager
def run_progress(begin: Callable[[], None]) -> Iterator[ProgressListener]:
    """A bar with trials done and left, tokens a second and time left; plain lines where there is no terminal.

    begin: called before the first stage, which comes after everything that a run refuses.
    """
    console = PlainConsole(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed} of {task.total} trials"),
        TextColumn("{task.fields[speed]}"),
        _Left(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield _ProgressBar(bar, console, begin)
