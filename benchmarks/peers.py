"""Six tasks in kvpatch, nnsight and TransformerLens: lines of code, seconds, and whether the numbers are the same.

    python benchmarks/peers.py --peers PYTHON [--repeats 7] [--threads 1]

PYTHON is the interpreter of an environment with the peers: `pip install nnsight==0.8.1 transformer-lens==4.3.0
transformers==5.20.0`. kvpatch runs in the one that runs this file. (transformers 5.24 hands attention its cache under
another name, which TransformerLens 4.3.0 does not read: its caches stay empty.) The tasks stand in
`benchmarks/peer_tasks`, a file per library, cut by `# %% name`; docs/coming-from.md shows the same code. Each library
has a process of its own, with the same weights in float32.

Lines are what is neither blank nor a comment once ruff has formatted the file at 120 columns. Loading, imports and the
two prompts' caches (`prepare`) are not counted in a task; `prepare` has a row of its own. Tokens are Python's, and say
whether few lines are only long ones. Seconds are the least of the repeats, after one run that is not timed: what else
runs on the machine only adds to them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("peer_tasks")
LIBRARIES = ("kvpatch", "nnsight", "transformer_lens")
TASKS = {
    "swap": "text",
    "slot": "one",
    "sweep": "grid",
    "attention": "to_slot_2",
    "residual": "logits",
    "batch": "texts",
}
"""Task -> the name under which its result stands in every library."""
TOLERANCE = 1e-4
"""Largest difference that is taken as the same number: logits are of the order of 10, attention is at most 1."""
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def cells_of(library: str) -> dict[str, tuple[int, str]]:
    """The cells of a library's file: name -> (its first line's number from 1 on, its code)."""
    parts = re.split(r"^# %% (\w+)\n", (FOLDER / f"in_{library}.py").read_text("utf-8"), flags=re.M)
    found, line = {}, parts[0].count("\n") + 2
    for name, code in zip(parts[1::2], parts[2::2], strict=True):
        found[name] = (line, code.strip("\n") + "\n")
        line += code.count("\n") + 1
    return found


def lines_of(code: str) -> int:
    """Lines that are neither blank nor a comment."""
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in code.splitlines())


def told_lines(code: str) -> str:
    """ "1 line", "2 lines"."""
    count = lines_of(code)
    return f"{count} line{'' if count == 1 else 's'}"


def tokens_of(code: str) -> int:
    """Python's tokens, comments and layout left out."""
    return sum(token.type not in NOT_CODE for token in tokenize.generate_tokens(io.StringIO(code).readline))


def run_cell(library: str, cell: tuple[int, str], names: dict[str, Any]) -> None:
    """Execute a cell as if its whole file ran: nnsight reads the source of a `with` block from the file."""
    first, code = cell
    exec(compile("\n" * (first - 1) + code, str(FOLDER / f"in_{library}.py"), "exec"), names)


def plain(value: Any) -> Any:
    """A result as text or nested lists of numbers."""
    import numpy as np

    is_text = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str))
    return value if is_text else np.asarray(value).tolist()


def one_library(library: str, repeats: int, threads: int) -> dict[str, Any]:
    """Seconds and results of every task, in this process."""
    import torch

    torch.set_num_threads(threads)
    names: dict[str, Any] = {"__name__": library}
    cells, seconds, results = cells_of(library), {}, {}
    run_cell(library, cells["load"], names)
    for task in ("prepare", *TASKS):
        taken = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            run_cell(library, cells[task], names)
            taken.append(time.perf_counter() - start)
        seconds[task] = min(taken[1:] or taken)
        if task in TASKS:
            results[task] = plain(names[TASKS[task]])
    return {"seconds": seconds, "results": results}


def elsewhere(python: str, library: str, directory: Path, repeats: int, threads: int) -> dict[str, Any]:
    """`one_library` in a process of its own.

    Raises:
        RuntimeError: with the process's last lines, where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [python, __file__, "--library", library, "--out", str(out)]
        command += ["--repeats", str(repeats), "--threads", str(threads)]
        environment = os.environ | {"MODEL_DIRECTORY": str(directory), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{library} failed: {done.stderr[-2000:]}")
        return json.loads(out.read_text("utf-8"))


def difference(one: Any, other: Any) -> float:
    """The largest difference of two results; 0 or infinite for texts."""
    import numpy as np

    if isinstance(one, str) or (isinstance(one, list) and isinstance(one[0], str)):
        return 0.0 if one == other else float("inf")
    return float(np.abs(np.array(one) - np.array(other)).max())


def main() -> None:
    """Print a table of lines, tokens and seconds, and the largest difference between the libraries' numbers."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--peers", help="interpreter of the environment with the peers")
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--library", choices=LIBRARIES, help=argparse.SUPPRESS)
    options.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.library:
        asked.out.write_text(json.dumps(one_library(asked.library, asked.repeats, asked.threads)), "utf-8")
        return
    from kvpatch.models.load import pull

    directory = pull("smollm2-135m")
    found = {
        library: elsewhere(
            sys.executable if library == "kvpatch" else asked.peers or sys.executable,
            library,
            directory,
            asked.repeats,
            asked.threads,
        )
        for library in LIBRARIES
    }
    print(f"| task | {' | '.join(LIBRARIES)} | largest difference |\n|---|---|---|---|---|")
    for task in ("prepare", *TASKS):
        row = []
        for library in LIBRARIES:
            code = cells_of(library)[task][1]
            row.append(f"{told_lines(code)}, {tokens_of(code)} tokens, {found[library]['seconds'][task]:.2f} s")
        own = [found[library]["results"].get(task) for library in LIBRARIES]
        off = "" if task == "prepare" else f"{max(difference(own[0], other) for other in own[1:]):.1e}"
        print(f"| {task} | {' | '.join(row)} | {off} |")


if __name__ == "__main__":
    main()
