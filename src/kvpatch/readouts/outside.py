"""Readouts from outside: what other packages or a notebook registered in the catalogue, measured on one trial."""

from __future__ import annotations

import math
from numbers import Real

from kvpatch.errors import ExtensionError
from kvpatch.specs.readouts import Readout, TrialRecord, from_outside


def measure_outside(trial: TrialRecord) -> dict[str, float]:
    """The number of every readout from outside for one trial, by name; NaN where it can't be measured.

    Raises:
        ExtensionError: where a readout raises, or returns what is no such number; the message names it.
    """
    return {readout.name: _measured(readout, trial) for readout in from_outside()}


def _measured(readout: Readout, trial: TrialRecord) -> float:
    assert readout.measure is not None, "`register` takes none without it"
    try:
        found = readout.measure(trial)
    except (Exception, SystemExit) as error:
        why = " ".join(str(error).split())[:200] or "no message"
        raise ExtensionError(f"readout {readout.name!r} failed: {type(error).__name__}: {why}") from error
    if not isinstance(found, Real) or isinstance(found, bool) or math.isinf(found):
        raise ExtensionError(
            f"readout {readout.name!r} must return a finite number, or NaN where a trial can't be measured; "
            f"it returned {found!r:.80}"
        )
    if readout.is_positive and found <= 0:
        raise ExtensionError(f"readout {readout.name!r} says that it is above 0, and returned {found!r:.80}")
    return float(found)
