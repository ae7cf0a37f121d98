"""How long a plan will take on this machine and how much memory, from a calibration of about ten seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from kvpatch.engine.model import Model
from kvpatch.executors.batch import run_batch
from kvpatch.executors.groups import part_of
from kvpatch.planning.listener import Report, unreported
from kvpatch.planning.plan import Batch, Draft, Plan
from kvpatch.specs.base import Frozen

SECONDS = 8.0
"""What the two timed runs of a model may take together, about; longer where one pair alone takes longer."""
FEW, MORE = 2, 10
"""New tokens of the two timed runs; their difference is the time of a decoding step."""


class Estimate(Frozen):
    """What a plan will cost. Memory is the process' (on GPUs that of the cards), the models included; `available_bytes`
    is what it can have of it, with what it has already."""

    seconds: float
    seconds_by_phase: dict[str, float]
    peak_bytes: int
    available_bytes: int
    calibrated_in: float


class _Cost(Frozen):
    """What one model costs: each trial's share of a batch, each trial's share of a decoding step, bytes a trial."""

    trial: float
    step: float
    trial_bytes: float
    base_bytes: int


def estimate(plan: Plan, models: Mapping[str | None, Model], report: Report = unreported) -> Estimate:
    """Time and memory of a plan; runs a piece of its first test batch of each model.

    Times are those of the batches as planned, nothing of them done, and of every trial that writes as many tokens as
    it may. Loading, the check and the statistics are not in them. `report` is told what is timed, before it is.
    """
    start = time.monotonic()
    costs: dict[_Kind, _Cost] = {}
    kinds = {_kind(draft) for draft in plan.drafts if draft.split == "test"}
    for draft in plan.drafts:
        if draft.split == "test" and _kind(draft) not in costs:
            report("measuring how long some trials take", len(costs), len(kinds))
            costs[_kind(draft)] = _calibrate(models[draft.model], draft.batch())
    for draft in plan.drafts:  # a calibration is not watched: it costs what a test batch that is not watched costs
        if _kind(draft) not in costs:
            costs[_kind(draft)] = costs[draft.model, True]
    seconds: dict[str, float] = {}
    for draft in plan.drafts:
        cost = costs[_kind(draft)]
        per_trial = cost.trial + cost.step * draft.generation.max_new_tokens
        seconds[draft.phase] = seconds.get(draft.phase, 0.0) + per_trial * draft.size
    most = max((costs[_kind(d)].base_bytes + costs[_kind(d)].trial_bytes * d.size for d in plan.drafts), default=0)
    return Estimate(
        seconds=sum(seconds.values()),
        seconds_by_phase=seconds,
        peak_bytes=int(most),
        available_bytes=_available(),
        calibrated_in=time.monotonic() - start,
    )


_Kind = tuple[str | None, bool]
"""What batches of like cost share: the model, and whether attention is watched."""


def _kind(draft: Draft) -> _Kind:
    return draft.model, draft.watched is not None


def _calibrate(model: Model, batch: Batch) -> _Cost:
    """Time a piece of a batch, as large as the time allows, with few and with more new tokens."""
    piece = _piece(batch, 1, FEW)
    first = _timed(model, piece)
    if first < SECONDS / 4:  # the first run also pays for what is made once, which is little beside a longer one
        first = min(first, _timed(model, piece))
    pairs = max(1, min(len(batch.pairs), int(SECONDS / (2.5 * first))))
    more = _piece(batch, pairs, MORE)
    before = _memory(reset=True)
    short = first if pairs == 1 else _timed(model, _piece(batch, pairs, FEW))
    long = _timed(model, more)
    count = len(more.trials)
    step = max(long - short, 0.0) / (MORE - FEW)
    return _Cost(
        trial=max(short - FEW * step, 0.0) / count,
        step=step / count,
        trial_bytes=max(_memory(reset=False) - before, 0) / count,
        base_bytes=before,
    )


def _piece(batch: Batch, pairs: int, new_tokens: int) -> Batch:
    """The first pairs of a batch, with this many new tokens."""
    generation = batch.generation.model_copy(update={"max_new_tokens": new_tokens})
    return part_of(batch, range(min(pairs, len(batch.pairs)))).model_copy(update={"generation": generation})


def _timed(model: Model, batch: Batch) -> float:
    start = time.monotonic()
    run_batch(model, batch)
    return time.monotonic() - start


def _available() -> int:
    """Bytes that this process can have, on the GPUs where there are some, with those that it has."""
    if cards := range(torch.cuda.device_count()):
        return sum(torch.cuda.mem_get_info(card)[0] + torch.cuda.memory_reserved(card) for card in cards)
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def _memory(*, reset: bool) -> int:
    """Bytes in use; with `reset` those of now, from where the highest mark is then kept, else that mark."""
    if cards := range(torch.cuda.device_count()):
        for card in cards if reset else ():
            torch.cuda.reset_peak_memory_stats(card)
        read = torch.cuda.memory_allocated if reset else torch.cuda.max_memory_allocated
        return sum(read(card) for card in cards)
    status = Path("/proc/self/status")
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # the mark then stays what it was before, at least as high
        return psutil.Process().memory_info().rss
    if not status.exists():
        return psutil.Process().memory_info().rss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
