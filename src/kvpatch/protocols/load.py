"""Read a protocol by shipped name or from a YAML file; errors name file, line, key and what was expected."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kvpatch.errors import ProtocolError, ProtocolMistakes
from kvpatch.files import NotYaml, bytes_within, read_yaml, yaml_nodes
from kvpatch.protocols.hypotheses import Misplaced
from kvpatch.protocols.names import Planned, wrong_files, wrong_names
from kvpatch.protocols.readable import as_far_as_readable
from kvpatch.protocols.schema import Protocol
from kvpatch.specs.nearest import instead, nearest
from kvpatch.specs.refusals import sentence
from kvpatch.specs.test_kinds import kinds

MOST_LOOKED_AT = 200
"""Mistakes of a file that are looked at. A file with more is not one that its reader mends line by line."""


def shipped_protocols() -> list[str]:
    """Names of the protocols that come with kvpatch."""
    return sorted(
        p.name.removesuffix(".yaml") for p in files("kvpatch.protocols").iterdir() if p.name.endswith(".yaml")
    )


def load_protocol(
    name: str, *, needs_files: bool = False, may_leave: bool = False, planned: Planned | None = None
) -> Protocol:
    """Read a protocol and check every name in it; its paths are relative to its file, whatever the working directory.

    Args:
        needs_files: whether the bank and the lexicon that it names must be there, as for a run. Where they need not,
            what can be read of them is checked all the same.
        may_leave: whether they may lie outside the folder of the protocol's file.
        planned: n and phases of a run that is meant, for which the bank must have prompts enough.
    Raises:
        ProtocolError: for an unknown name, an unreadable file, or content that is not a protocol; all that is wrong in
            the content is said at once, one line each.
    """
    path = Path(name)
    folder = path.absolute().parent
    if path.suffix in (".yaml", ".yml"):
        try:
            text = bytes_within(path).decode("utf-8")
        except (OSError, ValueError) as error:
            raise ProtocolError(f"{name}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    elif name in shipped_protocols():
        shipped = files("kvpatch.protocols")
        text, folder = shipped.joinpath(f"{name}.yaml").read_text(encoding="utf-8"), Path(str(shipped))
    else:
        raise ProtocolError(f"no protocol {name!r}: shipped are {', '.join(shipped_protocols())}; or give a .yaml file")
    return parse_protocol(text, name, folder, needs_files=needs_files, may_leave=may_leave, planned=planned)


def parse_protocol(
    text: str,
    name: str,
    folder: Path | None = None,
    *,
    needs_files: bool = False,
    may_leave: bool = False,
    planned: Planned | None = None,
) -> Protocol:
    """Read a protocol from YAML text; `name` is what errors call the file, `folder` where it lies.

    Without a folder, the files that it names are not looked at.
    """
    try:
        node, written = yaml_nodes(text)
    except NotYaml as error:
        line = f", line {error.line}" if error.line else ""
        raise ProtocolError(f"{name}{line}: not YAML: {error}") from error
    if not isinstance(written, dict):
        raise ProtocolError(f"{name}, line 1: expected a mapping with the keys of a protocol")
    if repeated := _repeated_key(node):
        raise ProtocolError(f"{name}, line {repeated.start_mark.line + 1}: key {repeated.value!r} is given twice")
    kinds()  # a kind of test from another package that can't be used is no mistake of this file
    loaded = _laid_over(written, name, _place(node, ["extends"]).line) if "extends" in written else written
    asked = _Asked(folder, needs_files, may_leave, planned)
    try:
        wrong: list[Misplaced] = []
        protocol = Protocol.model_validate(loaded, context=wrong)
        found: list[_Mistake] = []
    except ValidationError as error:
        read = as_far_as_readable(loaded)
        shown = (read.errors or error.errors())[:MOST_LOOKED_AT]
        found = _explained([(e, _place(node, _as_written(_loc(e), written, loaded))) for e in shown])
        protocol, wrong = read.protocol, read.names
        if any(_loc(e)[:1] in (["calibration"], ["pairing"]) for e in shown):
            asked = replace(asked, planned=None)  # what decides how many pairs there are is not known yet
        if protocol is not None:
            wrong += [Misplaced(str(each), *read.place(each.loc)) for each in _wrong(protocol, asked)]
            wrong = [each for each in wrong if read.is_new(each)]
        elif folder is not None:
            wrong = _wrong_files_of(loaded, asked)
    else:
        protocol = protocol if folder is None else protocol.placed(folder)
        wrong += _wrong(protocol, asked)
    for each in wrong[:MOST_LOOKED_AT]:
        place = _place(node, _as_written(each.loc, written, loaded))
        found.append((place, place.whole, str(each)))
    if found or protocol is None:
        raise _mistakes(name, found)
    return protocol


@dataclass(frozen=True)
class _Asked:
    """What else is looked at beside a protocol's own content; see `load_protocol`."""

    folder: Path | None
    needs_files: bool
    may_leave: bool
    planned: Planned | None


