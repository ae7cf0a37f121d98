"""The run directory: what is in it, how it is written, and how damage shows.

    run.json            one `RunRecord`, written before the first trial
    trials/*.parquet    one row a trial, one part a batch
    attention/*.parquet one row a trial, stage, layer and query head; of the batches whose phase asks for it
    parts.jsonl         one line a part: name, rows, SHA-256 (`Part`); a part counts once its line is there
    verdicts.json       one entry a hypothesis
    report.html

A part is written beside its place, flushed, moved there, and only then named in parts.jsonl: data before index. A
killed process leaves at most an unnamed part, which the resumed run writes again. The attention of a batch is part of
its part: both files are there before the line that names both, so that they never disagree. No row of a file is used
before the file is known to be what its line names (see `parts.py`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from kvpatch.errors import StoreError
from kvpatch.heads import STAGES, STATISTICS
from kvpatch.parts import Part, check_file, read_file, read_index, refuse_copies
from kvpatch.patch import Frozen

_TOKENS = pa.list_(pa.int32())
_NUMBERS = pa.list_(pa.float32())
_SPANS = pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32())]))

TRIAL_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "trial_id": (pa.string(), "hash of the trial's content: model, pair, condition, seed and settings"),
    "content_id": (
        pa.string(),
        "the same hash without the phase: rows that share it are one computation, copied into each phase that has it",
    ),
    "phase": (pa.string(), "phase of the protocol; 'calibration' or 'calibration-<model>' for held-out pairs"),
    "split": (pa.string(), "'test' or 'calibration'"),
    "model": (pa.string(), "name of the model the trial ran on"),
    "condition": (pa.string(), "id of the condition"),
    "condition_role": (pa.string(), "experiment, control or integrity"),
    "pair_id": (pa.string(), "target and source of the pair; the unit of analysis"),
    "source_id": (pa.string(), "bank id of the pair's source prompt"),
    "target_id": (pa.string(), "bank id of the pair's target prompt"),
    "sample": (pa.int32(), "number of the continuation within pair and condition"),
    "seed": (pa.int64(), "seed of the trial's random numbers; shared by the conditions of a pair"),
    "patch": (pa.string(), "the patch or other intervention as JSON; null for a natural cache"),
    "changes_planned": (pa.int32(), "changes of activations that hooks were to make for this trial"),
    "changes_fired": (pa.int32(), "changes they made; where the two differ the trial is an error"),
    "n_slots_patched": (
        pa.int32(),
        "slots of the trial's cache that the condition put in, added to or computed anew, whatever its strength: those "
        "selected; of joined prompts all from the giver's first word on. 0 for a natural cache; null in older runs",
    ),
    "n_layers_patched": (pa.int32(), "layers in which it did"),
    "n_kv_heads_patched": (pa.int32(), "KV heads in each of these layers"),
    "source_text": (pa.string(), "words of the pair's source prompt"),
    "target_text": (pa.string(), "words of the pair's target prompt"),
    "source_token_ids": (_TOKENS, "tokens of the prompt whose cache was put in, pending token last"),
    "target_token_ids": (_TOKENS, "tokens of the prompt that received it, pending token last"),
    "cache_token_ids": (_TOKENS, "token each slot of the trial's cache stands for, pending token last"),
    "output_token_ids": (_TOKENS, "tokens written, end token included"),
    "output_logprobs": (_NUMBERS, "log-probability of each, temperature 1, natural logarithm"),
    "text": (pa.string(), "the continuation, special tokens left out"),
    "stopped": (pa.string(), "'eos' or 'length'"),
    "n_tokens": (pa.int32(), "tokens written, end token included"),
    "recursive_score": (pa.float64(), "score of the protocol's mode, whatever it is: hits per 100 words of the text"),
    "recursive_score_masked": (pa.float64(), "the same without hits that occur in the pair's source or foreign prompt"),
    "mode_hits": (_SPANS, "characters of each hit, in the text as Unicode NFC; null where a scorer gave only a number"),
    "overlap_4gram": (pa.float64(), "share of the text's word 4-grams that occur in the source prompt"),
    "rv_prompt": (
        pa.float64(),
        "R_V of the cache the trial starts from; under a full swap the source's by construction",
    ),
    "rv_output": (pa.float64(), "R_V of the values of a fixed continuation, the same for all conditions of the pair"),
    "rv_own": (pa.float64(), "R_V of the values of the trial's own last tokens; tracks its words too"),
    "nll_own": (pa.float64(), "mean negative log-likelihood of the text under the trial's own cache, nats a token"),
    "nll_target": (
        pa.float64(),
        "the same under the natural cache of the pair's target prompt, whatever the condition",
    ),
    "mode_llr": (pa.float64(), "log-likelihood of continuations in the mode less plain ones over topics, nats a token"),
    "content_llr": (pa.float64(), "log-likelihood of the source's topic less the target's over modes, nats a token"),
    "mode_llr_by_position": (_NUMBERS, "mode_llr at each position of the continuations"),
    "content_llr_by_position": (_NUMBERS, "content_llr at each position of the continuations"),
    "rv_trajectory": (
        _NUMBERS,
        "R_V of every window of the trial's own tokens, the first window first; see `geometry`",
    ),
    "rv_forced_trajectory": (_NUMBERS, "the same over the fixed continuation"),
    "pr_v_late": (
        pa.float64(),
        "participation ratio of the late layer's cached values, last window, sinks left out, heads joined",
    ),
    "pr_v_late_corrected": (pa.float64(), "the same without the bias of a small window"),
    "pr_k_late": (pa.float64(), "participation ratio of the late layer's cached keys, before RoPE"),
    "pr_k_late_corrected": (pa.float64(), "the same without the bias of a small window"),
    "pr_v": (_NUMBERS, "participation ratio of the cached values of each KV head alone, layer after layer"),
    "pr_v_corrected": (_NUMBERS, "the same without the bias of a small window"),
    "pr_k": (_NUMBERS, "participation ratio of the cached keys of each KV head alone, before RoPE"),
    "pr_k_corrected": (_NUMBERS, "the same without the bias of a small window"),
    "angle_target": (
        pa.float64(),
        "mean principal angle, in degrees, between the late values of the fixed continuation and those that it has "
        "after the natural target",
    ),
    "angle_source": (pa.float64(), "the same against the natural source"),
    "attention_entropy": (pa.float64(), "entropy of attention over log(keys), fixed continuation, mean over all heads"),
    "attention_sinks": (pa.float64(), "attention on the first four slots; the same mean"),
    "attention_template": (pa.float64(), "attention on what precedes the user's words"),
    "attention_body": (pa.float64(), "attention on the user's words"),
    "attention_trailer": (pa.float64(), "attention on what follows the user's words"),
    "attention_generated": (pa.float64(), "attention on tokens after the prompt"),
    "attention_own": (pa.float64(), "attention on the receiving prompt's own slots, sinks left out"),
    "attention_patched": (pa.float64(), "attention on slots that were put in, sinks left out"),
    "attention_marked": (pa.float64(), "attention on the slots the phase marks, such as self-referential words"),
    "attention_marked_lift": (pa.float64(), "attention on a marked slot over that on a slot of the body, on average"),
    "js_pull": (pa.float64(), "JS(this, A) - JS(this, B) of next-token distributions at fixed positions, nats"),
    "repetition": (pa.float64(), "repetition_4"),
    "repetition_1": (pa.float64(), "share of repeated tokens"),
    "repetition_2": (pa.float64(), "share of repeated token 2-grams"),
    "repetition_4": (pa.float64(), "share of repeated token 4-grams"),
    "repetition_8": (pa.float64(), "share of repeated token 8-grams"),
    "coherent": (
        pa.bool_(),
        "whether nll_target and repetition are within the natural runs' limits; null in calibration",
    ),
    "cache_checksum_before": (pa.string(), "checksum of the trial's cache before it was used"),
    "cache_checksum_after": (pa.string(), "the same after decoding and all readouts"),
    "error": (pa.string(), "what went wrong with this trial; null if nothing did"),
}
"""Every column of a trial row: its type and meaning. This is the documentation of the file format."""

ATTENTION_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "trial_id": (pa.string(), "the trial; see its row for phase, condition and pair"),
    "stage": (pa.string(), "; ".join(f"'{name}': {about}" for name, about in STAGES.items())),
    "layer": (pa.int16(), "layer, from 0"),
    "head": (pa.int16(), "query head, from 0"),
    "queries": (pa.int32(), "queries counted"),
    **{name: (pa.float32(), about) for name, about in STATISTICS.items()},
}
"""Every column of a row of attention/*.parquet, a mean over queries; null where no query has the statistic."""

ATTENTION_SCHEMA = pa.schema([pa.field(k, t, metadata={"doc": doc}) for k, (t, doc) in ATTENTION_COLUMNS.items()])
TRIAL_SCHEMA = pa.schema([pa.field(k, t, metadata={"doc": doc}) for k, (t, doc) in TRIAL_COLUMNS.items()])
NEEDED = ("trial_id", "phase", "condition", "pair_id")
NEEDED_OF_HEADS = ("trial_id", "stage", "layer", "head")
"""Columns that every version stored, and without which a row means nothing."""


class ModelRecord(Frozen):
    """The model of a run. The hashes name weights, tokenizer, chat template, and the text that the template wrote
    around the user's words (None without a template, and in records of runs that did not store it)."""

    name: str
    architecture: str
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    dtype: str
    device: str
    weights_sha256: str
    tokenizer_sha256: str
    template_sha256: str | None
    scaffold_sha256: str | None = None


class OtherModel(Frozen):
    """A further model of a run: what `RunRecord` says of the first, for one key of the protocol's `models`."""

    model: ModelRecord
    check: list[dict[str, Any]] | None = None
    noise_floor: dict[str, Any] | None = None
    coherence_limits: dict[str, float] | None = None


class RunRecord(Frozen):
    """run.json: how a run was made. What `differs_from` compares a resumed run must share; the rest is for the reader.

    `protocol_sha256` is of what the protocol says, not of where it lies; `bank_sha256` and `scorer_sha256` of the bytes
    of the bank's files, and of the lexicon's or the scoring function's.
    """

    kvpatch_version: str
    protocol: dict[str, Any]
    protocol_sha256: str
    bank_sha256: str
    scorer_sha256: str | None = None
    model: ModelRecord
    seed: int
    n: int | None
    phases: list[str]
    planned_by_phase: dict[str, int]
    versions: dict[str, str]
    git: dict[str, Any]
    hardware: dict[str, Any]
    command: list[str]
    created: str
    finished: str | None = None
    seconds: float = 0.0
    tokens: int = 0
    skipped: list[dict[str, Any]] = Field(default_factory=list)
    dropped_pairs: list[str] = Field(default_factory=list)
    check: list[dict[str, Any]] | None = None
    noise_floor: dict[str, Any] | None = None
    engine: dict[str, dict[str, Any]] = Field(default_factory=dict)
    coherence_limits: dict[str, float] | None = None
    other_models: dict[str, OtherModel] = Field(default_factory=dict)
    validation: dict[str, Any] | None = None

    @property
    def planned(self) -> int:
        """Trials of all phases that were asked for."""
        return sum(self.planned_by_phase.values())

    def continued(self, stored: RunRecord) -> RunRecord:
        """The stored record of the same run, with what this one asks for beside what was asked before.

        Raises:
            StoreError: where the two are not the same run.
        """
        if reason := self.differs_from(stored):
            raise StoreError(f"the directory belongs to another run: it has {reason}; give another --out")
        return stored.model_copy(
            update={
                "other_models": self.other_models | stored.other_models,
                "phases": list(dict.fromkeys([*stored.phases, *self.phases])),
                "planned_by_phase": stored.planned_by_phase | self.planned_by_phase,
                "skipped": [*stored.skipped, *(s for s in self.skipped if s not in stored.skipped)],
                "dropped_pairs": list(dict.fromkeys([*stored.dropped_pairs, *self.dropped_pairs])),
            }
        )

    def differs_from(self, other: RunRecord) -> str | None:
        """What of the other record keeps the two from being the same run, or None."""
        if self.protocol_sha256 != other.protocol_sha256:
            return "another protocol (or a changed one)"
        if self.bank_sha256 != other.bank_sha256:
            return "another prompt bank (or a changed one)"
        if self.scorer_sha256 != other.scorer_sha256:
            return "another lexicon or scorer (or a changed one)"
        pairs = [(self.model, other.model)]
        pairs += [
            (self.other_models[k].model, o.model) for k, o in other.other_models.items() if k in self.other_models
        ]
        for mine, theirs in pairs:
            for key in ("weights_sha256", "tokenizer_sha256", "template_sha256", "dtype", "device"):
                if getattr(mine, key) != getattr(theirs, key):
                    return f"another model ({key.removesuffix('_sha256')} of {theirs.name})"
            scaffolds = {mine.scaffold_sha256, theirs.scaffold_sha256} - {None}
            if len(scaffolds) > 1:
                return (
                    f"other prompts: the chat template of {theirs.name} renders other words around the prompt than "
                    "when the run began (it writes the date?)"
                )
        if self.seed != other.seed:
            return f"seed {other.seed}"
        if self.n != other.n:
            return f"n={'as planned' if other.n is None else other.n}"
        return None


class Store:
    """One run directory."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.trials = self.directory / "trials"
        self.attention = self.directory / "attention"
        self.index = self.directory / "parts.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory, made if need be, against other processes.

        Raises:
            StoreError: where another process holds it, or it can't be written.
        """
        with _explained(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.directory.is_dir() and not self._is_ours():
                raise StoreError(f"{self.directory} holds other files; give an empty or a new directory")
            lock = filelock.FileLock(self.directory / ".lock", timeout=0.2)
            try:
                lock.acquire()
            except filelock.Timeout:
                raise StoreError(f"{self.directory} is in use by another kvpatch process") from None
        try:
            yield
        finally:
            lock.release()

    def _is_ours(self) -> bool:
        names = {p.name for p in self.directory.iterdir()}
        # A process killed while it wrote run.json leaves only its unfinished copy.
        return "run.json" in names or not names - {".lock", "trials", "attention", ".run.json.tmp"}

    def read_record(self) -> RunRecord:
        """run.json.

        Raises:
            StoreError: where there is none, or it is damaged.
        """
        path = self.directory / "run.json"
        try:
            return RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError(f"{self.directory} is not a run directory: it has no run.json") from None
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} can't be read: {str(error).splitlines()[0]}") from error

    def has_record(self) -> bool:
        """Whether a run was started here."""
        return (self.directory / "run.json").exists()

    def write_record(self, record: RunRecord) -> None:
        """Write run.json."""
        self.write_text("run.json", record.model_dump_json(indent=1) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Write a file of the directory atomically.

        Raises:
            StoreError: where it can't be written; what was there before stays.
        """
        path = self.directory / name
        with _explained(self.directory):
            _atomically(path, text.encode("utf-8"))
        return path

    def append(self, name: str, rows: Iterable[dict[str, Any]], attention: pa.Table | None = None) -> None:
        """Store the rows of one batch as a part, data before index; `attention` is of `ATTENTION_SCHEMA`.

        Raises:
            StoreError: where they can't be written; nothing stored before is lost.
        """
        table = pa.Table.from_pylist(list(rows), schema=TRIAL_SCHEMA)
        data = _parquet(table)
        part = Part(part=f"{name}.parquet", rows=len(table), sha256=hashlib.sha256(data).hexdigest())
        with _explained(self.directory):
            if attention is not None:
                of_heads = _parquet(attention.cast(ATTENTION_SCHEMA))
                sha256 = hashlib.sha256(of_heads).hexdigest()
                part = part.model_copy(update={"attention_sha256": sha256, "attention_rows": len(attention)})
                self.attention.mkdir(exist_ok=True)
                _atomically(self.attention / part.part, of_heads)
            self.trials.mkdir(exist_ok=True)
            _atomically(self.trials / part.part, data)
            kept = [other for other in self.parts() if other.part != part.part]
            _atomically(self.index, b"".join(each.line() for each in (*kept, part)))

    def parts(self) -> list[Part]:
        """What parts.jsonl names; see `parts.read_index`.

        Raises:
            StoreError: naming a line that is no entry.
        """
        return read_index(self.index)

    def done(self) -> set[str]:
        """Names of the batches that are stored, each part checked.

        Raises:
            StoreError: naming a part that is missing or damaged.
        """
        parts = self._each_once()
        for part in parts:
            self.check(part)
        return {part.batch for part in parts}

    def _each_once(self) -> list[Part]:
        parts = self.parts()
        refuse_copies(parts)
        return parts

    def check(self, part: Part) -> None:
        """Check that the files of a part are what was stored; costs little where they were checked before.

        Raises:
            StoreError: naming a file that is missing or damaged.
        """
        check_file(self.trials / part.part, part.sha256, part.rows, TRIAL_SCHEMA, NEEDED)
        if part.attention_sha256 is not None:
            place = self.attention / part.part
            check_file(place, part.attention_sha256, part.attention_rows, ATTENTION_SCHEMA, NEEDED_OF_HEADS)

    def rows_of(self, part: Part, columns: Sequence[str] | None = tuple(TRIAL_COLUMNS)) -> pa.Table:
        """The trials of one part: the named columns, or with None all that its file holds, unknown ones too.

        Raises:
            StoreError: where it is missing or damaged.
        """
        return read_file(self.trials / part.part, part.sha256, part.rows, TRIAL_SCHEMA, NEEDED, columns)

    def part(self, batch: str) -> Part:
        """The part in which a batch is stored.

        Raises:
            StoreError: where parts.jsonl names none.
        """
        found = next((part for part in self.parts() if part.batch == batch), None)
        if found is None:
            raise StoreError(f"{self.index} names no part {batch}.parquet; run again to store its trials")
        return found

    def read_part(self, name: str) -> list[dict[str, Any]]:
        """The rows of one stored batch.

        Raises:
            StoreError: where it is missing or damaged.
        """
        return self.rows_of(self.part(name)).to_pylist()

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All stored trials, in the order they were stored; all columns, or those that are named.

        Raises:
            StoreError: where there are none, or a part is missing or damaged.
        """
        tables = list(self.tables(columns))
        if not tables:
            raise StoreError(f"{self.directory} holds no trials yet")
        return pa.concat_tables(tables)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The stored trials part by part, as `read` gives them.

        Raises:
            StoreError: where a part is missing or damaged.
        """
        for part in self._each_once():
            yield self.rows_of(part, tuple(TRIAL_COLUMNS) if columns is None else columns)

    def read_attention(
        self, columns: Sequence[str] | None = None, stage: str | None = None, batches: Container[str] | None = None
    ) -> pa.Table:
        """What every head did in every trial that was watched; no rows where none was.

        All columns, stages and batches, or those that are named.

        Raises:
            StoreError: where a part is missing or damaged.
        """
        columns = tuple(ATTENTION_COLUMNS) if columns is None else columns
        tables = [pa.schema([ATTENTION_SCHEMA.field(name) for name in columns]).empty_table()]
        for part in self._each_once():
            if part.attention_sha256 is None or (batches is not None and part.batch not in batches):
                continue
            stored = (self.attention / part.part, part.attention_sha256, part.attention_rows)
            table = read_file(*stored, ATTENTION_SCHEMA, NEEDED_OF_HEADS, columns)
            tables.append(table if stage is None else table.filter(pc.field("stage") == stage))
        return pa.concat_tables(tables)


def _parquet(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _atomically(path: Path, data: bytes) -> None:
    """Write beside the place, flush to the disk, move there; a failure leaves what was there before."""
    part = path.with_name(f".{path.name}.tmp")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{directory} can't be written: {error.strerror or error}; what was stored is kept") from error
