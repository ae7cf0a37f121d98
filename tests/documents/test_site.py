"""The documentation builds as a site without a warning, with every public name, and the tutorial as a notebook."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import REPOSITORY, blocks_of

import kvpatch as kv


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as it is built, where a warning is an error. Not to be changed."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def test_every_public_name_is_on_the_page_of_python(site: Path) -> None:
    page = (site / "reference.html").read_text("utf-8")
    assert [name for name in kv.__all__ if f'id="kvpatch.{name}"' not in page] == []


def test_readme_examples_and_decisions_have_their_place(site: Path) -> None:
    for example in (REPOSITORY / "examples").glob("*/README.md"):
        assert (site / "gallery" / f"{example.parent.name}.html").exists()
    decisions = (site / "decisions" / "index.html").read_text("utf-8")
    for decision in (REPOSITORY / "docs" / "decisions").glob("[0-9]*.md"):
        assert decision.with_suffix(".html").name in decisions
    assert 'href="tutorial.html"' in (site / "index.html").read_text("utf-8")


LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b(?![^>]*canonical)[^>]*\bhref=[\"']?(?:https?:)?//"
)
"""What a browser would fetch from another host to show a page."""


def test_nothing_is_fetched_from_elsewhere_to_show_any_page(site: Path) -> None:
    pages = {page.relative_to(site): page.read_text("utf-8") for page in site.rglob("*.html")}
    assert len(pages) > 30
    assert [(str(name), LOADED.findall(page)) for name, page in pages.items() if LOADED.search(page)] == []
    # The theme's script fetches Mermaid from another host for every element of this class.
    assert [str(name) for name, page in pages.items() if re.search(r"class=[\"']?mermaid", page)] == []
    assert "architecture.svg" in pages[Path("architecture.html")]


def test_the_tutorial_is_a_notebook_of_the_same_blocks(site: Path) -> None:
    notebook = json.loads((site / "tutorial.ipynb").read_text("utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    page = [b.text for b in blocks_of(REPOSITORY / "docs" / "tutorial.md") if b.language == "python"]
    assert code == page and notebook["nbformat"] == 4