def _wrong(protocol: Protocol, asked: _Asked) -> list[Misplaced]:
    """What is wrong in the files that a protocol names, and in its names."""
    found: list[Misplaced] = []
    if asked.folder is not None:
        placed = protocol.placed(asked.folder)
        found += wrong_files(placed, must_be_there=asked.needs_files, may_leave=asked.may_leave, planned=asked.planned)
    return [*found, *wrong_names(protocol)]


def _wrong_files_of(loaded: dict[str, Any], asked: _Asked) -> list[Misplaced]:
    """What is wrong in the bank and the lexicon of content of which too little can be read to be a protocol."""
    bank, readouts = loaded.get("bank"), loaded.get("readouts")
    lexicon = readouts.get("lexicon") if isinstance(readouts, dict) else None
    content: dict[str, Any] = {"protocol": "-", "title": "-", "question": "-"}
    content |= {"conditions": {}, "phases": {}, "hypotheses": []}
    content |= {"bank": bank} if isinstance(bank, str) else {}
    content |= {"readouts": {"lexicon": lexicon}} if isinstance(lexicon, str) else {}
    placed = Protocol.model_validate(content, context=[]).placed(asked.folder or Path())
    told = wrong_files(placed, must_be_there=asked.needs_files, may_leave=asked.may_leave)
    return [each for each in told if each.loc in (("bank",), ("readouts", "lexicon"))]


@dataclass(frozen=True)
class _Place:
    """Where a path of keys leads in a file: as far as the file has it, what is left of the path, and the line."""

    there: list[str | int]
    left: list[str | int]
    line: int

    @property
    def whole(self) -> list[str | int]:
        return [*self.there, *self.left]


_Mistake = tuple[_Place, list[str | int], str]
"""Where it is, the keys to show, and what is wrong."""


def _mistakes(name: str, found: Sequence[_Mistake]) -> ProtocolError:
    """All that is wrong with a file, in its order."""
    lines = [
        f"{name}, line {place.line}, {'.'.join(map(str, keys)) or 'protocol'}: {message}"
        for place, keys, message in sorted(found, key=lambda each: each[0].line)
    ]
    return ProtocolMistakes(list(dict.fromkeys(lines)))


def _as_written(loc: Sequence[int | str], written: dict[str, Any], loaded: dict[str, Any]) -> list[int | str]:
    """A path into a protocol as its file has it, which may give a few hypotheses of those of the protocol it extends;
    one that it does not give goes by its id."""
    if written is loaded or len(loc) < 2 or loc[0] != "hypotheses" or not isinstance(loc[1], int):
        return list(loc)
    own = written.get("hypotheses")
    ids = [h.get("id") for h in own if isinstance(h, dict)] if isinstance(own, list) else []
    hypothesis = loaded["hypotheses"][loc[1]]
    name = hypothesis.get("id") if isinstance(hypothesis, dict) else loc[1]
    return ["hypotheses", ids.index(name) if name in ids else str(name), *loc[2:]]


def _laid_over(loaded: dict[str, Any], name: str, line: int) -> dict[str, Any]:
    """The content of a protocol that says only what it changes of the shipped one it `extends`.

    Mappings are merged key by key; a hypothesis of a known id is changed, another one is added.
    """
    base_name = loaded["extends"]
    if base_name not in shipped_protocols():
        told = instead(str(base_name), shipped_protocols(), "shipped are")
        raise ProtocolError(f"{name}, line {line}, extends: no shipped protocol {base_name!r}; {told}")
    base = read_yaml(files("kvpatch.protocols").joinpath(f"{base_name}.yaml").read_text(encoding="utf-8"))
    changes = {key: value for key, value in loaded.items() if key != "extends"}
    hypotheses = changes.get("hypotheses")
    if isinstance(hypotheses, list) and all(isinstance(h, dict) and isinstance(h.get("id"), str) for h in hypotheses):
        known = {h["id"]: h for h in base["hypotheses"]}
        for h in hypotheses:
            known[h.get("id")] = {**known.get(h.get("id"), {}), **h}
        changes["hypotheses"] = list(known.values())
    return _merged(base, changes)


