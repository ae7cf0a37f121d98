"""The plan: how many trials, what their ids depend on, and batches that stand on their own."""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from kvpatch.errors import ProtocolError
from kvpatch.planning.names import hashed
from kvpatch.planning.plan import Batch, Plan, PlanningModel, make_plan
from kvpatch.prompts.bank import Bank, load_bank
from kvpatch.protocols.load import load_protocol
from kvpatch.protocols.schema import Protocol
from small import CONDITIONS, PAIRS, protocol_content, write_bank

MODEL: dict[str, Any] = {"key": "m", "kv_heads": 2, "has_template": True}


def plan_of(bank: Bank, protocol: Protocol | None = None, **changes: Any) -> Plan:
    protocol = protocol or Protocol.model_validate(protocol_content("small"))
    own = MODEL | {key: changes.pop(key) for key in list(changes) if key in (*MODEL, "can_move_keys", "has")}
    model = PlanningModel(body_length=lambda text: len(text.split()), **own)
    return make_plan(protocol, bank, {None: model, **dict.fromkeys(protocol.models, model)}, **{"seed": 0, **changes})


DEC7 = functools.cache(lambda: load_protocol("dec7"))


PLANS: dict[str, Plan] = {}


def dec7_plan(**changes: Any) -> Plan:
    """A plan of dec7, made once: it takes seconds, and no test changes it."""
    key = repr(sorted(changes.items()))
    if key not in PLANS:
        PLANS[key] = plan_of(load_bank("recursion"), DEC7(), **changes)
    return PLANS[key]


@pytest.fixture
def bank(tmp_path) -> Bank:
    return load_bank(str(write_bank(tmp_path / "bank")))


def ids_by_content(plan: Plan) -> dict[tuple, str]:
    return {
        (batch.phase, trial.condition, batch.pairs[trial.pair].pair_id, trial.sample): trial.trial_id
        for batch in plan.batches
        for trial in batch.trials
    }


def test_the_experiment_s_own_conditions_of_each_phase_are_as_many_runs_as_it_planned():
    own = Counter(b.phase for b in dec7_plan().batches for t in b.trials if b.roles[t.condition] == "experiment")
    planned = {"1": 600, "2": 250, "3": 200, "4": 100, "5": 300, "6": 150, "7": 300}
    assert {phase: own[phase] for phase in planned} == planned


def test_a_phase_on_another_model_has_a_calibration_of_its_own():
    batches = dec7_plan(phases=["1", "7"]).batches
    assert list(dict.fromkeys((b.model, b.phase, b.calibration) for b in batches)) == [
        (None, "calibration", "calibration"),
        (None, "1", "calibration"),
        ("second", "calibration-second", "calibration-second"),
        ("second", "7", "calibration-second"),
    ]


def test_every_level_of_the_ladder_goes_into_the_same_targets_from_another_subject():
    bank = load_bank("recursion")
    batches = dec7_plan(phases=["4"]).batches
    pairs = [pair for b in batches if b.phase == "4" for pair in b.pairs]
    runs = Counter(t.condition for b in batches if b.phase == "4" for t in b.trials)
    assert len(pairs) == 20
    assert set(runs.values()) == {20}
    for pair in pairs:
        target, source = bank.by_id[pair.target_id], bank.by_id[pair.source_id]
        assert (target.level, source.level) == ("long_control", "L5_refined")
        assert target.topic != source.topic
        text = {p.text: p for p in bank.prompts}
        levels = {role: text[pair.texts[role]] for role in ("L1_hint", "L2_simple", "L3_deeper", "L4_full")}
        assert {role: prompt.level for role, prompt in levels.items()} == {role: role for role in levels}
        assert {prompt.topic for prompt in levels.values()} == {source.topic}
        assert set(pair.masked_by) >= {"source", *levels}


def test_calibration_pairs_are_held_out_of_every_phase():
    plan = dec7_plan()
    pairs = defaultdict(set)
    for batch in plan.batches:
        if batch.phase == "4":
            continue  # its pairs are formed of prompts of its own
        pairs[batch.split] |= {pair.pair_id for pair in batch.pairs}
    assert len(pairs["calibration"]) == 30
    assert len(pairs["test"]) == 100
    assert not pairs["calibration"] & pairs["test"]


