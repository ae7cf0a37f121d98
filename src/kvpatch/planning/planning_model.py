"""What a plan must know of a model, and which conditions are possible on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvpatch.planning.pairing import Pair
from kvpatch.protocols.conditions import ROLES, Condition
from kvpatch.protocols.schema import Having


@dataclass(frozen=True)
class PlanningModel:
    """What a plan must know of a model.

    body_length: number of body tokens of a text. key: names the weights, tokenizer and template; part of every trial
    id. has_template: whether prompts go into a chat template (the neutral scaffold needs one). can_move_keys: False
    for a model that adds positions to its embeddings. has: whether the prompt of a text has the slots that a phase asks
    of its pairs; without it every pair counts as having them.
    """

    body_length: Callable[[str], int]
    key: str
    kv_heads: int
    has_template: bool
    can_move_keys: bool = True
    has: Callable[[str, Having], bool] | None = None


def why_not(condition: Condition, model: PlanningModel, pairs: Sequence[Pair]) -> str | None:
    """Why a condition can't be run on a model with these pairs; None where it can."""
    roles = {condition.from_, condition.text_of}
    other = next((role for role in roles if role is not None and role not in ROLES), None)
    if model.kv_heads < condition.min_kv_heads:
        return f"needs {condition.min_kv_heads} KV heads; the model has {model.kv_heads}"
    if "neutral" in roles and not model.has_template:
        return "needs a chat template for the empty scaffold; the model has none"
    if condition.needs_template and not model.has_template:
        return "needs slots that only a chat template gives; the model has none"
    if "foreign" in roles and any(pair.foreign is None for pair in pairs):
        return "needs a foreign partner for every target; the bank has not got them"
    if "foreign_matched" in roles and any(pair.foreign_matched is None for pair in pairs):
        return "needs a foreign partner, matched in person and speech act, for every source; the bank has none"
    if other and not any(other in pair.others for pair in pairs):
        return f"needs {other} prompts; the bank gives these pairs none"
    if condition.change is not None and condition.change.moves_keys and not model.can_move_keys:
        return "moves keys to other positions; the model adds positions to its embeddings"
    return None
