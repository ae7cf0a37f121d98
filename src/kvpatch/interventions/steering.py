"""Steering values while a prompt runs: a direction added to the values of chosen layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.selection import chosen_layers, chosen_mask
from kvpatch.engine.decode import refuse_foreign
from kvpatch.engine.prefill import prefill_pass
from kvpatch.interventions.directions import place_of_values, refuse_foreign_directions, rows_of
from kvpatch.interventions.in_prefill import touched_slots
from kvpatch.interventions.kinds import Fitting, Kind, Made, Trials, refuse_missing_layers
from kvpatch.models.backbone import Backbone
from kvpatch.models.hf import Edits, LayerEdit
from kvpatch.models.template import EncodedPrompt
from kvpatch.specs.interventions import CacheSteering, ValueSteering


def run_value_steering(
    backbone: Backbone,
    spec: ValueSteering,
    directions: dict[int, Tensor],
    targets: Sequence[EncodedPrompt],
    natural: KVCache,
    may_be_empty: bool = False,
    which: Sequence[int] = (),
) -> Made:
    """Prefill targets while alpha times a direction, [kv_heads, head_dim] a layer, is added to their values.

    Args:
        which: a row's number of its random direction, used where the spec asks for random ones.
    """
    refuse_foreign(backbone, natural)
    refuse_foreign_directions(directions, backbone.identity)
    backbone.catch_up()
    layers = chosen_layers(spec.layers, backbone.geometry.layers, may_be_empty=may_be_empty)
    is_put = chosen_mask(natural, spec.slots, may_be_empty=may_be_empty)
    mask = is_put[:, None, :, None]

    steps = _steps(spec, directions, layers, which if spec.uses_pair_number else range(natural.batch))

    def steer(layer: int) -> LayerEdit:
        step = steps[layer][:, :, None]
        return LayerEdit(value=lambda v: v + torch.where(mask.to(step.device), step, 0).to(v))

    edits = {i: steer(i) for i in layers}
    cache = prefill_pass(backbone, targets, edits=edits)
    fired = sum(edit.fired for edit in edits.values())
    return Made(cache, touched_slots(is_put, layers, backbone), len(edits), fired)


def _steps(
    spec: ValueSteering, directions: dict[int, Tensor], layers: Sequence[int], which: Sequence[int]
) -> dict[int, Tensor]:
    """What is added to the values of each layer: [rows, kv_heads, head_dim]."""
    return {
        layer: spec.alpha * rows_of(directions[layer], which, place_of_values(layer), spec.random_directions)
        for layer in layers
    }


@dataclass(frozen=True)
class RowSteering:
    """What is added to the values of every token fed after the prompt: layer -> [batch, kv_heads, head_dim], zero for
    rows that are not steered."""

    steps: dict[int, Tensor]

    def edits(self, rows: slice = slice(None)) -> Edits:
        """The changes for some of the rows."""

        return {layer: LayerEdit(steer=step[rows]) for layer, step in self.steps.items()}


def _build(spec: ValueSteering, trials: Trials) -> Made:
    _, values = trials.directions()
    may_be_empty, which = trials.may_be_empty, trials.pair_numbers
    made = run_value_steering(trials.model.backbone, spec, values, trials.receivers, trials.own, may_be_empty, which)
    if not spec.while_decoding:
        return made
    layers = chosen_layers(spec.layers, trials.model.geometry.layers, may_be_empty=may_be_empty)
    return replace(made, steps=_steps(spec, values, layers, which))


def refuse_missing_slots(spec: ValueSteering | CacheSteering, fitting: Fitting) -> None:
    """Refuse a prompt in which a direction finds no slot to be added to."""
    chosen_mask(fitting.empty_caches(fitting.receivers), spec.slots, may_be_empty=fitting.may_be_empty)


VALUE_STEERING = Kind(
    ValueSteering,
    _build,
    refuse_model=refuse_missing_layers,
    refuse_prompts=refuse_missing_slots,
    runs_prompts=True,
)
