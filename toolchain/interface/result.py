"""Results of benchmarks, and their comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.artifacts.store import Artifact
from toolchain.compare.current import compare_current
from toolchain.compare.report import drawing_figures, flat, fragment, html, markdown, plots, table
from toolchain.compare.rows import Row, arrange
from toolchain.errors import ResultFileError, SettingsError, ToolchainError
from toolchain.interface.arguments import as_tuple, check_choice
from toolchain.interface.calls import calling
from toolchain.results.providers import PROVIDERS
from toolchain.results.result_file import ResultFile
from toolchain.system import files
from toolchain.system.escaping import to_json

if TYPE_CHECKING:
    import pandas as pd

    from toolchain.compare.report.plots import Plot

_FORMATS = {".html": html.to_html, ".csv": flat.to_csv, ".md": markdown.to_markdown}


class Comparison:
    """Rows of results side by side, each with ratios to the baseline.

    `print` shows the table of `toolchain compare`, and a notebook shows it as HTML. `Result.compare` returns it.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """Returns the rows as JSON values; the page on JSON output lists their fields.

        Examples:
            >>> result = tc.read_result("benchmarks/results/example.json")
            >>> [row["variant"] for row in result.compare().rows]
            ['torch-fp32', 'onnx-int8']
        """
        return [row.to_json() for row in self._rows]

    def __str__(self) -> str:
        """Returns title, table and notes as text, as wide as the terminal."""
        return table.to_text(self._rows)

    def __repr__(self) -> str:
        """Returns the same text as `str`, so that a Python prompt shows the table."""
        return str(self)

    def _repr_html_(self) -> str:
        """Returns title, table and notes as HTML, for a notebook."""
        return fragment.to_fragment(self._rows)

    @calling()
    def to_pandas(self) -> pd.DataFrame:
        """Returns a data frame with one line for each row; its columns are those of `toolchain compare --format csv`.

        Raises:
            ToolchainError: pandas is not installed.

        Examples:
            >>> result = tc.read_result("benchmarks/results/example.json")
            >>> result.compare().to_pandas()[["variant", "accuracy"]].to_dict("list")
            {'variant': ['torch-fp32', 'onnx-int8'], 'accuracy': [0.9, 0.89]}
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ToolchainError(
                "A data frame needs pandas, which is not installed.", "Install it with `pip install pandas`."
            ) from error
        return pd.DataFrame([{name: figure(row) for name, figure in flat.COLUMNS.items()} for row in self._rows])

    @calling()
    def plot(self, y: str = "accuracy", x: str = "latency") -> Plot:
        """Draws one figure of each row against another one.

        Args:
            y: Figure on the vertical axis: accuracy, latency, throughput, memory or size.
            x: Figure on the horizontal axis.

        Returns:
            A plot, which a notebook shows. `plot.save("plot.svg")` writes it, and `plot.figure` is Matplotlib's figure.

        Raises:
            SettingsError: There is no such figure, or both figures are the same.
            ResultFileError: No row has both figures.

        Examples:
            >>> plot = tc.read_result("benchmarks/results/example.json").compare().plot("accuracy", "size")
            >>> plot.save("plot.svg")
        """
        check_choice("y", y, list(drawing_figures.AXES))
        check_choice("x", x, list(drawing_figures.AXES))
        if x == y:
            raise SettingsError(f"`y` and `x` are both {x!r}.", "Choose two different figures.")
        plot = plots.figure_against(self._rows, y, x)
        if plot is None:
            raise ResultFileError(f"No row has both figures, {y} and {x}.", "Choose other figures.")
        return plot

    @calling()
    def save(self, path: str | Path) -> None:
        """Writes the comparison to a file: a report as ``.html``, or ``.csv``, ``.md`` or ``.json``.

        Raises:
            SettingsError: The path has another ending.
            ResultFileError: The file cannot be written.

        Examples:
            >>> tc.read_result("benchmarks/results/example.json").compare().save("report.html")
        """
        file = Path(path)
        check_choice("ending", file.suffix, [*_FORMATS, ".json"])
        text = _FORMATS[file.suffix](self._rows) if file.suffix in _FORMATS else to_json(self.rows, indent=1)
        try:
            files.write_whole(file, text)
        except OSError as error:
            raise ResultFileError.unwritable(file, error) from error


class Result:
    """The result of a benchmark. `Model.bench` and `read_result` return it.

    Attributes:
        paths: The result files.
    """

    def __init__(self, runs: Sequence[ResultFile], paths: Sequence[Path], exported: Path) -> None:
        self._runs = list(runs)
        self._exported = exported
        self.paths = tuple(paths)

    @calling()
    def compare(
        self,
        baseline: str | Artifact | None = None,
        *,
        filter: str | Iterable[str] = (),
        provider: str | None = None,
        sort: str | None = None,
    ) -> Comparison:
        """Compares all measured variants with a baseline.

        Args:
            baseline: Variant or cell that the ratios refer to; None for torch-fp32.
            filter: Keep only cells whose name matches one of these patterns, such as ``onnx-*``.
            provider: Keep only rows of this execution provider, ``cpu``, ``cuda``, ``cuda-graphs`` or ``tensorrt``;
                ``cuda`` includes ``cuda-graphs``.
            sort: Sort by accuracy, latency, throughput, memory or size, the best row first.

        Raises:
            ResultFileError: No row is the baseline, or no row matches.

        Examples:
            >>> comparison = tc.read_result("benchmarks/results/example.json").compare(baseline="torch-fp32")
            >>> "onnx-int8@cpu" in str(comparison)
            True
        """
        if sort is not None:
            check_choice("sort", sort, list(drawing_figures.AXES))
        if provider is not None:
            check_choice("provider", provider, PROVIDERS)
        name = baseline.name if isinstance(baseline, Artifact) else baseline
        rows = compare_current(self._runs, name, self._exported)
        return Comparison(arrange(rows, sort, as_tuple(filter), provider))

    @calling()
    def to_pandas(self, baseline: str | Artifact | None = None) -> pd.DataFrame:
        """Returns `compare(baseline)` as a data frame; see `Comparison.to_pandas`.

        Examples:
            >>> frame = tc.read_result("benchmarks/results/example.json").to_pandas()
            >>> list(frame["variant"])
            ['torch-fp32', 'onnx-int8']
        """
        return self.compare(baseline).to_pandas()

    @calling()
    def plot(self, y: str = "accuracy", x: str = "latency") -> Plot:
        """Draws one figure of each row against another one; see `Comparison.plot`.

        Examples:
            >>> tc.read_result("benchmarks/results/example.json").plot("accuracy", "latency")
            <Plot 'Accuracy against latency'>
        """
        return self.compare().plot(y, x)

    def __repr__(self) -> str:
        """Returns the table of `compare()`."""
        return str(self.compare())

    def _repr_html_(self) -> str:
        """Returns the table of `compare()` as HTML, for a notebook."""
        return self.compare()._repr_html_()


@calling()
def read_result(*paths: str | Path, exported: str | Path = "exported") -> Result:
    """Reads result files of the command `bench` or of `Model.bench`, to compare their rows.

    Args:
        paths: The result files.
        exported: Folder of the artifacts; a row is stale if its artifact there has changed.

    Raises:
        SettingsError: There is no path.
        ResultFileError: A file cannot be read.

    Examples:
        >>> result = tc.read_result("benchmarks/results/example.json")
        >>> len(result.compare().rows)
        2
    """
    if not paths:
        raise SettingsError("There is no result file to read.", "Give the path of a file that `bench` saved.")
    return Result([ResultFile.read(Path(path)) for path in paths], [Path(path) for path in paths], Path(exported))
