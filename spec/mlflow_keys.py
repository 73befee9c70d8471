"""Names of metrics, parameters and tags as MLflow takes them: any text becomes a key, and no two the same."""

from __future__ import annotations

import hashlib
import re

KEY_LIMIT = 250
_UNFIT = re.compile(
    r"[^\w./: -]+"  # characters that MLflow refuses
    r"|\A\.\.|(?<![^/])\.\.?(?![^/])|\A/|/(?=/)|/\Z"  # what a path would drop
    r"|_(?=x-?[0-9A-F]*(?:_|[^\w./: -]|/(?:/|\Z)))"  # what would look like an escape
)


def key(name: str) -> str:
    """A name as MLflow takes it, no two names alike; an ordinary name stays as it is.

    What MLflow refuses becomes `_x`, its UTF-8 in hexadecimal, and `_`: "C++" is "C_x2B2B_". From a name that is too
    long the middle is left out; a digest of the whole name takes its place.
    """
    return shortened(name, _UNFIT.sub(_escaped, name) or "_x_", KEY_LIMIT)


def shortened(name: str, text: str, limit: int) -> str:
    """A text that stands for a name, with a digest of the name in its middle where it is longer than a limit."""
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:20].upper()
    return f"{text[: limit - 84]}_x-{digest}_{text[-60:]}"


def _escaped(match: re.Match[str]) -> str:
    return f"_x{match[0].encode('utf-8', 'surrogatepass').hex().upper()}_"
