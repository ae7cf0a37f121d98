"""Where the models of a run are: in this process, or with workers. What needs them is asked of a host.

A run asks its host for everything that takes a model: the plan, the checks, the calibration. So the process that
drives workers needs no GPU, and none of its memory goes to a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface

import torch

from kvpatch.caches.devices import one_host_thread
from kvpatch.engine.model import Model
from kvpatch.executors.local import Executor, LocalExecutor
from kvpatch.models.load import template_sha256, tokenizer_sha256, weights_sha256
from kvpatch.models.placement import told_placement
from kvpatch.planning.listener import ProgressListener
from kvpatch.readouts.specific_mode import SpecificMode
from kvpatch.store.record import ModelRecord, Session

OnChange = Callable[[Session], None]
"""Told of what has happened to a session by now, for run.json."""


@dataclass(frozen=True)
class How:
    """How a plan is carried out: what `LocalExecutor` takes, and the threads of its products on a processor."""

    rows: Mapping[str | None, int | None]
    rules: Mapping[str | None, SpecificMode | None]
    noise: Mapping[str | None, Mapping[str, Any]]
    threads: int | None = None


class Host(Interface):
    """Has the models of a run."""

    @property
    def keys(self) -> Sequence[str | None]:
        """The models' keys, None for the run's own."""
        ...

    def ask(self, function: Callable[..., Any], *args: Any, listener: ProgressListener) -> Any:
        """`function(models, listener, *args)`, where the models are. The function is one of a module, and what it takes
        and gives is plain data, so that both can be sent."""
        ...

    def executor(self, how: How, on_change: OnChange) -> Executor:
        """What carries out a plan."""
        ...


class Here:
    """The host that is this process."""

    def __init__(self, models: Mapping[str | None, Model]) -> None:
        self.models = models

    @property
    def keys(self) -> Sequence[str | None]:
        """The models' keys."""
        return list(self.models)

    def ask(self, function: Callable[..., Any], *args: Any, listener: ProgressListener) -> Any:
        """`function(models, listener, *args)`."""
        with one_host_thread(model.backbone.device for model in self.models.values()):
            return function(self.models, listener, *args)

    def executor(self, how: How, on_change: OnChange) -> Executor:
        """The local executor."""
        on_change(Session(executor="local"))
        if how.threads:
            torch.set_num_threads(how.threads)
        return LocalExecutor(self.models, how.rows, how.rules, how.noise)


def model_record(model: Model) -> ModelRecord:
    """What run.json says of a model."""
    g = model.geometry
    return ModelRecord(
        name=model.loaded.published_name,
        architecture=g.architecture,
        layers=g.layers,
        kv_heads=g.kv_heads,
        query_heads=g.query_heads,
        head_dim=g.head_dim,
        dtype=model.backbone.told_type,
        device=str(model.backbone.device.type),
        weights_sha256=weights_sha256(model.loaded),
        tokenizer_sha256=tokenizer_sha256(model.tokenizer),
        template_sha256=template_sha256(model.tokenizer),
        scaffold_sha256=None if model.scaffold is None else model.scaffold.sha256,
        revision=model.loaded.revision,
        placement=told_placement(model.hf),
    )
