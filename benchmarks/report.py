"""The committed results as a page and as plots.

    python benchmarks/report.py

Writes reports/reference.html, and the plots of this repository's own machine under reports/reference/.
"""

from __future__ import annotations

from pathlib import Path

from toolchain.compare.report.html import to_html
from toolchain.compare.report.plots import save
from toolchain.compare.rows import compare
from toolchain.results.measurements import ResultFile

BENCHMARKS = Path(__file__).parent
REPORTS = BENCHMARKS / "reports"
RESULT = BENCHMARKS / "results" / "reference-xeon-2cores.json"


def main() -> None:
    """Reads, writes, says what it wrote."""
    rows = compare([ResultFile.read(RESULT)])
    page = REPORTS / "reference.html"
    page.write_text(to_html(rows))
    for path in (page, *save(rows, REPORTS / "reference")):
        print(path.relative_to(BENCHMARKS.parent))


if __name__ == "__main__":
    main()
