"""Blocks of code in pages of Markdown: fenced ones, and ones that are indented by four spaces."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
NO_PAGES = ("docs/decisions", "docs/site")
"""Folders whose pages show no code that a reader would run."""


class Block(NamedTuple):
    """page: from the repository's root; line: of its first line, from 1; language: "" for an indented block."""

    page: str
    line: int
    language: str
    text: str

    @property
    def start(self) -> tuple[str, str]:
        """Page and first line, by which lists name a block."""
        return self.page, self.text.split("\n", 1)[0].strip()


def pages() -> list[Path]:
    """README and its like, everything in docs/, and every example's README."""
    found = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    found += sorted((REPOSITORY / "docs").rglob("*.md")) + sorted((REPOSITORY / "examples").rglob("*.md"))
    return [page for page in found if not page.relative_to(REPOSITORY).as_posix().startswith(NO_PAGES)]


def blocks_of(page: Path) -> list[Block]:
    """Every block of a page, in order. An indented block begins after an empty line, as in Markdown."""
    name = page.relative_to(REPOSITORY).as_posix()
    lines = page.read_text("utf-8").split("\n")
    found: list[Block] = []
    at, is_after_empty, is_in_list = 0, True, False
    while at < len(lines):
        line, end = lines[at], at + 1
        if line.startswith("```"):
            while not lines[end].startswith("```"):
                end += 1
            found.append(Block(name, at + 2, line[3:].strip(), "\n".join(lines[at + 1 : end])))
            end += 1
        elif line.startswith("    ") and is_after_empty and not is_in_list:
            while end < len(lines) and (lines[end].startswith("    ") or _goes_on(lines, end)):
                end += 1
            found.append(Block(name, at + 1, "", "\n".join(part[4:] for part in lines[at:end])))
        elif line.strip():
            is_in_list = line.startswith(("- ", "* ", "  ")) or (is_in_list and not is_after_empty)
        is_after_empty = not lines[end - 1].strip()
        at = end
    return found


def _goes_on(lines: list[str], at: int) -> bool:
    """Whether an empty line stands within an indented block."""
    return not lines[at].strip() and at + 1 < len(lines) and lines[at + 1].startswith("    ")


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks_of(page)]


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a block, each as its words. A comment ends a line; `;` parts commands; an open quote goes on."""
    commands: list[list[str]] = []
    pending = ""
    for line in block.text.split("\n"):
        pending = f"{pending} {line.strip()}".strip() if pending else line
        try:
            words = shlex.shlex(pending, posix=True, punctuation_chars=";")
            words.whitespace_split, words.commenters = True, "#"
            told = list(words)
        except ValueError:  # a quote is still open
            continue
        pending, command = "", []
        for word in [*told, ";"]:
            if word == ";":
                commands += [command] if command else []
                command = []
            else:
                command.append(word)
    return commands
