"""Every block of docs/notebook.md runs, on the model that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvpatch as kv

pytestmark = pytest.mark.model
PAGE = Path(__file__).parents[1] / "docs" / "notebook.md"


def test_the_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    grid = names["grid"]
    assert isinstance(grid, kv.Sweep) and grid.data.dims == ("layers", "slots", "parts")
    assert grid.data.sizes["layers"] == 30 and grid.source_value > grid.target_value
    assert "Colosseum" in "".join(grid.data.coords["source_token"].values.tolist())