def test_each_prompt_serves_in_one_pair():
    batches = [batch for batch in dec7_plan().batches if batch.model is None]
    pairs = {pair.pair_id: pair for batch in batches for pair in batch.pairs}.values()
    for role in ("target_id", "source_id"):
        assert max(Counter(getattr(pair, role) for pair in pairs).values()) == 1


def test_trial_ids_are_unique():
    ids = dec7_plan().trial_ids
    assert len(set(ids)) == len(ids)


def test_only_n4_and_p1_have_fewer_trials_than_their_phase_has_pairs():
    runs = Counter((b.phase, t.condition) for b in dec7_plan().batches for t in b.trials if b.phase == "interventions")
    fewer = {name: n for (_, name), n in runs.items() if n < 50}
    assert fewer.keys() == {"N4", "P1"}
    assert min(fewer.values()) >= 40


def test_one_condition_under_two_names_and_in_two_phases_gives_trials_of_their_own(bank):
    conditions = {name: CONDITIONS["A"] for name in ("A", "B", "A2")}
    phases = {name: {"question": "?", "n": 2, "conditions": ["A", "A2"]} for name in ("1", "2")}
    content = protocol_content("small", conditions=conditions, phases=phases, hypotheses=[])
    ids = plan_of(bank, Protocol.model_validate(content)).trial_ids
    assert len(set(ids)) == len(ids) == 2 * 2 * 2 + 3 * 2


def test_trial_ids_are_the_same_for_the_same_plan(bank):
    assert plan_of(bank) == plan_of(bank)


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("model", {"key": "other"}),
        ("seed", {"seed": 1}),
        ("temperature", {"protocol": {"generation": {"max_new_tokens": 10, "temperature": 0.8}}}),
        ("length", {"protocol": {"generation": {"max_new_tokens": 11, "temperature": 0.7}}}),
        ("readouts", {"protocol": {"readouts": {"js_positions": 5}}}),
    ],
)
def test_trial_ids_depend_on_everything_that_makes_a_trial(bank, what, changes):
    content = protocol_content("small", **changes.pop("protocol", {}))
    other = plan_of(bank, Protocol.model_validate(content), **changes)
    assert not set(plan_of(bank).trial_ids) & set(other.trial_ids), what


def test_only_the_changed_condition_gets_other_ids(bank):
    conditions = CONDITIONS | {"P": CONDITIONS["P"] | {"patch": {"layers": [1, 3], "slots": "body", "parts": "v"}}}
    other = ids_by_content(plan_of(bank, Protocol.model_validate(protocol_content("small", conditions=conditions))))
    for key, trial_id in ids_by_content(plan_of(bank)).items():
        assert (other[key] == trial_id) is (key[1] != "P"), key


def test_only_trials_of_a_changed_prompt_get_other_ids(bank):
    prompts = tuple(p.model_copy(update={"text": p.text + " Say it."}) if p.id == "f2" else p for p in bank.prompts)
    edited = ids_by_content(plan_of(bank.model_copy(update={"prompts": prompts})))
    changed = {key for key, trial_id in ids_by_content(plan_of(bank)).items() if edited[key] != trial_id}
    assert {pair.split("+")[0] for _, _, pair, _ in changed} == {"t2"}


def test_only_fitted_donors_depend_on_the_reference_prompts(bank):
    """With fewer calibration pairs the Gaussian is fitted to other prompts; all else stays."""
    fewer = protocol_content("small", calibration={"pairs": 2, "conditions": ["A", "B"]})
    now, then = ids_by_content(plan_of(bank, Protocol.model_validate(fewer))), ids_by_content(plan_of(bank))
    common = now.keys() & then.keys()
    assert {key[1] for key in common if now[key] != then[key]} == {"F2"}


