"""Holds a function to its annotations; `conftest.py` has it applied to whole packages."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int may stand where a float is asked for, as type checkers have it."""
