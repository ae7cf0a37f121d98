"""A pre-registration: what a protocol is going to ask, in one file that is kept elsewhere before the first trial.

Markdown for a person, with one block of YAML for a machine. The block holds the protocol whole, so that its hash can be
computed from the file alone, and `kvpatch verdicts --registered FILE` holds a run against it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from kvpatch.errors import ProtocolError
from kvpatch.files import NotYaml, bytes_within, read_yaml
from kvpatch.protocols.hypotheses import Hypothesis
from kvpatch.protocols.schema import Pairing, Protocol, calibration_of
from kvpatch.store.record import RunRecord, dumped_sha256
from kvpatch.verdicts.attainable import correction_of, planned_pairs
from kvpatch.verdicts.deviations import stated
from kvpatch.verdicts.margins import calibration_rows, natural_gap
from kvpatch.verdicts.missing import MOST_MISSING
from kvpatch.verdicts.pairs import prepare
from kvpatch.verdicts.prerequisites import ABOUT, COHERENT_SHARE, MOSTLY
from kvpatch.verdicts.specificity import EXPLAINED, LIMIT

FORMAT = "kvpatch-preregistration-1"
"""What the block says that it is. A later form of it gets another number."""
_OPEN, _CLOSE = "```yaml\n", "\n```"


@dataclass(frozen=True)
class Circumstances:
    """What a pre-registration says beside its protocol.

    created: time in ISO 8601. model: what `--model` of the run will be. n: pairs in place of each phase's own. phases:
    those that will be run, None for all. calibration: as `calibration_figures` gives it, None without a run directory.
    """

    created: str
    version: str
    model: str
    bank_sha256: str
    n: int | None = None
    phases: Sequence[str] | None = None
    calibration: Mapping[str, Any] | None = None


def preregistration(protocol: Protocol, around: Circumstances) -> str:
    """The file's text: tables for a person, then the block that holds all of it."""
    block = _block(protocol, around)
    dumped = yaml.safe_dump(block, sort_keys=False, allow_unicode=True, width=120)
    return "\n".join([*_told(protocol, block), "", "## For a machine", "", f"{_OPEN}{dumped}{_CLOSE.strip()}", ""])


def _block(protocol: Protocol, around: Circumstances) -> dict[str, Any]:
    pairs = planned_pairs(protocol, around.n, around.phases)
    asked = [h for h in protocol.hypotheses if h.id in pairs]
    return {
        "format": FORMAT,
        "protocol_sha256": protocol.sha256,
        "created": around.created,
        "kvpatch_version": around.version,
        "model": around.model,
        "other_models": dict(protocol.models),
        "bank": {"name": protocol.bank, "sha256": around.bank_sha256},
        "phases": {
            name: around.n or phase.n
            for name, phase in protocol.phases.items()
            if around.phases is None or name in around.phases
        },
        "families": _families(protocol, asked),
        "hypotheses": [_hypothesis(protocol, h, pairs[h.id]) for h in asked],
        "exclusions": exclusions(protocol),
        "calibration": None if around.calibration is None else dict(around.calibration),
        **stated(protocol, around.n, around.phases),
        "protocol": protocol.model_dump(mode="json", by_alias=True),
    }


def _families(protocol: Protocol, asked: Sequence[Hypothesis]) -> dict[str, dict[str, Any]]:
    sizes = Counter(h.family for h in protocol.hypotheses)
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(h.family for h in asked):
        of_family = protocol.families.get(name)
        out[name] = {
            "alphas": sorted({h.alpha for h in protocol.hypotheses if h.family == name}),
            "hypotheses": sizes[name],
            "correction": correction_of(protocol, name),
            "passes_to": {} if of_family is None else dict(of_family.passes_to),
        }
    return out


def _hypothesis(protocol: Protocol, h: Hypothesis, n: int) -> dict[str, Any]:
    keys = {"id", "claim", "phase", "contrast", "readout", "transform", "test", "direction", "against", "of", "family"}
    given = h.model_dump(mode="json", include=keys | {"margin", "alpha", "needs", "confirmatory"}, exclude_none=True)
    waits = {} if h.needs is not None else {"gate": h.gate, "is_gatekeeper": h.is_gatekeeper}
    return given | waits | {"n": n}


