"""What the site takes from outside docs/: the README and its like, the examples, the list of decisions, a notebook.

Pages are written so that their links work in a clone and on a code host. Here each link to a file of the repository is
turned into one to its page on the site. A link to a file that has no page stops the build.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tests/readouts/labelled/README.md": "labelled-texts.md",
    "examples/README.md": "gallery/index.md",
}
"""File of the repository -> its place on the site. What lies in docs/ keeps its place there."""
DECISIONS = "decisions/index.md"
NOTEBOOK = "tutorial.ipynb"
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)?(#[^)\s]*)?\)")
FENCED = re.compile(r"^```.*?^```[^\n]*$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def outside() -> dict[str, str]:
    """Every file from outside docs/ that has a place on the site: its path in the repository -> that place."""
    found = dict(PAGES)
    for folder in sorted(p.parent for p in ROOT.glob("examples/*/README.md")):
        found[f"examples/{folder.name}/README.md"] = f"gallery/{folder.name}.md"
        for figure in sorted(folder.glob("*.svg")):
            found[f"examples/{folder.name}/{figure.name}"] = f"gallery/{folder.name}-{figure.name}"
    return found


def on_files(files: Files, config: Any) -> Files:
    for path, place in outside().items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    decisions = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    titles = [p.read_text("utf-8").split("\n", 1)[0].removeprefix("# ") for p in decisions]
    rows = [f"- [{title}]({path.name})" for title, path in zip(titles, decisions, strict=True)]
    files.append(File.generated(config, DECISIONS, content="# Decisions\n\n" + "\n".join(rows) + "\n"))
    page = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
    files.append(File.generated(config, NOTEBOOK, content=json.dumps(as_notebook(page), indent=1)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    place = page.file.src_uri
    if place == DECISIONS:
        return markdown
    origin = {to: path for path, to in outside().items()}.get(place, f"docs/{place}")
    pieces, end = [], 0
    for code in FENCED.finditer(markdown):  # a link in code is no link
        pieces += [with_places(markdown[end : code.start()], origin, place), code[0]]
        end = code.end()
    return "".join([*pieces, with_places(markdown[end:], origin, place)])


def with_places(text: str, origin: str, place: str) -> str:
    """The text of a page with its links to files of the repository turned into links to places on the site.

    origin: the page's path in the repository; place: its path on the site.
    """

    def turned(link: re.Match[str]) -> str:
        start, path, anchor = link[1], link[2] or "", link[3] or ""
        if not path or re.match(r"[a-z]+:", path):
            return link[0]
        target = os.path.normpath(PurePosixPath(origin).parent / path).replace(os.sep, "/")
        to = place_of(target)
        if to is None:
            raise PluginError(f"{origin} links to {path}, which has no place on the site")
        return f"{start}{os.path.relpath(to, PurePosixPath(place).parent)}{anchor})"

    return LINK.sub(turned, text)


def place_of(path: str) -> str | None:
    """Where the site has a file, or folder, of the repository; None where it has none."""
    if path == "docs/decisions":
        return DECISIONS
    if path == f"docs/{NOTEBOOK}":
        return NOTEBOOK
    if path.startswith("docs/") and (ROOT / path).is_file():
        return path.removeprefix("docs/")
    known = outside()
    return known.get(path, known.get(f"{path}/README.md"))


def as_notebook(page: str) -> dict[str, Any]:
    """A page in Markdown as a Jupyter notebook: its blocks of Python are cells of code, all else is text."""
    cells: list[dict[str, Any]] = []
    for number, piece in enumerate(re.split(r"^```python\n(.*?)^```\n", page, flags=re.MULTILINE | re.DOTALL)):
        source = piece.strip("\n").splitlines(keepends=True)
        if not source:
            continue
        cell: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}, "source": source}
        if number % 2:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        else:
            cell |= {"cell_type": "markdown"}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
