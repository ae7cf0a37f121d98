"""Every name in a protocol that its own keys can't vouch for: readouts, groups of the bank, files, verdicts.

What a name should be is known before anything is loaded, so a misspelt one is told then, with the nearest right one,
and not after the last trial. The schema itself checks names that the protocol defines (conditions, phases, hypotheses).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import get_args

from kvpatch.errors import ProtocolError, ProtocolMistakes
from kvpatch.files import is_directory, is_file, leaves
from kvpatch.prompts.bank import Bank, BankMistakes, load_bank, shipped_banks
from kvpatch.protocols.conditions import ROLES
from kvpatch.protocols.hypotheses import Hypothesis, Misplaced, Variable
from kvpatch.protocols.schema import PLAIN, Pairing, Phase, Protocol
from kvpatch.readouts.scorer import names_code, read_scorer
from kvpatch.specs.attention import statistic_of
from kvpatch.specs.nearest import instead, nearest
from kvpatch.specs.readouts import Readout, readouts
from kvpatch.store.columns import TRIAL_COLUMNS

Loc = tuple[str | int, ...]
_ASKED = {
    "attention": "attention: true",
    "attention.marked": "attention: {marked: ...}",
    "geometry": "geometry: true",
}
"""What a readout asks of its phase, as the protocol says it."""


def wrong_names(protocol: Protocol) -> Iterator[Misplaced]:
    """What is wrong in what a protocol says, files left aside."""
    yield from wrong_readouts(protocol)
    yield from _roles_that_a_phase_lacks(protocol)
    yield from _wrong_expectations(protocol)


def wrong_readouts(protocol: Protocol) -> Iterator[Misplaced]:
    """Readouts that there are not, that their phase does not measure, or that have no logarithm where one is taken."""
    for place, h in enumerate(protocol.hypotheses):
        at: Loc = ("hypotheses", place)
        phase = protocol.phases.get(h.phase)
        named: list[tuple[Hypothesis | Variable, Loc]] = [(h, ()), *h.others()]
        for variable, loc in named:
            yield from _wrong_readout(variable, phase, h.phase, (*at, *loc), protocol.readouts.semantic is not None)
        if h.ranked_with is not None:
            beside = Variable(contrast=h.conditions[0], readout=h.ranked_with)
            for wrong in _wrong_readout(beside, phase, h.phase, at, protocol.readouts.semantic is not None):
                yield Misplaced(str(wrong), *at, "ranked_with")
        own = readouts().get(h.readout)
        if own and h.kind.measures == "heads" and statistic_of(own) is None:
            of_heads = ", ".join(r.name for r in readouts().values() if statistic_of(r) is not None)
            yield Misplaced(f"single heads have no {h.readout!r}; test {h.test!r} reads {of_heads}", *at, "readout")
        if own and own.asks not in (None, "semantic") and h.margin is not None and h.margin.natural_gap is not None:
            yield Misplaced(
                f"the calibration pairs have no {h.readout!r}, so that the natural gap is not known; "
                "give the margin as dz or value",
                *at, "margin", "natural_gap",
            )  # fmt: skip


def _wrong_readout(
    variable: Hypothesis | Variable, phase: Phase | None, phase_name: str, at: Loc, is_scored: bool
) -> Iterator[Misplaced]:
    name = variable.readout
    readout = readouts().get(name)
    if readout is None:
        what = f"column {name!r} measures no outcome" if name in TRIAL_COLUMNS else f"no readout {name!r}"
        yield Misplaced(f"{what}; {instead(name, readouts())}", *at, "readout")
        return
    if readout.asks == "semantic":
        if not is_scored:
            told = "the protocol does not measure 'semantic_score'; give it 'readouts: {semantic: recursion}'"
            yield Misplaced(told, *at, "readout")
    elif phase is not None and not _is_measured(readout, phase):
        wanted = _ASKED[readout.asks or ""]
        yield Misplaced(f"phase {phase_name!r} does not measure {name!r}; give the phase '{wanted}'", *at, "readout")
    if variable.transform == "log" and not readout.is_positive:
        with_log = ", ".join(other.name for other in readouts().values() if other.is_positive)
        yield Misplaced(
            f"{name!r} can be 0 or below, where there is no logarithm; leave 'transform' out (it goes with {with_log})",
            *at, "transform",
        )  # fmt: skip


def _is_measured(readout: Readout, phase: Phase) -> bool:
    if readout.asks is None:
        return True
    if readout.asks == "geometry":
        return phase.geometry
    watched = phase.watched
    return watched is not None and (readout.asks == "attention" or watched.marked is not None)


def _roles_that_a_phase_lacks(protocol: Protocol) -> Iterator[Misplaced]:
    """Conditions that take a prompt which the pairs of their phase never have: their trials would all be left out."""
    lent_anywhere = {role for pairing in protocol.pairings for role in pairing.also}
    for name, phase in protocol.phases.items():
        lent = (phase.pairing or protocol.pairing).also
        for key in ("conditions", "controls"):
            for place, condition in enumerate(getattr(phase, key)):
                made = protocol.conditions.get(condition)
                roles = () if made is None else (made.from_, made.text_of)
                for role in roles:
                    if role in lent_anywhere and role not in (*ROLES, *lent):
                        there = ", ".join(lent) or "none"
                        yield Misplaced(
                            f"condition {condition!r} takes a {role!r} prompt, and the pairing of phase {name!r} lends "
                            f"none; name it under 'also', which now has {there}",
                            "phases", name, key, place,
                        )  # fmt: skip


def _wrong_expectations(protocol: Protocol) -> Iterator[Misplaced]:
    if not protocol.expected:
        return
    from kvpatch.specs.organisms import ORGANISMS
    from kvpatch.specs.test_kinds import Word

    words = [*get_args(Word), "slight"]
    for organism, verdicts in protocol.expected.items():
        if organism not in ORGANISMS:
            yield Misplaced(f"no organism {organism!r}; {instead(organism, ORGANISMS)}", "expected", organism)
        for verdict in verdicts:
            for word in verdict.split(" or "):
                if word not in words:
                    yield Misplaced(f"no verdict {word!r}; {instead(word, words)}", "expected", organism, verdict)


@dataclass(frozen=True)
class Planned:
    """What of a protocol is meant to be run: pairs per condition, each phase's own if None, and phases, all if None."""

    n: int | None = None
    phases: Sequence[str] | None = None