def _merged(base: Any, changes: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    return {**base, **{key: _merged(base.get(key), value) for key, value in changes.items()}}


def _loc(error: Any) -> list[int | str]:
    """The keys that lead to what pydantic found wrong."""
    cause = error.get("ctx", {}).get("error")
    return [*error["loc"], *(cause.loc if isinstance(cause, Misplaced) else ())]


def _explained(found: Sequence[tuple[Any, _Place]]) -> list[_Mistake]:
    """What pydantic found wrong, each once: a misspelt key is also a missing one, and what fits none of several forms
    is wrong in each of them."""
    out: list[_Mistake] = []
    meant: set[tuple[int | str, ...]] = set()
    for error, place in sorted(found, key=lambda each: each[0]["type"] != "extra_forbidden"):
        keys, message = _worded(error, place)
        if error["type"] == "extra_forbidden" and (near := nearest(str(keys[-1]), _known_keys(error, keys[:-1]))):
            meant.add((*keys[:-1], near))
        is_told = any(keys[: len(told)] == told or told[: len(keys)] == keys for _, told, _ in out)
        if not is_told and not (error["type"] == "missing" and tuple(keys) in meant):
            out.append((place, keys, message))
    return out


def _worded(error: Any, place: _Place) -> tuple[list[int | str], str]:
    """The keys to show for one thing that pydantic found wrong, and what was expected there."""
    kind, cause = error["type"], error.get("ctx", {}).get("error")
    if kind == "missing":
        return [*place.there, error["loc"][-1]], "this key is missing"
    if isinstance(cause, Misplaced):
        return place.whole, str(cause)
    if kind == "extra_forbidden":
        known = _known_keys(error, place.there[:-1])
        near = nearest(str(place.there[-1]), known)
        return place.there, f"no such key; expected {near + ', or ' if near else ''}one of {', '.join(known)}"
    near = nearest(str(error["input"]), re.findall(r"'([^']*)'", error["msg"])) if kind == "literal_error" else None
    return place.there, sentence(error) + (f"; did you mean {near!r}?" if near else "")


def _known_keys(error: Any, loc: Sequence[int | str]) -> list[str]:
    """The keys that there are beside one that there is not; settings from outside the package bring their own."""
    return error.get("ctx", {}).get("known") or _keys_at(loc)


@functools.cache
def _schema() -> dict[str, Any]:
    return Protocol.model_json_schema()


def _keys_at(loc: Sequence[int | str]) -> list[str]:
    """The keys that the schema knows for the mapping at a place of a protocol."""
    schema = _schema()
    places = [schema]
    for part in loc:
        places = [step for place in places for step in _steps(schema, place, part)]
    return sorted({key for place in places for form in _forms(schema, place) for key in form.get("properties", {})})


def _steps(schema: dict[str, Any], place: dict[str, Any], part: int | str) -> list[dict[str, Any]]:
    found = []
    for form in _forms(schema, place):
        if isinstance(part, int):
            found.append(form.get("items", {}))
        elif part in form.get("properties", {}):
            found.append(form["properties"][part])
        elif isinstance(form.get("additionalProperties"), dict):
            found.append(form["additionalProperties"])
    return found


def _forms(schema: dict[str, Any], place: dict[str, Any]) -> list[dict[str, Any]]:
    """What a part of a JSON Schema may be, references and alternatives followed."""
    if "$ref" in place:
        return _forms(schema, schema["$defs"][place["$ref"].rsplit("/", 1)[-1]])
    if "anyOf" in place:
        return [form for option in place["anyOf"] for form in _forms(schema, option)]
    return [place]


def _repeated_key(node: yaml.Node | None) -> yaml.Node | None:
    """The first key that a mapping holds twice, of which YAML would keep the second without a word."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                return key
            seen.add(str(key.value))
            if found := _repeated_key(value):
                return found
    elif isinstance(node, yaml.SequenceNode):
        return next((found for item in node.value if (found := _repeated_key(item))), None)
    return None


def _place(node: yaml.Node | None, loc: Sequence[int | str]) -> _Place:
    """Where a path leads. Parts that the file does not have, such as the name of one of several forms that pydantic
    tried, are passed over where the file has the rest."""
    there: list[int | str] = []
    left: list[int | str] = []
    line = node.start_mark.line + 1 if node else 1
    for part in loc:
        child = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    child, line = value, key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            child = node.value[part]
            line = child.start_mark.line + 1
        if child is None:
            left.append(part)
        else:
            there.append(part)
            left, node = [], child
    return _Place(there, left, line)
