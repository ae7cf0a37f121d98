"""One small plan on the tiny Llama, run once for the tests that only look at its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvpatch.planned import plan_for
from kvpatch.planning.plan import Batch, Plan
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.load import load_protocol
from small import write_protocol


@pytest.fixture(scope="session")
def model(tiny: Callable):
    return tiny("llama")


@pytest.fixture(scope="session")
def small_plan(model, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Plan]:
    """`small_plan(**changes)`: the plan of the small protocol on the tiny Llama."""

    def make(*, n: int | None = None, seed: int = 0, **changes: Any) -> Plan:
        protocol = load_protocol(str(write_protocol(tmp_path_factory.mktemp("plan"), **changes)))
        return plan_for({None: model}, protocol, load_bank(protocol.bank), seed=seed, n=n, phases=None)[0]

    return make


@pytest.fixture(scope="session")
def batch(model, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """The first test batch of the small protocol."""
    protocol = load_protocol(str(write_protocol(tmp_path_factory.mktemp("small"))))
    plan, _ = plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=None, phases=None)
    return next(b for b in plan.batches if b.split == "test")


@pytest.fixture(scope="session")
def rows(model, batch) -> list[dict[str, Any]]:
    """Its rows. Not to be changed."""
    from kvpatch.executors.batch import run_batch
    from kvpatch.readouts.fluency import CoherenceLimits

    return run_batch(model, batch, limits=CoherenceLimits(excess_context=9.0, repetition_4=0.5))
