"""The command line: parse, build one request, call one function, print, exit.

Exit codes: 0 yes, 1 it failed, 2 usage, 3 the verdict is no, 130 interrupted. Data goes to standard output, progress to
standard error. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from toolchain import __version__
from toolchain.errors import ToolchainError, VerdictError

if TYPE_CHECKING:
    from toolchain.pipeline import Workspace
    from toolchain.variants import Step

F = TypeVar("F", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "TOOLCHAIN"})
@click.version_option(__version__)
def cli() -> None:
    """Takes a fine-tuned text classifier to ONNX: exported, quantised, validated, measured and compared.

    Every option can be set in the environment: TOOLCHAIN_BENCH_THREADS=4 is `toolchain bench --threads 4`.
    """


def debug_option(command: F) -> F:
    """--debug, which `main` looks at."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of a failure.")(command)


def model_options(command: F) -> F:
    """What every command that works on a model takes."""
    for option in (
        click.option(
            "--exported",
            type=click.Path(file_okay=False, path_type=Path),
            default=Path("exported"),
            show_default=True,
            help="Where artifacts lie.",
        ),
        click.option("--as", "slug", metavar="NAME", help="Name the model's folder there; by default its own name."),
        click.option(
            "--model", default="reference", show_default=True, help="`reference` (embedded), a folder, or a hub id."
        ),
        debug_option,
    ):
        command = option(command)
    return command


