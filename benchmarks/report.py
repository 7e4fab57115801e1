"""The committed results as a page and as plots.

    python benchmarks/report.py

Writes reports/reference.html, and the plots of this repository's own machine under reports/reference/.
"""

from __future__ import annotations

from pathlib import Path

from toolchain.measurements import ResultFile
from toolchain.report.html import to_html
from toolchain.report.plots import save
from toolchain.steps.compare import compare

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
