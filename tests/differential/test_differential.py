"""Random models, prompts and patches: kvpatch gives what a slow reference of transformers alone gives.

`KVPATCH_DRAWS` is the number of draws over all classes (200), `KVPATCH_DRAW_SEED` the first seed (0). A draw is known
by its class and its seed; a failure prints both, and the command that carries that one draw out again.
"""

from __future__ import annotations

import ast
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
from compare import Case, Outcome, compare
from draws import CLASSES, CONTEXT, KINDS, SWITCH, WINDOW, draw

pytestmark = pytest.mark.model

DRAWS = int(os.environ.get("KVPATCH_DRAWS", "200"))
FIRST = int(os.environ.get("KVPATCH_DRAW_SEED", "0"))
EACH = math.ceil(DRAWS / len(CLASSES))


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """`case_of(name)`: a class's models, built once."""
    home = tmp_path_factory.mktemp("differential")
    return functools.cache(lambda name: Case.build(name, home))


@pytest.mark.parametrize("name", CLASSES)
def test_every_draw_gives_what_transformers_alone_gives(name: str, case_of: Callable[[str], Case]):
    failures = []
    outcomes = []
    for seed in range(FIRST, FIRST + EACH):
        one = draw(name, seed)
        outcomes.append(compare(case_of(name), one))
        if outcomes[-1].differences:
            again = f"KVPATCH_DRAWS=1 KVPATCH_DRAW_SEED={seed} pytest tests/differential -k '[{name}]'"
            lines = "\n    ".join(outcomes[-1].differences[:6])
            failures.append(f"{name}, seed {seed}, {one.kind} (again: {again}):\n    {lines}")
    print(told(name, outcomes))
    if failures:
        pytest.fail(f"{len(failures)} of {EACH} draws differ\n" + "\n".join(failures[:10]), pytrace=False)
    if EACH > 10:  # draws that both refuse compare little
        assert sum(not (outcome.refused or outcome.undecided) for outcome in outcomes) >= EACH / 4


def told(name: str, outcomes: list[Outcome]) -> str:
    """What came of a class's draws, in a line."""
    refused = sum(bool(outcome.refused) for outcome in outcomes)
    undecided = sum(outcome.undecided for outcome in outcomes)
    worst = max(outcome.worst for outcome in outcomes)
    return (
        f"{name}: seeds {FIRST} to {FIRST + EACH - 1}, {refused} with a refusal by both, {undecided} undecided, "
        f"largest relative difference {worst:.1e}"
    )


def test_the_reference_knows_nothing_of_kvpatch():
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    standard = {"__future__", "collections", "dataclasses", "inspect", "math", "pathlib", "re", "sys", "typing"}
    assert imported <= standard | {"torch", "transformers", "numpy"}


def test_a_draw_is_the_same_every_time():
    assert draw("llama", 7) == draw("llama", 7)
    assert draw("llama", 7) != draw("llama", 8)


def test_draws_reach_past_every_limit_and_ask_every_kind():
    some = [draw(name, seed) for name in CLASSES for seed in range(30)]
    assert {one.kind for one in some} == set(KINDS)
    lengths = [len(prompt.token_ids) for one in some for prompt in one.targets]
    assert min(lengths) == 1
    assert sum(length > WINDOW for length in lengths) > len(lengths) / 3
    assert any(length > CONTEXT for length in lengths)
    assert any(len(prompt.token_ids) > SWITCH for one in some if one.model == "phi3" for prompt in one.targets)
    specs = [patch.spec for one in some for patch in one.patches]
    for field, values in {
        "align": ("start", "end", "stretch", "replace", "append"),
        "parts": ("k", "v", "kv"),
        "rotate": (True, False),
        "strength": (0.0, 1.0, 0.5),
    }.items():
        assert {spec[field] for spec in specs} >= set(values)


def test_a_key_moved_by_the_reference_is_the_key_of_a_prompt_that_stands_there(case_of: Callable[[str], Case]):
    """The reference's own rotation, against the model: in the first layer a key depends on its token and position."""
    for name in ("llama", "qwen3", "gemma3", "gpt_neox", "phi3", "glm"):
        model = case_of(name).reference
        prompt = reference.Prompt((50, 60, 70, 50, 60, 70, 50, 80), ("body",) * 8, (" a",) * 8)
        slots = model.prefill(prompt).slots
        moved = model.moved(0, slots[0].keys[0], 0, 6)
        assert torch.allclose(moved, slots[6].keys[0], rtol=0, atol=1e-5 * float(moved.abs().max())), name
