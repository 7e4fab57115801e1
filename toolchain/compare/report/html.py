"""The comparison as one HTML file that loads no other file: tables, plots, flips and measurement settings."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.compare.report import origin, page_plots, plots, sections
from toolchain.compare.report.baselines import Baselines
from toolchain.compare.report.columns import rows_with_figures, title
from toolchain.compare.report.filters import Filter, filters
from toolchain.compare.report.flips import Texts, flips, shared_losses
from toolchain.compare.report.notes import baseline_note, notes
from toolchain.compare.report.panels import panels
from toolchain.compare.rows import Row
from toolchain.results.statistics import CONFIDENCE, FEWEST_ROUNDS
from toolchain.system.escaping import escape_controls

TEMPLATE, SCRIPTS = "report.html.j2", ("sorting.js", "points.js", "controls.js")


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
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    script = "\n".join((folder / name).read_text() for name in SCRIPTS)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The page's content security policy holds the digest of the script, so a browser runs no other script. The page's
    # data are no script.
    page = environment.get_template(TEMPLATE).render(script=script, script_sha256=allowed, **_content(rows))
    return escape_controls(page.encode(errors="replace").decode())


def _content(rows: Sequence[Row]) -> dict[str, Any]:
    shown = rows_with_figures(rows)
    runs = list({id(row.run): row.run for row in rows}.values())
    numbers = {id(row): number for number, row in enumerate(shown)}
    baselines, hidden = Baselines(shown) if shown else None, filters(shown)
    others = baselines.others if baselines else []
    texts, compared = Texts(), sections.comparison(shown) if shown else None
    first_note = baseline_note(shown)
    facts = [origin.protocol(runs), origin.versions(runs), origin.rates(runs)]
    methods = dict.fromkeys(str(m) for row in shown if (m := row.measurement.memory_bytes.get("method")))
    return {
        "models": list(dict.fromkeys(row.measurement.model for row in rows)),
        "lines": title(rows),
        "number_of": lambda row: numbers[id(row)],
        "place": baselines.place if baselines else None,
        "choices": [choice.label for choice in baselines.choices] if baselines else [],
        "filters": hidden,
        "data": _data(baselines, hidden, numbers) if baselines else None,
        "best": [(panel.title, sections.best_rows(panel)) for panel in panels(shown)],
        "comparison": compared,
        "marks": sections.marks(compared) if compared else [],
        # The page marks the Pareto front with a word instead of `FRONT`, so no note explains this symbol.
        "first_note": first_note,
        "notes": [line for line in notes(shown, explain_front=False) if line != first_note] if shown else [],
        "plots": [
            (name, plot, page_plots.parts(plot, name, lambda row: numbers[id(row)]))
            for name, plot in plots.figures(rows).items()
        ],
        "stages": sections.stages(shown, others) if shown else None,
        "quality": sections.quality(shown, others) if shown else None,
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


def _data(baselines: Baselines, hidden: Sequence[Filter], numbers: Mapping[int, int]) -> dict[str, Any]:
    """Returns the data of the page's script: the choices of the baseline, and each row's values of the filters."""
    data = baselines.to_data(lambda row: numbers[id(row)])
    return {**data, "meaning": sections.MEANINGS["baseline"], "filters": [each.indices for each in hidden]}