def wrong_files(
    protocol: Protocol, *, must_be_there: bool, may_leave: bool = False, planned: Planned | None = None
) -> Iterator[Misplaced]:
    """What is wrong with the lexicon and the bank that a protocol names, and with the names in it that the bank knows.

    must_be_there: whether a file that can't be found is wrong. Whoever only decides a run again needs neither file; but
    a name that is all but a shipped one is told in any case. may_leave: whether they may lie outside the protocol's own
    folder; one that may not is not looked at, and is wrong where it must be there. planned: a run for which the bank
    must have prompts enough, whatever the tokenizer.
    """
    outside = [] if may_leave else _outside(protocol)
    if outside:
        if must_be_there:
            yield from outside
        return
    try:
        bank = load_bank(protocol.bank, protocol.folder)
    except ProtocolError as error:
        is_there = _is_a_directory(protocol)
        if must_be_there or is_there or nearest(protocol.bank, shipped_banks()):
            for line in error.lines if isinstance(error, ProtocolMistakes) else (str(error),):
                yield Misplaced(line, "bank")
        if isinstance(error, BankMistakes):
            yield from _wrong_groups(protocol, protocol.bank, error.groups)
            if must_be_there:
                yield from _wrong_mode(protocol, protocol.bank, error.modes)
        if is_there:
            yield from _wrong_lexicon(protocol, must_be_there)
        return  # where the bank is missing, the lexicon mostly is too: the folder is wrong
    groups = sorted({name for prompt in bank.prompts for name in (prompt.group, prompt.level) if name})
    wrong = list(_wrong_groups(protocol, bank.name, groups))
    yield from wrong
    # Where no mode is given it is called after the sources, whose wrong name is told of once.
    is_told = protocol.mode == protocol.pairing.sources and any(each.loc == ("pairing", "sources") for each in wrong)
    if must_be_there and not is_told:
        yield from _wrong_mode(protocol, bank.name, sorted({c.mode for c in bank.continuations}))
    if planned is not None and not wrong:
        yield from _too_few_prompts(protocol, bank, planned)
    yield from _wrong_lexicon(protocol, must_be_there)


