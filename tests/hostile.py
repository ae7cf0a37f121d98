"""Sixty texts that would run, hide, reorder or break something if shown as they are, and a run full of them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from kvpatch.errors import HIDING
from kvpatch.protocols.schema import Protocol
from kvpatch.store.directory import Store
from synthetic import dec7, model_record, record_of, run_parts

RUN = "window.ran = 1"
HOSTILE = [
    # What would run as markup
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"</SCRIPT ><script>{RUN}//",
    f"<!--<script>{RUN}</script>-->",
    f"--><script>{RUN}</script>",
    f"<img src=x onerror='{RUN}'>",
    f'"><img src=x onerror="{RUN}">',
    f"'><svg onload='{RUN}'>",
    f"<svg><script>{RUN}</script></svg>",
    f"<svg><animate onbegin='{RUN}' attributeName=x dur=1s>",
    f"<body onload='{RUN}'>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<details open ontoggle='{RUN}'>",
    f"<input autofocus onfocus='{RUN}'>",
    f"<a href='javascript:{RUN}'>link</a>",
    f"javascript:{RUN}",
    f"JaVaScRiPt&colon;{RUN}",
    f"data:text/html,<script>{RUN}</script>",
    f"[link](javascript:{RUN})",
    "<style>*{display:none}</style>",
    "<link rel=stylesheet href=http://localhost:1/x.css>",
    "<meta http-equiv=refresh content='0;url=about:blank'>",
    "<base href='http://localhost:1/'>",
    f"</textarea></title></style><script>{RUN}</script>",
    f"<math><mtext></table><img src=x onerror='{RUN}'>",
    f"&lt;script&gt;{RUN}&lt;/script&gt;",
    f"&#60;script&#62;{RUN}&#60;/script&#62;",
    f"]]><script>{RUN}</script>",
    f"\\u003cscript\\u003e{RUN}\\u003c/script\\u003e",
    f"' onmouseover='{RUN}' x='",
    f'" style="position:fixed;inset:0" onclick="{RUN}',
    # What a template or an expression would carry out
    "{{ 7 * 7 }} {% for x in range(9) %}{{ x }}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    f"${{{RUN}}} #{{{RUN}}}",
    f"datum['value'] || ({RUN})",
    f"'] + ({RUN}) + datum['",
    "signal.constructor.constructor('window.ran = 1')()",
    "__proto__",
    "constructor",
    f"\\'; {RUN}; //",
    f"%3Cscript%3E{RUN}%3C/script%3E",
    # What hides or reorders
    "\u202eabc\u202c \u202dabc\u202c \u202aabc\u202c \u202babc\u202c",
    "\u2066abc\u2069 \u2067abc\u2069 \u2068abc\u2069",
    "a\u200eb\u200fc\u061cd",
    "zero\u200bwidth\u2060word\ufeffand\u00adhyphen",
    "\u2061\u2062\u2063\u2064 \ufff9a\ufffab\ufffb \u180e",
    "tags \U000e0041\U000e0042\U000e007f end",
    "line\u2028separators\u2029here",
    "nul\x00bell\x07back\x08delete\x7f",
    "\x1b[2J\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b31m",
    "carriage\rreturn\x0bvertical\x0cfeed",
    # What is wide, tall, or written another way
    "w" * 5_000,
    "wide\u00a0" * 700,
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd abc 123",
    "Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319\u0324\u031e\u0349\u035a\u032f\u031e\u0320algo" * 9,
    "\u1100\u1161\u11a8" * 300,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466" * 40,
    "\uff1cscript\uff1e \u2215 \u02ba",
    "tab\there\nline\n\n\n\nfeed",
    "https://example.com/?a=1&b=<2>#" + "x" * 900,
]  # fmt: skip
assert len(HOSTILE) == 60
FREE = ("title", "question", "about", "claim", "expected")
"""Keys of a protocol whose text is free."""
TEXTS = ("text", "source_text", "target_text", "error", "stopped")
NAMES = ("pair_id", "source_id", "target_id")


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f]")


def hidden(texts: list[str]) -> list[str]:
    """Texts that hold a character which nobody would see."""
    return [text for text in texts if HIDING.search(text) or _CONTROL.search(text)]


def write_hostile_run(directory: Path) -> Store:
    """A run of which every free text of protocol, record and trials is one of the sixty, each in its turn."""
    turns = itertools.cycle(HOSTILE)

    def filled(tree: Any) -> Any:
        if isinstance(tree, dict):
            free = {key: next(turns) for key in FREE if isinstance(tree.get(key), str)}
            return {key: filled(value) for key, value in tree.items()} | free
        return [filled(value) for value in tree] if isinstance(tree, list) else tree

    protocol = Protocol.as_stored(filled(dec7().model_dump(mode="json", by_alias=True)))
    store, parts = Store(directory), list(run_parts(protocol, 8, 1, 2, phases=["1", "4"]))
    planned: dict[str, int] = {}
    model = model_record(HOSTILE[0] + HOSTILE[41], HOSTILE[5], 30, 3)
    names: dict[str, str] = {}
    with store.locked():
        for name, rows in parts:
            for row in rows:
                told = {key: next(turns) for key in TEXTS}
                told["error"] = told["error"] if row["error"] else None  # failed trials have no readouts
                # What was one name stays one, so that pairs stay pairs.
                told |= {key: names.setdefault(row[key], f"{len(names)} {next(turns)[:200]}") for key in NAMES}
                row |= told
                planned[row["phase"]] = planned.get(row["phase"], 0) + 1
            store.append(name, rows)
        free = {f"{place}": text for place, text in enumerate(HOSTILE)}
        changes = {"git": {"commit": HOSTILE[3], "dirty": False}, "hardware": free, "versions": free, "model": model}
        changes |= {"command": HOSTILE, "skipped": [], "kvpatch_version": HOSTILE[1]}
        store.write_record(record_of(protocol, planned, **changes))
    return store
