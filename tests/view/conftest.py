"""A run to look at, and a client that asks as a browser on this machine does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from kvpatch.view.runs import LiveRun
from kvpatch.view.server import View
from synthetic import write_run

TOKEN = "a-token"


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of phases 1 and 4."""
    return write_run(tmp_path_factory.mktemp("runs") / "first", n=6, samples=2, phases=["1", "4"]).directory


@pytest.fixture(scope="session")
def live(directory: Path) -> LiveRun:
    run = LiveRun("first", directory)
    run.refresh()
    return run


@pytest.fixture(scope="session")
def client(directory: Path) -> Iterator[TestClient]:
    with TestClient(View([directory]).app(TOKEN), base_url="http://127.0.0.1:8000") as asking:
        yield asking
