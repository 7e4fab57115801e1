"""Writes the committed result file as an HTML page and as plots.

    python benchmarks/report.py

The HTML page is reports/reference.html. The plots go to reports/reference/.
"""

from __future__ import annotations

from pathlib import Path

from toolchain.compare.report.html import to_html
from toolchain.compare.report.plots import save
from toolchain.compare.rows import compare
from toolchain.results.result_file import ResultFile

BENCHMARKS = Path(__file__).parent
REPORTS = BENCHMARKS / "reports"
RESULT = BENCHMARKS / "results" / "reference-xeon-2cores.json"


def main() -> None:
    """Writes the HTML page and the plots, and prints their paths."""
    rows = compare([ResultFile.read(RESULT)])
    page = REPORTS / "reference.html"
    page.write_text(to_html(rows))
    for path in (page, *save(rows, REPORTS / "reference")):
        print(path.relative_to(BENCHMARKS.parent))


if __name__ == "__main__":
    main()
