"""The name under which scripts of the first version import the identities: `from kvpatch.check import check`."""

from kvpatch.checks.identities import Identity, check

__all__ = ["Identity", "check"]
