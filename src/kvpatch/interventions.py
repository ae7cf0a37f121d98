"""Interventions that are not a splice: data only, as `Patch` is, written in YAML and stored with the trial."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field, model_validator

from kvpatch.patch import Given, LayerAt, Layers, Number, Parts, Slots

Site = Literal["values", "queries_keys_values", "residual"]


class _Stored(Given):
    def to_json(self) -> str:
        """Canonical JSON, with the kind of intervention in it."""
        return json.dumps({"kind": type(self).__name__, **self.model_dump(mode="json")}, sort_keys=True)


class InPrefill(_Stored):
    """Change activations while the target's prompt runs; later layers and tokens see the change.

    The source's activations replace the target's, matched from the last cached token backwards. The pending token runs
    after the prompt and is not changed.

    site: "values" at a layer, "queries_keys_values" at a layer (keys and queries turned to where they land), or
    "residual", the stream that enters a layer.
    """

    site: Site
    layers: Layers = None
    slots: Slots = "all"


class ValueSteering(_Stored):
    """Add alpha times a direction to a layer's values while the prompt runs, and at every decoding step if asked.

    The direction is the mean difference of the body's values, sources less targets, over the calibration pairs.
    """

    layers: Layers
    alpha: Number
    slots: Slots = "all"
    while_decoding: bool = False


class CacheSteering(_Stored):
    """Add strength times a direction to the finished cache (M2).

    The direction is the mean difference of keys (before RoPE) and values over the calibration pairs' bodies, layer by
    layer and head by head. `random_directions` replaces it by that many random directions of the same norms in turn:
    its null.
    """

    strength: Number
    slots: Slots = "body"
    layers: Layers = None
    parts: Parts = "kv"
    random_directions: int | None = Field(default=None, ge=1)


class Joined(_Stored):
    """Prefill the giver's words, then the receiver's, in one prompt.

    keep "all" is that prompt's cache (T, the natural ceiling). keep "receiver" takes the giver's slots out and turns
    the rest to where the receiver's own prompt would have them (M1): no token of the giver stays.
    """

    keep: Literal["all", "receiver"]
    separator: str = "\n\n"

    @model_validator(mode="after")
    def _separates(self) -> Joined:
        if not self.separator:
            raise ValueError("separator must not be empty")
        return self


class Reshape(_Stored):
    """Set R_V by hand: give the late layer's cached values another participation ratio (G1, G2).

    The last `window` cached values, a token's KV heads as one vector, keep their directions and their norm; their
    spectrum is flattened or sharpened to the `ratio` of the giver's window, or to their own, which changes nothing.
    `by` "rotation" is the null: the same values turned at random by as much as the reshaping would move them, which
    leaves the ratio as it is. The window is that of the protocol's `r_v` unless another is named; the layer should be
    its late one.
    """

    layers: Layers = LayerAt(depth=0.75)
    window: int | None = Field(default=None, ge=2)
    ratio: Literal["giver", "own"] = "giver"
    by: Literal["spectrum", "rotation"] = "spectrum"


Intervention = InPrefill | ValueSteering | CacheSteering | Joined | Reshape
