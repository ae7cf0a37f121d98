"""Carry a draw out by kvpatch and by the reference, and say where the two differ."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from draws import LAYERS, Draw, Patched, save_model
from reference import NAMES, IllegalError, Prompt, Reference, Row, UndecidedError, patched
from torch import Tensor, nn

import kvpatch as kv
from kvpatch.caches.kvcache import KVCache, Segment
from kvpatch.engine.score import score
from kvpatch.errors import KvpatchError
from kvpatch.models.template import EncodedPrompt

TOLERANCE = 1e-4
"""Largest difference, relative to the largest number of the tensor that is compared."""
A = TypeVar("A")
B = TypeVar("B")


class StopError(Exception):
    """A draw can't go on: it was refused by both, or the two have parted."""


@dataclass
class Case:
    """One class's model in kvpatch, in the reference, and a second one of the same shape and other weights."""

    name: str
    home: Path
    ours: kv.Model
    reference: Reference
    _twin: list[kv.Model] = field(default_factory=list)

    @classmethod
    def build(cls, name: str, home: Path) -> Case:
        """Save a random model of a class and load it both ways."""
        directory = save_model(name, home / name)
        return cls(name, home, kv.load(directory, device="cpu"), Reference(directory))

    @property
    def twin(self) -> kv.Model:
        """Another model of the same shape."""
        if not self._twin:
            self._twin.append(kv.load(save_model(self.name, self.home / f"{self.name}-twin", seed=1), device="cpu"))
        return self._twin[0]


@dataclass
class Outcome:
    """What came of a draw.

    Attributes:
        differences: one line each; empty where the two agree.
        refused: stages that both refuse. undecided: whether the documentation left the draw open.
        worst: largest relative difference of any number.
    """

    differences: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    undecided: bool = False
    worst: float = 0.0

    def close(self, what: str, ours: Tensor, reference: Tensor, scale: float | None = None) -> None:
        """Note where two tensors differ by more than the tolerance of the largest number, or of `scale`."""
        if ours.shape != reference.shape:
            self.differences.append(f"{what}: shape {tuple(ours.shape)}, reference {tuple(reference.shape)}")
            return
        if not reference.numel():
            return
        largest = float(reference.abs().max()) if scale is None else scale
        error = float((ours - reference).abs().max()) / max(largest, 1e-12)
        self.worst = max(self.worst, error)
        if not error <= TOLERANCE:
            self.differences.append(f"{what}: off by {error:.2g} of the largest")

    def same(self, what: str, ours: object, reference: object) -> None:
        """Note where two things are not equal."""
        if ours != reference:
            self.differences.append(f"{what}: {ours}, reference {reference}")

    def both(self, stage: str, ours: Callable[[], A], reference: Callable[[], B]) -> tuple[A, B]:
        """Run both; go on only where neither refuses, and note where only one does."""
        try:
            theirs = reference()
            reason = None
        except IllegalError as error:
            theirs, reason = None, error
        try:
            mine = ours()
        except KvpatchError as error:
            if reason is None:
                self.differences.append(f"{stage}: refused ({error}); the reference carries it out")
            else:
                self.refused.append(f"{stage}: {reason}")
            raise StopError from error
        if reason is not None:
            self.differences.append(f"{stage}: carried out; the reference refuses ({reason})")
            raise StopError
        assert theirs is not None
        return mine, theirs


def compare(case: Case, draw: Draw) -> Outcome:
    """Carry out a draw both ways."""
    outcome = Outcome()
    with contextlib.suppress(StopError):
        try:
            if draw.kind == "foreign":
                _foreign(case, draw, outcome)
            elif draw.kind == "changed":
                _changed(case, draw, outcome)
            else:
                _patched(case, draw, outcome)
        except UndecidedError:
            outcome.undecided = True
    return outcome


def _patched(case: Case, draw: Draw, outcome: Outcome) -> None:
    cache, rows = _prefilled(case, draw.targets, outcome, "targets")
    for number, patch in enumerate(draw.patches, start=1):
        with contextlib.suppress(StopError):
            cache, rows = _one_patch(case, patch, cache, rows, outcome, f"patch {number}")
        if outcome.differences:
            return
    _what_follows(case, draw, cache, rows, outcome)


