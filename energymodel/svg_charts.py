"""Figures as SVG that is part of a web page: in its colours and fonts, with texts to point at."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING

from energymodel.plot_style import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PINK,
    RED,
    RULE,
    SKY,
    STYLE,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    RED: "red",
    PINK: "pink",
    SKY: "sky",
    BROWN: "brown",
    GREY: "grey",
}
"""CSS variables of the page that take the place of the figures' colours."""

_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def inline_svg(figure: Figure, name: str, label: str, css_class: str) -> str:
    """A figure as an `<svg>` element for a page whose CSS sets its colours.

    Parameters
    ----------
    figure : as made by `plots`; texts given by `plot_style.hover` become `<title>` elements
    name : prefix of the ids, different for each figure of a page
    label : what the figure shows, for those who do not see it
    css_class : class of the element
    """
    import matplotlib as mpl  # noqa: PLC0415 (slow to import)

    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = file.getvalue().decode("utf-8")
    svg = svg[svg.index("<svg") :]
    (view_box,) = re.findall(r'viewBox="([^"]*)"', svg[: svg.index(">")])
    body = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    # ids that are texts become titles; all others are made unique on the page, or left out
    body = re.sub(r'<g id="([^"]* [^"]*)">', r'<g class="hover"><title>\1</title>', body)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = body.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    body = re.sub(r" font-family: [^;\"]*;?", "", body)
    body = re.sub(r'(?: d| x| y| width| height| transform)="[^"]*"', _rounded, body)
    body = re.sub(r"\s*\n\s*", " ", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    return (
        f'<svg class="{css_class}" viewBox="{view_box}" role="img" '
        f'aria-label="{escape(label)}">{body}</svg>'
    )


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to hundredths of a point."""
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0])
