"""Measures accuracy at each pruning ratio for every pruning method, and after recovery training.

    python benchmarks/pruning.py [--model reference] [--exported exported] [--save-as NAME]

The script prunes the model at each of `RATIOS` by every method. The method "fisher, not fitted" is `fisher` without the
least-squares fit of the remaining weights. At the ratios in `RECOVERED`, the script also measures the artifacts of
`toolchain prune --recover 1`. The script measures the PyTorch models on the whole validation set. The script writes
NAME.json and NAME.svg to benchmarks/studies/ and prints a table.
"""

from __future__ import annotations

import copy
import io
import json
import time
from pathlib import Path
from typing import Any

import click
import figures
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

from toolchain import pruning
from toolchain.artifacts.steps import Prune, Recover
from toolchain.backends.pytorch import load_model
from toolchain.build.pipeline import ensure
from toolchain.build.steps.prune import price_of
from toolchain.build.workspace import Workspace
from toolchain.cli.progress import bar, say
from toolchain.data import inputs
from toolchain.models.architectures import keep_units
from toolchain.pruning.costs import EncoderSizes
from toolchain.pruning.selection import select
from toolchain.pruning.setup import PruningSetup, shared_setup
from toolchain.system import hardware
from toolchain.training.batches import Batch, batches
from toolchain.training.scoring import score

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.72, 0.85, 0.9)
RECOVERED = (0.5, 0.72, 0.85)
FISHER, NOT_FITTED, RECOVERY = "fisher", "fisher, not fitted", "fisher, 1 epoch"
METHODS = (FISHER, NOT_FITTED, "magnitude", "mask")
STUDIES = Path(__file__).parent / "studies"


def prune_model(setup: PruningSetup, method: str, ratio: float) -> Any:
    """Returns the model pruned by `method` at `ratio`; writes no artifact."""
    if method == "mask":
        return pruning.mask(setup.model, ratio)
    price, _ = price_of(setup, "parameters", None, lambda done, total, what: None)
    if method != NOT_FITTED:
        return pruning.prune(setup, ratio, method, price, lambda layer: None)
    model = copy.deepcopy(setup.model)
    for index, kept in enumerate(select(setup.importances("fisher"), ratio, EncoderSizes.from_model(model), price)):
        keep_units(model, index, kept.heads, kept.neurons)
    return model


def measure(model: Any, validation: list[Batch], method: str, ratio: float, seconds: float, dense: int) -> dict:
    """Returns a model's figures; `removed` is the share of the encoder's linear parameters that pruning removed."""
    correct = round(score(model.eval(), validation) * sum(len(part.rows) for part in validation))
    removed = 1 - EncoderSizes.from_model(model).parameters / dense
    return {"method": method, "ratio": ratio, "removed": round(removed, 4), "right": correct, "seconds": round(seconds)}


def study(workspace: Workspace) -> dict[str, Any]:
    """Prunes the model by every method at every ratio, measures the pruned models and returns all results."""
    root = ensure(workspace, ["torch-fp32"], {}, say)["torch-fp32"]
    step = Prune(RATIOS[0])
    setup = shared_setup(root, workspace.train, step.sentences, step.seed)
    data = inputs.load(None, root.label_set)
    validation = batches(setup.encoder.encode(data.texts), data.labels, setup.encoder, 64)
    dense = EncoderSizes.from_model(setup.model).parameters
    rows = [measure(setup.model, validation, "unpruned", 0.0, 0, dense)]
    # All pruning ratios use the importances that are computed here, so no measured time includes their computation.
    setup.importances("fisher")
    with bar("pruning") as progress:  # The progress bar of pruning closes before recovery shows its own progress bar.
        for number, (method, ratio) in enumerate((m, r) for m in METHODS for r in RATIOS):
            progress(number, len(METHODS) * len(RATIOS), f"{method} at {ratio:.0%}")
            started = time.monotonic()
            model = prune_model(setup, method, ratio)
            rows.append(measure(model, validation, method, ratio, time.monotonic() - started, dense))
    for ratio in RECOVERED:
        name = f"torch-pruned{round(100 * ratio)}"
        steps = {name: Prune(ratio), f"{name}-r1": Recover(1)}
        artifact = ensure(workspace, [f"{name}-r1"], steps, say, bar)[f"{name}-r1"]
        seconds = artifact.manifest.facts["recovery"]["seconds"]
        rows.append(measure(load_model(artifact.path), validation, RECOVERY, ratio, seconds, dense))
    return {
        "schema": 1,
        "model": {"name": workspace.model, "artifact": root.manifest.id},
        "data": {"name": data.name, "sentences": len(data.labels), "sha256": data.sha256},
        "machine": hardware.machine(),
        "versions": hardware.versions(),
        "seed": step.seed,
        "rows": rows,
    }


def table(body: dict[str, Any]) -> str:
    """Returns a table of accuracies and their differences from the unpruned model in percentage points.

    The table has a line for each ratio and a column for each method.
    """
    total, unpruned = body["data"]["sentences"], body["rows"][0]["right"]
    view = Table(
        title=f"accuracy of the unpruned model: {unpruned / total:.2%} of {total} sentences",
        title_justify="left",
        box=box.SIMPLE,
    )
    columns = (*METHODS, RECOVERY)
    for column in ("ratio", *columns):
        view.add_column(column, justify="right", no_wrap=True)
    counts = {(row["method"], row["ratio"]): row["right"] for row in body["rows"]}
    for ratio in sorted({ratio for _, ratio in counts if ratio}):
        cells = [counts.get((method, ratio)) for method in columns]
        texts = ["" if n is None else f"{n / total:.2%} ({100 * (n - unpruned) / total:+.2f})" for n in cells]
        view.add_row(f"{ratio:.0%}", *texts)
    buffer = io.StringIO()
    Console(file=buffer, width=120).print(view)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def plot(body: dict[str, Any], path: Path) -> None:
    """Plots accuracy by ratio with a line for each method; a band shows the unpruned model's 95 % Wilson interval."""
    total, unpruned = body["data"]["sentences"], body["rows"][0]["right"]
    interval = stats.binomtest(unpruned, total).proportion_ci(method="wilson")
    ratio_label = "pruning ratio: % of the encoder's linear parameters removed (for mask: set to zero)"
    with figures.axes(path, ratio_label, f"accuracy on {total} sentences, %") as axes:
        axes.axhspan(100 * interval.low, 100 * interval.high, color="0.92", label="unpruned, 95 % interval")
        axes.axhline(100 * unpruned / total, color="0.6", linewidth=1)
        for method, style in zip((*METHODS, RECOVERY), ("o-", "o:", "s--", "x-", "*"), strict=True):
            rows = [row for row in body["rows"] if row["method"] == method]
            accuracies = [100 * row["right"] / total for row in rows]
            axes.plot([100 * row["ratio"] for row in rows], accuracies, style, label=method, markersize=6)
        axes.legend(loc="lower left", frameon=False)


@click.command()
@click.option("--model", default="reference", show_default=True)
@click.option("--exported", type=click.Path(path_type=Path), default=Path("exported"), show_default=True)
@click.option("--save-as", default="pruning-reference", show_default=True)
def main(model: str, exported: Path, save_as: str) -> None:
    """Measures all pruning methods, saves the results and the plot, and prints the table."""
    body = study(Workspace.open(model, exported))
    (STUDIES / f"{save_as}.json").write_text(json.dumps(body, indent=1) + "\n")
    plot(body, STUDIES / f"{save_as}.svg")
    click.echo(table(body))


if __name__ == "__main__":
    main()
