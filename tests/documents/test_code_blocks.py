"""Every block of code in README, docs and examples runs as it is written, or stands in a list with the reason why not.

Commands run with fewer pairs and on a tiny model where the page names SmolLM2, so that they are quick. Blocks of Python
run on SmolLM2, one page after the other, unless `ON_TINY` names the page.
"""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
import yaml
from blocks import REPOSITORY, Block, all_blocks, commands_of

import kvpatch as kv
from kvpatch.cli import main as cli
from kvpatch.protocols.plan_rows import PlanRow
from kvpatch.protocols.schema import Phase, Readouts
from kvpatch.readouts.scorer import read_scorer
from kvpatch.specs import readouts
from kvpatch.verdicts.power_of_rule import read_assumptions
from synthetic import write_run

pytestmark = pytest.mark.model

BLOCKS = all_blocks()
ON_TINY = {"docs/how-to/own-model.md", "docs/how-to/own-readout.md"}
"""Pages whose Python saves models or runs protocols: on the tiny model."""
RUN_ELSEWHERE = {
    (
        "docs/extending.md",
        "from kvpatch.specs.readouts import Readout, TrialRecord, register",
    ): "test_extending_readouts.py",
    ("docs/extending.md", "# scaled_values.py"): "test_extending_interventions.py",
    ("docs/extending.md", "conditions:"): "test_extending_interventions.py",
    ("docs/extending.md", "# kvpatch_sign.py"): "test_extending_test_kinds.py",
}
"""Blocks that a test of tests/layout takes from the page and runs up to a verdict."""
NOT_RUN = {
    (
        "docs/how-to/object-stores.md",
        "pip install",
    ): "needs a bucket; tests/store runs these commands against a server of its own",
    ("README.md", "make"): "makes an environment from the package index; `make test` is what runs this test",
    ("CONTRIBUTING.md", "make"): "the same",
    ("docs/installing.md", "docker"): "builds and runs a container, for which a test has no daemon",
    ("docs/findings/gemma3.md", "kvpatch run"): "five minutes on a GPU; README.md's block runs the same command small",
    ("docs/findings/smollm2.md", "kvpatch run"): "five minutes on a GPU; README.md's block runs the same command small",
    ("docs/notebook.md", 'run = kv.run("dec7"'): "minutes; docs/how-to/own-readout.md calls kv.run on a tiny model",
    ("README.md", "kvpatch plan dec7"): "dec7's bands need more layers than a tiny model has; own-mode.md plans",
    ("README.md", "kvpatch view"): "serves until it is stopped; tests/view asks it for every page",
    ("README.md", "kvpatch validate"): "takes minutes; tests/organisms/test_validation.py runs it",
}
"""(page, beginning of a block or of a command) -> why no test runs it."""


def reason(page: str, text: str) -> str | None:
    return next((why for (where, start), why in NOT_RUN.items() if page == where and text.startswith(start)), None)


def is_run_elsewhere(block: Block) -> bool:
    return block.start in RUN_ELSEWHERE


def is_read_by_its_page(block: Block) -> bool:
    """A whole protocol, which the page's Python runs."""
    return block.language == "yaml" and block.page in ON_TINY


def is_python(block: Block) -> bool:
    return block.language == "python" and not is_run_elsewhere(block)


def is_commands(block: Block) -> bool:
    return block.language in ("", "bash") and re.match(r"(kvpatch|duckdb|pip|make|docker) ", block.text) is not None


def is_yaml(block: Block) -> bool:
    if is_run_elsewhere(block) or is_read_by_its_page(block):
        return False
    return block.language == "yaml" or (block.language == "" and re.match(r"[a-z]+:( |\n|$)", block.text) is not None)


KINDS: dict[str, Callable[[Block], bool]] = {
    "Python": is_python,
    "commands": is_commands,
    "YAML": is_yaml,
    "TOML": lambda block: block.language == "toml",
    "elsewhere": is_run_elsewhere,
    "by its page": is_read_by_its_page,
    "files": lambda block: block.text.startswith("mine/"),
    "schema": lambda block: block.text.startswith("# yaml-language-server"),
    "in another library, by tests/test_coming_from_page.py": lambda block: block.language.startswith("python title="),
}