def test_trial_ids_do_not_depend_on_n_or_on_other_phases(bank):
    phases = {name: {"question": "?", "n": 5, "conditions": ["A", "C", "N1"]} for name in ("1", "2")}
    protocol = Protocol.model_validate(protocol_content("small", phases=phases, hypotheses=[]))
    whole = ids_by_content(plan_of(bank, protocol))
    assert ids_by_content(plan_of(bank, protocol, n=2)).items() <= whole.items()
    assert ids_by_content(plan_of(bank, protocol, phases=["2"])).items() <= whole.items()
    assert {key[0] for key in ids_by_content(plan_of(bank, protocol, phases=["2"]))} == {"calibration", "2"}


def test_batches_go_to_json_and_back(bank):
    for batch in plan_of(bank).batches:
        assert Batch.model_validate_json(batch.model_dump_json(by_alias=True)) == batch


def test_batches_hold_every_text_and_setting_they_need(bank):
    protocol = Protocol.model_validate(protocol_content("small"))
    for batch in plan_of(bank, protocol).batches:
        assert batch.generation == protocol.generation
        assert batch.readouts == protocol.readouts
        for condition in batch.conditions.values():
            roles = {condition.into, condition.from_, condition.text_of} - {None}
            assert all(roles <= pair.texts.keys() for pair in batch.pairs)
            if condition.patch and condition.patch.donor == "gaussian_fitted":
                assert len(batch.reference_texts) == protocol.calibration.pairs
        for pair in batch.pairs:
            assert pair.texts["target"] == bank.by_id[pair.target_id].text
            assert pair.texts["source"] == bank.by_id[pair.source_id].text
            assert all(pair.continuations)
        assert {trial.condition for trial in batch.trials} == set(batch.conditions)


def test_conditions_of_a_pair_share_a_batch_and_a_seed():
    where, seeds = defaultdict(set), defaultdict(set)
    for batch in dec7_plan().batches:
        for trial in batch.trials:
            key = (batch.phase, batch.pairs[trial.pair].pair_id, trial.sample)
            where[key].add(batch.batch_id)
            seeds[key].add(trial.seed)
    assert all(len(batches) == 1 for batches in where.values())
    assert all(len(shared) == 1 for shared in seeds.values())
    # A pair keeps its seed from phase to phase; no two pairs have one.
    pairs = {(pair, sample): shared for (_, pair, sample), shared in seeds.items()}
    assert all(pairs[pair, sample] == shared for (_, pair, sample), shared in seeds.items())
    assert len({min(shared) for shared in pairs.values()}) == len(pairs)


def test_samples_of_a_pair_have_seeds_of_their_own(bank):
    content = protocol_content("small", generation={"max_new_tokens": 4, "samples": 3})
    batch = plan_of(bank, Protocol.model_validate(content)).batches[-1]
    assert len({trial.seed for trial in batch.trials if trial.pair == 0}) == 3


def test_fixed_continuation_is_a_plain_one_on_the_target_s_topic(bank):
    plain = {c.text for c in bank.continuations if (c.mode, c.topic_of) == ("plain", "target")}
    assert {pair.forced for batch in plan_of(bank).batches for pair in batch.pairs} <= plain


def test_head_shuffle_is_left_out_by_name_on_a_model_with_one_kv_head():
    plan = dec7_plan(kv_heads=1)
    assert {(s.phase, s.condition) for s in plan.skipped} == {("1", "E3"), ("interventions", "H0")}
    assert all("KV heads" in s.reason for s in plan.skipped)
    assert not {"E3", "H0"} & {trial.condition for batch in plan.batches for trial in batch.trials}
    assert not dec7_plan().skipped


def test_what_needs_a_template_is_left_out_by_name_where_there_is_none():
    """The neutral scaffold, and patches of what stands before and behind the user's words: there is nothing."""
    plan = dec7_plan(has_template=False)
    beside = {("3", "T_template"), ("3", "M3_trailer"), ("3", "M3_trailer_n"), ("interventions", "M3_trailer")}
    assert {(s.phase, s.condition) for s in plan.skipped} == {("1", "N2"), ("7", "N2")} | beside
    assert all("chat template" in s.reason for s in plan.skipped)


