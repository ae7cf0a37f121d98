"""Whoever looks for a variable that kvpatch reads from the environment finds it in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import kvpatch

PACKAGE = Path(kvpatch.__file__).parent
PAGE = PACKAGE.parents[1] / "docs" / "installing.md"


def test_every_variable_that_the_code_names_is_explained_and_no_other():
    named = {
        name for path in PACKAGE.rglob("*.py") for name in re.findall(r"\bKVPATCH_[A-Z_]+\b", path.read_text("utf-8"))
    }
    explained = set(re.findall(r"^\| `(KVPATCH_[A-Z_]+)` \|", PAGE.read_text("utf-8"), re.MULTILINE))
    assert explained == named