def blocks(kind: str) -> list[Block]:
    return [block for block in BLOCKS if KINDS[kind](block) and reason(block.page, block.text) is None]


def names(found: list[Block]) -> list[str]:
    return [f"{block.page}:{block.line}" for block in found]


LOAD = kv.load  # as it is before a test puts another in its place


@pytest.fixture(scope="module")
def smollm2() -> kv.Model:
    return LOAD("smollm2-135m")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of dec7's first phase, and of those that watch attention. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "results"
    return write_run(folder, n=4, phases=["1", "4", "6"]).directory


# No block is forgotten


def test_every_block_is_of_one_kind_that_is_checked_or_has_a_reason() -> None:
    for block in BLOCKS:
        kinds = [kind for kind, fits in KINDS.items() if fits(block)]
        told = f"{block.page}, line {block.line}: {block.text[:60]!r}"
        assert len(kinds) == 1 or reason(block.page, block.text), f"{told} is checked as {kinds}"


def test_every_reason_belongs_to_a_block() -> None:
    for page, start in NOT_RUN:
        of_page = [block for block in BLOCKS if block.page == page]
        said = [b.text for b in of_page] + [" ".join(c) for b in of_page if is_commands(b) for c in commands_of(b)]
        is_there = any(text.startswith(start) for text in said)
        assert is_there, f"{page} has no block that begins with {start!r}"


@pytest.mark.parametrize("block", blocks("elsewhere"), ids=names(blocks("elsewhere")))
def test_blocks_that_another_test_runs_are_named_there(block: Block) -> None:
    text = (REPOSITORY / "tests" / "layout" / RUN_ELSEWHERE[block.start]).read_text("utf-8")
    assert ("extending.md" in text and "exec" in text) or "write_text" in text


# Python


PYTHON = sorted({block.page for block in blocks("Python")})


