"""The plan of a protocol on its models, once all that it asks of them is known to be had."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from kvpatch.engine.model import Model
from kvpatch.errors import ProtocolError
from kvpatch.executors.host import model_record
from kvpatch.files import remember_tokenizer
from kvpatch.models.template import has_template
from kvpatch.planning.fit import refuse_misfits, slots_are_had
from kvpatch.planning.listener import ProgressListener
from kvpatch.planning.plan import Plan, PlanningModel, chosen_phases, make_plan
from kvpatch.prompts.bank import Bank
from kvpatch.protocols.schema import Protocol
from kvpatch.readouts.geometry import layer_at
from kvpatch.readouts.lexicon_files import is_shipped
from kvpatch.readouts.outside import measure_outside
from kvpatch.readouts.scorer import Scorer
from kvpatch.specs.readouts import TrialRecord
from kvpatch.store.record import ModelRecord

Models = Mapping[str | None, Model]
"""The run's own model under None, the protocol's further ones by their keys."""


def plan_for(
    models: Models,
    protocol: Protocol,
    bank: Bank,
    *,
    seed: int,
    n: int | None,
    phases: Sequence[str] | None,
    grown_from: Sequence[int | None] = (),
) -> tuple[Plan, dict[str | None, ModelRecord]]:
    """The plan of a protocol on its models, and the record of each.

    Raises:
        ProtocolError: where the protocol can't run on one of these models, or on this bank.
    """
    records = {key: model_record(model) for key, model in models.items()}
    _refuse_one_name_for_two(records)
    readouts = protocol.readouts
    room = max(protocol.generation.max_new_tokens, readouts.forced_tokens, readouts.likelihood_tokens)
    encoders = {
        key: functools.cache(lambda text, model=model: model.encode(text, may_be_empty=not text))
        for key, model in models.items()
    }
    for key, model in models.items():
        r_v = readouts.r_v.of_model(model.loaded.name)
        for layer in (r_v.early, r_v.late):
            layer_at(layer, model.geometry.layers)
        longest = max(len(encoders[key](prompt.text).token_ids) for prompt in bank.prompts)
        if longest + room > model.geometry.context:
            raise ProtocolError(
                f"the longest prompt has {longest} tokens and {room} are to follow; {model.geometry.limit}"
            )
        if (directory := model.loaded.directory) is not None:
            remember_tokenizer(records[key].tokenizer_sha256, directory / "tokenizer.json")
    planning = {
        key: PlanningModel(
            body_length=lambda text, encode=encoders[key]: encode(text).body_length,
            key=f"{r.weights_sha256}:{r.tokenizer_sha256}:{r.template_sha256}:{r.dtype}",
            kv_heads=r.kv_heads,
            has_template=has_template(models[key].tokenizer),
            can_move_keys=not any(rope.keeps_its_place for rope in models[key].geometry.rope),
            has=slots_are_had(models[key].geometry, encoders[key]),
        )
        for key, r in records.items()
    }
    plan = make_plan(protocol, bank, planning, seed=seed, n=n, phases=phases, grown_from=grown_from)
    _try_out(plan.scorer, bank, models[next(iter(models))].continuation_ids)
    for key, model in models.items():
        own = [draft for draft in plan.drafts if draft.model == key]
        refuse_misfits(own, model.geometry, encoders[key], model.continuation_ids, room)
    return plan, records


def _refuse_one_name_for_two(records: Mapping[str | None, ModelRecord]) -> None:
    """Trials name their model as its record does; of a local model that is the last part of its path.

    Raises:
        ProtocolError: where two models that differ would have one name.
    """
    known: dict[str, ModelRecord] = {}
    for record in records.values():
        if known.setdefault(record.name, record) != record:
            raise ProtocolError(
                f"two models of this run are called {record.name!r}, by which its trials would name both; rename one "
                "of their directories"
            )


def _try_out(scorer: Scorer, bank: Bank, ids_of: Callable[[str], list[int]]) -> None:
    """Score the empty text and a continuation of each mode, and by a lexicon that is not shipped all texts of the bank;
    measure the readouts from outside. What is broken, or too slow, is told before a trial is run.

    ids_of: the token ids of a text.
    """
    if scorer.kind == "lexicon" and not is_shipped(scorer.sha256):
        for entry in (*bank.prompts, *bank.continuations):
            scorer.score(entry.text, "")
    for text in ("", *{c.mode: c.text for c in bank.continuations}.values()):
        scorer.score(text, text)
        ids = tuple(ids_of(text)) or (0,)  # an output that ends at once has the end token
        chances = (-1.0,) * len(ids)
        measure_outside(TrialRecord(text, ids, chances, "length", text, text, ids, ids, ids))


def other_models(protocol: Protocol, phases: Sequence[str] | None) -> dict[str, str]:
    """The further models that the chosen phases need: key -> name."""
    chosen = [protocol.phases[name].model for name in chosen_phases(protocol, phases)]
    return {key: name for key, name in protocol.models.items() if key in chosen}


def clocked(models: Models, listener: ProgressListener) -> list[str]:
    """Names of the models whose prompts hold the date, since a run of theirs can't be resumed when it has changed."""
    return [m.loaded.name for m in models.values() if m.scaffold is not None and m.scaffold.depends_on_clock]
