"""The comparison as one HTML file that loads no other file: tables, plots, flips and measurement settings."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolchain.compare.report import canvas, origin, plots, sections
from toolchain.compare.report.columns import rows_with_figures, title
from toolchain.compare.report.flips import Texts, flips, shared_losses
from toolchain.compare.report.notes import notes
from toolchain.compare.report.panels import panels
from toolchain.compare.rows import Row
from toolchain.results.statistics import CONFIDENCE, FEWEST_ROUNDS
from toolchain.system.escaping import escape_controls

TEMPLATE, SCRIPT = "report.html.j2", "report.js"
# Colour in a plot → the colour of the page's theme that replaces it.
THEMED = {
    canvas.INK: "currentColor",
    canvas.PAPER: "var(--paper)",
    canvas.OTHER_STYLE[0]: "var(--other)",
    **{colour: f"var(--{runtime})" for runtime, (colour, _) in canvas.RUNTIME_STYLES.items()},
}
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def to_html(rows: Sequence[Row]) -> str:
    """Returns the HTML page; the same rows give the same bytes.

    The template escapes all text from result files, so this text cannot act as markup.
    """
    import jinja2

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (folder / SCRIPT).read_text()
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The page's content security policy holds the digest of report.js, so a browser runs no other script.
    page = environment.get_template(TEMPLATE).render(script=script, script_sha256=allowed, **_content(rows))
    return escape_controls(page.encode(errors="replace").decode())


def _content(rows: Sequence[Row]) -> dict[str, Any]:
    shown = rows_with_figures(rows)
    runs = list({id(row.run): row.run for row in rows}.values())
    texts, compared = Texts(), sections.comparison(shown) if shown else None
    facts = [origin.protocol(runs), origin.versions(runs), origin.rates(runs)]
    methods = dict.fromkeys(str(m) for row in shown if (m := row.measurement.memory_bytes.get("method")))
    return {
        "models": list(dict.fromkeys(row.measurement.model for row in rows)),
        "lines": title(rows),
        "best": [(panel.title, panel_best) for panel in panels(shown) if (panel_best := sections.best_rows(panel))],
        "comparison": compared,
        "marks": sections.marks(compared) if compared else [],
        # The page marks the Pareto front with a word instead of `FRONT`, so no note explains this symbol.
        "notes": notes(shown, explain_front=False) if shown else [],
        "plots": [
            (name, plot, inline(plots.svg(plot, name), name, plot.alt)) for name, plot in plots.figures(rows).items()
        ],
        "stages": sections.stages(shown) if shown else None,
        "quality": sections.quality(shown) if shown else None,
        "flips": flips(shown, texts),
        "shared": shared_losses(shown, texts),
        "missing": sections.rows_without_figures(rows),
        "facts": [table for table in facts if table],
        "roofline": sections.roofline(shown),
        "memory": list(methods),
        "here": not shown or any(row.measurement.status == "ok" for row in shown),
        "confidence": f"{CONFIDENCE:.0%}".replace("%", " %"),
        "fewest_rounds": FEWEST_ROUNDS,
    }


def inline(svg: str, name: str, alt: str) -> Any:
    """Returns an SVG as markup for a page, without metadata, style elements and namespaces.

    The function replaces colours by the page's theme colours and makes ids unique in the page.

    Args:
        svg: The SVG document.
        name: Prefix of the ids in the SVG.
        alt: Description of the image for screen readers.
    """
    from xml.etree import ElementTree

    import markupsafe

    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style") or not child.tag.startswith(_SVG):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        attributes = {key.removeprefix(_LINK): value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({key: _apply_theme(key, value, name) for key, value in attributes.items()})
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": alt}
    return markupsafe.Markup(ElementTree.tostring(root, encoding="unicode"))


def _apply_theme(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-")
    if key in ("style", "fill", "stroke"):
        for colour, themed in THEMED.items():
            value = value.replace(colour, themed)
    return value.replace("url(#", f"url(#{name}-")