def exclusions(protocol: Protocol) -> list[str]:
    """What keeps a pair, a row, a condition or a hypothesis from counting, one sentence each."""
    out = [_lengths(pairing) for pairing in protocol.pairings]
    for name, phase in protocol.phases.items():
        if phase.having is not None:
            roles = ", ".join(phase.having.roles)
            out.append(
                f"Phase {name} passes over pairs in which a prompt of one of these roles has no slot of the kind that "
                f"it compares: {roles}."
            )
    return [
        *dict.fromkeys(out),
        f"{protocol.calibration.pairs} pairs are held out for calibration, and no test reads them.",
        "A pair counts in a contrast if it has a finite value under each of its conditions.",
        f"A contrast of which a condition lacks more than {MOST_MISSING:.0%} of its planned rows is not interpretable, "
        "unless the verdict is the same with these at the lowest and at the highest value seen.",
        f"A readout of sampled text is not interpretable where a condition has less than {COHERENT_SHARE:.0%} coherent "
        f"outputs beyond chance, unless each has at least {MOSTLY:.0%} and the 95% interval of the largest difference "
        f"between them ends below {ABOUT:g}.",
        f"A contrast of unequally damaged conditions is not interpretable in a readout that a destroyed cache moves by "
        f"more than {LIMIT:g} of the natural gap, unless what differs in damage explains at most {EXPLAINED:g} of it.",
        "Nothing is interpretable on a model that fails the check.",
    ]


def _lengths(pairing: Pairing) -> str:
    told = f"Pairs of {pairing.targets} and {pairing.sources} that differ in tokens by more than "
    told += f"{pairing.max_length_difference:.0%}"
    if pairing.max_partner_difference is not None:
        told += f", or by more than {pairing.max_partner_difference:.0%} from a foreign partner,"
    return f"{told} are dropped and counted."


def calibration_figures(protocol: Protocol, record: RunRecord, trials: pd.DataFrame) -> dict[str, Any]:
    """What a run's calibration pairs fixed: the natural gap of every readout of which a margin, or the bound below
    which an effect counts as none, is a share; coherence limits; specificity. `test_trials` counts the trials of the
    test split that were stored already: a pre-registration that follows them is none.

    Raises:
        ProtocolError: where the run was made with another protocol.
    """
    if record.protocol_sha256 != protocol.sha256:
        raise ProtocolError(
            f"the calibration comes from a run of a protocol with hash {record.protocol_sha256[:12]}, and "
            f"{protocol.protocol} has {protocol.sha256[:12]}; give a run of the same protocol"
        )
    rows = prepare(trials)
    gaps: dict[tuple[str | None, str, str], dict[str, Any]] = {}
    for h in protocol.hypotheses:
        model = protocol.phases[h.phase].model
        if h.kind.measures != "correlation" and (model, h.readout, h.transform) not in gaps:
            own = calibration_rows(protocol, rows, h.phase)
            own = own.loc[(own["split"] != "calibration") | (own["phase"] == calibration_of(model))]
            found = natural_gap(own, h.readout, h.transform)
            told = {"model": model or "own", "readout": h.readout, "transform": h.transform, "at_least": found.value}
            gaps[model, h.readout, h.transform] = told | ({"reason": found.reason} if found.reason else {})
    others = record.other_models.items()
    calibrated = {"own": record.readout_calibration} | {key: other.readout_calibration for key, other in others}
    return {
        "model": record.model.model_dump(mode="json"),
        "seed": record.seed,
        "began": record.created,
        "test_trials": int((rows["split"] == "test").sum()),
        "natural_gaps": list(gaps.values()),
        "coherence_limits": {"own": record.coherence_limits} | {key: o.coherence_limits for key, o in others},
        "specificity": {
            key: {name: of.model_dump(mode="json", exclude={"by_position"}) for name, of in found.readouts.items()}
            for key, found in calibrated.items()
            if found is not None
        },
    }


