"""Tiny models, made once a session."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

CHECKED = ["kvpatch.statistics", "kvpatch.caches.rope", "kvpatch.caches.selection", "kvpatch.caches.noise"]
"""Modules whose functions are held to their annotations while the tests run. Not those whose public functions are given
wrong types by the tests, to see them refused in words."""

install_import_hook(CHECKED, "annotations.checked")

# Tiny models gain nothing from threads, and lose much where several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests break the engine on purpose, which an earlier check of the same model would hide.
os.environ["KVPATCH_CHECK_AGAIN"] = "1"
# Processes that tests start would compile every module again where bytecode is not kept.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# The same examples on every machine. `HYPOTHESIS_PROFILE=explore make test` looks further.
settings.register_profile("fixed", derandomize=True, database=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# The libraries' objects live as long as the tests, so they are looked through for garbage less often.
gc.set_threshold(50_000, 20, 50)

SLOWEST = (
    "report/test_browser.py",
    "view/test_view_browser.py",
    "test_packaging.py",
    "test_smollm2.py",
    "layout/test_report_equals_verdicts.py",
)
"""Files to start with, slowest first, so that no worker ends alone with one of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slowest files; the order is kept otherwise, and within each file."""
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    gc.freeze()  # what is loaded by now stays to the end


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, open for a file of tests, which are marked `chromium.NEEDED`."""
    from chromium import chromium

    with chromium() as opened_one:
        yield opened_one


@pytest.fixture(scope="session")
def tiny_dirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_dirs(architecture, chat=True)`: the directory of a tiny model. Not to be written to."""
    from tiny import tiny_model_dir

    home = tmp_path_factory.mktemp("tiny")
    return functools.cache(lambda architecture, chat=True: tiny_model_dir(architecture, home, chat=chat))


@pytest.fixture(scope="session")
def tiny(tiny_dirs: Callable[..., Path]) -> Callable:
    """`tiny(architecture, chat=True)`: a loaded `kvpatch.Model`, shared by all tests: leave it as it is."""
    import kvpatch as kv

    return functools.cache(lambda architecture, chat=True: kv.load(tiny_dirs(architecture, chat), device="cpu"))