def test_foreign_conditions_are_left_out_by_name_where_a_target_has_no_partner(bank):
    prompts = tuple(p for p in bank.prompts if p.group != "foreign")
    plan = plan_of(bank.model_copy(update={"prompts": prompts}))
    assert [s.condition for s in plan.skipped] == ["N1"]
    assert "foreign" in plan.skipped[0].reason


def test_n_too_large_for_the_bank_is_refused_with_the_numbers(bank):
    with pytest.raises(ProtocolError, match=rf"wants n=6, and bank .* gives 5 pairs .*\({PAIRS} less 3 held out"):
        plan_of(bank, n=6)


@pytest.mark.parametrize("n", [0, -1])
def test_n_below_one_is_refused(bank, n):
    with pytest.raises(ProtocolError, match="n must be at least 1"):
        plan_of(bank, n=n)


def test_unknown_phase_is_refused(bank):
    with pytest.raises(ProtocolError, match="no phase '9' in small; it has 1"):
        plan_of(bank, phases=["9"])


def test_unknown_group_is_refused(bank):
    content = protocol_content("small", pairing={"targets": "nobody"})
    with pytest.raises(ProtocolError, match="no group or level 'nobody'"):
        plan_of(bank, Protocol.model_validate(content))


# --- interventions --------------------------------------------------------------------------------------------------

INTERVENTIONS: dict[str, dict[str, Any]] = {
    "IV": {"about": "values", "from": "source", "in_prefill": {"site": "values"}},
    "IR": {"about": "residual", "from": "source", "in_prefill": {"site": "residual"}},
    "IQ": {"about": "q, k and v", "from": "source", "in_prefill": {"site": "queries_keys_values"}},
    "SV": {"about": "steering", "steer_values": {"layers": [1], "alpha": 2}},
    "SC": {"about": "direction", "steer_cache": {"strength": 2}},
    "SN": {"about": "random", "steer_cache": {"strength": 2, "random_directions": 20}},
    "M1": {"about": "cut", "from": "source", "joined": {"keep": "receiver"}},
    "T": {"about": "both", "from": "source", "joined": {"keep": "all"}},
    "N4": {"about": "pseudo", "from": "pseudo_recursive", "patch": {"align": "replace"}},
    "N4s": {"about": "its text", "text_of": "pseudo_recursive"},
    "P1": {"about": "paraphrase", "from": "zero_lexicon", "patch": {"align": "replace"}},
}


def intervening(**changes: Any) -> Protocol:
    """The small protocol with `INTERVENTIONS` beside A and B."""
    conditions = {name: CONDITIONS[name] for name in ("A", "B")} | INTERVENTIONS
    phases = {"1": {"question": "?", "n": 5, "conditions": list(conditions)}}
    pairing = {"max_length_difference": 0.5, "also": ["pseudo_recursive", "zero_lexicon"]}
    content = protocol_content("small", conditions=conditions, phases=phases, hypotheses=[], pairing=pairing, **changes)
    return Protocol.model_validate(content)


def with_others(bank: Bank, pseudo: int = 0, zero: int = 0, words: int = 5) -> Bank:
    """The bank with so many prompts of the groups that N4 and P1 take from, of so many words."""
    groups = ["pseudo_recursive"] * pseudo + ["zero_lexicon"] * zero
    like = bank.prompts[0]
    more = tuple(
        like.model_copy(update={"id": f"o{i}", "group": group, "text": " ".join([f"word{i}"] * words)})
        for i, group in enumerate(groups)
    )
    return bank.model_copy(update={"prompts": bank.prompts + more})


def runs_of(plan: Plan) -> Counter:
    return Counter(trial.condition for batch in plan.batches if batch.split == "test" for trial in batch.trials)


