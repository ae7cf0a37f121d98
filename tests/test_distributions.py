"""What is published: sdist and wheel build, pass twine's check, hold all data, and work by themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "kvpatch"


def python(*words: object, cwd: Path = REPOSITORY, **more: str) -> str:
    """Run this Python with these words; what it printed. It must end with 0."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **more},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist and the wheel that is built from it. hatchling is installed, so that no network is asked."""
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", folder, REPOSITORY)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def test_both_pass_the_check_of_the_index(built: dict[str, Path]) -> None:
    assert python("-m", "twine", "check", "--strict", *built.values()).count("PASSED") == 2


def test_the_wheel_holds_every_file_of_the_package(built: dict[str, Path]) -> None:
    expected = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    assert expected <= names
    assert {name.split("/")[0] for name in names - expected} == {
        built["wheel"].name.removesuffix("-py3-none-any.whl") + ".dist-info"
    }
    for kind in (".yaml", ".j2", ".css", ".js", ".json", ".safetensors", "py.typed"):
        assert any(name.endswith(kind) for name in names), kind


def test_the_sdist_holds_what_builds_and_tests_it(built: dict[str, Path]) -> None:
    names = {name.split("/", 1)[-1] for name in tarfile.open(built["sdist"]).getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "mkdocs.yml", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".whl")) or name.startswith((".venv/", "site/"))]


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing in it but what the wheel installs."""
    folder = tmp_path_factory.mktemp("installed")
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, built["wheel"])
    return folder


@pytest.mark.model
def test_the_installed_wheel_runs_the_first_example_of_the_readme(installed: Path, tmp_path: Path) -> None:
    """The block of Python up to its sweep, on the model that it names."""
    block = re.search(r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text("utf-8"), re.M | re.S)
    assert block is not None
    example = block[1].split("\ngrid = ")[0]
    assert "model.generate" in example and "model.score" in example
    (tmp_path / "example.py").write_text(example + "\nprint(kv.__file__)\n", "utf-8")
    printed = python("example.py", cwd=tmp_path, PYTHONPATH=str(installed))
    assert printed.splitlines()[-1] == str(installed / "kvpatch" / "__init__.py")


def test_the_installed_wheel_answers_on_the_command_line(installed: Path, tmp_path: Path) -> None:
    told = python("-m", "kvpatch", "power", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "Usage" in told
    code = "from kvpatch.protocols.load import load_protocol as f; print(f('dec7').protocol, f('demo').protocol)"
    assert python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split() == ["dec7", "demo"]