def json_option(command: F) -> F:
    """--json, for every command that prints a table."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(command)


def dry_run_option(command: F) -> F:
    """--dry-run, for every command that builds."""
    return click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")(command)


def _workspace(model: str, exported: Path, slug: str | None) -> Workspace:
    from toolchain.pipeline import Workspace

    return Workspace.open(model, exported, slug)


def _build(workspace: Workspace, asked: dict[str, Step], dry_run: bool) -> None:
    """Builds what is asked for, or says what that would be; prints where it lies."""
    from toolchain.pipeline import ensure, plan
    from toolchain.report.progress import say
    from toolchain.variants import settings_of

    if dry_run:
        for item in plan(workspace, asked, asked):
            settings = ", ".join(f"{key}={value}" for key, value in settings_of(item.step).items())
            click.echo(
                f"{item.variant.name}: {f'build ({item.reason})' if item.reason else 'skip (fresh)'}; {settings}"
            )
        return
    built = ensure(workspace, asked, asked, say)
    for name in asked:
        click.echo(built[name].path)


@cli.command()
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--opset", type=click.IntRange(17, 20), default=18, show_default=True, help="ONNX operator set.")
@click.option(
    "--optimize",
    "provider",
    type=click.Choice(["cpu", "none"]),
    default="cpu",
    show_default=True,
    help="Rewrite the graph for this execution provider as well.",
)
@dry_run_option
@model_options
def export(
    model: str, exported: Path, slug: str | None, revision: str | None, opset: int, provider: str, dry_run: bool
) -> None:
    """Export a checkpoint to ONNX: torch-fp32, onnx-std, and onnx-fp32 optimised for the CPU.

    Each is validated against PyTorch before it is published; what is fresh is skipped.

    \b
    Example:
      toolchain export --model ./my-checkpoint
    """
    from toolchain.variants import Export, Import, Optimize

    asked: dict[str, Step] = {"torch-fp32": Import(revision), "onnx-std": Export(opset)}
    if provider != "none":
        asked["onnx-fp32"] = Optimize(provider)
    _build(_workspace(model, exported, slug), asked, dry_run)


@cli.command()
@click.option("--backend", type=click.Choice(["ort"]), default="ort", show_default=True, help="Whose int8 it is.")
@click.option("--from", "parent", default="onnx-fp32", show_default=True, metavar="VARIANT", help="What is quantised.")
@click.option(
    "--scheme",
    type=click.Choice(["dynamic"]),
    default="dynamic",
    show_default=True,
    help="dynamic: int8 weights per channel, activations scaled at run time.",
)
@dry_run_option
@model_options
def quantize(
    model: str, exported: Path, slug: str | None, backend: str, parent: str, scheme: str, dry_run: bool
) -> None:
    """Quantise a variant to int8: linear layers and embedding table; onnx-fp32 becomes onnx-int8.

    Validated before it is published: at most 2 % of 200 sentences may be answered differently from PyTorch.

    \b
    Example:
      toolchain quantize --backend ort
    """
    from toolchain.variants import Quantize, child

    step = Quantize(backend, scheme)
    _build(_workspace(model, exported, slug), {child(parent, step).name: step}, dry_run)


@cli.command()
@click.option(
    "--provider", "providers", multiple=True, type=click.Choice(["cpu", "cuda"]), help="Only these; may repeat."
)
@click.option("--variant", "names", multiple=True, metavar="VARIANT", help="Only these; may repeat.")
@click.option("--quick", is_flag=True, help="About 20 s a cell instead of 60.")
@click.option("--threads", type=click.IntRange(1), help="Threads of every cell.  [default: physical cores]")
@click.option("--data", metavar="FILE", help="CSV or TSV to evaluate on.  [default: the embedded SST-2]")
@click.option("--text-column", help="Its column of sentences.  [default: sentence or text]")
@click.option("--label-column", default="label", show_default=True, help="Its column of labels.")
@click.option("--save-as", metavar="NAME", help="Save under benchmarks/results/NAME.json, to be committed.")
@json_option
@dry_run_option
@model_options
def bench(
    model: str,
    exported: Path,
    slug: str | None,
    providers: tuple[str, ...],
    names: tuple[str, ...],
    quick: bool,
    threads: int | None,
    data: str | None,
    text_column: str | None,
    label_column: str,
    save_as: str | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Measure accuracy, latency, throughput, memory and size of every variant, and compare them.

    Each variant runs in a process of its own; rounds are interleaved in random order. What is missing is built first.
    What cannot run here is listed with the reason.

    \b
    Examples:
      toolchain bench --quick
      toolchain bench --provider cpu --variant onnx-int8 --variant torch-fp32
      toolchain bench --data reviews.csv --text-column review
    """
    from toolchain import hardware, runs
    from toolchain.report.progress import bar, say
    from toolchain.steps.bench import Protocol

    if save_as and Path(save_as).name != save_as:
        raise click.BadParameter("a name, not a path", param_hint="--save-as")
    protocol = (Protocol.quick if quick else Protocol.full)(threads or hardware.cores())
    request = runs.Request(names, providers, protocol, data, text_column, label_column)
    workspace = _workspace(model, exported, slug)
    if dry_run:
        for name, provider, what in runs.outlook(workspace, request):
            click.echo(f"{name}@{provider}: {what}")
        return
    with bar("bench") as progress:
        result = runs.measure(workspace, request, say, progress)
    say(f"saved: {runs.save(result, workspace.model, save_as)}")
    _show([result], None, "json" if as_json else "table", exported)
    runs.judge(result)


@cli.command()
@click.argument("results", nargs=-1, type=click.Path(path_type=Path))
@click.option("--baseline", metavar="CELL", help="Compare with this variant or cell.  [default: torch-fp32@cpu]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "markdown", "json"]),
    default="table",
    show_default=True,
    help="Output.",
)
@json_option
@model_options
def compare(
    results: tuple[Path, ...],
    model: str,
    exported: Path,
    slug: str | None,
    baseline: str | None,
    form: str,
    as_json: bool,
) -> None:
    """Show result files side by side, one row a cell; without RESULTS the model's newest run.

    \b
    Examples:
      toolchain compare
      toolchain compare laptop.json server.json --baseline onnx-fp32 --format markdown
    """
    from toolchain import runs
    from toolchain.measurements import ResultFile

    if results:
        files = [ResultFile.read(path) for path in results]
    else:
        files = [runs.newest(_workspace(model, exported, slug).model)]
    _show(files, baseline, "json" if as_json else form, exported)


