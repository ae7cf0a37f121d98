"""The name under which scripts of the first version import rotations: `from kvpatch.rope import rotate`."""

from kvpatch.caches.rope import LayerRope, rotate

__all__ = ["LayerRope", "rotate"]
