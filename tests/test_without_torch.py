"""A finished run is read, decided and reported where torch is not installed; what needs an extra names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvpatch
from finished import small_run
from kvpatch.errors import EXTRA_OF, missing_extra

RUNNER = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {hidden!r}

class Hidden:
    '''Behaves as if the hidden packages were not installed, or raises for them.'''

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            if {raises!r}:
                raise ImportError(f"the test does without {{name}}")
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return PathFinder.find_spec(name, path, target)

sys.meta_path.insert(0, Hidden)
{code}
"""
READERS = ("status", "verdicts", "effects")
COMMAND = "from kvpatch.cli.main import main; sys.argv = ['kvpatch', *sys.argv[1:]]; main()"

COMMANDS = """
import contextlib, io, json
from kvpatch.cli.main import main

def call(arguments):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["kvpatch", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stopped:
            return {"code": stopped.code or 0, "out": out.getvalue(), "err": err.getvalue()}

print(json.dumps([call(arguments) for arguments in json.loads(sys.argv[1])]))
"""
"""Several commands, one after the other in a process: what each left, as JSON."""


def run_without(
    *arguments: object, hidden: object = tuple(EXTRA_OF), code: str = COMMAND, raises: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command, or other code, in a process where some packages can't be imported."""
    program = RUNNER.format(hidden=hidden, raises=raises, code=code)
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("finished") / "run").directory


def test_version_without_any_extra():
    done = run_without("--version", raises=True)
    assert (done.returncode, done.stdout) == (0, f"kvpatch {kvpatch.__version__}\n"), done.stderr


@pytest.fixture(scope="module")
def read(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each command that reads the run left: its exit code and what it printed. The report is in `page`."""
    page = tmp_path_factory.mktemp("page") / "report.html"
    commands = [[name, str(run_dir), "--json"] for name in READERS]
    done = run_without(json.dumps([*commands, ["report", str(run_dir), "--out", str(page)]]), code=COMMANDS)
    assert done.returncode == 0, done.stderr
    found = dict(zip([*READERS, "report"], json.loads(done.stdout), strict=True))
    return found | {"page": {"text": page.read_text("utf-8") if page.exists() else ""}}


@pytest.mark.parametrize("command", READERS)
def test_a_finished_run_is_read_without_any_extra(read: dict[str, dict[str, Any]], command: str):
    assert read[command]["code"] == 0, read[command]["err"]
    assert json.loads(read[command]["out"])


def test_a_finished_run_is_reported_without_any_extra(read: dict[str, dict[str, Any]]):
    assert read["report"]["code"] == 0, read["report"]["err"]
    assert "</html>" in read["page"]["text"]


def test_a_notebook_reads_a_run_without_any_extra(run_dir: Path):
    code = (
        "import kvpatch as kv; run = kv.Run(sys.argv[1]); run.verdicts(), run.effects(), run.plot.forest(); "
        "print(len(run.trials()), len(run.trials('pandas')), [name for name in HIDDEN if name in sys.modules])"
    )
    done = run_without(run_dir, code=code)
    assert done.returncode == 0, done.stderr
    first, pandas, imported = done.stdout.split(maxsplit=2)
    assert first == pandas != "0"
    assert imported.strip() == "[]"


def test_a_polars_frame_is_refused_by_the_name_of_its_extra(run_dir: Path):
    for call in ("trials", "verdicts"):
        done = run_without(run_dir, code=f"import kvpatch as kv; kv.Run(sys.argv[1]).{call}('polars')")
        assert "MissingExtra: this needs polars, which is not installed: pip install 'kvpatch[polars]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "package", "extra", "raises"),
    [
        (("check", "smollm2-135m"), "torch", "run", False),
        (("run", "dec7", "--model", "smollm2-135m", "--out", "somewhere"), "torch", "run", True),
        (("view", "."), "uvicorn", "view", False),
    ],
)
def test_a_command_that_needs_an_extra_says_which(tmp_path: Path, arguments, package, extra, raises):
    hidden = [name for name, of in EXTRA_OF.items() if of == extra]
    done = run_without(*arguments, hidden=hidden, raises=raises, KVPATCH_CACHE=str(tmp_path))
    *warnings, line = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert all(warning.startswith("warning: ") for warning in warnings)
    assert line == f"kvpatch: this needs {package}, which is not installed: pip install 'kvpatch[{extra}]'"
    assert not Path("somewhere").exists()


def test_names_that_need_torch_say_so_in_python():
    code = "import kvpatch as kv\ntry:\n    kv.load\nexcept kv.MissingExtra as error:\n    print(error)"
    done = run_without(code=code)
    assert done.stdout == "this needs torch, which is not installed: pip install 'kvpatch[run]'\n", done.stderr


def test_a_package_that_is_installed_and_broken_is_not_called_missing():
    assert missing_extra(ModuleNotFoundError("No module named 'torch._broken'", name="torch._broken")) is None
    assert missing_extra(ImportError("libsomething.so: cannot open shared object file", name="torch._C")) is None
    assert missing_extra(ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")) is None


def test_named_models_are_listed_without_any_extra(tmp_path: Path):
    done = run_without("models", "--json", KVPATCH_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {model["name"]: model["pulled"] for model in json.loads(done.stdout)}["smollm2-135m"] is False


def test_pull_needs_no_extra():
    done = run_without("pull", "no-such-model")
    assert done.returncode == 2
    assert done.stderr.startswith("kvpatch: no named model 'no-such-model'; there are "), done.stderr
