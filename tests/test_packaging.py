"""What somebody who installs the package relies on: its version, its names, its extras, its types."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import kvpatch

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))


def packages(requirements: list[str]) -> set[str]:
    """The names of the packages that a list of requirements asks for."""
    cuts = [min((i for i in map(line.find, "=<>[; ") if i > 0), default=len(line)) for line in requirements]
    return {line[:cut].lower() for line, cut in zip(requirements, cuts, strict=True)}


@pytest.mark.parametrize("command", [["kvpatch", "--version"], ["-m", "kvpatch", "--version"]])
def test_the_version_is_printed(command: list[str]):
    if command[0] == "kvpatch":
        command = ["-c", "from kvpatch.cli.main import main; main()", *command[1:]]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"kvpatch {kvpatch.__version__}\n")


def test_the_version_stands_in_one_place():
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    written = REPOSITORY / PROJECT["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{kvpatch.__version__}"' in written.read_text("utf-8")


def test_the_package_says_that_it_is_typed():
    assert (Path(kvpatch.__file__).parent / "py.typed").exists()


def test_dir_lists_every_public_name_and_each_can_be_had():
    assert set(kvpatch.__all__) <= set(dir(kvpatch))
    assert set(kvpatch._LAZY) <= set(kvpatch.__all__)
    assert [name for name in dir(kvpatch) if name.startswith("_") and not name.startswith("__")] == []
    for name in kvpatch.__all__:
        assert getattr(kvpatch, name) is not None


def test_the_base_install_asks_for_no_package_of_an_extra():
    project = PROJECT["project"]
    extras = {name: packages(lines) for name, lines in project["optional-dependencies"].items()}
    assert not packages(project["dependencies"]) & set(kvpatch.errors.EXTRA_OF)
    assert extras["report"] == set()
    for package, extra in kvpatch.errors.EXTRA_OF.items():
        assert package in extras[extra], f"{package} is not in the extra {extra}"


def test_every_package_that_the_code_imports_is_asked_for():
    """Packages are asked for by the base install or by an extra, and those of an extra are known as such."""
    project = PROJECT["project"]
    asked = packages([*project["dependencies"], *project["optional-dependencies"]["run"]])
    for extra in ("view", "bank", "semantic", "polars", "ray"):
        asked |= packages(project["optional-dependencies"][extra])
    asked = {name.replace("_", "-") for name in asked}
    distributions = metadata.packages_distributions()
    imported = set()
    for path in Path(kvpatch.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            imported |= {name.split(".")[0] for name in names}
    foreign = imported - set(sys.stdlib_module_names) - {"kvpatch", "triton"}  # Triton comes with torch's CUDA builds
    unasked = {name for name in foreign if not {d.lower().replace("_", "-") for d in distributions[name]} & asked}
    assert not unasked


def test_citation_and_project_agree():
    import yaml

    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"][0]["name"] == PROJECT["project"]["authors"][0]["name"]
