"""Calls of the Python API with arguments that can't be meant; `bad_input.py` counts what comes of them.

Half of the calls are of what needs no model, half of a tiny random model, its caches, and a finished run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import kvpatch as kv
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.load import load_protocol
from kvpatch.readouts.behavior import Lexicon
from kvpatch.store.directory import Store
from tiny import tiny_model_dir

Call = Callable[[], object]
Draws = dict[str, Callable[[], Call]]
"""Name of a function -> what draws a call of it."""
VALUES: list[Any] = [
    None, True, False, 0, -1, 1.5, 1e400, float("nan"), 10**30, "", "x", "x" * 3_000,
    "[/]", "\x1b[31m", "\u202e", [], [None],
    {}, {"a": 1},
    [[1]], ["A", "A"], {"kind": "x"}, "A - B - C", "A <", "../x", "/etc", b"x", 2**63, -(2**63), "log", "all",
]  # fmt: skip
OF_PYTHON: list[Any] = [
    *VALUES, object(), 3 + 4j, math.inf, -math.inf, range(3), {1, 2}, "0", Path("nowhere"), [1, 2], ["body"], ("a", 1),
    np.bool_(True), np.int64(1), np.int64(-999), np.float64("nan"), np.float32(0.5), np.array([True, False]),
    np.array(1),
    np.array([0, 1]), np.array([[0.5]]), np.array(["a"]), np.array([None]), np.array([]),
    torch.tensor(1), torch.tensor([0, 1]), torch.tensor([True]), torch.tensor(float("nan")), torch.zeros(2, 3),
    torch.zeros(0), torch.zeros(2, 3, dtype=torch.complex64), slice(1, None), slice(None, None, -1), slice("a", 2),
    "body", 10**5_000, -(10**5_000), [10**5_000],
    print, int, ..., NotImplemented, [np.int64(1)], [1.5], [True, 2], iter([1]), "é\ud800", bytearray(b"x"), 5, 0.7, 2,
]  # fmt: skip
SPECS = (
    kv.Patch, kv.SlotQuery, kv.LayerBand, kv.LayerAt, kv.Span,
    kv.InPrefill, kv.ValueSteering, kv.CacheSteering, kv.Joined, kv.Reshape,
)  # fmt: skip
TEXTS = [
    "", " ", "nowhere", "a\x1b[2Jb", "\x00", "x" * 5_000, "~no-such-user-here/x", "/dev/zero", "/dev/null", "/", ".",
    "\udcff", "-", "s3://", "a.gguf", "..",
]  # fmt: skip


def without_model(pick: Callable[[], Any], rng: random.Random, folder: Path, texts: list[str]) -> Draws:
    """Name of a call -> what draws one."""

    def text() -> str:
        return rng.choice(texts)

    def made(kind: type[Any]) -> Callable[[], Call]:
        names = [*(field.alias or name for name, field in kind.model_fields.items()), "nowhere"]
        required = [field.alias or name for name, field in kind.model_fields.items() if field.is_required()]
        return lambda: (lambda given: lambda: kind(**given))(
            {name: pick() for name in [*required, *rng.sample(names, min(2, len(names)))]}
        )

    def of_text(call: Callable[[str], object]) -> Callable[[], Call]:
        return lambda: (lambda name: lambda: call(name))(text())

    loadable = [name for name in texts if not name.startswith(("http", "dec7", "demo", "organism", "~/"))]
    return {
        **{kind.__name__: made(kind) for kind in SPECS},
        "Run": of_text(kv.Run),
        "Store.read": of_text(lambda name: Store(name).read()),
        "load_protocol": of_text(lambda name: load_protocol(name, needs_files=True)),
        "load_bank": of_text(lambda name: load_bank(name, folder)),
        "load": lambda: (lambda name: lambda: kv.load(name, device="cpu"))(rng.choice(loadable)),
        "Lexicon.load": of_text(Lexicon.load),
        "KVCache.load": of_text(kv.KVCache.load),
        "participation_ratio": lambda: (lambda v: lambda: kv.participation_ratio(v))(pick()),
        "principal_angles": lambda: (lambda a, b, c: lambda: kv.principal_angles(a, b, c))(pick(), pick(), pick()),
        "logit_difference": lambda: (lambda a, b: lambda: kv.logit_difference(a, b))(pick(), pick()),
        "log_likelihood": lambda: (lambda a: lambda: kv.log_likelihood(a))(pick()),
        "mode_likelihood_ratio": lambda: (lambda a, b: lambda: kv.mode_likelihood_ratio(a, b))(pick(), pick()),
        "probability": lambda: (lambda a: lambda: kv.probability(a))(pick()),
        "load(dtype=)": lambda: (lambda a: lambda: kv.load("no/such/model", dtype=a))(pick()),
        "kv.run": lambda: (lambda a, b: lambda: kv.run(a, "no/such/model", out=folder / "out", n=b))(pick(), pick()),
    }


class Live:
    """A tiny model with two caches, a cache of another model, and a finished run."""

    def __init__(self, folder: Path, run: Path) -> None:
        self.folder, self.run = folder, kv.Run(run)
        self.model = kv.load(tiny_model_dir("llama", folder), device="cpu")
        other = kv.load(tiny_model_dir("qwen2", folder), device="cpu")
        self.source = self.model.prefill(["Watch these words arrive.", "Say what it is like."])
        self.target = self.model.prefill(["Explain how bread rises.", "Leave out the usual steps."])
        self.foreign = other.prefill(["Another model's cache."])
        self.saved = self.source.save(folder / "cache.safetensors")

    def calls(self, pick: Callable[[], Any], rng: random.Random) -> Draws:
        """Name of a call -> what draws one."""
        m, source, target = self.model, self.source, self.target

        def cache() -> Any:
            return rng.choice([source, source, self.foreign, pick()])

        def some(names: list[str], count: int = 2) -> dict[str, Any]:
            return {name: pick() for name in rng.sample(names, rng.randint(1, min(count, len(names))))}

        def drawn(call: Callable[..., object], *draw: Callable[[], Any]) -> Callable[[], Call]:
            return lambda: (lambda given: lambda: call(*given))([each() for each in draw])

        sampling = ["max_new_tokens", "temperature", "top_p", "seeds", "stop", "attention", "on_step", "on_logits"]
        axes = ["layers", "slots", "kv_heads", "parts", "x"]
        metric = kv.logit_difference("a", "b")
        patches = [kv.Patch(), kv.Patch(align="replace"), kv.Patch(slots=[0]), kv.Patch(align="append")]
        changes = [
            *patches,
            kv.InPrefill(site="residual"),
            kv.Joined(keep="receiver"),
            kv.Reshape(),
            kv.CacheSteering(strength=1),
        ]
        plots = ["conditions", "coherence", "forest", "effects", "trajectory", "heads", "narrowing"]
        return {
            "prefill": drawn(lambda a, b: m.prefill(a, chat=b), pick, pick),
            "encode": drawn(lambda a: m.encode(a), pick),
            "generate": drawn(lambda c, k: m.generate(c, **{"max_new_tokens": 2, **k}), cache, lambda: some(sampling)),
            "score": drawn(m.score, cache, pick),
            "logits": drawn(m.logits, cache),
            "attention": drawn(lambda a, b: m.attention("a text", marked=a, maps=b), pick, pick),
            "Maps": drawn(lambda a, b, c: m.attention("a text", maps=kv.Maps(a, b, c)), pick, pick, pick),
            "sweep": drawn(
                lambda a, b, over, how: m.sweep(a, b, over, how), cache, cache,
                lambda: rng.choice([some(axes), pick()]), lambda: rng.choice([metric, metric, pick()]),
            ),
            "apply": drawn(
                lambda p, a, b, k: p.apply(a, b, **k), lambda: rng.choice(patches), cache, cache,
                lambda: rng.choice([{}, {"seed": pick()}, {"reference": cache()}]),
            ),
            "intervene": drawn(
                lambda c, a, b, k: m.intervene(c, a, b, **k), lambda: rng.choice([*changes, pick()]),
                lambda: rng.choice(["a text", pick()]), lambda: rng.choice(["a text", None, pick()]),
                lambda: rng.choice([{}, {"calibration": pick()}, {"seed": pick()}]),
            ),
            "cache[]": drawn(lambda a: target[a], pick),
            "cache.to": drawn(target.to, pick),
            "cache.concat": drawn(kv.KVCache.concat, lambda: rng.choice([[target, cache()], [cache()], pick()])),
            "cache.row_token_ids": drawn(target.row_token_ids, pick),
            "cache.save": drawn(target.save, pick),
            "cache.from_dynamic": drawn(
                lambda a, b, c, d: kv.KVCache.from_dynamic(a, positions=b, token_ids=c, pending=d),
                lambda: rng.choice([target.to_dynamic(), pick()]), pick, pick, pick,
            ),
            "damaged cache": drawn(lambda path: kv.KVCache.load(path, model=m), lambda: self._damaged(rng)),
            "r_v": drawn(lambda c, k: kv.r_v(c, **k), cache, lambda: some(["early", "late", "window"])),
            "cache_ratios": drawn(
                lambda c, k: kv.cache_ratios(c, **k), cache, lambda: some(["part", "window", "joined", "corrected"])
            ),
            "Run.trials": drawn(lambda a: self.run.trials(a), pick),
            "Run.verdicts": drawn(lambda a: self.run.verdicts(a), pick),
            "Run.plot": drawn(lambda name, a: getattr(self.run.plot, name)(a), lambda: rng.choice(plots), pick),
            "load(model=)": drawn(lambda a, b: kv.load(model=a, tokenizer=b), pick, pick),
            "load, told more": drawn(
                lambda k: kv.load(self.folder / "llama", **k), lambda: some(["device", "dtype", "revision"], 1)
            ),
            "kv.run on a model": drawn(
                lambda k: kv.run("demo", m, out=self.folder / "out", **k),
                lambda: {name: rng.choice(["x", -1, 1.5, [], {}, object(), np.nan]) for name in ["n", "phases"]},
            ),
        }  # fmt: skip

    def _damaged(self, rng: random.Random) -> Path:
        """A saved cache with something wrong: bytes, a tensor, or its note."""
        path = self.folder / "damaged.safetensors"
        how = rng.choice(["bytes", "cut", "tensor", "drop", "note", "note"])
        if how in ("bytes", "cut"):
            data = bytearray(self.saved.read_bytes())
            for _ in range(3):
                data[rng.randrange(2_000)] ^= rng.randint(1, 255)
            path.write_bytes(data[: rng.randrange(len(data))] if how == "cut" else data)
            return path
        import json

        from safetensors import safe_open

        tensors = load_file(self.saved)
        with safe_open(self.saved, framework="pt") as file:
            note = json.loads(file.metadata()["kvpatch"])
        name = rng.choice(sorted(tensors))
        if how == "drop":
            del tensors[name]
        elif how == "tensor":
            tensors[name] = rng.choice(
                [
                    torch.zeros(0),
                    torch.zeros(3, 3),
                    tensors[name].double(),
                    tensors[name][:1],
                    torch.full_like(tensors[name], -7),
                ]
            ).contiguous()
        else:
            key = rng.choice(sorted(note))
            note[key] = rng.choice(
                [None, 0, -1, 10**6, "x", [], [[]], {}, [["x", [1.0]]], [[1, 2]], 1.5, [["a"], ["b"]]]
            )
        text = json.dumps(note) if rng.random() < 0.9 else "[" * 100_000
        save_file(tensors, path, {"kvpatch": text})
        return path


def bad_calls(rng: random.Random, n: int, folder: Path, texts: list[str], run: Path) -> list[tuple[str, Call]]:
    """So many calls, each with its name."""

    def pick() -> Any:
        return rng.choice([*OF_PYTHON, folder])

    kinds = [without_model(pick, rng, folder, [*texts, *TEXTS]), Live(folder, run).calls(pick, rng)]
    drawn = []
    for _ in range(n):
        kind = rng.choice(kinds)
        name = rng.choice(list(kind))
        drawn.append((name, kind[name]()))
    return drawn
