"""Modules that scripts of the first version import still stand under their names."""

import kvpatch.check
import kvpatch.rope
from kvpatch.caches import rope
from kvpatch.checks import identities


def test_check_and_rope_are_the_modules_that_moved() -> None:
    assert kvpatch.check.check is identities.check
    assert kvpatch.rope.rotate is rope.rotate
