"""What every spec is: frozen data that refuses unknown keys, and whose mistakes are told in one line."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from inspect import Parameter, Signature
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
)

from kvpatch.errors import SpecError, as_html
from kvpatch.specs.arguments import real, shown
from kvpatch.specs.refusals import refusal_of


class Frozen(BaseModel):
    """Base of the data types: no unknown keys, no change after it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_OF_PYDANTIC = frozenset(dir(Frozen)) - frozenset(dir(object)) - {"__module__", "__dict__", "__annotations__"}


_OF_A_RUN = frozenset(
    ("is_fitted", "moves_keys", "uses_pair_number", "keeps_text_whole", "sets_r_v", "is_full_swap", "draws", "told")
) | {"takes_giver", "kind"}
"""What a run asks of a spec and a person does not."""


class _WithoutPydantic(type(Frozen)):
    """Leaves out of `dir`, `help` and completion what pydantic gives to every class, hundreds of lines, and what only a
    run asks for."""

    def __dir__(cls) -> list[str]:
        hidden = _OF_PYDANTIC | _OF_A_RUN
        return [name for name in super().__dir__() if name not in hidden and not name.startswith("_")]


class Given(Frozen, metaclass=_WithoutPydantic):
    """Base of what a person writes in Python: what is wrong with it is said in one line.

    It prints as it would be written, without what is left at its default.

    Raises:
        SpecError: where it is made of something that can't be meant.
    """

    @classmethod
    def __pydantic_init_subclass__(cls, **settings: Any) -> None:
        """The signature as a person writes it: pydantic's own spells out every validator."""
        fields = [
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if field.is_required() else field.get_default(call_default_factory=True),
            )
            for name, field in cls.model_fields.items()
        ]
        setattr(cls, "__signature__", Signature(fields))  # noqa: B010

    def __init__(self, *misplaced: Any, **given: Any) -> None:
        """Take what is written by name, and say in one line what is wrong with it."""
        kind = type(self)
        if misplaced:
            first = next(iter(kind.model_fields))
            raise SpecError(
                f"{kind.__name__}: {shown(misplaced[0])} stands without a name; write {first}=... "
                f"(it has {', '.join(kind.model_fields)})"
            )
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise SpecError(refusal_of(error, kind)) from None

    # pydantic then takes it for its own, and a part of a protocol is built as before, with the place of what is wrong.
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *type(self).model_fields})

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.is_required() or value != field.get_default(call_default_factory=True):
                yield name, _written(value)

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        return f"<code>{as_html(repr(self))}</code>"


def _written(value: Any) -> Any:
    """Indices that follow one another as the range that they are."""
    if isinstance(value, list) and len(value) > 2 and all(isinstance(item, int) for item in value):
        run = range(value[0], value[0] + len(value))
        return run if value == list(run) else value
    return value


class Change(Given):
    """Base of whatever a condition of a protocol may do to a cache: what of it is known without a model.

    takes_giver: whether something is taken from another prompt, which the condition then names under `from`.
    """

    takes_giver: ClassVar[bool] = False

    @property
    def is_fitted(self) -> bool:
        """Whether it is made from the calibration prompts, such as a mean or a direction."""
        return False

    @property
    def moves_keys(self) -> bool:
        """Whether keys land at other positions than they were made for."""
        return False

    @property
    def uses_pair_number(self) -> bool:
        """Whether it differs between pairs by their number in the run."""
        return False

    @property
    def keeps_text_whole(self) -> bool:
        """Whether the cache is that of whole prompts, which a model goes on from as fluently as from any."""
        return False

    @property
    def sets_r_v(self) -> bool:
        """Whether the geometry of cached values is what is changed, and not what they say."""
        return False

    @property
    @abstractmethod
    def told(self) -> str:
        """What is done, as the name of a series in a chart."""

    @abstractmethod
    def to_json(self) -> str:
        """Canonical JSON of everything that it says."""


def is_false(value: object) -> bool:
    """A switch that came later and is off is left out of what is hashed, so that what lacks it keeps its hash."""
    return value is False


def is_none(value: object) -> bool:
    """The same of what is not given."""
    return value is None


def is_empty(value: object) -> bool:
    """The same of a mapping or a list that came later and says nothing."""
    return value in ({}, [])


def real_number(value: Any, info: ValidationInfo) -> Any:
    return real(str(info.field_name), value)


NAME = re.compile(r"\w[\w.-]{0,63}")
"""What may become a file's name, a column or a part of a page: a letter, a digit or `_`, then up to 63 of these and of
`-` and `.`."""
NAME_BYTES = 128


def wrong_name(kind: str, name: str, reserved: Sequence[str] = ()) -> str | None:
    """What keeps a name from being one, as a sentence; None where it is one.

    Args:
        kind: what it names, such as "phase".
        reserved: names that kvpatch uses itself; also with `-` and more behind them.
    """
    if NAME.fullmatch(name) is None or len(name.encode("utf-8", "replace")) > NAME_BYTES:
        return (
            f"{name!r} can't name a {kind}: a name is made of letters, digits, '_', '-' and '.', begins with a letter, "
            "a digit or '_', and has at most 64 characters"
        )
    if any(name.casefold() == word or name.casefold().startswith(f"{word}-") for word in reserved):
        return f"{name!r} is a name that kvpatch uses itself; give the {kind} another one"
    return None


Number = Annotated[float, BeforeValidator(real_number)]
"""A finite number."""
Mode = Annotated[str, Field(pattern=r"^\w[\w-]*$")]
"""Name of a mode, such as "recursive"."""
PLAIN = "plain"
"""What is not in the protocol's mode."""