def _told(protocol: Protocol, block: Mapping[str, Any]) -> list[str]:
    lines = [
        f"# Pre-registration: {protocol.title}", "",
        protocol.question, "",
        "| | |", "|---|---|",
        f"| protocol | {protocol.protocol}, SHA-256 `{block['protocol_sha256']}` |",
        f"| written | {block['created']}, kvpatch {block['kvpatch_version']} |",
        f"| model | {_cell(', '.join([block['model'], *block['other_models'].values()]))} |",
        f"| prompt bank | {_cell(protocol.bank)}, SHA-256 `{block['bank']['sha256']}` |",
        f"| pairs | {', '.join(f'phase {name}: {n}' for name, n in block['phases'].items())} |", "",
        "## How often it may err", "", block["error_statement"], "",
        *(f"- {told}" for told in block["deviations"]), "",
        "## Families", "",
        "| family | alpha | hypotheses | correction | passes its alpha to |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, of in block["families"].items():
        heirs = ", ".join(f"{heir}: {share:g}" for heir, share in of["passes_to"].items()) or "none"
        alphas = ", ".join(f"{alpha:g}" for alpha in of["alphas"])
        lines.append(f"| {name} | {alphas} | {of['hypotheses']} | {of['correction']} | {heirs} |")
    lines += ["", "## Hypotheses", "", "| id | claim | contrast | readout | test | margin | alpha | n | read after |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for h in block["hypotheses"]:
        margin = ", ".join(f"{key} {value:g}" for key, value in h.get("margin", {}).items()) or "none"
        waits = ", ".join(h["needs"]) or "nothing" if "needs" in h else f"gates before {h['gate']}"
        cells = (h["id"], h["claim"], h["contrast"], h["readout"], h["test"], margin, f"{h['alpha']:g}", h["n"], waits)
        lines.append(f"| {' | '.join(_cell(str(cell)) for cell in cells)} |")
    lines += ["", "## Exclusions", "", *(f"- {told}" for told in block["exclusions"]), "", "## Calibration", ""]
    return [*lines, *_calibration_told(block["calibration"])]


def _calibration_told(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["Not measured yet. Margins that are shares of the natural gap follow from the calibration pairs."]
    lines = [
        f"From a run that began {found['began']}, of which {found['test_trials']} test trials were stored already."
    ]
    lines += ["", "| model | readout | natural gap, at least |", "|---|---|---|"]
    for gap in found["natural_gaps"]:
        name = gap["readout"] if gap["transform"] == "none" else f"log {gap['readout']}"
        value = gap["reason"] if gap["at_least"] is None else f"{gap['at_least']:.6g}"
        lines.append(f"| {_cell(gap['model'])} | {name} | {_cell(value)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def read_preregistration(path: Path) -> dict[str, Any]:
    """The block of a pre-registration.

    Raises:
        ProtocolError: where the file can't be read, holds no such block, or its protocol has another hash than it says.
    """
    try:
        text = bytes_within(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ProtocolError(f"the pre-registration {path} can't be read: {reason}") from error
    start = text.rfind(f"\n{_OPEN}")
    body = text[start + 1 + len(_OPEN) :].rsplit(_CLOSE, 1)[0] if start >= 0 else ""
    try:
        block = read_yaml(body)
    except NotYaml as error:
        raise ProtocolError(f"the block of the pre-registration {path} is no YAML: {error}") from error
    if not isinstance(block, dict) or block.get("format") != FORMAT or not isinstance(block.get("protocol"), dict):
        raise ProtocolError(f"{path} is no pre-registration: it has no block of format {FORMAT}")
    found = dumped_sha256(block["protocol"])
    if found != block.get("protocol_sha256"):
        raise ProtocolError(
            f"the pre-registration {path} was changed after it was written: its protocol has hash {found[:12]}, and it "
            f"says {str(block.get('protocol_sha256'))[:12]}"
        )
    return block


def held_against(block: Mapping[str, Any], record: RunRecord) -> tuple[bool, list[str]]:
    """Whether a run has the protocol of a pre-registration, and what is said of it, a sentence each.

    block: as `read_preregistration` gives it.
    """
    own, registered = record.protocol_sha256, str(block["protocol_sha256"])
    if own != registered:
        return False, [
            f"The run's protocol (hash {own[:12]}) is not the pre-registered one (hash {registered[:12]}): no verdict "
            "of it is pre-registered."
        ]
    told = [f"The run's protocol is the pre-registered one (hash {own[:12]}, written {block.get('created')})."]
    if str(block.get("created")) > record.created:
        told.append(f"The pre-registration was written after the run began ({record.created}).")
    bank = block.get("bank", {}).get("sha256")
    if bank != record.bank_sha256:
        told.append(
            f"The prompt bank is another one (hash {record.bank_sha256[:12]}, pre-registered {str(bank)[:12]})."
        )
    planned = {
        name: record.n or phase["n"] for name, phase in record.protocol["phases"].items() if name in record.phases
    }
    for name, n in planned.items():
        if block.get("phases", {}).get(name) != n:
            before = block.get("phases", {}).get(name, "not to be run")
            told.append(f"Phase {name} was run with n={n}; pre-registered: {before}.")
    if left := [name for name in block.get("phases", {}) if name not in planned]:
        told.append(f"Of the pre-registered phases these were not run: {', '.join(left)}.")
    return True, told
