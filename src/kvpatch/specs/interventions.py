"""Interventions that are not a splice: data only, as `Patch` is, written in YAML and stored with the trial.

The kinds of this package are keys of a condition. A kind from outside the package is said as
`intervention: {kind: NAME, ...settings}`; `extensions.py` finds it by its name.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from kvpatch.specs.base import Change, Number, is_none
from kvpatch.specs.patch import Parts
from kvpatch.specs.selectors import LayerAt, Layers, QueryHeads, Slots

Site = Literal["values", "queries_keys_values", "residual", "queries", "heads"]
OF_QUERY_HEADS = ("queries", "heads")


class InterventionSpec(Change):
    """Base of the settings of a kind of intervention.

    kind: its name, which is stored with every trial.
    """

    kind: ClassVar[str]

    @property
    def told(self) -> str:
        return f"made by {self.kind}"

    def said(self) -> dict[str, Any]:
        """The kind and every setting, as plain data."""
        return {"kind": self.kind, **self.model_dump(mode="json", by_alias=True)}

    def to_json(self) -> str:
        """Canonical JSON, with the kind of intervention in it."""
        return json.dumps(self.said(), sort_keys=True)


class InPrefill(InterventionSpec):
    """Change activations while the target's prompt runs; later layers and tokens see the change.

    The source's activations replace the target's, matched from the last cached token backwards. The pending token runs
    after the prompt and is not changed.

    site: "values" at a layer, "queries_keys_values" at a layer (keys and queries turned to where they land),
    "residual", the stream that enters a layer, or of single query heads: "queries" (turned to where they land), or
    "heads", what they read, before their outputs are joined.
    query_heads: which, for the last two sites; all if None.
    """

    kind: ClassVar[str] = "InPrefill"
    takes_giver: ClassVar[bool] = True

    site: Site
    layers: Layers = None
    slots: Slots = "all"
    query_heads: QueryHeads = Field(default=None, exclude_if=is_none)

    @model_validator(mode="after")
    def _heads_have_a_site(self) -> InPrefill:
        if self.query_heads is not None and self.site not in OF_QUERY_HEADS:
            raise ValueError(f"site {self.site!r} has no query heads to choose; they go with 'queries' and 'heads'")
        return self

    @property
    def moves_keys(self) -> bool:
        """With keys or queries among what is changed, unless lengths are equal."""
        return self.site in ("queries_keys_values", "queries")

    @property
    def told(self) -> str:
        return "its activations put in"


class ValueSteering(InterventionSpec):
    """Add alpha times a direction to a layer's values while the prompt runs, and at every decoding step if asked.

    The direction is the mean difference of the body's values, sources less targets, over the calibration pairs.
    `random_directions` replaces it by that many random directions of the same norms in turn: its null.
    """

    kind: ClassVar[str] = "ValueSteering"

    layers: Layers
    alpha: Number
    slots: Slots = "all"
    while_decoding: bool = False
    random_directions: int | None = Field(default=None, ge=1, exclude_if=is_none)

    @property
    def is_fitted(self) -> bool:
        return True

    @property
    def uses_pair_number(self) -> bool:
        """With random directions, which pairs take in turn."""
        return self.random_directions is not None

    @property
    def told(self) -> str:
        return "mean difference" if self.random_directions is None else "random directions"


class CacheSteering(InterventionSpec):
    """Add strength times a direction to the finished cache (M2).

    The direction is the mean difference of keys (before RoPE) and values over the calibration pairs' bodies, layer by
    layer and head by head. `random_directions` replaces it by that many random directions of the same norms in turn:
    its null.
    """

    kind: ClassVar[str] = "CacheSteering"

    strength: Number
    slots: Slots = "body"
    layers: Layers = None
    parts: Parts = "kv"
    random_directions: int | None = Field(default=None, ge=1)

    @property
    def is_fitted(self) -> bool:
        return True

    @property
    def uses_pair_number(self) -> bool:
        """With random directions, which pairs take in turn."""
        return self.random_directions is not None

    @property
    def told(self) -> str:
        return "mean difference" if self.random_directions is None else "random directions"


class Joined(InterventionSpec):
    """Prefill the giver's words, then the receiver's, in one prompt.

    keep "all" is that prompt's cache (T, the natural ceiling). keep "receiver" takes the giver's slots out and turns
    the rest to where the receiver's own prompt would have them (M1): no token of the giver stays.
    """

    kind: ClassVar[str] = "Joined"
    takes_giver: ClassVar[bool] = True

    keep: Literal["all", "receiver"]
    separator: str = "\n\n"

    @model_validator(mode="after")
    def _separates(self) -> Joined:
        if not self.separator:
            raise ValueError("separator must not be empty")
        return self

    @property
    def moves_keys(self) -> bool:
        """Where the giver's slots are taken out."""
        return self.keep == "receiver"

    @property
    def keeps_text_whole(self) -> bool:
        return True

    @property
    def told(self) -> str:
        return "read after it, left without its slots" if self.keep == "receiver" else "read after it"


class Reshape(InterventionSpec):
    """Set R_V by hand: give the late layer's cached values another participation ratio (G1, G2).

    The last `window` cached values, a token's KV heads as one vector, keep their directions and their norm; their
    spectrum is flattened or sharpened to the `ratio` of the giver's window, or to their own, which changes nothing.
    `by` "rotation" is the null: the same values turned at random by as much as the reshaping would move them, which
    leaves the ratio as it is. The window is that of the protocol's `r_v` unless another is named; the layer should be
    its late one, which `layers: r_v_late` means for every model.
    """

    kind: ClassVar[str] = "Reshape"
    takes_giver: ClassVar[bool] = True

    layers: Literal["r_v_late"] | Layers = LayerAt(depth=0.75)
    window: int | None = Field(default=None, ge=2)
    ratio: Literal["giver", "own"] = "giver"
    by: Literal["spectrum", "rotation"] = "spectrum"

    @property
    def told(self) -> str:
        return "its participation ratio given"

    @property
    def sets_r_v(self) -> bool:
        return True


OWN_KEYS: dict[str, type[InterventionSpec]] = {
    "in_prefill": InPrefill,
    "joined": Joined,
    "reshape": Reshape,
    "steer_values": ValueSteering,
    "steer_cache": CacheSteering,
}
"""Key of a condition -> the kind of intervention it sets; a kind from outside the package goes under `intervention`."""
