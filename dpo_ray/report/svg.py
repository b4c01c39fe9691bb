"""Conversion of a matplotlib figure to an SVG element of a page.

Colours are written as CSS classes (`stroke-train`, `fill-chosen`), so the page's style sheet sets the colours. No
element has a style attribute, so the page's Content-Security-Policy can forbid these attributes.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Placeholders: matplotlib needs a colour value, and `embed` replaces each of these values by a CSS class.
STAND_INS = {
    "ink": "#000001",
    "grid": "#000002",
    "train": "#000003",
    "eval": "#000004",
    "chosen": "#000005",
    "rejected": "#000006",
    "prompt": "#000007",
}
_ROLES = {value: role for role, value in STAND_INS.items()}


def embed(figure: Figure, key: str, title: str, description: str) -> str:
    """Convert a figure to an SVG element, with ids that are unique in the page (by `key`), and CSS classes as colours.

    `title` and `description` are for readers who cannot see the figure.
    """
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - matplotlib's output, not foreign text
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', buffer.getvalue().decode()))
    for parent in root.iter():
        for child in [c for c in parent if _local(c.tag) in {"metadata", "style"}]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        _plain_attributes(element, key, used)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{key}-title {key}-desc"}
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        label = ElementTree.Element(tag, {"id": f"{key}-{tag}"})
        label.text = text
        root.insert(position, label)
    return ElementTree.tostring(root, encoding="unicode")


def _two_decimals(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _plain_attributes(element: ElementTree.Element, key: str, used: set[str]) -> None:
    """Rewrite the attributes of an element in place: `style` becomes CSS classes and attributes; ids begin with `key`."""
    attributes = {_local(name): value for name, value in element.attrib.items()}
    element.attrib.clear()
    classes = []
    for declaration in attributes.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name in {"fill", "stroke"} and value in _ROLES:
            classes.append(f"{name}-{_ROLES[value]}")
        elif name and not name.startswith("font"):
            attributes[name] = value
    if (identifier := attributes.pop("id", None)) in used:
        attributes["id"] = identifier or ""
    for name, value in attributes.items():
        if name == "id":
            value = f"{key}-{value}"
        elif name == "d":
            value = " ".join(re.sub(r"\d+\.\d+", _two_decimals, value).split())
        element.set(name, value.replace("url(#", f"url(#{key}-") if name != "href" else f"#{key}-{value[1:]}")
    if classes:
        element.set("class", " ".join(classes))
    for blank in ("text", "tail"):
        if not (getattr(element, blank) or "").strip():
            setattr(element, blank, None)