def _outside(protocol: Protocol) -> list[Misplaced]:
    """The bank, the lexicon and further models, where they lie outside the protocol's own folder: a protocol from
    elsewhere should not have other files of this machine read, and quoted in messages and in the report. A bank or a
    model by its absolute path, which only someone who knows this machine can have written, is taken as it is meant."""
    folder, lexicon = protocol.folder, protocol.readouts.lexicon
    if folder is None:
        return []
    found: list[Misplaced] = []
    told = "lies outside the protocol's folder; move it there, or allow it with --allow-outside if you trust the file"
    is_meant = Path(protocol.bank).is_absolute() or protocol.bank in shipped_banks()
    if not is_meant and leaves(folder, protocol.bank, "*.yaml"):
        found.append(Misplaced(f"the bank {protocol.bank!r} {told}", "bank"))
    is_code = names_code(lexicon)
    file = lexicon.rpartition(":")[0] if is_code else lexicon
    if lexicon not in _shipped_lexicons() and (not is_code or file.endswith(".py")) and leaves(folder, file):
        found.append(Misplaced(f"the lexicon {lexicon!r} {told}", "readouts", "lexicon"))
    for key, name in protocol.models.items():
        if name.startswith("~") or ".." in Path(name).parts:
            found.append(Misplaced(f"the model {name!r} {told}", "models", key))
    return found


def _is_a_directory(protocol: Protocol) -> bool:
    return is_directory(Path(protocol.folder or "", protocol.bank))


def _wrong_lexicon(protocol: Protocol, must_be_there: bool) -> Iterator[Misplaced]:
    name = protocol.readouts.lexicon
    is_module = names_code(name) and not name.rpartition(":")[0].endswith(".py")
    if is_module:
        return  # to find it, its package would run
    try:
        read_scorer(name, protocol.folder)
    except ProtocolError as error:
        path = Path(protocol.folder or "", name)
        if must_be_there or is_file(path) or nearest(name, _shipped_lexicons()):
            for line in error.lines if isinstance(error, ProtocolMistakes) else (str(error),):
                yield Misplaced(line, "readouts", "lexicon")


def _shipped_lexicons() -> list[str]:
    folder = files("kvpatch.readouts") / "lexicons"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir())


def _wrong_groups(protocol: Protocol, bank: str, known: Sequence[str]) -> Iterator[Misplaced]:
    places: list[tuple[Pairing, Loc]] = [(protocol.pairing, ("pairing",))]
    for name, phase in protocol.phases.items():
        if phase.pairing is not None:
            places.append((phase.pairing, ("phases", name, "pairing")))
    for pairing, at in places:
        named: list[tuple[str, Loc]] = [(pairing.targets, ("targets",)), (pairing.sources, ("sources",))]
        named += [(group, ("also", place)) for place, group in enumerate(pairing.also)]
        for group, loc in named:
            if group not in known:
                told = instead(group, known, "it has")
                yield Misplaced(f"bank {bank!r} has no group or level {group!r}; {told}", *at, *loc)


def _too_few_prompts(protocol: Protocol, bank: Bank, planned: Planned) -> Iterator[Misplaced]:
    """Phases that want more pairs than the bank can give on any model. A phase's own pairing takes what it gets."""
    how, held_out = protocol.pairing, protocol.calibration.pairs
    targets, sources = len(bank.group(how.targets)), len(bank.group(how.sources))
    most = max(0, min(targets, sources) - held_out)
    for name, phase in protocol.phases.items():
        wanted = planned.n or phase.n
        is_asked = planned.phases is None or name in planned.phases
        if is_asked and phase.pairing is None and wanted > most:
            yield Misplaced(
                f"phase {name} wants n={wanted}, and bank {bank.name!r} gives {most} pairs at most ({targets} targets "
                f"and {sources} sources, less {held_out} held out for calibration); it needs {wanted + held_out} of "
                "each, or a smaller n",
                "phases", name, "n",
            )  # fmt: skip


def _wrong_mode(protocol: Protocol, bank: str, modes: Sequence[str]) -> Iterator[Misplaced]:
    for mode in (protocol.mode, PLAIN):
        if mode not in modes:
            told = instead(mode, modes, "it has")
            yield Misplaced(f"bank {bank!r} has no continuations of mode {mode!r}; {told}", "mode")
