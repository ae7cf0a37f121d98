"""How much a trial depends on what it shares a batch with: the same rows decoded in other company.

In float32 it should not, but for rounding. In bfloat16 the sums of a product run in another order where the batch
has another shape, so that near-ties fall either way, and a text goes another way from there on. A run stores what
was found.
"""

from __future__ import annotations

from typing import Any

import torch

from kvpatch.engine.decode import Continuations, decode
from kvpatch.engine.model import Model
from kvpatch.engine.prefill import prefill

ROWS, NEW_TOKENS = 8, 16
_TEXTS = (
    "Watch how each of these words arrives, and say what it is like to be the one that is choosing them now.",
    "Explain how bread rises in a warm oven, and which of the usual steps a beginner can leave out safely.",
)


def noise_floor(model: Model) -> dict[str, Any]:
    """Decode the same trials in other company.

    Returns:
        The share of texts that stay the same, and the largest change of a first log-probability, where mates are in
        another order, and where half as many rows are decoded at a time.
    """
    prompts = [model.encode(f"{_TEXTS[i % 2]} {i}" if i > 1 else _TEXTS[i]) for i in range(ROWS)]
    cache = prefill(model.backbone, prompts)

    def texts(rows: list[int], places: int) -> Continuations:
        part = cache if rows == list(range(ROWS)) else cache[rows]
        return decode(model.backbone, part, max_new_tokens=NEW_TOKENS, temperature=0.7, seeds=rows, places=places)

    order, turned = list(range(ROWS)), list(range(ROWS - 1, -1, -1))
    first = texts(order, ROWS)
    mates, shape = texts(turned, ROWS), texts(order, ROWS // 2)
    found: dict[str, Any] = {"rows": ROWS, "new_tokens": NEW_TOKENS}
    for name, other, rows in (("other_mates", mates, turned), ("other_batch_shape", shape, order)):
        equal = (other.token_ids[rows] == first.token_ids).all(dim=1).float().mean()
        found[f"texts_equal_{name}"] = float(equal)
        change = (other.logprobs[rows, 0] - first.logprobs[:, 0]).abs()
        found[f"first_logprob_{name}"] = float(torch.nan_to_num(change, nan=float("inf")).max())
    return found
