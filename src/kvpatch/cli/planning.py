"""What `kvpatch plan` computes, with a line that says what it is at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvpatch.cli.progress import planning_progress
from kvpatch.cli.tables import plan_summary
from kvpatch.models.placement import weight_bytes
from kvpatch.planned import Models, plan_for
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.schema import Protocol


def planned_summary(
    protocol: Protocol, models: Models, *, seed: int, n: int | None, phases: Sequence[str] | None, is_timed: bool
) -> dict[str, Any]:
    """What a run would do, as plain data. is_timed: whether some trials are run to estimate time and memory.

    Raises:
        ProtocolError: where the protocol can't run on these models, or on its bank.
    """
    with planning_progress() as report:
        report("forming pairs and checking that every condition fits", 0, 0)
        plan, _ = plan_for(models, protocol, load_bank(protocol.bank, protocol.folder), seed=seed, n=n, phases=phases)
        cost = None
        if is_timed:
            from kvpatch.executors.estimate import estimate

            cost = estimate(plan, models, report)

        def tokens(key: str | None, text: str) -> int:
            return len(models[key].encode(text, may_be_empty=True).token_ids)

        summary = plan_summary(plan, protocol, tokens, cost, report)
        return summary | {"placement": {m.loaded.published_name: weight_bytes(m.hf) for m in models.values()}}
