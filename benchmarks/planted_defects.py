"""Put realistic faults into a scratch copy of kvpatch, one at a time, and see what catches each.

    python benchmarks/planted_defects.py [--only NAME] [--all] [--jobs N] [-o TABLE.md]

For every fault `kvpatch check` (on tiny models of three architectures), then `kvpatch validate --quick` (on the
organisms the fault should show on), then the tests (of the rooms it lies in, or the differential test with few draws)
are asked, until one fails as it should; --all asks all three. The sound copy is asked first, and must pass everything.
The table stands in docs/validation.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("llama", "mistral", "gemma3")
DRAWS = 102
"""Draws of the differential test: six a class, enough for each of its kinds to be among them."""


@dataclass(frozen=True)
class Fault:
    """One fault: where it is, what is put in place of what, and where it should show."""

    name: str
    about: str
    file: str
    edits: tuple[tuple[str, str], ...]
    organisms: str
    tests: str


FAULTS = (
    Fault(
        "unrotated",
        "keys are not re-rotated where they land",
        "interventions/splice.py",
        (("        return taken if self._turns is None else self._turns.turn(taken, rope)", "        return taken"),),
        "early", "tests/core/test_patch.py",
    ),
    Fault(
        "cached_and_fed",
        "the last prompt token is both cached and fed",
        "engine/prefill.py",
        (("    slots = max(len(prompt.token_ids) for prompt in prompts) - 1\n",
          "    slots = max(len(prompt.token_ids) for prompt in prompts)\n"),
         ("tuple(len(prompt.token_ids) - 1 for prompt", "tuple(len(prompt.token_ids) for prompt"),
         ("tuple(tuple(getattr(p, of)[:-1]) for p", "tuple(tuple(getattr(p, of)) for p"),
         ("prompt.pieces[:-1] for", "prompt.pieces for")),
        "wired", "tests/engine",
    ),
    Fault(
        "slot_off_by_one",
        "every selection means the next slot",
        "caches/selection.py",
        (("    return sorted(slot + padding for slot in own)",
          "    return sorted({min(slot + padding + 1, cache.slots - 1) for slot in own})"),),
        "wired", "tests/core/test_selection.py",
    ),
    Fault(
        "band_off_by_one",
        "a layer band starts and ends a layer late",
        "caches/selection.py",
        (("        inside = layers.within(count)", "        inside = {layer + 1 for layer in layers.within(count)}"),),
        "wired", "tests/core/test_selection.py",
    ),
    Fault(
        "query_heads",
        "query heads are taken for KV heads",
        "caches/selection.py",
        (('else indices_within("KV head", kv_heads, count)', "else sorted({head // 2 for head in kv_heads})"),),
        "wired", "tests/core/test_selection.py",
    ),
    Fault(
        "aliased_donor",
        "a donor is made in place, in the live cache",
        "interventions/donors.py",
        (("return replace(source, values=_gathered(source.values, _permutations(source, seeds)))",
          "order = _permutations(source, seeds)\n"
          "    return replace(source, values=tuple(v.copy_(_gathered([v], order)[0]) for v in source.values))"),),
        "wired", "tests/core/test_donors.py",
    ),
    Fault(
        "joint_shuffle",
        "condition E shuffles keys and values together, which changes nothing",
        "interventions/donors.py",
        (('"shuffle_values": _shuffle_values', '"shuffle_values": _shuffle_jointly'),),
        "wired", "tests/core/test_donors.py",
    ),
    Fault(
        "prompt_scored",
        "the score is taken over prompt and output",
        "executors/rows.py",
        (("scored = batch.scorer.score(of.text, seen)",
          "into = batch.conditions[batch.trials[index].condition].into\n"
          '    scored = batch.scorer.score(pair.texts[into] + " " + of.text, seen)'),),
        "null", "tests/executors/test_batch.py",
    ),
    Fault(
        "samples_as_n",
        "samples of a pair count as pairs",
        "verdicts/pairs.py",
        (('pair = out["phase"].astype(str), out["pair_id"].astype(str)',
          'pair = out["phase"].astype(str), out["pair_id"].astype(str) + out["sample"].astype(str)'),),
        "null", "tests/statistics",
    ),
    Fault(
        "margin_from_test",
        "margins come from the test pairs",
        "verdicts/margins.py",
        (('rows = rows_of(trials, split="calibration")', 'rows = rows_of(trials, split="test")'),),
        "wired", "tests/statistics",
    ),
    Fault(
        "window_short",
        "a sliding window is one slot short",
        "models/hf.py",
        (("self.slot_positions[:, None, :] < window\n", "self.slot_positions[:, None, :] < window - 1\n"),),
        "wired-mistral", "tests/models/test_hf.py",
    ),
    Fault(
        "mask_short",
        "the mask leaves the first slot out",
        "models/hf.py",
        (("may = (slot <= own)[None]", "may = ((slot <= own) & (slot > 0))[None]"),),
        "wired", "tests/models/test_hf.py",
    ),
    Fault(
        "one_theta",
        "sliding layers are turned by the other layers' RoPE theta",
        "models/probe.py",
        (("rope = tuple(_layer_rope(backbone, layer, slabs) for layer in range(layers))",
          "rope = (_layer_rope(backbone, layers - 1, slabs),) * layers"),),
        "wired", "tests/models/test_hf.py",
    ),
    Fault(
        "dead_hook",
        "hooks on keys and values never fire",
        "models/hf.py",
        (("if edit := _running.step.edits.get(self.layer):", "if edit := _running.step.edits.get(-1):"),),
        "early", "tests/core/test_activations.py",
    ),
    Fault(
        "unseeded",
        "random donors are not seeded",
        "interventions/donors.py",
        (("return [np.random.Generator(np.random.Philox(key=seed % 2**64)) for seed in seeds]",
          "return [np.random.default_rng() for _ in seeds]"),),
        "wired", "tests/core/test_donors.py",
    ),
    Fault(
        "pairs_misaligned",
        "a pair is given the next pair's source",
        "executors/conditions.py",
        (("giver_caches=functools.partial(natural.rows, pairs, giver),",
          "giver_caches=functools.partial(natural.rows, [(p + 1) % len(batch.pairs) for p in pairs], giver),"),),
        "early", "tests/executors",
    ),
    Fault(
        "labels_swapped",
        "the labels of two conditions are swapped",
        "executors/rows.py",
        (('        "condition": trial.condition,\n',
          '        "condition": {"C": "N1", "N1": "C"}.get(trial.condition, trial.condition),\n'),),
        "wired", "tests/executors",
    ),
    Fault(
        "cells_swapped",
        "continuations in the mode and plain ones are swapped",
        "readouts/likelihood.py",
        (("mode_t, plain_t, mode_s, plain_s = persons", "plain_t, mode_t, plain_s, mode_s = persons"),),
        "wired", "tests/readouts/test_likelihood.py",
    ),
    Fault(
        "pending_misplaced",
        "after a swap the pending token is fed one position late",
        "interventions/splice.py",
        (("pending = (start + real.sum(dim=1, keepdim=True)).squeeze(1)",
          "pending = (start + real.sum(dim=1, keepdim=True)).squeeze(1) + 1"),),
        "early", "tests/core/test_patch.py",
    ),
    Fault(
        "stale_weights",
        "decoding goes on with the weights of its first call",
        "models/backbone.py",
        (("            self.kept.clear()\n", "            self.kept.runner = None\n"),),
        "wired", "tests/differential",
    ),
    Fault(
        "dropped_window",
        "a window that the attention module does not pass is dropped",
        "models/hf.py",
        (("window = self.windows[layer] if self.windows else None", "window = None"),),
        "wired-mistral", "tests/differential",
    ),
    Fault(
        "empty_selection",
        "a patch that finds no slot changes nothing and says nothing",
        "caches/selection.py",
        (("    for row, count in enumerate(counts):\n        if not count:\n",
          "    for row, count in enumerate(counts):\n        if count < 0:\n"),),
        "wired", "tests/differential",
    ),
    Fault(
        "wrong_body",
        "the body is where the words first stand in the rendered template",
        "models/template.py",
        (("        rendered, start, end = (scaffold or scaffold_of(tokenizer)).around(tokenizer, text)\n",
          "        rendered = (scaffold or scaffold_of(tokenizer)).around(tokenizer, text)[0]\n"
          "        start = rendered.find(text.strip())\n"
          "        end = start + len(text.strip())\n"),),
        "wired", "tests/models/test_template.py tests/models/test_template_faults.py",
    ),
    Fault(
        "random_head",
        "a checkpoint without an output head loads with a random one",
        "models/load.py",
        (("    refuse_incomplete(hf, info)\n    recompute_buffers(hf)\n", "    recompute_buffers(hf)\n"),),
        "wired", "tests/models/test_checkpoints.py",
    ),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of faults, with commas")
    parser.add_argument("--all", action="store_true", help="ask every catcher, not only up to the first that catches")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried side by side; each takes one core")
    parser.add_argument("-o", "--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    chosen = [f for f in FAULTS if options.only is None or f.name in options.only.split(",")]
    with tempfile.TemporaryDirectory(prefix="kvpatch-defects-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        scratch = Path(folder)
        models = tiny_models(scratch)
        sound = pool.submit(is_sound, chosen, models, scratch)
        if options.jobs == 1 and not sound.result():
            return 1
        rows = list(pool.map(lambda fault: tried(fault, models, scratch, is_all=options.all), chosen))
        if not sound.result():
            return 1
    table = "\n".join(["| fault | caught by | how it showed |", "|---|---|---|", *rows]) + "\n"
    if options.out:
        options.out.write_text(table, encoding="utf-8")
    missed = [r for r in rows if "| nothing |" in r]
    print(f"{len(rows) - len(missed)} of {len(rows)} caught")
    return 1 if missed else 0


def is_sound(chosen: list[Fault], models: list[Path], scratch: Path) -> bool:
    """Whether an untouched copy passes all that the faults are asked."""
    copy = fresh_copy(scratch / "sound")
    organisms = ",".join(dict.fromkeys(f.organisms for f in chosen))
    tests = " ".join(dict.fromkeys(f.tests for f in chosen))
    for name, broken in catchers(copy, models, organisms, tests).items():
        print(f"sound copy, {name}: {broken or 'passes'}", flush=True)
        if broken:
            return False
    return True


def tried(fault: Fault, models: list[Path], scratch: Path, *, is_all: bool) -> str:
    """The row of one fault, planted in a copy of its own."""
    copy = fresh_copy(scratch / fault.name)
    plant(fault, copy)
    told = row(fault, catchers(copy, models, fault.organisms, fault.tests, is_all=is_all))
    print(told, flush=True)
    return told


def fresh_copy(copy: Path) -> Path:
    """An untouched copy of source and tests."""
    copy.mkdir()
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def plant(fault: Fault, copy: Path) -> None:
    """Put the fault in; each edit must fit exactly once."""
    path = copy / "src" / "kvpatch" / fault.file
    text = path.read_text(encoding="utf-8")
    for old, new in fault.edits:
        if text.count(old) != 1:
            raise SystemExit(f"{fault.name}: {old!r} stands {text.count(old)} times in {fault.file}")
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def tiny_models(scratch: Path) -> list[Path]:
    """Tiny random models, made by the sound tests."""
    code = (
        "import sys; from pathlib import Path; from tiny import tiny_model_dir\n"
        f"for name in {ARCHITECTURES!r}: tiny_model_dir(name, Path(sys.argv[1]))"
    )
    home = scratch / "models"
    home.mkdir()
    environment = {**os.environ, "PYTHONPATH": search_path(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(home)], check=True, env=environment, capture_output=True)
    return [home / name for name in ARCHITECTURES]


def search_path(copy: Path) -> str:
    """Where Python finds a copy of kvpatch and its tests, before whatever else it was told to search."""
    return os.pathsep.join([str(copy / "src"), str(copy / "tests"), os.environ.get("PYTHONPATH", "")])


def catchers(copy: Path, models: list[Path], organisms: str, tests: str, *, is_all: bool = True) -> dict[str, str]:
    """Catcher -> how the fault showed, empty where it did not; up to the first that catches unless `is_all`."""
    command = [sys.executable, "-m", "kvpatch"]
    asked = {
        "check": [[*command, "check", str(model), "--json"] for model in models],
        "validate": [[*command, "validate", "--quick", "--only", organisms, "--json"]],
        "make test": [[sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]],
    }
    out: dict[str, str] = {}
    for name, commands in asked.items():
        out[name] = next((told for c in commands if (told := _shows(name, c, copy))), "")
        if out[name] and not is_all:
            break
    return out


def _shows(name: str, command: list[str], copy: Path) -> str:
    """How a command fails on a copy; empty where it does not."""
    environment = {
        **os.environ,
        "PYTHONPATH": search_path(copy),
        "KVPATCH_CACHE": str(copy.parent / "cache"),
        "OMP_NUM_THREADS": "1",
        "KVPATCH_DRAWS": str(DRAWS),
    }
    start = time.monotonic()
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    print(f"  {name}: exit {done.returncode}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return "" if done.returncode == 0 else _first_sign(name, done.stdout, done.stderr)


def _first_sign(name: str, out: str, err: str) -> str:
    """The first thing a failing command names."""
    import json

    try:
        told = json.loads(out)
    except ValueError:
        lines = [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR"))]
        lines = lines or [line for line in err.splitlines() if line.strip()][-1:] or ["exit code"]
        return lines[0].removeprefix("FAILED ").split(" - ")[0].split("[")[0]
    if name == "check":
        return next(i["identity"] for i in told["identities"] if i["holds"] is False)
    first = next(f for f in told["findings"] if not f["holds"])
    failed = sum(not f["holds"] for f in told["findings"])
    more = f", and {failed - 1} more" if failed > 1 else ""
    return f"{first['organism']}: {first['asked']}, {first['planted']}; found {first['found'].split(' (')[0]}{more}"


def row(fault: Fault, found: dict[str, str]) -> str:
    """A row of the table."""
    caught = [name for name, told in found.items() if told]
    how = "; ".join(found[name] for name in caught)
    return f"| {fault.about} | {', '.join(caught) or 'nothing'} | {how.replace('|', '/')} |"


if __name__ == "__main__":
    sys.exit(main())
