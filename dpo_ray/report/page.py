"""Rendering of HTML pages that need no other file: the templates, and the formatting of numbers and untrusted text."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from dpo_ray import __version__
from dpo_ray.observe.text import duration

from .plots import typographic

# Control characters are not allowed in HTML; they are shown as Unicode control pictures.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {127: 0x2421}
# Directional embeddings and overrides would reverse the text after them; the page isolates untrusted text by itself.
_CONTROLS |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


def render_page(template: str, **values: Any) -> str:
    """Return a page as HTML that can be encoded as UTF-8. The same values give the same bytes.

    Raises KeyError or jinja2.UndefinedError if a value lacks a field that the template shows.
    """
    html = _environment().get_template(template).render(generator=f"dpo_ray {__version__}", **values)
    # A lone surrogate, which broken input can contain, cannot be encoded as UTF-8: the file could not be written.
    return html.lstrip().translate(_CONTROLS).encode("utf-8", "replace").decode("utf-8")


def format_number(value: float | str | bool | None) -> str:
    """Format a number with four significant digits and thousands separators. Text is returned unchanged."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and (isinstance(value, int) or abs(value) < 1e6):
        return typographic(f"{int(value):,}")
    return typographic(f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}")


def format_share(part: float, whole: float) -> str:
    """Format part / whole as a percentage. The result is 0 % or 100 % only if the share is exactly 0 or 1."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.01:
        return "< 0.01 %"
    if part < whole and percent > 99.99:
        return "> 99.99 %"
    digits = 2 if percent < 1 or (part < whole and percent > 99) else 1
    return f"{percent:.{digits}f} %" if part and part != whole else f"{percent:.0f} %"


def format_signed(value: float | None, digits: int) -> str:
    """Format a number with + or -, for numbers that a reader compares with zero."""
    return "–" if value is None else typographic(f"{value:+,.{digits}f}")


def format_seconds(seconds: float | None) -> str:
    """Format a duration for people, or return a dash if it is not known."""
    return "–" if seconds is None else duration(seconds)


def format_time(iso: str) -> str:
    """Format an ISO 8601 time for people: 2025-01-02 03:04:05 UTC."""
    return re.sub(r"(?<=\d)T(?=\d)", " ", iso).removesuffix("Z") + (" UTC" if iso.endswith("Z") else "")


def excerpt(text: object, characters: int) -> str:
    """Return text cut to a number of characters. If it was cut, add how many more characters it had."""
    whole = str(text)
    left = len(whole) - characters
    return whole if left <= 0 else f"{whole[:characters]} … ({left:,} more characters)"


def breakable(name: str) -> Markup:
    """Return a snake_case name as HTML in which a browser may break the line after each underscore."""
    return Markup("_<wbr>").join(str(name).split("_"))  # join escapes the parts


def _csp_hash(style: object) -> str:
    """Return the hash of a style sheet. The page's Content-Security-Policy allows only the style sheet with this hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(str(style).encode()).digest()).decode()}'"


def _template_text(name: str) -> str:
    return resources.files("dpo_ray.report").joinpath("templates", name).read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_template_text),
    )
    environment.filters |= {
        "number": format_number,
        "share": format_share,
        "signed": format_signed,
        "seconds": format_seconds,
        "time": format_time,
        "excerpt": excerpt,
        "csp_hash": _csp_hash,
        "breakable": breakable,
    }
    return environment
