"""A run on an object store is what it is on a disk: resumed, held by one process at a time, read by every command.

The server is moto's, on the loopback interface; the drivers that are killed and stopped are processes of their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import kvpatch as kv
from kvpatch.cli.main import main
from kvpatch.errors import StoreError
from kvpatch.planning import plan as planning
from kvpatch.store import buckets, lease
from kvpatch.store.directory import Store
from kvpatch.store.objects import ObjectPath, place_of
from kvpatch.store.parts import Part
from kvpatch.store.repair import repair
from kvpatch.store.session import Session
from kvpatch.verdicts.outcome import outcome_of
from kvpatch.view.runs import Runs
from small import write_protocol

pytestmark = pytest.mark.model

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def protocol(tmp_path_factory) -> Path:
    return write_protocol(tmp_path_factory.mktemp("protocol"))


@pytest.fixture
def run(tiny, protocol, monkeypatch):
    """`run(out)`: the protocol on a tiny model, two pairs, a batch each."""
    monkeypatch.setattr(planning, "ROWS_PER_BATCH", 1)
    return lambda out: kv.run(str(protocol), tiny("llama"), out, n=2)


@pytest.fixture(scope="module")
def on_disk(tiny, protocol, tmp_path_factory):
    """The same run on a disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "ROWS_PER_BATCH", 1)
        return kv.run(str(protocol), tiny("llama"), tmp_path_factory.mktemp("disk") / "run", n=2)


def driver(words: str, **environment: str) -> subprocess.Popen[str]:
    """Another process, which carries out some Python and tells how it ended."""
    path = os.pathsep.join([str(Path(kv.__file__).parent.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "PYTHONPATH": path, **environment}
    script = textwrap.dedent(words)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script], env=settings, text=True, **pipes)


HOLDER = """
    import sys
    from kvpatch.errors import StoreError
    from kvpatch.store import lease
    from kvpatch.store.directory import Store
    lease.EXPIRES = {expires}
    store = Store({out!r})
    try:
        with store.locked():
            print("held", flush=True)
            sys.stdin.readline()
            store.append("late", [])
            print("wrote")
    except StoreError as error:
        print(error)
"""


def holding(out: str, expires: float) -> subprocess.Popen[str]:
    """A process that holds a run, and wants to store a part once it is written to."""
    child = driver(HOLDER.format(out=out, expires=expires))
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def rows(store: Store) -> list[tuple]:
    return [(row["trial_id"], row["text"], row["mode_llr"]) for row in store.read().to_pylist()]


def test_a_run_on_s3_equals_a_run_on_a_disk_and_every_command_reads_it(s3, run, on_disk, tmp_path, capsys):
    out = s3()
    done = run(out)
    store = Store(out)
    assert rows(store) == rows(on_disk.store)
    verdicts = (store.directory / "verdicts.json").read_bytes()
    assert verdicts == (on_disk.store.directory / "verdicts.json").read_bytes()
    assert done.answer == on_disk.answer and str(done.directory) == out
    for name in ("parts.jsonl", "verdicts.json"):
        assert (store.directory / name).read_bytes() == (on_disk.store.directory / name).read_bytes()
    for command in (["status"], ["verdicts"], ["effects"], ["report", "-o", str(tmp_path / "page.html")], ["repair"]):
        _command([command[0], out, *command[1:]])
        assert "Traceback" not in capsys.readouterr().err
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert (store.directory / "verdicts.json").read_bytes() == verdicts


