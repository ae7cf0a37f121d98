"""Which options of `kvpatch run` ask for workers, and what is refused before anything is started or loaded."""

from __future__ import annotations

import sys

import pytest

import kvpatch.cli.hosts as hosts
from kvpatch.cli import main as cli
from kvpatch.cli.hosts import asked_for
from kvpatch.errors import KvpatchError
from kvpatch.executors.cluster import Asked


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """`machine(gpus)`: a machine of two cores and so many GPUs; none at first."""

    def of(gpus: int) -> None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)

    monkeypatch.setattr("kvpatch.executors.cluster.cores_here", lambda: 2)
    monkeypatch.setattr(hosts, "is_installed", lambda package: True)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    of(0)
    return of


@pytest.mark.parametrize(
    ("gpus", "given", "asked"),
    [
        (0, (None, None, None, None, None), None),
        (1, (None, None, None, None, None), None),
        (8, (None, None, None, None, None), Asked(gpus="all")),
        (8, ("local", None, None, None, None), None),
        (8, (None, "cpu", None, None, None), None),
        (8, ("ray", None, None, None, None), Asked(gpus="all")),
        (8, (None, None, None, "4", None), Asked(gpus="4")),
        (0, ("ray", None, 2, None, None), Asked(workers=2)),
        (0, (None, None, None, None, "10.0.0.1:6379"), Asked(gpus="all", address="10.0.0.1:6379")),
    ],
)
def test_several_gpus_are_used_unless_told_otherwise(machine, gpus, given, asked):
    machine(gpus)
    assert asked_for(*given) == asked


def test_environment_names_a_cluster_to_those_who_ask_for_workers(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert asked_for("ray", None, None, None, None) == Asked(gpus="all", address="10.0.0.1:6379")
    assert asked_for(None, None, None, None, None) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("cloud", None, None, None, None), "no executor 'cloud': there are 'local' and 'ray'"),
        (("local", None, 2, None, None), "leave out --on local, or them"),
        (("ray", None, None, None, None), "this machine has no GPU, and 2 processor cores; --workers 2"),
        ((None, None, None, "2", None), "--gpus 2: this machine has no GPUs and 2 processor cores"),
        ((None, None, 2, "2", None), "give one of them"),
        ((None, "cuda", 2, None, None), "--gpus is for workers with --device cuda"),
    ],
)
def test_what_can_not_be_had_is_refused_in_words(given, words):
    with pytest.raises(KvpatchError, match=words):
        asked_for(*given)


def test_without_ray_workers_are_refused_and_several_gpus_are_told(machine, monkeypatch, capsys):
    monkeypatch.setattr(hosts, "is_installed", lambda package: package != "ray")
    with pytest.raises(KvpatchError, match=r"pip install 'kvpatch\[ray\]'"):
        asked_for("ray", None, 2, None, None)
    machine(8)
    assert asked_for(None, None, None, None, None) is None
    assert "one of 8 GPUs is used; pip install 'kvpatch[ray]' to use all" in capsys.readouterr().err


def test_refusal_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kvpatch", "run", "dec7", "--model", "m", "--gpus", "2"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and said.startswith("kvpatch: --gpus 2: this machine has")
    assert list(tmp_path.iterdir()) == []


def test_workers_and_an_object_store_are_refused_before_anything_is_loaded(monkeypatch, capsys):
    given = ["run", "dec7", "--model", "no-such-model", "--workers", "2", "--device", "cpu", "--out", "s3://bucket/run"]
    monkeypatch.setattr(sys, "argv", ["kvpatch", *given])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and "s3://bucket/run is an object store" in said
