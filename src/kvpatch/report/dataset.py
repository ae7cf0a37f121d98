"""A run as a dataset of the Hugging Face hub: Parquet files, and a card that says what they hold.

`datasets.load_dataset(FOLDER)` reads the folder as it is, and `load_dataset(FOLDER, "verdicts")` its verdicts. The card
is the folder's README.md; its head names the files of each configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from kvpatch.errors import visible
from kvpatch.files import write_whole
from kvpatch.store.columns import ATTENTION_COLUMNS, TRIAL_COLUMNS
from kvpatch.store.directory import Store
from kvpatch.verdicts.outcome import Outcome

CARD = "README.md"


def write_dataset(store: Store, outcome: Outcome, folder: Path) -> list[Path]:
    """Write the trials of a run, its verdicts and, where attention was watched, what the heads did.

    Args:
        store: the run. outcome: its verdicts. folder: made where it is missing; files of the same names are replaced.
    Returns:
        The files, the card last.
    Raises:
        StoreError: where a part is missing or damaged. OSError: where the folder can't be written.
    """
    tables = {"trials": store.read(), "verdicts": _verdicts(outcome)}
    if (attention := store.read_attention()).num_rows:
        tables["attention"] = attention
    (folder / "data").mkdir(parents=True, exist_ok=True)
    written = []
    for name, table in tables.items():
        written.append(folder / "data" / f"{name}.parquet")
        pq.write_table(table, written[-1], compression="zstd")
    write_whole(folder / CARD, _card(store, outcome, tables).encode())
    return [*written, folder / CARD]


def _verdicts(outcome: Outcome) -> pa.Table:
    """A row a hypothesis; what is neither text, number nor truth value is written as YAML."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, (str, int, float, bool)):
            return value
        return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).strip()

    rows = [{name: plain(value) for name, value in v.model_dump(mode="json").items()} for v in outcome.verdicts]
    return pa.Table.from_pylist(rows)


def _card(store: Store, outcome: Outcome, tables: dict[str, pa.Table]) -> str:
    record = store.read_record()
    head = {
        "pretty_name": f"{outcome.protocol.protocol} on {record.model.name}",
        "tags": ["kvpatch", "interpretability", "kv-cache"],
        "configs": [
            {"config_name": name, "data_files": f"data/{name}.parquet"}
            | ({"default": True} if name == "trials" else {})
            for name in tables
        ],
    }
    columns = {"trials": TRIAL_COLUMNS, "attention": ATTENTION_COLUMNS}
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {_line(outcome.protocol.title)}",
        "",
        f"A run of the protocol `{outcome.protocol.protocol}` by kvpatch {record.kvpatch_version} on "
        f"`{_line(record.model.name)}`. It asks: {_line(outcome.protocol.question)}",
        "",
        f"**Answer.** {_line(outcome.told.short)}",
        "",
        "| configuration | rows | one row is |",
        "|---|---|---|",
        f"| `trials` | {tables['trials'].num_rows} | one trial: a cache, what the model wrote, and its readouts |",
        f"| `verdicts` | {tables['verdicts'].num_rows} | one hypothesis with its estimate, interval, p and verdict |",
    ]
    if "attention" in tables:
        lines.append(f"| `attention` | {tables['attention'].num_rows} | one head of one layer in one trial |")
    for name, meanings in columns.items():
        if name in tables:
            lines += ["", f"## Columns of `{name}`", "", "| column | meaning |", "|---|---|"]
            lines += [f"| `{column}` | {_line(meanings[column][1])} |" for column in tables[name].column_names]
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    """Text in one line of Markdown that no markup of it leaves."""
    plain = " ".join(visible(text).split())
    return "".join(f"\\{mark}" if mark in "\\`*_[]<>|#" else mark for mark in plain)