def _one_patch(
    case: Case, patch: Patched, cache: KVCache, rows: list[Row], outcome: Outcome, name: str
) -> tuple[KVCache, list[Row]]:
    other, other_rows = _prefilled(case, patch.prompts, outcome, f"sources of {name}")
    spec = copy.deepcopy(patch.spec)
    source, target = (cache, other) if patch.is_reversed else (other, cache)
    from_rows, to_rows = (rows, other_rows) if patch.is_reversed else (other_rows, rows)
    before = target.checksums(), source.checksums()
    made, made_rows = outcome.both(
        name,
        lambda: kv.Patch(**spec).apply(source, target),
        lambda: patched(case.reference, spec, from_rows, to_rows),
    )
    outcome.same(f"{name} leaves target and source as they were", (target.checksums(), source.checksums()), before)
    _same_cache(name, made, made_rows, outcome)
    return made, made_rows


def _prefilled(case: Case, prompts: Sequence[Prompt], outcome: Outcome, name: str) -> tuple[KVCache, list[Row]]:
    cache, rows = outcome.both(
        f"prefill of {name}",
        lambda: case.ours.prefill([_encoded(prompt) for prompt in prompts]),
        lambda: [case.reference.prefill(prompt) for prompt in prompts],
    )
    _same_cache(name, cache, rows, outcome)
    return cache, rows


def _encoded(prompt: Prompt) -> EncodedPrompt:
    return EncodedPrompt(prompt.token_ids, tuple(int(Segment[name]) for name in prompt.segments), prompt.pieces)


def _same_cache(name: str, cache: KVCache, rows: Sequence[Row], outcome: Outcome) -> None:
    """Keys, values and labels of every real slot of every row."""
    outcome.same(f"{name}: rows", cache.batch, len(rows))
    for number, row in enumerate(rows):
        where, count = f"{name}, row {number}", len(row.slots)
        first = cache.slots - count
        outcome.same(f"{where}: slots", cache.row_lengths[number], count)
        outcome.same(f"{where}: positions", cache.positions[number, first:].tolist(), [s.position for s in row.slots])
        outcome.same(f"{where}: tokens", cache.token_ids[number, first:].tolist(), [s.token_id for s in row.slots])
        names = [NAMES[code] for code in cache.segments[number, first:].tolist()]
        outcome.same(f"{where}: segments", names, [s.segment for s in row.slots])
        outcome.same(f"{where}: pieces", list(cache.pieces[number]), [s.piece for s in row.slots])
        pending = int(cache.pending[number]), int(cache.pending_position[number])
        outcome.same(f"{where}: pending", pending, (row.pending, row.pending_position))
        if outcome.differences or not count:
            continue
        for layer in range(LAYERS):
            for part, ours in (("keys", cache.keys), ("values", cache.values)):
                theirs = torch.stack([getattr(slot, part)[layer] for slot in row.slots], dim=1)
                outcome.close(f"{where}: {part} of layer {layer}", ours[layer][number, :, first:], theirs)


def _what_follows(case: Case, draw: Draw, cache: KVCache, rows: Sequence[Row], outcome: Outcome) -> None:
    """Next-token logits, written tokens with their log-probabilities, and scores of given continuations."""
    with contextlib.suppress(StopError):
        scores, logits = outcome.both(
            "score",
            lambda: score(
                case.ours.backbone, cache, draw.continuations, keep_logits=max(len(a) for a, _ in draw.continuations)
            ),
            lambda: [
                [case.reference.follow(r, c) for c in two] for r, two in zip(rows, draw.continuations, strict=True)
            ],
        )
        public = case.ours.score(cache, [a for a, _ in draw.continuations])
        assert scores.logits is not None
        for number, two in enumerate(draw.continuations):
            name, first = f"row {number}", len(two[0])
            outcome.close(f"{name}: logits", scores.logits[number, :first], logits[number][0])
            for branch, tokens in enumerate(two):
                found = scores.logprobs[number, branch, : len(tokens)]
                _same_logprobs(
                    f"{name}: scores of continuation {branch}", found, tokens, logits[number][branch], outcome
                )
            outcome.close(f"{name}: public scores", public[number, :first], scores.logprobs[number, 0, :first])
    with contextlib.suppress(StopError):
        limit = [0] * draw.tokens  # what may be written at all does not depend on what is
        made, _ = outcome.both(
            "generate",
            lambda: case.ours.generate(
                cache,
                max_new_tokens=draw.tokens,
                temperature=draw.temperature,
                seeds=[draw.seed + i for i in range(len(rows))],
                stop=False,
            ),
            lambda: [case.reference.must_follow(row, limit) for row in rows],
        )
        for number, row in enumerate(rows):
            tokens = made.token_ids[number].tolist()
            logits = case.reference.follow(row, tokens)
            name = f"row {number}: written tokens {tokens}"
            _same_logprobs(name, made.logprobs[number], tokens, logits, outcome)
            if draw.temperature == 0:
                chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
                outcome.close(f"{name} are the likeliest", chosen, logits.amax(dim=1), float(logits.abs().max()))


