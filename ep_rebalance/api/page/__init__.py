"""The page at `GET /ep_rebalance/`: one document that contains its style and script and loads nothing from
other sites. While it is visible, it asks the server for `overview`.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

_STYLE = (files(__name__) / "page.css").read_text(encoding="utf-8")
_SCRIPT = (files(__name__) / "page.js").read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src {_hash(_STYLE)}; script-src {_hash(_SCRIPT)}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


@cache
def page() -> str:
    """The whole document."""
    document = (files(__name__) / "page.html").read_text(encoding="utf-8")
    return document.replace("/*style*/", _STYLE).replace("/*script*/", _SCRIPT)
