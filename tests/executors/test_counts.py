"""Planning refuses what would change nothing, naming condition, phase and pair; every trial counts what it touched."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvpatch.caches.kvcache import Segment
from kvpatch.errors import ProtocolError
from kvpatch.executors.batch import run_batch
from kvpatch.protocols.conditions import Condition
from kvpatch.protocols.load import load_protocol
from kvpatch.store.columns import NEEDED, TRIAL_SCHEMA
from kvpatch.store.directory import Store
from kvpatch.store.parts import read_file
from small import CONDITIONS, bank_entries, write_bank, write_protocol
from tiny import LAYERS

pytestmark = pytest.mark.model

SOURCE = {"from": "source"}
KV_HEADS = 2
ZEBRA = {"of": "body", "keywords": ["zebra"]}
SOUP = {"of": "body", "keywords": ["soup"]}
"""Which stands in one of the targets."""


def changes_for(ways: dict[str, dict[str, Any]], *, n: int = 5, **phase: Any) -> dict[str, Any]:
    """The small protocol with these conditions beside the natural ones."""
    conditions = {name: CONDITIONS[name] for name in ("A", "B")}
    conditions |= {name: {"about": name, **way} for name, way in ways.items()}
    phases = {"1": {"question": "?", "n": n, "conditions": list(conditions), **phase}}
    return {"conditions": conditions, "phases": phases, "hypotheses": []}


NOTHING: list[dict[str, Any]] = [
    *(
        SOURCE | {"patch": {"slots": ZEBRA, "align": align}}
        for align in ("start", "end", "stretch", "replace", "append")
    ),
    SOURCE | {"patch": {"slots": {"of": "body", "fraction": [0, 0.001]}}},
    SOURCE | {"patch": {"slots": {"of": "body", "matched_to": ZEBRA}}},
    SOURCE | {"patch": {"slots": ZEBRA | {"in_source": True}}},
    SOURCE | {"patch": {"slots": [], "strength": 0}},
    SOURCE | {"patch": {"slots": SOUP}},
    *(SOURCE | {"in_prefill": {"site": s, "slots": ZEBRA}} for s in ("values", "queries_keys_values", "residual")),
    {"steer_values": {"layers": [1], "alpha": 0, "slots": ZEBRA}},
    {"steer_values": {"layers": [1], "alpha": 2, "slots": []}},
    {"steer_cache": {"strength": 2, "slots": ZEBRA}},
    {"steer_cache": {"strength": 0, "slots": {"of": "body", "without": "body"}}},
]


@pytest.mark.parametrize("way", NOTHING, ids=str)
def test_a_condition_that_finds_no_slot_of_a_pair_is_refused_by_condition_phase_and_pair(small_plan, way):
    words = r"\Acondition X of phase 1: .*slots .* find no slot in the .*may_be_empty.* \(pair t\d\+s\d\)\Z"
    with pytest.raises(ProtocolError, match=words):
        small_plan(**changes_for({"X": way}))


@pytest.mark.parametrize(
    "way",
    [
        SOURCE | {"patch": {"layers": []}},
        SOURCE | {"patch": {"kv_heads": []}},
        SOURCE | {"patch": {"layers": {"band": [0, 1], "inverse": True}}},
        SOURCE | {"in_prefill": {"site": "values", "layers": []}},
        SOURCE | {"reshape": {"layers": []}},
        {"steer_values": {"layers": [], "alpha": 2}},
        {"steer_cache": {"layers": [], "strength": 2}},
    ],
    ids=str,
)
def test_a_condition_that_finds_no_layer_or_head_is_refused(small_plan, way):
    with pytest.raises(ProtocolError, match=r"condition X of phase 1: .* hold"):
        small_plan(**changes_for({"X": way}))
    small_plan(**changes_for({"X": way | {"may_be_empty": True}}))


def test_the_pair_that_is_named_is_the_one_that_has_none(small_plan, tmp_path):
    """All targets but one have the word."""
    entries = [e | {"text": e["text"].replace("cook", "stand")} if e["id"] == "t3" else e for e in bank_entries()]
    bank = write_bank(tmp_path / "one", entries)
    way = {"steer_cache": {"strength": 1, "slots": {"of": "body", "keywords": ["cook"]}}}
    found = set()
    for seed in range(8):
        try:
            plan = small_plan(bank=bank, seed=seed, **changes_for({"X": way}))
        except ProtocolError as error:
            found.add(str(error).rsplit("(pair ", 1)[1].split("+")[0])
        else:
            tested = {pair.target_id for b in plan.batches if b.split == "test" for pair in b.pairs}
            assert "t3" not in tested
    assert found == {"t3"}


def test_the_giver_of_a_joined_prompt_needs_words(small_plan):
    way = {"from": "neutral", "joined": {"keep": "receiver"}}
    for may_be_empty in (False, True):
        with pytest.raises(ProtocolError, match="condition X of phase 1: the giver has no words"):
            small_plan(**changes_for({"X": way | {"may_be_empty": may_be_empty}}))


def test_marks_that_a_pair_has_nowhere_are_refused(small_plan):
    way = SOURCE | {"patch": {"slots": "body"}}
    for slots in (ZEBRA, SOUP, {"of": "body", "keywords": []}):
        with pytest.raises(ProtocolError, match=r"phase 1: its marked slots .* find no slot .* \(pair t\d\+s\d\)"):
            small_plan(**changes_for({"X": way}, attention={"marked": slots}))
    small_plan(**changes_for({"X": way}, attention={"marked": {"of": "body", "keywords": ["Describe"]}}))


# --- counts ---

COUNTED: dict[str, dict[str, Any]] = {
    "band": SOURCE | {"patch": {"slots": "body", "layers": {"band": [0.25, 0.75]}, "parts": "v"}},
    "head": SOURCE | {"patch": {"slots": "body", "kv_heads": [1], "strength": 0.5}},
    "word": SOURCE | {"patch": {"slots": {"of": "body", "keywords": ["how"]}, "align": "start"}},
    "other": SOURCE | {"patch": {"slots": {"of": "body", "matched_to": {"of": "body", "keywords": ["how"]}}}},
    "swap": SOURCE | {"patch": {"align": "replace"}},
    "more": SOURCE | {"patch": {"align": "append"}},
    "text": {"text_of": "source"},
    "values": SOURCE | {"in_prefill": {"site": "values", "layers": [1], "slots": "body"}},
    "stream": SOURCE | {"in_prefill": {"site": "residual", "slots": "last"}},
    "M1": SOURCE | {"joined": {"keep": "receiver"}},
    "T": SOURCE | {"joined": {"keep": "all"}},
    "steered": {"steer_values": {"layers": [2], "alpha": 3, "slots": "body"}},
    "added": {"steer_cache": {"strength": 2}},
    "nothing_added": {"steer_cache": {"strength": 0, "layers": [0, 1]}},
    "shape": SOURCE | {"reshape": {"window": 6, "layers": [3]}},
    "soup": SOURCE | {"patch": {"slots": SOUP | {"matched_to": None}}, "may_be_empty": True},
    "steered_soup": {"steer_cache": {"strength": 2, "slots": SOUP}, "may_be_empty": True},
    "no_layer": SOURCE | {"patch": {"layers": [], "slots": "body"}, "may_be_empty": True},
}


@pytest.fixture(scope="module")
def counted(model, tmp_path_factory):
    """Rows by condition and pair, and the batches they came from."""
    from kvpatch.planned import plan_for
    from kvpatch.prompts.bank import load_bank

    protocol = load_protocol(str(write_protocol(tmp_path_factory.mktemp("counts"), **changes_for(COUNTED))))
    plan, _ = plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=None, phases=None)
    batches = [batch for batch in plan.batches if batch.split == "test"]
    rows: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for batch in batches:
        for row in run_batch(model, batch):
            rows[row["condition"]][row["pair_id"]] = row
    return rows, {pair.pair_id: pair for batch in batches for pair in batch.pairs}


def counts_of(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["n_slots_patched"], row["n_layers_patched"], row["n_kv_heads_patched"]


def test_every_trial_counts_its_slots_layers_and_heads(model, counted):
    rows, pairs = counted
    separator = len(model.continuation_ids("\n\n"))
    for pair_id, pair in pairs.items():
        target, source = (model.encode(pair.texts[role]) for role in ("target", "source"))
        body, source_body = target.body_length, source.body_length
        length, source_length = len(target.token_ids) - 1, len(source.token_ids) - 1
        behind = length - target.segments.index(Segment.body)
        expected = {
            "A": (0, 0, 0),
            "B": (0, 0, 0),
            "text": (0, 0, 0),
            "band": (min(body, source_body), 2, KV_HEADS),
            "head": (min(body, source_body), LAYERS, 1),
            "swap": (source_length, LAYERS, KV_HEADS),
            "more": (source_length, LAYERS, KV_HEADS),
            "values": (body if source_length >= length else None, 1, KV_HEADS),
            "stream": (1, LAYERS, KV_HEADS),
            "M1": (behind, LAYERS, KV_HEADS),
            "T": (behind + source_body + separator, LAYERS, KV_HEADS),
            "steered": (body, 1, KV_HEADS),
            "added": (body, LAYERS, KV_HEADS),
            "nothing_added": (body, 2, KV_HEADS),
            "shape": (6, 1, KV_HEADS),
            "no_layer": (0, 0, 0),
        }
        for name, wanted in expected.items():
            row = rows[name][pair_id]
            assert row["error"] is None
            if None not in wanted:
                assert counts_of(row) == wanted, name
        words = rows["word"][pair_id]
        assert counts_of(words)[1:] == (LAYERS, KV_HEADS)
        assert 1 <= counts_of(words)[0] <= min(body, source_body)
        assert counts_of(rows["other"][pair_id]) == counts_of(words)


def test_pairs_that_find_nothing_where_that_may_be_run_as_they_are_and_count_0(counted):
    rows, pairs = counted
    for name in ("soup", "steered_soup", "no_layer"):
        for pair_id in pairs:
            row, natural = rows[name][pair_id], rows["A"][pair_id]
            assert row["error"] is None
            has_it = name == "steered_soup" and "soup" in row["target_text"]
            assert (counts_of(row) != (0, 0, 0)) == has_it
            assert (row["cache_checksum_before"] != natural["cache_checksum_before"]) == has_it
    assert any(counts_of(row) != (0, 0, 0) for row in rows["steered_soup"].values())


def test_counts_are_stored_and_null_in_parts_that_were_written_before_them(counted, tmp_path: Path):
    rows = [row for of in counted[0].values() for row in of.values()]
    columns = ["n_slots_patched", "n_layers_patched", "n_kv_heads_patched"]
    store = Store(tmp_path)
    store.append("new", rows)
    found = store.read(["condition", *columns]).to_pylist()
    assert [tuple(row[c] for c in columns) for row in found] == [counts_of(row) for row in rows]
    path = tmp_path / "trials" / "old.parquet"
    older = pa.Table.from_pylist(rows, schema=TRIAL_SCHEMA).drop_columns(columns)
    pq.write_table(older, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    again = read_file(path, sha256, len(rows), TRIAL_SCHEMA, NEEDED, TRIAL_SCHEMA.names)
    assert again.schema == TRIAL_SCHEMA
    assert again["n_slots_patched"].null_count == len(rows)


# --- the switches of a condition ---


def test_switches_that_are_off_leave_hashes_as_they_were():
    plain = Condition.model_validate({"about": "?", **SOURCE, "patch": {"slots": "body"}})
    assert not {"may_be_empty", "needs_template"} & plain.model_dump(mode="json", by_alias=True).keys()
    on = Condition.model_validate({"about": "?", **SOURCE, "patch": {"slots": "body"}, "may_be_empty": True})
    assert on.model_dump(mode="json", by_alias=True)["may_be_empty"] is True


def test_no_shipped_condition_may_be_empty():
    for name in ("dec7", "validate"):
        assert not any(condition.may_be_empty for condition in load_protocol(name).conditions.values())


def test_indices_of_a_protocol_that_can_t_be_meant_are_refused_at_their_line(tmp_path):
    path = write_protocol(tmp_path, **changes_for({"X": SOURCE | {"patch": {"layers": [True]}}}))
    line = path.read_text().splitlines().index("      layers:") + 1
    with pytest.raises(ProtocolError, match=f"line {line}, conditions.X.patch.layers: layers must be whole numbers"):
        load_protocol(str(path))


def test_conditions_that_need_a_template_are_left_out_by_name_without_one(tiny, tmp_path):
    from kvpatch.planned import plan_for
    from kvpatch.prompts.bank import load_bank

    model = tiny("llama", chat=False)
    way = SOURCE | {"patch": {"slots": "trailer"}}
    protocol = load_protocol(str(write_protocol(tmp_path, **changes_for({"X": way | {"needs_template": True}}))))
    plan, _ = plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=None, phases=None)
    assert [(s.condition, "chat template" in s.reason) for s in plan.skipped] == [("X", True)]
    protocol = load_protocol(str(write_protocol(tmp_path, **changes_for({"X": way}))))
    with pytest.raises(ProtocolError, match="condition X of phase 1: slots 'trailer' find no slot in the source"):
        plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=None, phases=None)


@pytest.mark.parametrize("align", ["start", "end", "stretch"])
def test_values_alone_are_put_into_a_model_whose_positions_are_in_its_embeddings(tiny, tmp_path, align):
    from kvpatch.planned import plan_for
    from kvpatch.prompts.bank import load_bank

    model = tiny("gpt2")

    def planned(parts: str):
        way = SOURCE | {"patch": {"slots": "body", "align": align, "parts": parts}}
        protocol = load_protocol(str(write_protocol(tmp_path, **changes_for({"X": way}))))
        return plan_for({None: model}, protocol, load_bank(protocol.bank), seed=0, n=None, phases=None)[0]

    batch = planned("v").batches[-1]
    lengths = [[model.encode(pair.texts[role]).body_length for role in ("target", "source")] for pair in batch.pairs]
    assert any(target != source for target, source in lengths)
    rows = run_batch(model, batch)
    assert {row["error"] for row in rows} == {None}
    assert all(row["n_slots_patched"] > 0 for row in rows if row["condition"] == "X")
    if align != "start":
        with pytest.raises(ProtocolError, match=r"condition X of phase 1: .* can't be moved"):
            planned("kv")
