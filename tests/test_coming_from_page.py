"""Every block of docs/coming-from.md runs, on the model that it names, and does what its heading says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import kvpatch as kv

pytestmark = pytest.mark.model
PAGE = Path(__file__).parents[1] / "docs" / "coming-from.md"


def test_the_six_tasks_run_and_agree_with_one_another() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 7
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    model, grid = names["model"], names["grid"]
    assert len(names["texts"]) == 1 and len(names["rows"]) == 2
    assert grid.data.dims == ("layers", "slots") and grid.data.sizes["layers"] == 30
    logits = model.logits(kv.Patch(layers=12, slots=1).apply(names["source"], names["target"]))[0]
    first, other = (model.tokenizer(word, add_special_tokens=False).input_ids[0] for word in (" Rome", " Madrid"))
    assert names["one"] == pytest.approx(float(logits[first] - logits[other]), abs=1e-4)
    assert names["to_slot_2"].shape == (9,) and 0 < float(names["to_slot_2"].sum()) < 9
    assert not torch.allclose(names["logits"], model.logits(names["target"]), atol=1e-3)
    single = kv.Patch(layers=range(10, 20)).apply(names["source"], names["target"])
    assert model.generate(single, max_new_tokens=4, temperature=0).texts == names["rows"][:1]
