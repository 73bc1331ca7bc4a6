"""What both pages share: a policy that lets a browser run what is in the page, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re

_INLINE = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


def content_security_policy(html: str) -> str:
    """Allows the page's own styles and scripts by their digests, and requests to its own server."""
    digests: dict[str, list[str]] = {"style": [], "script": []}
    for kind, text in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        digests[kind].append(f"'sha256-{digest}'")
    parts = [
        "default-src 'none'",
        *(f"{kind}-src {' '.join(found)}" for kind, found in digests.items() if found),
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return "; ".join(parts)
