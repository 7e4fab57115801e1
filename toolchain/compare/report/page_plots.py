"""Plots as parts of the HTML page: one SVG for each panel, in the page's colours, whose marks name their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from toolchain.compare.report import canvas, drawing_machines, plots
from toolchain.compare.report.point_texts import baseline_text
from toolchain.compare.report.points import Mark
from toolchain.compare.rows import Row

# Colour in a plot → the colour of the page's theme that replaces it.
THEMED = {
    canvas.INK: "currentColor",
    canvas.PAPER: "var(--paper)",
    canvas.OTHER_STYLE[0]: "var(--other)",
    **{colour: f"var(--{runtime})" for runtime, (colour, _) in canvas.RUNTIME_STYLES.items()},
    drawing_machines.COLOURS[4]: "var(--machine-5)",
    drawing_machines.COLOURS[5]: "var(--machine-6)",
}
RING_RADIUS = 5.5
_GAP = 4.0  # distance between the top of a panel and the cut above it
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True)
class Part:
    """A part of a plot in the page: a panel, or the legend above several panels.

    Attributes:
        alt: Content of the panel in words; empty for the legend.
        svg: The markup.
    """

    alt: str
    svg: Any


def parts(plot: plots.Plot, name: str, number_of: Callable[[Row], int]) -> list[Part]:
    """Returns the legend and the panels of a plot as separate SVGs; a plot with one panel is one SVG.

    Args:
        plot: The plot.
        name: Name of the plot, which makes ids unique in the page.
        number_of: Function that returns the number of a row in the page.
    """
    svg = plots.svg(plot, name)
    root = ElementTree.fromstring(svg)
    _clean(root)
    _apply_marks(root, plot.marks.by_id, number_of)
    for element in root.iter():
        _localise(element, name)
    width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
    count = len(plot.panels)
    if count == 1:
        return [Part(plot.panels[0], _markup(list(root), (0.0, height), width, plot.panels[0]))]
    tops = [height - top - _GAP for top in _panel_tops(plot, count)]
    ends = [*tops[1:], height]
    panels, rest = _split(root, name, count)
    return [Part("", _markup(rest, (0.0, tops[0]), width, ""))] + [
        Part(alt, _markup(elements, (top, end), width, alt))
        for elements, top, end, alt in zip(panels, tops, ends, plot.panels, strict=True)
    ]


def _panel_tops(plot: plots.Plot, count: int) -> list[float]:
    """Returns the distance of each panel's top from the bottom of the figure, in points."""
    tops = [0.0] * count
    for axes in plot.figure.axes:
        index, box = int(str(axes.get_gid()).split("-")[1]), axes.get_tightbbox()
        tops[index] = max(tops[index], box.y1 if box else 0.0)
    return [top * 72 / plot.figure.dpi for top in tops]


def _clean(root: ElementTree.Element) -> None:
    """Removes metadata, style elements and namespaces."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style") or not child.tag.startswith(_SVG):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        attributes = {key.removeprefix(_LINK): value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update(attributes)


def _apply_marks(root: ElementTree.Element, marks: Mapping[str, Mark], number_of: Callable[[Row], int]) -> None:
    """Names the rows of each mark, adds the texts of the points, and replaces the rings by those of the page."""
    for parent in list(root.iter()):
        for child in list(parent):
            mark = marks.get(child.attrib.get("id", ""))
            if mark and mark.ring:
                # The legend uses the shape that the first ring defines.
                for shape in child.findall("g"):
                    child.remove(shape)
            elif mark:
                del child.attrib["id"]
                child.set("data-rows", " ".join(str(number_of(row)) for row in mark.rows))
                if mark.text:
                    _make_point(child, mark)


def _make_point(element: ElementTree.Element, mark: Mark) -> None:
    row = mark.rows[0]
    comparison = baseline_text(row) if mark.compared else ""
    element.set("class", "point" + (" baseline" if mark.compared and row.measurement is row.baseline else ""))
    title = ElementTree.Element("title")
    title.text = mark.text + (f"\n{comparison}" if comparison else "")
    element.insert(0, title)
    place = element.find(".//use")
    if mark.compared and place is not None:
        element.set("data-text", mark.text)
        ring = {"class": "ring", "cx": place.attrib["x"], "cy": place.attrib["y"], "r": str(RING_RADIUS)}
        ElementTree.SubElement(element, "circle", ring)


def _localise(element: ElementTree.Element, name: str) -> None:
    """Makes ids unique in the page, and replaces colours by the page's theme colours."""
    for key, value in element.attrib.items():
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == "href":
            element.set(key, value.replace("#", f"#{name}-"))
        elif not key.startswith("data-"):
            element.set(key, _apply_theme(key, value).replace("url(#", f"url(#{name}-"))


def _apply_theme(key: str, value: str) -> str:
    if key in ("style", "fill", "stroke"):
        for colour, themed in THEMED.items():
            value = value.replace(colour, themed)
    return value


def _split(
    root: ElementTree.Element, name: str, count: int
) -> tuple[list[list[ElementTree.Element]], list[ElementTree.Element]]:
    """Returns the elements of each panel, and the other elements; clip paths go to the panel that uses them."""
    clips = {clip.attrib["id"]: clip for clip in root.iter("clipPath")}
    panels: list[list[ElementTree.Element]] = [[] for _ in range(count)]
    rest = []
    for group in root.findall("g/*"):
        index = group.attrib.get("id", "").removeprefix(f"{name}-panel-").partition("-")[0]
        if not index.isdigit():
            rest.append(group)
            continue
        used = {element.attrib["clip-path"][5:-1] for element in group.iter() if "clip-path" in element.attrib}
        definitions = ElementTree.Element("defs")
        definitions.extend(clips[identifier] for identifier in sorted(used))
        panels[int(index)] += [definitions, group]
    return panels, rest


def _markup(elements: Sequence[ElementTree.Element], span: tuple[float, float], width: float, alt: str) -> Any:
    """Returns the elements between two heights as an SVG; without `alt`, screen readers skip the SVG."""
    import markupsafe

    top, end = span
    root = ElementTree.Element("svg", {"viewBox": f"0 {top:.1f} {width:g} {end - top:.1f}"})
    root.attrib |= {"role": "img", "aria-label": alt} if alt else {"aria-hidden": "true"}
    root.extend(elements)
    return markupsafe.Markup(ElementTree.tostring(root, encoding="unicode"))
