"""Read a protocol by shipped name or from a YAML file; errors name file, line, key and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kvpatch.errors import ProtocolError
from kvpatch.protocols.schema import Misplaced, Protocol
from kvpatch.refusals import sentence
from kvpatch.yaml_loader import LOADER


def shipped_protocols() -> list[str]:
    """Names of the protocols that come with kvpatch."""
    return sorted(
        p.name.removesuffix(".yaml") for p in files("kvpatch.protocols").iterdir() if p.name.endswith(".yaml")
    )


def load_protocol(name: str) -> Protocol:
    """Read a protocol; its paths are relative to its file, whatever the working directory.

    Raises:
        ProtocolError: for an unknown name, an unreadable file, or content that is not a protocol.
    """
    path = Path(name)
    folder = path.absolute().parent
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProtocolError(f"{name}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    elif name in shipped_protocols():
        shipped = files("kvpatch.protocols")
        text, folder = shipped.joinpath(f"{name}.yaml").read_text(encoding="utf-8"), Path(str(shipped))
    else:
        raise ProtocolError(f"no protocol {name!r}: shipped are {', '.join(shipped_protocols())}; or give a .yaml file")
    return parse_protocol(text, name).placed(folder)


def parse_protocol(text: str, name: str) -> Protocol:
    """Read a protocol from YAML text; `name` is what errors call the file."""
    try:
        node = yaml.compose(text, Loader=LOADER)
        loaded = yaml.load(text, Loader=LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ProtocolError(f"{name}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(loaded, dict):
        raise ProtocolError(f"{name}, line 1: expected a mapping with the keys of a protocol")
    if repeated := _repeated_key(node):
        raise ProtocolError(f"{name}, line {repeated.start_mark.line + 1}: key {repeated.value!r} is given twice")
    if "extends" in loaded:
        loaded = _laid_over(loaded, name, _line(node, ["extends"]))
    try:
        return Protocol.model_validate(loaded)
    except ValidationError as error:
        loc, message = _explained(error, node)
        key = ".".join(str(part) for part in loc)
        raise ProtocolError(f"{name}, line {_line(node, loc)}, {key or 'protocol'}: {message}") from error


def _laid_over(loaded: dict[str, Any], name: str, line: int) -> dict[str, Any]:
    """The content of a protocol that says only what it changes of the shipped one it `extends`.

    Mappings are merged key by key; a hypothesis of a known id is changed, another one is added.
    """
    base_name = loaded["extends"]
    if base_name not in shipped_protocols():
        raise ProtocolError(f"{name}, line {line}, extends: no shipped protocol {base_name!r}")
    base = yaml.load(files("kvpatch.protocols").joinpath(f"{base_name}.yaml").read_text(encoding="utf-8"), LOADER)
    changes = {key: value for key, value in loaded.items() if key != "extends"}
    hypotheses = changes.get("hypotheses")
    if isinstance(hypotheses, list) and all(isinstance(h, dict) for h in hypotheses):
        known = {h["id"]: h for h in base["hypotheses"]}
        for h in hypotheses:
            known[h.get("id")] = {**known.get(h.get("id"), {}), **h}
        changes["hypotheses"] = list(known.values())
    return _merged(base, changes)


def _merged(base: Any, changes: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    return {**base, **{key: _merged(base.get(key), value) for key, value in changes.items()}}


def _explained(error: ValidationError, node: yaml.Node | None) -> tuple[list[int | str], str]:
    """The keys that lead to the first thing wrong, and what was expected there."""
    found = error.errors()
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])  # a misspelt key is also a missing one
    kind, cause = first["type"], first.get("ctx", {}).get("error")
    loc = [*first["loc"], *(cause.loc if isinstance(cause, Misplaced) else ())]
    depth = len(_followed(node, loc))
    if kind == "missing":
        return loc[: depth + 1], "this key is missing"
    if isinstance(cause, Misplaced):
        return loc[: depth + 1], str(cause)
    if kind == "extra_forbidden":
        known = _keys_at(loc[: depth - 1])
        near = difflib.get_close_matches(str(loc[depth - 1]), known, n=1)
        return loc[:depth], f"no such key; expected {near[0] + ', or ' if near else ''}one of {', '.join(known)}"
    return loc[:depth], sentence(first)


def _keys_at(loc: Sequence[int | str]) -> list[str]:
    """The keys that the schema knows for the mapping at a place of a protocol."""
    schema = Protocol.model_json_schema()
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


def _line(node: yaml.Node | None, loc: Sequence[int | str]) -> int:
    """Line of the deepest part of a path that the file has."""
    lines = _followed(node, loc)
    return lines[-1] if lines else node.start_mark.line + 1 if node else 1


def _followed(node: yaml.Node | None, loc: Sequence[int | str]) -> list[int]:
    """Lines of the keys along a path, as far as the file has them."""
    lines = []
    for part in loc:
        child = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    child = value
                    lines.append(key.start_mark.line + 1)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            child = node.value[part]
            lines.append(child.start_mark.line + 1)
        if child is None:
            break
        node = child
    return lines
