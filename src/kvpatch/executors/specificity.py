"""Before the first trial: force the calibration's caches on held-out continuations, and fit the mode readout.

natural, neutral and destroyed caches of the held-out pairs -> log-probabilities of the continuations, no sampling
      -> the rule of `readouts.specific_mode` -> how far each cache moves each readout
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvpatch.engine.model import Model
from kvpatch.engine.score import score
from kvpatch.executors.batch import cell_means
from kvpatch.executors.conditions import build_all, prefill_all
from kvpatch.planning.plan import Batch, Plan
from kvpatch.protocols.conditions import NATURAL_SOURCE, NATURAL_TARGET
from kvpatch.protocols.schema import Calibration
from kvpatch.readouts.likelihood import LogLikelihoodRatios, log_likelihood_ratios
from kvpatch.readouts.specific_mode import COVARIATES, Fitted, SpecificMode, fit
from kvpatch.store.readout_calibration import FittedRule, ReadoutCalibration, ReadoutSpecificity

Floats = NDArray[np.float64]


def calibrate_readouts(
    models: Mapping[str | None, Model],
    plan: Plan,
    asked: Calibration,
    stored: Mapping[str | None, ReadoutCalibration] | None = None,
    on_model: Callable[[Model], None] | None = None,
) -> dict[str | None, ReadoutCalibration]:
    """The calibration of every model that the plan forces something on.

    stored: what an earlier run of the same plan found, which is kept. on_model: told of each model that is forced.
    """
    found = dict(stored or {})
    for key in dict.fromkeys(batch.model for batch in plan.forced):
        if key not in found:
            if on_model is not None:
                on_model(models[key])
            found[key] = calibration_of_model(models[key], [b for b in plan.forced if b.model == key], asked)
    return found


def calibration_of_model(model: Model, batches: Sequence[Batch], asked: Calibration) -> ReadoutCalibration:
    """Force the batches of one model and learn from them. batches: `Plan.forced`."""
    names = list(batches[0].conditions)
    first = batches[0].readouts.likelihood_tokens
    cells = np.concatenate([_cells(model, batch, names) for batch in batches])  # [pairs, conditions, cells, positions]
    is_made = [bool(np.isfinite(cells[:, place]).any()) for place in range(len(names))]
    neutral, destroyed = (
        [names.index(name) for name in wanted if name in names and is_made[names.index(name)]]
        for wanted in (asked.neutral, asked.destroyed)
    )
    natural = names.index(NATURAL_TARGET), names.index(NATURAL_SOURCE)
    fitted = fit(cells, natural=natural, neutral=neutral, destroyed=destroyed, first=first)
    texts = sorted({text for batch in batches for pair in batch.pairs for cell in pair.continuations for text in cell})
    trials = "".join(trial.trial_id for batch in batches for trial in batch.trials)
    return ReadoutCalibration(
        fitted_on=hashlib.sha256(trials.encode()).hexdigest(),
        pairs=len(cells),
        neutral=[names[place] for place in neutral],
        destroyed=[names[place] for place in destroyed],
        items_sha256=hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        n_items=len(texts),
        rule=FittedRule(
            covariates=list(COVARIATES),
            centre=fitted.rule.centre,
            at_rest=list(fitted.rule.at_rest),
            coefficients=list(fitted.rule.coefficients),
            is_weighted=fitted.is_weighted,
        ),
        readouts=_specificities(cells, fitted, names, natural, first),
    )


def rule_of(calibration: ReadoutCalibration | None) -> SpecificMode | None:
    """The rule that a calibration holds; None where there is none."""
    if calibration is None:
        return None
    rule = calibration.rule
    return SpecificMode(rule.centre, tuple(rule.at_rest), tuple(rule.coefficients))


def _cells(model: Model, batch: Batch, names: Sequence[str]) -> Floats:
    """[pairs, conditions, cells, positions] of one batch; NaN where a cache could not be made."""
    natural = prefill_all(model, batch)
    built = build_all(model, batch, natural)
    first = batch.readouts.likelihood_tokens
    held_out = [
        [[model.continuation_ids(text)[:first] for text in cell] for cell in pair.continuations] for pair in batch.pairs
    ]
    wanted = [[ids for cell in held_out[trial.pair] for ids in cell] for trial in batch.trials]
    logprobs = score(model.backbone, built.cache, wanted).logprobs[..., :first].float().cpu().numpy()
    means = cell_means(logprobs, [held_out[trial.pair] for trial in batch.trials])
    out = np.full((len(batch.pairs), len(names), means.shape[1], first), np.nan)
    for trial, of_trial, error in zip(batch.trials, means, built.errors, strict=True):
        if error is None:
            out[trial.pair, names.index(trial.condition), :, : of_trial.shape[-1]] = of_trial
    return out


def _specificities(
    cells: Floats, fitted: Fitted, names: Sequence[str], natural: tuple[int, int], first: int
) -> dict[str, ReadoutSpecificity]:
    ratios = [[log_likelihood_ratios(one, first=first) for one in pair] for pair in cells]

    def table(of: Callable[[LogLikelihoodRatios], object]) -> Floats:
        return np.array([[of(one) for one in pair] for pair in ratios], dtype=np.float64)

    mode, content = table(lambda r: r.mode_by_position), table(lambda r: r.content_by_position)
    out = {
        "mode_llr": _specificity(fitted.held_out, names, natural, mode),
        "mode_llr_unweighted": _specificity(fitted.unweighted, names, natural, mode),
        "content_llr": _specificity(table(lambda r: r.content), names, natural, content),
    }
    if ratios[0][0].register is not None:
        out["register_llr"] = _specificity(table(lambda r: r.register), names, natural)
    return out


def _specificity(
    values: Floats, names: Sequence[str], natural: tuple[int, int], by_position: Floats | None = None
) -> ReadoutSpecificity:
    """values: [pairs, conditions]; by_position: [pairs, conditions, positions]."""
    target, source = natural
    shifts = values - values[:, [target]]
    known = {name: _mean(shifts[:, place]) for place, name in enumerate(names)}
    gap, spread = known[names[source]], float(np.nanstd(shifts[:, source], ddof=1))
    curves: dict[str, list[float | None]] = {}
    if by_position is not None:
        moved = by_position - by_position[:, [target]]
        for place, name in enumerate(names):
            if place != target:
                curves[name] = [_mean(moved[:, place, at]) for at in range(moved.shape[-1])]
    return ReadoutSpecificity(
        gap=gap,
        dz=gap / spread if gap is not None and spread > 0 else None,
        shares={
            name: shift / gap
            for place, (name, shift) in enumerate(known.items())
            if place not in natural and shift is not None and gap
        },
        by_position=curves,
    )


def _mean(values: Floats) -> float | None:
    """Mean of what is known; None where nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
