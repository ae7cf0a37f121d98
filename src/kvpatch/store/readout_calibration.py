"""What the calibration found of one model's likelihood readouts: the fitted mode readout, and their specificity."""

from __future__ import annotations

import hashlib
import json

from pydantic import Field

from kvpatch.specs.base import Frozen


class ReadoutSpecificity(Frozen):
    """How far caches move one readout, over the calibration pairs; a number that could not be had is None."""

    gap: float | None = Field(description="mean of natural source less natural target, in the readout's unit")
    dz: float | None = Field(description="the same over its standard deviation")
    shares: dict[str, float] = Field(description="condition -> its mean shift from the natural target over the gap")
    by_position: dict[str, list[float | None]] = Field(
        default={}, description="condition -> its mean shift at each position of the continuations; nothing subtracted"
    )


class FittedRule(Frozen):
    """The coefficients of the mode readout; see `readouts.specific_mode.SpecificMode`."""

    covariates: list[str]
    centre: float
    at_rest: list[float]
    coefficients: list[float]
    is_weighted: bool = Field(description="False where the rule did not help on pairs it was not fitted on")


class ReadoutCalibration(Frozen):
    """One model's calibration of its likelihood readouts.

    `readouts` holds the specificity of each; that of the fitted mode readout is measured on pairs that the rule was not
    fitted on. `items`: ids of the texts of the continuations, hashed, which were forced.
    """

    fitted_on: str = Field(description="hash of the trials that were forced")
    pairs: int
    neutral: list[str]
    destroyed: list[str]
    items_sha256: str
    n_items: int
    rule: FittedRule
    readouts: dict[str, ReadoutSpecificity]

    @property
    def sha256(self) -> str:
        """Hash of all that was fitted and found."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()