def _show(files: Sequence[Any], baseline: str | None, form: str, exported: Path) -> None:
    from toolchain import runs
    from toolchain.report.markdown import to_markdown
    from toolchain.report.table import print_table
    from toolchain.steps.compare import compare as comparison

    current = runs.current_ids(exported, [row for file in files for row in file.rows])
    rows = comparison(files, baseline, current)
    if form == "json":
        click.echo(json.dumps([row.to_json() for row in rows], indent=1))
    elif form == "markdown":
        click.echo(to_markdown(rows), nl=False)
    else:
        print_table(rows)


@cli.command()
@click.argument("variant")
@json_option
@model_options
def validate(model: str, exported: Path, slug: str | None, variant: str, as_json: bool) -> None:
    """Compare VARIANT's answers with PyTorch's over lengths, batches, paddings and odd texts; exit 3 if it fails.

    \b
    Example:
      toolchain validate onnx-int8
    """
    from toolchain.pipeline import validate_variant
    from toolchain.report.progress import say
    from toolchain.steps.validate import sentence

    report = validate_variant(_workspace(model, exported, slug), variant, say)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        for name, delta in report["grid_largest_delta"].items():
            click.echo(f"{name:36} |Δlogit| {'not finite' if delta is None else f'{delta:.2g}'}")
        click.echo(f"{variant}: {'valid' if report['passed'] else 'NOT valid'}: {sentence(report)}")
    if not report["passed"]:
        raise VerdictError(f"{variant} does not answer as PyTorch does.", "Build it again, or do not use it.")


@cli.command()
@json_option
@model_options
def variants(model: str, exported: Path, slug: str | None, as_json: bool) -> None:
    """List every variant: what it is made from, how, and whether it is built, stale or missing.

    \b
    Example:
      toolchain variants --model ./my-checkpoint
    """
    from toolchain.pipeline import states
    from toolchain.variants import settings_of, step_name

    rows: list[dict[str, Any]] = []
    for variant, artifact, state in states(_workspace(model, exported, slug)):
        step = artifact.manifest.step if artifact else variant.step
        rows.append(
            {
                "variant": variant.name,
                "parent": variant.parent,
                "step": step_name(step),
                "settings": settings_of(step),
                "state": state,
                "size_bytes": artifact.manifest.size_bytes if artifact else None,
                "id": artifact.manifest.id if artifact else None,
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        size = f"{row['size_bytes'] / 1e6:.1f} MB" if row["size_bytes"] else "–"
        made = f"{row['step']} of {row['parent']}" if row["parent"] else str(row["step"])
        click.echo(f"{row['variant']:12} {made:24} {size:>9}  {row['state']}")


@cli.command()
@click.option(
    "--exported",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("exported"),
    help="Where artifacts lie.",
)
@json_option
@debug_option
def doctor(exported: Path, as_json: bool) -> None:
    """Look at this machine and installation; each finding with the line that mends it. Exit 1 if something is broken.

    \b
    Example:
      toolchain doctor
    """
    from toolchain.doctor import examine

    findings = examine(exported)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            mend = f"\n{'':9}→ {finding.mend}" if finding.mend else ""
            click.echo(f"{finding.level:8} {finding.what}{mend}")
    problems = [finding for finding in findings if finding.level == "problem"]
    if problems:
        raise ToolchainError(
            f"{len(problems)} of {len(findings)} findings stop the toolchain from working.", problems[0].mend
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; every failure ends here, in words."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        code = cli.main(words, prog_name="toolchain", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.Abort:
        click.echo("Interrupted: what was finished is kept, nothing is half-written.", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ToolchainError as error:
        if debug:
            raise
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        click.echo(f"Error: unexpected {type(error).__name__}: {error} Run again with --debug to see where.", err=True)
        return 1
