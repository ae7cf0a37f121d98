"""Read a protocol by shipped name or from a YAML file; errors name file, line, key and what was expected."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import yaml
from pydantic import ValidationError

from kvpatch.errors import ProtocolError
from kvpatch.protocols.schema import Protocol


def shipped_protocols() -> list[str]:
    """Names of the protocols that come with kvpatch."""
    return sorted(
        p.name.removesuffix(".yaml") for p in files("kvpatch.protocols").iterdir() if p.name.endswith(".yaml")
    )


def load_protocol(name: str) -> Protocol:
    """Read a protocol.

    Raises:
        ProtocolError: for an unknown name, an unreadable file, or content that is not a protocol.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProtocolError(f"{name}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    elif name in shipped_protocols():
        text = files("kvpatch.protocols").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ProtocolError(f"no protocol {name!r}: shipped are {', '.join(shipped_protocols())}; or give a .yaml file")
    return parse_protocol(text, name)


def parse_protocol(text: str, name: str) -> Protocol:
    """Read a protocol from YAML text; `name` is what errors call the file."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ProtocolError(f"{name}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(loaded, dict):
        raise ProtocolError(f"{name}, line 1: expected a mapping with the keys of a protocol")
    if repeated := _repeated_key(node):
        raise ProtocolError(f"{name}, line {repeated.start_mark.line + 1}: key {repeated.value!r} is given twice")
    try:
        return Protocol.model_validate(loaded)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ProtocolError(f"{name}, line {_line(node, first['loc'])}, {key or 'protocol'}: {message}") from error


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


def _line(node: yaml.Node | None, loc: tuple[int | str, ...]) -> int:
    """Line of the deepest part of a path that the file has."""
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
            break
        node = child
    return line
