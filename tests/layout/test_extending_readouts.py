"""A readout of docs/extending.md, registered from outside the package: up to a verdict, a chart and a filter."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

import kvpatch
from kvpatch.errors import ExtensionError, StoreError
from kvpatch.protocols.load import load_protocol
from kvpatch.readouts.outside import measure_outside
from kvpatch.report.build import report_page
from kvpatch.report.packing import opened
from kvpatch.run import run
from kvpatch.specs import readouts as catalogue
from kvpatch.specs.readouts import RESERVED, Readout, TrialRecord, readouts, register, shown, unregister
from kvpatch.store.columns import TRIAL_COLUMNS, trial_schema
from kvpatch.store.directory import Store
from kvpatch.verdicts.outcome import outcome_of
from kvpatch.view.server import View
from small import CONDITIONS, write_protocol

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
NAME = "capitals"
HYPOTHESES = [
    {
        "id": "shouts", "claim": "the source's cache brings other capitals", "phase": "1", "readout": NAME,
        "contrast": "C - A", "test": "greater", "alpha": 0.05, "family": "f", "gate": 1,
    },
    {
        "id": "exists", "claim": "B > A", "phase": "1", "readout": "mode_llr",
        "contrast": "B - A", "test": "greater", "alpha": 0.05, "family": "f", "gate": 1,
    },
]  # fmt: skip
RECORD = TrialRecord("Two Words here", (5, 6, 2), (-0.1, -0.2, -0.3), "eos", "s", "t", (1,), (1,), (1,))


def code_of_the_page() -> str:
    section = PAGE.read_text("utf-8").split("\n## A readout\n")[1].split("\n## ")[0]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def registered() -> Iterator[Readout]:
    """The page's readout, for the tests of this module alone."""
    exec(compile(code_of_the_page(), str(PAGE), "exec"), {})
    yield readouts()[NAME]
    unregister(NAME)


