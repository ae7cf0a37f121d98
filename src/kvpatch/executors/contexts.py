"""Under which prompt an output is judged fluent: the one whose words the trial's cache holds.

A text that continues one prompt is unlikely after another, however fluent it is. Asking the target's prompt would call
every text in the source's language or on its topic damaged (docs/decisions/003-coherence.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvpatch.engine.model import Model
from kvpatch.engine.score import score
from kvpatch.executors.conditions import Built, Natural, giver_role
from kvpatch.planning.plan import Batch
from kvpatch.specs.patch import Patch


def held_prompts(batch: Batch, built: Built, equal: Sequence[str | None]) -> list[tuple[str, ...]]:
    """For every trial the roles of the prompts whose words its cache holds, the receiver's first.

    One where the cache is a prompt's natural run, or where a giver replaced all of the receiver's slots in all layers
    and KV heads, changed or not. Two where words of both count: the parts of a splice, prompts that were read together,
    activations that one prompt lent another. A direction that is added leads from targets to sources, so that a
    steered output is judged under both.

    equal: for every trial the role of the prompt whose natural run its cache equals, or None.
    """
    cache = built.cache
    layers, kv_heads, lengths = cache.layers, cache.keys[0].shape[1], cache.row_lengths
    held: list[tuple[str, ...]] = []
    for i, trial in enumerate(batch.trials):
        condition = batch.conditions[trial.condition]
        alike, patch = equal[i], condition.patch
        if alike is not None:
            held.append((alike,))
        elif condition.is_natural or built.errors[i] is not None:
            held.append((giver_role(condition) if condition.text_of else condition.into,))
        elif condition.steer_values is not None or condition.steer_cache is not None:
            held.append(tuple(dict.fromkeys((condition.into, "target", "source"))))
        elif patch is not None and _is_whole(patch, built.touched[i] == (lengths[i], layers, kv_heads)):
            held.append((condition.giver,))
        else:
            held.append(tuple(dict.fromkeys((condition.into, condition.giver))))
    return held


def _is_whole(patch: Patch, is_everywhere: bool) -> bool:
    """Whether nothing of the receiver is left. is_everywhere: the patch touched every slot, layer and KV head."""
    return is_everywhere and patch.parts == "kv" and patch.strength == 1


@dataclass(frozen=True)
class Fluency:
    """How surprising every output is, one entry per trial, nats per token.

    nll_target: mean negative log-likelihood under the natural cache of the pair's target. nll_context: the same under
    that of the prompt whose words the trial's cache holds; the smaller one where it holds words of two.
    excess_context: nll_context less the mean entropy of the distributions that the tokens are read from, chosen in the
    same way. What a model writes by itself is as surprising as it expects, in any language and on any topic; what a
    broken cache wrote is more so.
    """

    nll_target: list[float]
    nll_context: list[float]
    excess_context: list[float]


def fluency(
    model: Model,
    batch: Batch,
    natural: Natural,
    outputs: Sequence[Sequence[int]],
    held: Sequence[Sequence[str]],
) -> Fluency:
    """Read every output under its pair's target, and under the prompts whose words the trial's cache holds."""
    once: dict[tuple[int, tuple[int, ...]], int] = {}  # trials that wrote one text share its reading
    place: dict[tuple[int, str], int] = {}
    for i, of_trial in enumerate(held):
        for role in ("target", *of_trial):
            row = natural.row[batch.trials[i].pair, role]
            place[i, role] = once.setdefault((row, tuple(outputs[i])), len(once))
    read = score(
        model.backbone, natural.cache, [[text] for _, text in once], of=[row for row, _ in once], keep_entropies=True
    )
    assert read.entropies is not None
    surprise = -read.logprobs[:, 0].nanmean(dim=1)
    surprises, excesses = surprise.tolist(), (surprise - read.entropies[:, 0].nanmean(dim=1)).tolist()
    nll, excess = ({key: of[at] for key, at in place.items()} for of in (surprises, excesses))
    return Fluency(
        [nll[i, "target"] for i in range(len(outputs))],
        [min(nll[i, role] for role in of_trial) for i, of_trial in enumerate(held)],
        [min(excess[i, role] for role in of_trial) for i, of_trial in enumerate(held)],
    )