def test_conditions_that_move_keys_are_left_out_by_name_where_keys_can_t_be_moved(bank):
    bank = with_others(bank, 8, 8)
    plan = plan_of(bank, intervening(), can_move_keys=False)
    assert [(s.phase, s.condition) for s in plan.skipped] == [("1", "IQ"), ("1", "M1")]
    assert {s.reason for s in plan.skipped} == {
        "moves keys to other positions; the model adds positions to its embeddings"
    }
    assert not {"IQ", "M1"} & runs_of(plan).keys()
    assert {"IV", "IR", "SV", "SC", "T"} <= runs_of(plan).keys()
    assert not plan_of(bank, intervening()).skipped


def test_dec7_leaves_out_m1_where_keys_can_t_be_moved():
    skipped = dec7_plan(can_move_keys=False).skipped
    joined = {"M1", "M1n", "M1y", *(f"J{level}" for level in range(6))}
    qkv = {"I_QKV", "I_QKV_n", "I_QKV_last", "I_QKV_last_n"}
    through = {f"through_{band}{n}" for band in ("0_4", "4_8", "8_16", "16_24") for n in ("", "_n")}
    assert {s.condition for s in skipped} == qkv | through | joined


@pytest.mark.parametrize(
    ("groups", "left_out"),
    [((0, 0), ["N4", "N4s", "P1"]), ((8, 0), ["P1"]), ((0, 8), ["N4", "N4s"]), ((8, 8), [])],
)
def test_n4_and_p1_are_left_out_by_name_where_the_bank_lacks_their_group(bank, groups, left_out):
    plan = plan_of(with_others(bank, *groups), intervening())
    assert [s.condition for s in plan.skipped] == left_out
    for skipped in plan.skipped:
        group = "zero_lexicon" if skipped.condition == "P1" else "pseudo_recursive"
        assert skipped.reason == f"needs {group} prompts; the bank gives these pairs none"
    assert not set(left_out) & runs_of(plan).keys()


def test_n4_is_left_out_where_no_prompt_of_its_group_is_of_like_length(bank):
    plan = plan_of(with_others(bank, 8, 8, words=40), intervening())
    assert [s.condition for s in plan.skipped] == ["N4", "N4s", "P1"]


def test_n4_is_left_out_of_the_calibration_whose_pairs_get_no_prompt(bank):
    protocol = intervening(calibration={"pairs": 3, "conditions": ["A", "B", "N4"]})
    plan = plan_of(with_others(bank, 8, 8), protocol)
    assert [(s.phase, s.condition) for s in plan.skipped] == [("calibration", "N4")]


def test_only_pairs_that_have_the_prompt_get_trials(bank):
    plan = plan_of(with_others(bank, 2, 3), intervening())
    assert {name: runs_of(plan)[name] for name in ("A", "N4", "N4s", "P1")} == {"A": 5, "N4": 2, "N4s": 2, "P1": 3}
    for batch in plan.batches:
        for trial in batch.trials:
            condition, texts = batch.conditions[trial.condition], batch.pairs[trial.pair].texts
            assert {condition.into, condition.from_, condition.text_of} - {None} <= texts.keys()


def test_a_prompt_of_another_group_serves_once(bank):
    plan = plan_of(with_others(bank, 5, 5), intervening())
    for role in ("pseudo_recursive", "zero_lexicon"):
        given = [pair.texts[role] for batch in plan.batches if batch.split == "test" for pair in batch.pairs]
        assert len(set(given)) == len(given) == 5


def test_directions_get_both_sides_of_the_calibration_pairs(bank):
    protocol = intervening()
    plan = plan_of(with_others(bank, 8, 8), protocol)
    held_out = [pair for batch in plan.batches if batch.split == "calibration" for pair in batch.pairs]
    for batch in plan.batches:
        if batch.split == "test":
            assert batch.reference_texts == [pair.texts["source"] for pair in held_out]
            assert batch.reference_targets == [pair.texts["target"] for pair in held_out]
        else:
            assert batch.reference_texts == batch.reference_targets == []


def test_only_conditions_with_directions_depend_on_the_calibration_prompts(bank):
    """And the random ones on the number of the pair, which moves up where fewer pairs are held out."""
    fewer = intervening(calibration={"pairs": 2, "conditions": ["A", "B"]})
    now, then = ids_by_content(plan_of(bank, fewer)), ids_by_content(plan_of(bank, intervening()))
    common = now.keys() & then.keys()
    assert {key[1] for key in common if now[key] != then[key]} == {"SV", "SC", "SN"}