def _command(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kvpatch", *words])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code in (0, None)


def test_a_run_that_was_killed_between_a_part_and_its_line_is_resumed_with_every_trial_once(
    s3, run, on_disk, tiny_dirs, protocol
):
    out = s3()
    killed = driver(
        f"""
        import os, signal
        import kvpatch as kv
        from kvpatch.planning import plan
        from kvpatch.store.session import Session
        plan.ROWS_PER_BATCH = 1
        name_parts, named = Session.name_parts, []
        def dies(self, parts):
            named.extend(parts)
            if len(named) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            name_parts(self, parts)
        Session.name_parts = dies
        kv.run({str(protocol)!r}, {str(tiny_dirs("llama"))!r}, {out!r}, n=2)
        """
    )
    _, said = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, said
    store = Store(out)
    assert len(store.parts()) == 3
    assert len(list((store.directory / "trials").iterdir())) == 4
    run(out)  # the holder was of this machine and is no more, so that nothing is waited for
    found = rows(store)
    assert found == rows(on_disk.store) and len({row[0] for row in found}) == len(found)
    verdicts = (store.directory / "verdicts.json").read_bytes()
    assert verdicts == (on_disk.store.directory / "verdicts.json").read_bytes()


def test_a_second_driver_is_refused_with_the_holder_and_the_age_of_its_lease(s3, run):
    out = s3()
    holder = holding(out, 30.0)
    with pytest.raises(StoreError, match=rf"in use by process {holder.pid} on .*renewed its lease \d+ s ago"):
        run(out)
    told, _ = holder.communicate("\n", timeout=30)
    assert told == "wrote\n"
    assert [part.batch for part in Store(out).parts()] == ["late"]
    with Store(out).locked():  # let go of at once
        pass


def test_a_stale_lease_is_taken_over_and_its_holder_stops_without_writing_when_it_wakes_up(s3):
    out = s3()
    holder = holding(out, 2.0)
    os.kill(holder.pid, signal.SIGSTOP)
    store = Store(out)
    with pytest.raises(StoreError, match="renewed its lease"), store.locked():
        pass
    time.sleep(4)
    with store.locked():
        store.append("mine", [])
        os.kill(holder.pid, signal.SIGCONT)
        told, _ = holder.communicate("\n", timeout=30)
        assert [part.batch for part in store.parts()] == ["mine"]
        store.append("mine too", [])
    assert f"taken over by process {os.getpid()} on " in told and "writes nothing more" in told
    assert [part.batch for part in store.parts()] == ["mine", "mine too"]
    assert [place.name for place in (store.directory / "trials").iterdir()] == ["mine too.parquet", "mine.parquet"]


def test_a_former_holder_that_does_not_know_it_yet_can_name_no_part(s3, monkeypatch):
    """Its lease looks held to it, as after a pause between two instructions; the version of the index tells."""
    out = s3()
    former = Session(place_of(out))
    former.begin()
    former.lease._stop.set()
    monkeypatch.setattr(lease, "_is_gone", lambda holder: True)
    newer = Session(place_of(out))
    newer.begin()
    part = Part(part="x.parquet", rows=0, sha256="0" * 64)
    with pytest.raises(StoreError, match="taken over"):
        former.name_parts([part])
    newer.name_parts([part])
    assert [each.batch for each in Store(out).parts()] == ["x"]
    newer.lease.release()


def test_the_view_finds_runs_in_a_folder_of_a_bucket_and_sees_who_is_at_them(s3, on_disk):
    folder = place_of(s3())
    for name in ("first", "second"):
        for file in ("run.json", "parts.jsonl", *(f"trials/{part.part}" for part in on_disk.store.parts())):
            (folder / name).bucket.put(f"{folder.key}/{name}/{file}", (Path(on_disk.directory) / file).read_bytes())
    runs = Runs([folder])
    first, second = sorted(runs.refresh(), key=lambda run: run.key)
    assert (first.key, second.key, first.trouble) == ("first", "second", None)
    assert first.progress().done == on_disk.record.planned and first.progress().state == "finished"
    with Store(folder / "first").locked():
        assert (first.progress().state, second.progress().state) == ("running", "finished")
    assert not runs.refresh()


def test_nothing_private_stays_in_the_lease_once_it_is_let_go(s3):
    out = s3()
    with Store(out).locked():
        held = json.loads((place_of(out) / ".lock").read_bytes())
        assert held["process"] == os.getpid()
    assert json.loads((place_of(out) / ".lock").read_bytes()) == {"process": None}


def test_a_damaged_part_is_told_set_aside_and_fetched_anew_while_good_ones_come_from_the_cache(s3, run, monkeypatch):
    out = s3()
    run(out)
    store = Store(out)
    first, second = store.parts()[:2]
    fetched: list[str] = []
    read = type(store.trials).read_bytes
    monkeypatch.setattr(type(store.trials), "read_bytes", lambda self: fetched.append(self.name) or read(self))
    store.read()
    outcome_of(store)
    assert [name for name in fetched if name.endswith(".parquet")] == []
    place = store.trials / first.part
    place.bucket.put(place.key, b"rubbish")
    place.forget()
    with pytest.raises(StoreError, match=rf"{first.part} can't be read as it was stored"):
        store.read()
    told = repair(store)
    assert told.parts_again == [first.part] and (store.directory / "set-aside" / f"trials-{first.part}.1").is_file()
    run(out)
    assert {part.part for part in store.parts()} >= {first.part, second.part}
    store.done()


def test_a_store_without_conditional_writes_is_read_and_not_written(on_disk):
    """As the Hugging Face hub is: what fsspec has is read. Here it is fsspec's own view of the disk."""
    folder = Path(on_disk.directory)
    store = Store(ObjectPath("file", str(folder.parent), folder.name))
    assert rows(store) == rows(on_disk.store)
    assert outcome_of(store).verdicts == on_disk.outcome.verdicts
    with pytest.raises(StoreError, match="has no conditional writes"), store.locked():
        pass


def test_a_bucket_that_is_not_there_is_told_in_one_line(s3, run, monkeypatch):
    with pytest.raises(StoreError, match=r"s3://nowhere/run can't be written: .*NoSuchBucket"):
        run("s3://nowhere/run")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(buckets, "RETRIES", 1)
    with pytest.raises(StoreError, match=r"s3://unreachable/run can't be written: Generic S3 error \(HTTP error"):
        run("s3://unreachable/run")
    with pytest.raises(StoreError, match="names a bucket and no run directory in it"):
        Store("s3://runs")


def test_a_missing_package_is_told_with_the_extra_to_install():
    out = driver(
        """
        import sys
        sys.modules["obstore"] = None
        from kvpatch.errors import KvpatchError
        from kvpatch.store.directory import Store
        try:
            Store("s3://runs/run").read_record()
        except KvpatchError as error:
            print(error)
        """
    )
    told, failed = out.communicate(timeout=60)
    assert "pip install 'kvpatch[remote]'" in told, failed


@pytest.mark.parametrize("given", ["s3://runs/a/b", Path("s3://runs/a/b")], ids=["str", "Path"])
def test_an_address_stays_one_after_it_was_taken_for_a_path(given):
    assert str(place_of(given)) == "s3://runs/a/b"
    assert isinstance(place_of("runs/s3"), Path)
