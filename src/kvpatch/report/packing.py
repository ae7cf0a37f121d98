"""Parts of a page that are packed, since a page whose folds are closed needs few of them: the script unpacks them."""

from __future__ import annotations

import base64
import gzip
import re
from typing import Any

from markupsafe import Markup

from kvpatch.report.text import script_json

_FOLDED = re.compile(r'<script type="application/gzip" class="folded">([A-Za-z0-9+/=]*)</script>')


def packed(content: str) -> str:
    """Return a text as gzip in base64: the same text gives the same characters."""
    return base64.b64encode(gzip.compress(content.encode("utf-8", "replace"), 9, mtime=0)).decode()


def unpacked(content: str) -> str:
    """Return what `packed` was given."""
    return gzip.decompress(base64.b64decode(content)).decode()


def packed_json(value: Any) -> Markup:
    """Return a value as packed JSON; a part of it may stand inside a script element as it is."""
    return Markup(packed(script_json(value)))


def folded(content: str) -> Markup:
    """Return HTML that the page's script puts in place of this element, once the page is shown.

    content: HTML that is safe to stand in the page; a template's output is.
    """
    return Markup(f'<script type="application/gzip" class="folded">{packed(content)}</script>')


def opened(page: str) -> str:
    """Return a page with all that `folded` packed in its place, as its script makes it."""
    return _FOLDED.sub(lambda found: unpacked(found[1]), page)
