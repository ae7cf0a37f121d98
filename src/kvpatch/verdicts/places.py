"""Where a condition acts, in words: which slots, in which layers."""

from __future__ import annotations

from kvpatch.protocols.conditions import Condition
from kvpatch.specs.interventions import InPrefill
from kvpatch.specs.patch import Patch
from kvpatch.specs.selectors import LayerAt, LayerBand, SlotQuery
from kvpatch.specs.spans import Span

_STRETCHES = {
    "all": "all slots",
    "bos": "the first slot",
    "template": "the template's slots",
    "body": "the body's slots",
    "trailer": "the trailer's slots",
    "last": "the last slot",
    "sinks": "the attention sinks",
}
_PARTS = {"k": "keys of ", "v": "values of ", "kv": ""}


def place_of(condition: Condition) -> str:
    """The slots and layers of the cache that a condition takes from another prompt, or changes.

    >>> place_of(Condition.model_validate({"about": "", "from": "source", "patch": {"slots": "body", "parts": "v"}}))
    "values of the body's slots, all layers"
    """
    change = condition.change
    if condition.joined is not None:
        own = "the target's own slots" if condition.into == "target" else "the source's own slots"
        slots = f"{own}, read after the other prompt" if condition.joined.keep == "receiver" else "all slots"
        return f"{slots}, all layers"
    if isinstance(change, Patch):
        heads = "" if change.kv_heads is None else f", {_listed('KV head', change.kv_heads)}"
        return f"{_PARTS[change.parts]}{_slots(change.slots)}, {_layers(change.layers)}{heads}"
    if isinstance(change, InPrefill):
        heads = "" if change.query_heads is None else f", {_listed('query head', change.query_heads)}"
        return f"{change.site.replace('_', ' ')} of {_slots(change.slots)}, {_layers(change.layers)}{heads}"
    return "all slots, all layers" if change is None else condition.about


def _slots(slots: str | SlotQuery | Span | list[int]) -> str:
    if isinstance(slots, str):
        return _STRETCHES[slots]
    if not isinstance(slots, SlotQuery):
        return _listed("slot", slots)
    told = _STRETCHES[slots.of]
    if slots.without is not None:
        told += f" without {_STRETCHES[slots.without]}"
    if slots.fraction is not None:
        told = f"{slots.fraction[0]:.4g} to {slots.fraction[1]:.4g} of {told}"
    if slots.matched_to is not None:
        return f"as many of {told} as are marked by meaning, and others"
    if slots.keywords is not None:
        told = f"those of {told} that match a keyword"
    return told if slots.at_most is None else f"{slots.at_most} of {told}"


def _layers(layers: list[int] | LayerBand | LayerAt | Span | None) -> str:
    if layers is None:
        return "all layers"
    if isinstance(layers, LayerAt):
        return f"the layer at {layers.depth:.4g} of depth"
    if isinstance(layers, LayerBand):
        band = f"layers from {layers.band[0]:.4g} to {layers.band[1]:.4g} of depth"
        return f"all but the {band}" if layers.inverse else band
    return _listed("layer", layers)


def _listed(what: str, numbers: list[int] | Span) -> str:
    if isinstance(numbers, Span):
        first = f" from {numbers.start}" if numbers.start is not None else ""
        last = f" before {numbers.stop}" if numbers.stop is not None else ""
        step = f" in steps of {numbers.step}" if numbers.step is not None else ""
        return f"{what}s{first}{last}{step}"
    return f"{what}{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"