def _same_logprobs(name: str, ours: Tensor, tokens: Sequence[int], logits: Tensor, outcome: Outcome) -> None:
    theirs = logits.log_softmax(dim=-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    outcome.close(f"{name}, log-probabilities", ours, theirs, max(1.0, float(logits.abs().max())))


def _foreign(case: Case, draw: Draw, outcome: Outcome) -> None:
    """A cache of another model of the same shape is refused wherever it is given."""
    cache, _ = _prefilled(case, draw.targets, outcome, "targets")
    foreign = case.twin.prefill([_encoded(prompt) for prompt in draw.targets])
    continuations = [a for a, _ in draw.continuations]
    uses: dict[str, Callable[[], object]] = {
        "generate": lambda: case.ours.generate(foreign, max_new_tokens=1),
        "score": lambda: case.ours.score(foreign, continuations),
        "a foreign source": lambda: kv.Patch(align="replace").apply(foreign, cache),
        "a foreign target": lambda: kv.Patch(align="append").apply(cache, foreign),
        "concat": lambda: KVCache.concat([cache, foreign]),
    }
    for name, use in uses.items():
        with contextlib.suppress(StopError):
            outcome.both(f"another model's cache: {name}", use, _never)


def _never() -> object:
    raise IllegalError("this cache was made by another model")


def _changed(case: Case, draw: Draw, outcome: Outcome) -> None:
    """After a first decoding the model is changed; all that follows is by the changed model, and then by the old."""
    cache, rows = _prefilled(case, draw.targets, outcome, "targets")
    outcome.both(
        "generate before the change",
        lambda: case.ours.generate(cache, max_new_tokens=1),
        lambda: [case.reference.must_follow(row, [0]) for row in rows],
    )
    models = case.ours.hf, case.reference.hf
    with _changes(models[0], draw.change, draw.seed), _changes(models[1], draw.change, draw.seed):
        cache, rows = _prefilled(case, draw.targets, outcome, f"targets after {draw.change}")
        _what_follows(case, draw, cache, rows, outcome)
    cache, rows = _prefilled(case, draw.targets, outcome, f"targets after {draw.change} is undone")
    _what_follows(case, draw, cache, rows, outcome)


class _Wrapped(nn.Module):
    """A block that adds a vector to what another makes, as libraries of control vectors have it."""

    def __init__(self, block: nn.Module, vector: Tensor) -> None:
        super().__init__()
        self.block, self.vector = block, vector

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.block(*args, **kwargs)
        return out + self.vector if isinstance(out, Tensor) else (out[0] + self.vector, *out[1:])


_OUTPUTS = ("o_proj", "dense", "c_proj", "out_proj", "down_proj", "dense_4h_to_h", "fc2")


@contextlib.contextmanager
def _changes(hf: Any, change: str, seed: int) -> Iterator[None]:
    """Change a model as its user might, and change it back. The same seed changes two copies alike."""
    rng = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng) * 0.2

    blocks: Any = next(m for m in hf.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
    at = seed % LAYERS
    outputs = [m for name, m in blocks[at].named_modules() if name.split(".")[-1] in _OUTPUTS and hasattr(m, "weight")]
    module: Any = hf.get_input_embeddings() if change == "embedding" else outputs[seed // LAYERS % len(outputs)]
    weight, data, block = module.weight, module.weight.data, blocks[at]
    if change in ("data", "embedding"):
        module.weight.data = noise(data)
    elif change == "parameter":
        module.weight = nn.Parameter(noise(data), requires_grad=False)
    elif change == "in_place":
        was = data.clone()
        data.mul_(-0.5)
    elif change == "wrapped":
        blocks[at] = _Wrapped(block, noise(hf.get_input_embeddings().weight[0]))
    else:
        module.forward = lambda x: -type(module).forward(module, x)
    try:
        yield
    finally:
        if change == "in_place":
            data.copy_(was)
        elif change == "wrapped":
            blocks[at] = block
        elif change == "forward":
            del module.forward
        else:
            module.weight = weight
            weight.data = data
