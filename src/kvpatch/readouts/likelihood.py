"""Likelihood readouts: no sampling, so no luck of the draw."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


@dataclass(frozen=True)
class LogLikelihoodRatios:
    """Mode, content and register of one cache, in nats a token.

    Attributes:
        mode: main effect of continuations in the mode less plain ones, topics and persons averaged.
        content: main effect of the source's topic less the target's, modes and persons averaged.
        register: main effect of the first person less the third, modes and topics averaged; None without persons.
        mode_by_position, content_by_position: the same at each position, [positions].
    """

    mode: float
    content: float
    register: float | None
    mode_by_position: list[float]
    content_by_position: list[float]


def log_likelihood_ratios(cells: ArrayLike, *, first: int) -> LogLikelihoodRatios:
    """Main effects of a 2x2 of continuations, or of two of them, in the first and in the third person.

    Args:
        cells: [4 or 8, positions], mean log-probability at each position over the continuations of the cells (mode,
            target), (plain, target), (mode, source), (plain, source), in this order (`planning.pairing.cells_of`);
            where there are eight, the first four are in the first person.
        first: the single numbers take the mean over this many first positions.
    """
    values = np.asarray(cells, dtype=np.float64)
    persons = values.reshape(-1, 4, values.shape[-1])
    mode_t, plain_t, mode_s, plain_s = persons.mean(axis=0)
    mode = (mode_t + mode_s - plain_t - plain_s) / 2
    content = (mode_s + plain_s - mode_t - plain_t) / 2
    register = None
    if len(persons) == 2:
        register = float((persons[0] - persons[1]).mean(axis=0)[:first].mean())
    return LogLikelihoodRatios(
        mode=float(mode[:first].mean()),
        content=float(content[:first].mean()),
        register=register,
        mode_by_position=mode.tolist(),
        content_by_position=content.tolist(),
    )


def js_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence of next-token distributions, in nats (Lin 1991, eq. 4.1 with equal weights).

    Args:
        p_logits, q_logits: [..., vocabulary].
    Returns:
        [...], between 0 and log 2.
    """
    p, q = p_logits.log_softmax(dim=-1), q_logits.log_softmax(dim=-1)
    mixed = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - mixed)).sum(dim=-1) + (q.exp() * (q - mixed)).sum(dim=-1)).clamp(min=0) / 2


def js_pull(logits: Tensor, target_logits: Tensor, source_logits: Tensor) -> float:
    """JS(this, natural target) less JS(this, natural source), mean over positions: above 0 is nearer to the source.

    Args:
        logits, target_logits, source_logits: [positions, vocabulary], at the same fixed positions of the same text.
    """
    counts = torch.tensor([len(logits)], device=logits.device)
    return float(js_pulls(logits[None], target_logits[None], source_logits[None], counts))


def js_pulls(logits: Tensor, target_logits: Tensor, source_logits: Tensor, counts: Tensor) -> Tensor:
    """`js_pull` of many rows.

    Args:
        logits, target_logits, source_logits: [rows, positions, vocabulary].
        counts: [rows], how many first positions of a row count.
    Returns:
        [rows].
    """
    pulls = js_divergence(logits, target_logits) - js_divergence(logits, source_logits)  # [rows, positions]
    is_counted = torch.arange(pulls.shape[1], device=pulls.device) < counts[:, None]
    return torch.where(is_counted, pulls, 0).sum(dim=1) / counts