@pytest.mark.parametrize("page", PYTHON)
def test_python_of_a_page_runs_block_by_block(
    page: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load = kv.load

    def loaded(*names: Any, **more: Any) -> kv.Model:
        """The model of this page, loaded once for all pages; what the page saved itself is loaded as ever."""
        if names != ("smollm2-135m",):
            return load(*names, **more)
        return request.getfixturevalue("tiny")("llama") if page in ON_TINY else request.getfixturevalue("smollm2")

    monkeypatch.setattr(kv, "load", loaded)
    if page in ("README.md", "docs/how-to/duckdb.md"):
        shutil.copytree(request.getfixturevalue("results"), tmp_path / "results")
        command(["kvpatch", "verdicts", "results"], monkeypatch)
    for block in BLOCKS:
        if block.page == page and is_read_by_its_page(block):
            (tmp_path / "mine.yaml").write_text(block.text, "utf-8")
    known = set(readouts.readouts())
    scope: dict[str, Any] = {}
    try:
        for block in (block for block in blocks("Python") if block.page == page):
            lines = "\n" * (block.line - 1)  # so that a traceback names the page's line
            exec(compile(lines + block.text, str(REPOSITORY / page), "exec"), scope)
    finally:
        for name in set(readouts.readouts()) - known:
            readouts.unregister(name)
    if page in SHOWN:
        SHOWN[page](scope)


def _notebook_ends_in_a_grid(scope: dict[str, Any]) -> None:
    grid = scope["grid"]
    assert isinstance(grid, kv.Sweep) and grid.data.dims == ("layers", "slots", "parts")
    assert grid.data.sizes["layers"] == 30 and grid.source_value > grid.target_value
    assert "Colosseum" in "".join(grid.data.coords["source_token"].values.tolist())


def _tutorial_ends_in_its_figure(scope: dict[str, Any]) -> None:
    shown = scope["figure"]._repr_mimebundle_()["image/svg+xml"]
    assert shown.startswith("<svg") and (REPOSITORY / "docs" / "tutorial.svg").read_text("utf-8").startswith("<svg")
    leaning = {name: scope["lean"](scope[name]) for name in ("source", "target", "partly", "control")}
    assert leaning["source"] > leaning["partly"] > leaning["control"], leaning
    assert leaning["source"] > leaning["target"]


SHOWN = {"docs/notebook.md": _notebook_ends_in_a_grid, "docs/tutorial.md": _tutorial_ends_in_its_figure}
"""Page -> what must hold of what its blocks left."""


# Commands


def command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of kvpatch in this process; it must end with 0."""
    monkeypatch.setenv("KVPATCH_DEBUG", "")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code, " ".join(words)


def small(words: list[str], model: Path) -> list[str]:
    """A command as it is written, with a tiny model for SmolLM2, two pairs for any number, and no timing."""
    words = list(words)
    if words[1] != "pull":
        words = [str(model) if word in ("smollm2-135m", "my-model") else word for word in words]
        words = [word.replace("=my-model", f"={model}") for word in words]
        words = [word.replace("-smollm2-135m", f"-{model.name}") for word in words]
    if "--n" in words:
        words[words.index("--n") + 1] = "2"
    if words[1] in ("run", "plan") and "--n" not in words:
        words += ["--n", "2"]
    added = {"plan": ["--no-timing"], "power": ["--draws", "2"]}.get(words[1], [])
    return words if set(added) <= set(words) else words + added


@pytest.mark.parametrize("block", blocks("commands"), ids=names(blocks("commands")))
def test_commands_of_a_block_run_one_after_the_other(
    block: Block, tiny_dirs, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    if block.text.startswith("duckdb"):
        (tmp_path / "results").symlink_to(results)
    if " mine/protocol.yaml" in block.text and "kvpatch new mine" not in block.text:
        command(["kvpatch", "new", "mine"], monkeypatch)  # as an earlier block of its page does
    for words in commands_of(block):
        if reason(block.page, " ".join(words)) is not None:
            continue
        if words[0] == "duckdb":
            assert words[1] == "-c" and duckdb.sql(words[2]).fetchall()
        elif words[0] == "pip":
            project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
            extra = re.search(r"\[(.*)\]", words[-1])
            assert extra is None or set(extra[1].split(",")) <= set(project["optional-dependencies"])
        else:
            assert words[0] == "kvpatch", words
            command(small(words, tiny_dirs("llama")), monkeypatch)


# YAML, TOML and what else stands in a block


@pytest.mark.parametrize("block", blocks("YAML"), ids=names(blocks("YAML")))
def test_yaml_is_a_part_of_a_protocol(block: Block, tmp_path: Path) -> None:
    content = yaml.safe_load(block.text)
    file = tmp_path / "mine.yaml"
    if "dz" in content:
        file.write_text(block.text, "utf-8")
        assert read_assumptions(file)
    elif set(content) == {"plan"}:
        assert [PlanRow.model_validate(row) for row in content["plan"]]
    elif "entries" in content:
        file.write_text(block.text, "utf-8")
        assert read_scorer("mine.yaml", tmp_path).kind == "lexicon"
    elif block.page == "docs/other-modes.md":
        shipped = yaml.safe_load((REPOSITORY / "examples" / "french" / "protocol.yaml").read_text("utf-8"))
        assert set(content["families"]) <= set(shipped["families"])
    else:
        for key, part in content.items():
            if key == "phases":
                assert [Phase.model_validate(phase) for phase in part.values()]
            else:
                assert key == "readouts" and Readouts.model_validate(part)


@pytest.mark.parametrize("block", blocks("TOML"), ids=names(blocks("TOML")))
def test_toml_names_what_the_page_defines(block: Block) -> None:
    python = "\n".join(b.text for b in BLOCKS if b.page == block.page and b.language == "python")
    for group, points in tomllib.loads(block.text)["project"]["entry-points"].items():
        assert group.startswith("kvpatch.")
        for target in points.values():
            assert re.search(rf"^(def )?{target.partition(':')[2]}\b", python, re.MULTILINE), target


@pytest.mark.parametrize("block", blocks("files"), ids=names(blocks("files")))
def test_a_list_of_files_is_that_of_the_example(block: Block) -> None:
    for line in block.text.split("\n")[1:]:
        assert list((REPOSITORY / "examples" / "french").glob(line.split()[0])), line


def test_the_schema_that_editors_are_pointed_at_is_there() -> None:
    for block in blocks("schema"):
        assert (REPOSITORY / block.page).parent.joinpath(block.text.partition("$schema=")[2].strip()).exists()