def test_pairs_are_numbered_through_the_batches_of_a_phase(bank, monkeypatch):
    monkeypatch.setattr("kvpatch.planning.plan.ROWS_PER_BATCH", 25)
    plan = plan_of(with_others(bank, 8, 8), intervening())
    batches = [batch for batch in plan.batches if batch.split == "test"]
    assert len(batches) > 1
    assert [pair.number for batch in batches for pair in batch.pairs] == list(range(5))


def test_prompts_of_other_groups_change_the_ids_of_the_conditions_that_use_them_alone(bank):
    with_them = ids_by_content(plan_of(with_others(bank, 8, 8), intervening()))
    without = ids_by_content(plan_of(bank, intervening()))
    assert all(with_them[key] == trial_id for key, trial_id in without.items())
    assert {key[1] for key in with_them.keys() - without.keys()} == {"N4", "N4s", "P1"}


def test_batches_with_interventions_go_to_json_and_back(bank):
    for batch in plan_of(with_others(bank, 2, 8), intervening()).batches:
        assert Batch.model_validate_json(batch.model_dump_json(by_alias=True)) == batch


# --- what a phase asks of its pairs ---------------------------------------------------------------------------------


def having(roles: list[str], **phase: Any) -> Protocol:
    """The small protocol, whose phase wants a soup in the prompts of these roles."""
    wanted = {"slots": {"of": "body", "keywords": ["soup"]}, "roles": roles}
    phases = {"1": {"question": "?", "n": 3, "conditions": ["A", "B"], "having": wanted, **phase}}
    return Protocol.model_validate(protocol_content("small", phases=phases, hypotheses=[]))


def has_of(lacking: set[str]) -> Any:
    """Of prompts, all have what is asked for but these texts."""
    return lambda text, asked: text not in lacking


def test_pairs_without_what_a_phase_compares_are_passed_over_and_counted_and_others_take_their_place(bank):
    everyone = plan_of(bank, having(["source"]))
    first, second = (pair for pair in everyone.batches[-1].pairs[:2])
    lacking = {first.texts["source"], second.texts["target"]}
    plan = plan_of(bank, having(["source"]), has=has_of(lacking))
    kept = [pair.pair_id for pair in plan.batches[-1].pairs]
    assert plan.passed_over == {"1": 1} and everyone.passed_over == {}
    assert first.pair_id not in kept and second.pair_id in kept and len(kept) == 3
    both = plan_of(bank, having(["source", "target"]), has=has_of(lacking))
    assert both.passed_over == {"1": 2}


def test_a_role_that_the_pairs_lack_is_not_asked(bank):
    plan = plan_of(bank, having(["source", "foreign_matched"]), has=has_of(set()))
    assert (len(plan.batches[-1].pairs), plan.passed_over) == (3, {})


def test_too_few_pairs_that_have_it_are_told_with_the_numbers(bank):
    with pytest.raises(ProtocolError, match=r"wants n=3, .* gives 0 pairs .*and 5 that lack what it asks .*'having'"):
        plan_of(bank, having(["source"]), has=lambda text, asked: False)


def test_an_unknown_role_in_having_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no prompt 'sorce'; did you mean 'source'"):
        having(["sorce"])


def test_dec7_s_pairs_have_marked_tokens_and_enough_of_them_are_left():
    def has(text: str, asked: Any) -> bool:
        return any(re.search(word, text, re.IGNORECASE) for word in asked.slots.keywords)

    plan = dec7_plan(phases=["3", "6"], has=has)
    runs = Counter(t.condition for b in plan.batches if b.phase == "3" for t in b.trials)
    assert runs["T_self"] == runs["T_self_n"] == runs["T_one_n"] == 50
    assert set(plan.passed_over) == {"3", "6"}
    for batch in plan.batches:
        for pair in batch.pairs if batch.phase in ("3", "6") else []:
            asked = DEC7().phases[batch.phase].having
            assert all(has(pair.texts[role], asked) for role in asked.roles)


