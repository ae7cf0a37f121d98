"""Any intervention of a protocol as one call on prompts: what `Model.intervene` carries out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvpatch.caches.kvcache import KVCache
from kvpatch.errors import CacheError, ModelError, ProtocolError
from kvpatch.interventions.build import build, refuse_misfit_model
from kvpatch.interventions.kinds import Trials
from kvpatch.models.template import EncodedPrompt
from kvpatch.readouts.geometry import layer_at
from kvpatch.specs.arguments import shown, whole
from kvpatch.specs.base import Change

if TYPE_CHECKING:
    from kvpatch.engine.model import Model

R_V_LATE, R_V_WINDOW = 0.75, 16
"""Where a reshaping works that names neither layers nor a window."""


def intervene(
    model: Model,
    change: Change,
    target: Sequence[EncodedPrompt],
    source: Sequence[EncodedPrompt] | None,
    calibration: Any,
    seed: int,
) -> KVCache:
    """Caches of the targets' prompts, made with an intervention; see `Model.intervene`."""
    if not isinstance(change, Change):
        raise ProtocolError(f"an intervention must be a Patch, an InPrefill or the like, got {shown(change)}")
    kind = type(change).__name__
    if change.takes_giver and source is None:
        raise ProtocolError(f"{kind} takes something from another prompt; give it: source=...")
    if not change.takes_giver and source is not None:
        raise ProtocolError(f"{kind} takes nothing from another prompt; leave source out")
    if getattr(change, "while_decoding", False):
        raise ProtocolError(f"{kind} with while_decoding changes what is decoded, which no cache holds; run a protocol")
    givers = target if source is None else list(source) * (len(target) if len(source) == 1 else 1)
    if len(givers) != len(target):
        raise CacheError(f"{len(givers)} sources do not fit {len(target)} targets; give one, or one for each")
    if change.is_fitted and calibration is None:
        raise ProtocolError(f"{kind} is made from calibration prompts; give calibration=(source texts, target texts)")
    refuse_misfit_model(change, model.geometry, may_be_empty=False)
    seed = whole("seed", seed)
    trials = Trials(
        model=model,
        own=model.prefill(target),
        receivers=target,
        givers=givers,
        giver_caches=lambda: model.prefill(givers),
        seeds=[seed] * len(target),
        pair_numbers=range(len(target)),
        calibration=_texts(calibration),
        r_v_window=R_V_WINDOW,
        r_v_late=layer_at(R_V_LATE, model.geometry.layers),
        may_be_empty=False,
    )
    made = build(change, trials)
    if made.fired != made.planned:
        raise ModelError(f"{made.planned} changes were planned while the prompts ran, and {made.fired} were made")
    return made.cache


def _texts(calibration: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts of sources and of targets."""
    if calibration is None:
        return (), ()
    is_pair = isinstance(calibration, (list, tuple)) and len(calibration) == 2
    sides = [[side] if isinstance(side, str) else side for side in calibration] if is_pair else []
    if not is_pair or not all(
        isinstance(side, (list, tuple)) and side and all(isinstance(text, str) for text in side) for side in sides
    ):
        raise ProtocolError(f"calibration must be (source texts, target texts), got {shown(calibration)}")
    return tuple(sides[0]), tuple(sides[1])