@pytest.fixture(scope="module")
def made(registered: Readout, tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the small protocol with a hypothesis on it. Not to be changed."""
    folder = tmp_path_factory.mktemp("extended")
    conditions = {name: CONDITIONS[name] for name in ("A", "B", "C", "N1")}
    phases = {"1": {"question": "?", "n": 5, "conditions": list(conditions)}}
    file = write_protocol(folder, conditions=conditions, phases=phases, hypotheses=HYPOTHESES)
    run(load_protocol(str(file)), {None: tiny("llama")}, folder / "out")
    return folder / "out"


def expected(text: str) -> float:
    words = text.split()
    return sum(word[0].isupper() for word in words) / len(words) if words else math.nan


@pytest.mark.model
def test_it_is_stored_for_every_trial_with_its_meaning(made: Path) -> None:
    table = Store(made).read()
    assert table.schema.equals(trial_schema()) and table.schema.names[-1] == NAME
    rows = table.to_pylist()
    assert {row["split"] for row in rows} == {"calibration", "test"}
    for row in rows:
        assert row[NAME] == pytest.approx(expected(row["text"]), nan_ok=True)
    assert len({row[NAME] for row in rows}) > 1
    field = pq.read_schema(next((made / "trials").iterdir())).field(NAME)
    assert str(field.type) == "double" and field.metadata[b"doc"].decode() == readouts()[NAME].about


@pytest.mark.model
def test_a_hypothesis_on_it_gets_a_verdict(made: Path) -> None:
    found = {v.id: v for v in outcome_of(Store(made)).verdicts}["shouts"]
    rows = [row for row in Store(made).read().to_pylist() if row["split"] == "test"]
    by_pair: dict[str, dict[str, float]] = {}
    for row in rows:
        by_pair.setdefault(row["pair_id"], {})[row["condition"]] = expected(row["text"])
    differences = [of["C"] - of["A"] for of in by_pair.values()]
    known = [d for d in differences if math.isfinite(d)]
    assert found.readout == NAME and found.verdict
    assert found.n == len(known) > 2 and found.estimate == pytest.approx(sum(known) / len(known))
    stored = {v["id"]: v for v in json.loads((made / "verdicts.json").read_text())}
    assert stored["shouts"]["verdict"] == found.verdict


@pytest.mark.model
def test_the_report_has_charts_and_columns_of_it(made: Path) -> None:
    store = Store(made)
    html = opened((made / "report.html").read_text("utf-8"))
    for figure in (f"readout-1-{NAME}", f"effect-1-{NAME}", f"forest-{NAME}"):
        assert figure in html
    assert ">Capital letters</th>" in html and "share of words" in html
    assert NAME in {effect.readout for effect in outcome_of(store).effects}


@pytest.mark.model
def test_the_view_filters_sorts_and_shows_by_it(made: Path) -> None:
    rows = Store(made).read().to_pylist()
    with TestClient(View([made]).app("t"), base_url="http://127.0.0.1:8000") as client:
        html = client.get("/t/run/out/trials").text
        assert f'name="min_{NAME}"' in html and f'<th scope="col" class="n">{NAME}</th>' in html
        limit = max(row[NAME] for row in rows if math.isfinite(row[NAME]))
        asked = client.get(f"/t/run/out/trials?as=json&min_{NAME}={limit}&sort={NAME}").json()
        assert asked["total"] == sum(row[NAME] >= limit for row in rows) < len(rows)
        assert {row[NAME] for row in asked["rows"]} == {limit}
        ordered = [row[NAME] for row in client.get(f"/t/run/out/trials?as=json&sort=-{NAME}").json()["rows"]]
        known = [value for value in ordered if value is not None]
        assert known == sorted(known, reverse=True) and known[0] == limit and ordered[: len(known)] == known
        trial = client.get(f"/t/run/out/trial/{rows[0]['trial_id']}").text
        assert f"<code>{NAME}</code>" in trial and readouts()[NAME].about.replace("'", "&#39;") in trial


@pytest.mark.model
def test_without_the_readout_the_run_is_read_and_its_column_is_not(made: Path, registered: Readout) -> None:
    unregister(NAME)
    try:
        table = Store(made).read()
        assert NAME not in table.schema.names and len(table) > 0
        with pytest.raises(StoreError, match=f"read '{NAME}', a readout that no installed package registers"):
            outcome_of(Store(made))
    finally:
        register(registered)
    assert NAME in Store(made).read().schema.names


@pytest.mark.model
def test_a_readout_that_fails_stops_the_run_before_a_trial(made: Path, tiny, tmp_path: Path) -> None:
    def breaks(trial: TrialRecord) -> float:
        return 1 / len(trial.text)  # not for the empty text

    register(Readout(name="broken_one", label="?", about="always breaks", measure=breaks))
    try:
        protocol = load_protocol(str(write_protocol(tmp_path)))
        with pytest.raises(ExtensionError, match="readout 'broken_one' failed: ZeroDivisionError: division by zero"):
            run(protocol, {None: tiny("llama")}, tmp_path / "out")
    finally:
        unregister("broken_one")
    assert not (tmp_path / "out").exists()


def test_a_run_without_it_is_shown_as_before(registered: Readout, tmp_path: Path) -> None:
    from finished import small_run

    store = small_run(tmp_path / "run")
    held = report_page(store, outcome_of(store))
    unregister(NAME)
    try:
        assert report_page(store, outcome_of(store)) == held
    finally:
        register(registered)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "mode_llr"}, "the name 'mode_llr' is that of a readout already"),
        ({"name": "source_tokens"}, "the name 'source_tokens' is that of a readout already"),
        ({"name": NAME}, f"the name '{NAME}' is that of a readout already"),
        ({"name": "pair_id"}, "the name 'pair_id' is that of another column of a trial already"),
        ({"name": "place"}, "the name 'place' is that of another column"),
        ({"name": "Capital share"}, "'Capital share': a name has only lower-case letters"),
        ({"name": '"; drop table trials'}, "a name has only lower-case letters"),
        ({"measure": None}, "has no measure"),
        ({"asks": "geometry"}, "is measured on a TrialRecord alone"),
        ({"kind": "int32"}, "is measured on a TrialRecord alone"),
        ({"transform": "log"}, "only a readout above 0 has"),
        ({"transform": "sqrt"}, "transform is 'none' or 'log', not 'sqrt'"),
        ({"places": {"report", "wall"}}, "no place 'wall'"),
        ({"places": {"maps"}}, "add 'effects' to its places"),
    ],
)
def test_what_can_t_be_a_readout_is_refused_in_one_sentence(registered: Readout, changes: dict, says: str) -> None:
    given = {"name": "other", "label": "?", "about": "something else", "measure": lambda trial: 1.0, **changes}
    before = list(readouts())
    with pytest.raises(ExtensionError, match=re.escape(says)) as told:
        register(Readout(**given))
    assert "\n" not in str(told.value) and list(readouts()) == before


@pytest.mark.parametrize("found", [None, "0.5", True, math.inf, [0.5], 0.0])
def test_what_is_no_number_is_refused(found: object) -> None:
    readout = Readout(name="odd_one", label="?", about="something", is_positive=True, measure=lambda _: found)
    register(readout)
    try:
        with pytest.raises(ExtensionError, match="readout 'odd_one'"):
            measure_outside(RECORD)
    finally:
        unregister("odd_one")


def test_no_readout_from_outside_may_take_the_name_of_a_column() -> None:
    own = {readout.name for readout in catalogue.BUILT_IN}
    assert {name for name in TRIAL_COLUMNS if name not in readouts()} <= RESERVED
    assert not own & RESERVED
    assert {name for names in catalogue.SHOWN.values() for name in names} <= own
    for place in catalogue.SHOWN:
        assert {r.name for r in shown(place)} == {r.name for r in readouts().values() if place in r.places}


def test_only_the_catalogue_lists_readouts() -> None:
    own, package = {readout.name for readout in catalogue.BUILT_IN}, Path(kvpatch.__file__).parent
    lists = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Tuple | ast.List | ast.Set) and path != package / "specs" / "readouts.py":
                named = [item.value for item in node.elts if isinstance(item, ast.Constant) and item.value in own]
                lists += [f"{path.relative_to(package)}, line {node.lineno}: {named}"] if len(named) > 1 else []
    assert not lists, "these lists of readouts belong into specs/readouts.py: " + "; ".join(lists)


# Entry points, in a process of their own

LOOK = """
from kvpatch.store.columns import TRIAL_COLUMNS, trial_schema
from kvpatch.specs.readouts import readouts
from kvpatch.errors import KvpatchError
try:
    print(list(TRIAL_COLUMNS)[-2:], trial_schema().names[-1], "capitals" in readouts(), len(TRIAL_COLUMNS))
except KvpatchError as error:
    print("refused:", error)
"""


def look(folder: Path, module: str, value: str) -> str:
    """What a new process says of the columns, where a package with this entry point is installed."""
    (folder / "toy_readouts.py").write_text(module)
    about = folder / "toy_readouts-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-readouts\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[kvpatch.readouts]\ntoy = {value}\n")
    source = Path(kvpatch.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(source)])}
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CALL = "register(CAPITALS)\n"


def test_an_entry_point_adds_its_readouts(tmp_path: Path) -> None:
    module = code_of_the_page().replace(CALL, "") + "BOTH = [CAPITALS]\n"
    said = look(tmp_path, module, "toy_readouts:BOTH")
    assert said.startswith("['error', 'capitals'] capitals True")


@pytest.mark.parametrize(
    ("module", "value", "says"),
    [
        ("import no_such_module\n", "toy_readouts:X", "can't be loaded: ModuleNotFoundError: No module named"),
        ("X = 3\n", "toy_readouts:X", "must give a Readout or a list of them, not 3"),
        ("X = 3\n", "toy_readouts:Y", "can't be loaded: AttributeError"),
        (
            "from kvpatch.specs.readouts import Readout\n"
            "X = Readout(name='mode_llr', label='?', about='again', measure=len)\n",
            "toy_readouts:X",
            "the name 'mode_llr' is that of a readout already",
        ),
    ],
)
def test_a_broken_entry_point_is_refused_by_name(tmp_path: Path, module: str, value: str, says: str) -> None:
    said = look(tmp_path, module, value)
    assert said.startswith(f"refused: entry point 'toy' ({value}) of group 'kvpatch.readouts'")
    assert says in said and "\n" not in said
