"""Kinds of intervention from outside the package: found by name, by a registration or by an entry point.

A protocol says `intervention: {kind: NAME, ...settings}`. Here NAME is turned into the settings' own type, so that a
protocol is checked when it is read. What carries them out stands in `interventions/build.py`; here it is only kept.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, ClassVar, Final, Protocol

from pydantic import PlainSerializer, PlainValidator, ValidationError, ValidationInfo, WithJsonSchema
from pydantic_core import InitErrorDetails, PydanticCustomError

from kvpatch.errors import ExtensionError
from kvpatch.specs.interventions import OWN_KEYS, InterventionSpec
from kvpatch.specs.nearest import instead

GROUP = "kvpatch.interventions"
"""Entry points of this group are named as their kinds, and lead to an `interventions.build.Kind`."""


class Registered(Protocol):
    """What is registered under a name: settings, and what this room does not look at."""

    @property
    def settings(self) -> type[InterventionSpec]: ...


REGISTERED: dict[str, Registered] = {}
"""Kinds that are registered or were loaded, by name."""
AS_STORED: Final = "as stored"
"""The context of a validation that reads the protocol of a stored run; see `Unregistered`."""


class Unregistered(InterventionSpec):
    """An intervention from outside the package as a stored run holds it. A run is read without the code that made it,
    so that its report and its verdicts do not depend on what is installed."""

    kind: ClassVar[str] = "unregistered"
    name: str
    settings: dict[str, Any]

    @property
    def told(self) -> str:
        return f"made by {self.name}"

    def said(self) -> dict[str, Any]:
        return {"kind": self.name, **self.settings}


def register(name: str, kind: Registered) -> None:
    """Make a kind known under a name. The same class, defined again as in a notebook, replaces the one before.

    Raises:
        ExtensionError: for a name that cannot be one, or that another kind has.
    """
    settings = kind.settings
    known = REGISTERED.get(name)
    if not name or not name.isidentifier():
        raise ExtensionError(f"a kind of intervention needs a name of letters, digits and _, got {name!r}")
    if name in OWN_KEYS or name == "patch":
        raise ExtensionError(f"{name!r} is an intervention of kvpatch itself; give the kind another name")
    if not settings.__pydantic_complete__ and not settings.model_rebuild(raise_errors=False):
        raise ExtensionError(
            f"the types of the settings of {name!r}, {'.'.join(_written_as(settings))}, can't be found; import them "
            "at the top of the file that the class is written in"
        )
    if known is not None and _written_as(known.settings) != _written_as(settings):
        raise ExtensionError(
            f"there is an intervention of kind {name!r} already, {'.'.join(_written_as(known.settings))}; give "
            f"{'.'.join(_written_as(settings))} another name"
        )
    REGISTERED[name] = kind


def _written_as(settings: type) -> tuple[str, str]:
    return settings.__module__, settings.__qualname__


def registered_names() -> list[str]:
    """Names of the kinds that can be had, those that are not loaded yet among them."""
    return sorted({*REGISTERED, *(entry.name for entry in entry_points(group=GROUP))})


def registered(name: str) -> Registered:
    """The kind of a name; an entry point is loaded when its kind is first asked for.

    Raises:
        ExtensionError: where there is none, or its entry point is broken.
    """
    if name not in REGISTERED:
        found = list(entry_points(group=GROUP, name=name))
        if not found:
            raise ExtensionError(_unknown(name))
        if len({entry.value for entry in found}) > 1:
            told = " and ".join(_entry_told(entry) for entry in found)
            raise ExtensionError(f"two interventions are called {name!r}: {told}; uninstall one of them")
        _load(found[0])
    return REGISTERED[name]


def _unknown(name: str) -> str:
    if name in OWN_KEYS or name == "patch":
        return f"{name!r} is a key of the condition itself; write '{name}: ...' in place of 'intervention'"
    return f"no intervention of kind {name!r}; {instead(name, registered_names(), 'registered are')}"


def _entry_told(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else "an unknown package"
    return f"{entry.value} of {package}"


def _load(entry: EntryPoint) -> None:
    where = f"the intervention {entry.name!r} ({_entry_told(entry)})"
    try:
        kind = entry.load()
    except Exception as error:  # whatever the package does when it is imported
        told = " ".join(str(error).split())
        raise ExtensionError(f"{where} can't be loaded: {type(error).__name__}: {told}; mend that package") from error
    settings = getattr(kind, "settings", None)
    if not (isinstance(settings, type) and issubclass(settings, InterventionSpec) and hasattr(kind, "build")):
        raise ExtensionError(
            f"{where} is no kvpatch.interventions.build.Kind but {type(kind).__name__}; mend the entry point"
        )
    if settings.kind != entry.name:
        raise ExtensionError(f"{where} calls itself {settings.kind!r}; its entry point must have that name")
    register(entry.name, kind)


def _read(given: Any, info: ValidationInfo) -> InterventionSpec:
    """The settings of `intervention: {kind: NAME, ...settings}`, in their own type."""
    if isinstance(given, InterventionSpec):
        return given
    if not isinstance(given, dict):
        raise ValueError("expected a mapping that has 'kind' and the settings of that kind")
    name = given.get("kind")
    if "kind" not in given:
        raise _refused({"type": "missing", "loc": ("kind",), "input": given})
    if not isinstance(name, str):
        raise _refused({"type": "string_type", "loc": ("kind",), "input": name})
    written = {key: value for key, value in given.items() if key != "kind"}
    if info.context == AS_STORED:
        return Unregistered(name=name, settings=written)
    try:
        settings = registered(name).settings
    except ExtensionError as error:
        told = PydanticCustomError("value_error", "{message}", {"message": str(error)})
        raise _refused({"type": told, "loc": ("kind",), "input": name}) from error
    try:
        return settings.model_validate(written)
    except ValidationError as error:
        raise _with_keys(error, settings) from error


def _refused(*details: InitErrorDetails) -> ValidationError:
    return ValidationError.from_exception_data("intervention", list(details))


def _with_keys(error: ValidationError, settings: type[InterventionSpec]) -> ValidationError:
    """The same mistakes, a key that there is not with those that there are: no schema knows them."""
    if not any(each["type"] == "extra_forbidden" and len(each["loc"]) == 1 for each in error.errors()):
        return error
    known = sorted(field.alias or name for name, field in settings.model_fields.items())
    details: list[InitErrorDetails] = []
    for each in error.errors():
        is_key = each["type"] == "extra_forbidden" and len(each["loc"]) == 1
        context = {"known": known} if is_key else each.get("ctx", {})
        kind = PydanticCustomError(each["type"], each["msg"], context)  # pyright: ignore
        details.append({"type": kind, "loc": each["loc"], "input": each["input"]})
    return _refused(*details)


def _said(spec: InterventionSpec) -> dict[str, Any]:
    return spec.said()


Said = Annotated[
    InterventionSpec,
    PlainValidator(_read),
    PlainSerializer(_said),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {"kind": {"type": "string"}},
            "required": ["kind"],
            "additionalProperties": True,
        }
    ),
]
"""An intervention from outside the package, as a condition says it."""
