"""Where `kvpatch run` carries a run out: in this process, or with workers on GPUs, processor cores or a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpatch.cli.app import loaded
from kvpatch.cli.console import say
from kvpatch.errors import KvpatchError, MissingExtra, is_installed

if TYPE_CHECKING:
    from kvpatch.executors.cluster import Asked
    from kvpatch.executors.host import Host

On = Annotated[
    str | None,
    typer.Option(
        help="Where to run: local (this process) or ray (workers). Default: ray if there are several GPUs, else local.",
        show_default=False,
    ),
]
Gpus = Annotated[str | None, typer.Option(help="Run with workers on so many GPUs, or on all: --gpus 4, --gpus all.")]
Workers = Annotated[int | None, typer.Option(help="Run with so many workers on processor cores.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Run with workers on the Ray cluster at this address. Default: RAY_ADDRESS; without one, a cluster is "
        "started on this machine for the run.",
        show_default=False,
    ),
]
Sources = Mapping[str | None, tuple[str, dict[str, Any]]]
"""For every model's key its name and how it is read."""


def asked_for(
    on: str | None,
    device: str | None,
    workers: int | None,
    gpus: str | None,
    address: str | None,
    device_map: str | None = None,
) -> Asked | None:
    """The workers that a run asks for; None where it runs in this process.

    Raises:
        KvpatchError: where the options contradict each other, or this machine has less.
    """
    if on not in (None, "local", "ray"):
        raise KvpatchError(f"no executor {on!r}: there are 'local' and 'ray'")
    wants_workers = workers is not None or gpus is not None or address is not None
    if on == "local" or _is_split(device_map, wants_workers or on == "ray"):
        if wants_workers:
            raise KvpatchError("--gpus, --workers and --address are for `--on ray`; leave out --on local, or them")
        return None
    import torch

    here = torch.cuda.device_count() if device in (None, "cuda") else 0
    if on is None and not wants_workers:
        if here < 2:
            return None
        if not is_installed("ray"):
            say(f"warning: one of {here} GPUs is used; pip install 'kvpatch[ray]' to use all", err=True)
            return None
    if not is_installed("ray"):
        raise MissingExtra("runs with workers need ray, which is not installed: pip install 'kvpatch[ray]'")
    from kvpatch.executors.cluster import Asked, cores_here, sized

    address = address or os.environ.get("RAY_ADDRESS") or None
    on_gpus = gpus or (None if workers is not None else "all")
    if address is None and workers is None and gpus is None and not here:
        raise KvpatchError(
            f"--on ray: this machine has no GPU, and {cores_here()} processor cores; --workers 2 runs two workers there"
        )
    asked = Asked(workers, on_gpus, address)
    if address is None:
        sized(asked, cores_here(), here)  # told before anything is started
    if workers is not None and device == "cuda":
        raise KvpatchError("--workers is for workers on processor cores; --gpus is for workers with --device cuda")
    if workers is None and device == "cpu":
        raise KvpatchError("--gpus is for workers on GPUs; --workers is for workers with --device cpu")
    return asked


def _is_split(device_map: str | None, wants_workers: bool) -> bool:
    """Whether the model is to be split over devices, which is done in this process.

    Raises:
        KvpatchError: where workers are asked for as well.
    """
    if device_map is not None and wants_workers:
        raise KvpatchError(
            "--device-map splits one model over the devices of this process, and each worker holds a whole model; "
            "leave out --device-map, or --on ray, --gpus, --workers and --address"
        )
    return device_map is not None


@contextmanager
def host_of(asked: Asked | None, sources: Sources) -> Iterator[Host]:
    """What has the models of a run; its workers are gone when the block is left."""
    from kvpatch.executors.host import Here

    if asked is None:
        yield Here(loaded(sources))
        return
    from kvpatch.executors.crew import crew_of
    from kvpatch.executors.ray import WithWorkers
    from kvpatch.executors.worker import ModelSource

    where = {"device": "cpu" if asked.workers is not None else "cuda"}
    made = {key: ModelSource(name, {**how, **where}) for key, (name, how) in sources.items()}
    if asked.address is None:
        made = {key: _fetched(source) for key, source in made.items()}
    with crew_of(made, asked) as crew:
        yield WithWorkers(crew)


def _fetched(source: Any) -> Any:
    """Fetch and convert a model where all workers will read it, with a bar; of a hub model the commit is then fixed."""
    from kvpatch.cli.progress import loading
    from kvpatch.models.hub import fetch_from_hub
    from kvpatch.models.load import resolve

    with loading() as report:
        found, _ = resolve(source.name, report)
        if not isinstance(found, str):
            return source
        kept = ("revision", "allow_pickle", "trust_remote_code")
        settings = {name: source.settings[name] for name in kept if name in source.settings}
        commit = fetch_from_hub(found, report, **settings).name
    return replace(source, settings={**source.settings, "revision": commit})
