"""Weights of the trained organisms: small safetensors files that come with kvpatch, each with how it was made.

python -m kvpatch.organisms.weights early --out DIR [--seed 0]     trains one again, in about 2 minutes
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvpatch.models.named import check_sha256
from kvpatch.organisms.trained import RECIPES, STEPS, config, train


def load_weights(path: Path) -> Any:
    """The organism of a weights file, in float32.

    Raises:
        ModelError: where the file is not the one its record was written for.
    """
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    made = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    check_sha256(path, made["weights_sha256"])
    model = LlamaForCausalLM(config())
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


def script_sha256() -> str:
    """Hash of what makes the weights: the training and the language."""
    total = hashlib.sha256()
    for name in ("trained.py", "language.py"):
        total.update(Path(__file__).with_name(name).read_bytes())
    return total.hexdigest()


def save(model: Any, name: str, seed: int, folder: Path, seconds: float) -> Path:
    """Write the weights as float16, and beside them how they were made."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, path)
    made = {
        "organism": name,
        "seed": seed,
        "script_sha256": script_sha256(),
        "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "seconds": round(seconds),
    }
    path.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return path


def retrain(folder: Path, report: Callable[[str, int, int, float], None], seed: int = 0) -> None:
    """Train every organism again into a directory of weights; told of name, step, steps and loss."""
    for name, recipe in RECIPES.items():
        start = time.monotonic()
        model = train(recipe, seed, lambda step, loss, name=name: report(name, step, STEPS, loss))
        save(model, name, seed, folder, time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an organism.")
    parser.add_argument("name", choices=list(RECIPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    start = time.monotonic()

    def report(step: int, loss: float) -> None:
        if step % 200 == 0 or step == options.steps - 1:
            print(f"{options.name} {step}: loss {loss:.3f}, {time.monotonic() - start:.0f} s", flush=True)

    model = train(RECIPES[options.name], options.seed, report, options.steps)
    print(save(model, options.name, options.seed, options.out, time.monotonic() - start))


if __name__ == "__main__":
    main()
