"""`kvpatch repair` sets aside what is damaged, loses nothing that is whole, and says what will be computed again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kvpatch.errors import StoreError
from kvpatch.store.directory import SET_ASIDE, Store
from kvpatch.store.repair import repair
from synthetic import write_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("repair") / "run", n=3, calibration=3, phases=["6"], heads=(2, 2)
    ).directory


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Store:
    return Store(shutil.copytree(whole, tmp_path / "run"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "rewritten": lambda path: pq.write_table(pq.read_table(path), path, compression="gzip"),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("/nowhere/at/all")),
}


@pytest.mark.parametrize("folder", ["trials", "attention"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_part_goes_as_a_whole_and_the_others_stay(store, damage, folder):
    before = store.parts()
    gone = next(part for part in reversed(before) if part.attention_sha256)
    DAMAGES[damage](store.directory / folder / gone.part)
    found = repair(store)
    assert (found.parts_again, found.again) == ([gone.part], {gone.phase: gone.rows})
    assert store.parts() == [part for part in before if part != gone]
    assert not (store.trials / gone.part).exists() and not (store.attention / gone.part).exists()
    assert store.done() == {part.batch for part in before if part != gone}
    told = "\n".join(found.lines)
    assert gone.part in told and f"{gone.rows} of phase {gone.phase}" in told and " ".join(found.command) in told
    assert repair(store).lines == ["nothing is damaged: every stored part is what was stored"]


def test_bytes_that_were_set_aside_are_kept_also_from_repair_to_repair(store):
    part = store.parts()[0].part
    contents = []
    for content in (b"first", b"second"):
        index = store.index.read_bytes()
        (store.trials / part).write_bytes(content)
        repair(store)
        store.index.write_bytes(index)
        contents.append(content)
    kept = {path.read_bytes() for path in (store.directory / SET_ASIDE).glob(f"trials-{part}.*")}
    assert kept == set(contents)


def test_swapped_parts_and_copies_all_go(store):
    first, second, *_, last = store.parts()
    a, b = store.trials / first.part, store.trials / second.part
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    copied = last.model_copy(update={"part": "copy.parquet", "attention_sha256": None, "attention_rows": None})
    shutil.copy(store.trials / last.part, store.trials / "copy.parquet")
    store.index.write_bytes(store.index.read_bytes() + copied.line())
    assert repair(store).parts_again == sorted([first.part, second.part, last.part, "copy.parquet"])
    store.done()


def test_lines_that_name_nothing_go_and_what_they_stood_between_stays(store):
    before = store.parts()
    lines = store.index.read_text().splitlines()
    wrong = json.dumps({**json.loads(lines[0]), "rows": 99})
    store.index.write_text(
        "\n".join(["[1, 2]", *lines, lines[1], wrong, '{"name": "x"}', "\x00", lines[0][:20]]) + "\n"
    )
    found = repair(store)
    assert (found.bad_lines, found.parts_again) == (4, [])
    assert store.parts() == before and store.done()


def test_record_that_cannot_be_read_is_set_aside_with_the_trials_left(store):
    before = store.parts()
    for content in ("", "{}", "[]", '{"kvpatch_version": ', "\x00" * 9):
        (store.directory / "run.json").write_text(content)
        found = repair(store)
        assert found.lacks_record and "run.json" in found.set_aside
        assert not store.has_record()
        assert store.parts() == before
        with store.locked():
            pass


def test_record_whose_protocol_was_changed_is_set_aside(store):
    content = json.loads((store.directory / "run.json").read_text())
    content["protocol"]["title"] = "another"
    (store.directory / "run.json").write_text(json.dumps(content))
    assert "run.json" in repair(store).set_aside


def test_verdicts_that_are_no_json_are_set_aside(store):
    store.write_text("verdicts.json", "[{")
    assert "verdicts.json" in repair(store).set_aside


def test_directory_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="is not a run directory"):
            repair(Store(directory))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# Links


def test_nothing_is_written_through_a_link_in_the_directory(store, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".run.json.tmp", "verdicts.json", ".verdicts.json.tmp", ".parts.jsonl.tmp"):
        (store.directory / name).unlink(missing_ok=True)
        (store.directory / name).symlink_to(victim)
    store.write_record(store.read_record())
    store.write_text("verdicts.json", "[]\n")
    rows = store.read_part(store.parts()[0].batch)
    (store.trials / ".more.parquet.tmp").symlink_to(victim)
    store.append("more", [row | {"trial_id": f"{row['trial_id']}x"} for row in rows])
    assert victim.read_text() == "mine"
    assert not (store.directory / "verdicts.json").is_symlink()


@pytest.mark.parametrize("name", ["trials", "attention", "set-aside", ".lock"])
def test_folder_of_the_run_that_is_a_link_is_refused(store, tmp_path, name):
    place = store.directory / name
    elsewhere = tmp_path / "elsewhere"
    if place.exists():
        place.rename(elsewhere)
    place.symlink_to(elsewhere)
    with pytest.raises(StoreError, match=f"{name} is a symbolic link"), store.locked():
        pass
    if name == "trials":
        with pytest.raises(StoreError, match="is a symbolic link"):
            store.append("more", [])