IDS = {
    (): "a045a5fd1d989fbc310a1ebffa187f52578151f92e9acfa1dd23b1041f6a8795",
    (("n", 7), ("phases", ("1", "5", "6")), ("seed", 3)): (
        "46184b4e14524ee4dc3a635be3e047d84fa079e3d9e65d23d0a3b9f5679b4063"
    ),
    (("grown_from", (3, 5)),): "b27d4dadce61a645bc6c8062ce936bf9280d35ed929b55970a52267c7c08d6d3",
}
"""Plans of dec7 -> a hash of all ids and seeds in them, as they were when each trial was hashed on its own."""


@pytest.mark.parametrize("asked", IDS, ids=["whole", "some phases of seven pairs", "grown twice"])
def test_no_id_of_a_trial_or_a_batch_has_changed_since_trials_were_hashed_one_by_one(asked):
    plan = dec7_plan(**dict(asked))
    found = hashlib.sha256()
    for batch in (*plan.batches, *plan.forced):
        trials = "".join(f"{t.trial_id}{t.content_id}{t.seed}" for t in batch.trials)
        found.update(f"{batch.batch_id}{trials}".encode())
    assert found.hexdigest() == IDS[asked]


def test_an_id_is_the_hash_of_the_trial_s_content_as_canonical_json():
    """By another way than the planner's: the whole content at once."""
    plan, protocol = dec7_plan(), DEC7()
    content = {
        "model": "m",
        "generation": protocol.generation.model_dump(mode="json"),
        "readouts": protocol.readouts.model_dump(mode="json"),
        "scorer": plan.scorer.sha256,
    }
    batch = next(b for b in plan.batches if b.phase == "1")
    for trial in batch.trials:
        condition, pair = batch.conditions[trial.condition], batch.pairs[trial.pair]
        if (change := condition.change) is not None and (change.is_fitted or change.uses_pair_number):
            continue
        of_pair = pair.model_dump(mode="json", exclude={"domains", "number"})
        roles = {"target", "source", "neutral", "shuffled_words", "foreign", "foreign_matched"}
        used = roles | {*pair.masked_by, condition.from_, condition.text_of}
        of_pair["texts"] = {role: text for role, text in pair.texts.items() if role in used}
        own = {
            "condition": condition.model_dump(mode="json", by_alias=True),
            "name": trial.condition,
            "pair": of_pair,
            "sample": trial.sample,
            "seed": trial.seed,
            "reference": [],
            "watched": None,
            "geometry": protocol.phases["1"].geometry,
        }
        whole = {**content, **own, "fitted_on": fitted_on(protocol, plan)}
        assert hashed(whole) == trial.content_id
        assert hashed({**whole, "phase": "1"}) == trial.trial_id


def fitted_on(protocol: Protocol, plan: Plan) -> str:
    """What the mode readout is fitted on, as the planner names it."""
    names = [*protocol.calibration.neutral, *protocol.calibration.destroyed]
    pairs = [pair.pair_id for b in plan.batches if b.phase == "calibration" for pair in b.pairs]
    made = {name: protocol.conditions[name].model_dump(mode="json", by_alias=True) for name in names}
    return hashed({"pairs": pairs, "conditions": made})


def test_a_draft_knows_its_batch_without_making_its_trials():
    plan = dec7_plan()
    assert plan.n_trials == sum(len(batch.trials) for batch in plan.batches)
    for draft, batch in zip(plan.drafts, plan.batches, strict=True):
        assert draft.batch_id == batch.batch_id and draft.size == len(batch.trials)
        counted = Counter(trial.condition for trial in batch.trials)
        assert {name: count for name, count in draft.counts.items() if count} == counted
        assert pickle.loads(pickle.dumps(draft)).batch_id == batch.batch_id
    bare = plan_of(load_bank("recursion"), DEC7())
    assert bare.n_trials == plan.n_trials and "batches" not in vars(bare)
