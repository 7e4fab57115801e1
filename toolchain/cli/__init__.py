"""The command line: each command parses its options, calls one function, prints the result and exits.

Exit codes: 0 success, 1 failure, 2 wrong usage, 3 a check completed and its answer is no, 130 interrupted. Data goes to
standard output, and progress goes to standard error. Commands import large libraries only when they need them.
"""

from __future__ import annotations

import errno
import io
import sys
import traceback
from collections.abc import Sequence

import click

from toolchain import __version__
from toolchain.cli.bench import bench
from toolchain.cli.build import build
from toolchain.cli.compare import compare
from toolchain.cli.doctor import doctor
from toolchain.cli.exits import exits
from toolchain.cli.explain import explain
from toolchain.cli.export import export
from toolchain.cli.finetune import finetune
from toolchain.cli.init import init
from toolchain.cli.output import echo, echo_error, echo_usage_error
from toolchain.cli.plan import plan
from toolchain.cli.predict import predict
from toolchain.cli.prune import prune
from toolchain.cli.quantize import quantize
from toolchain.cli.recipe import recipe
from toolchain.cli.ship import ship
from toolchain.cli.tune import tune
from toolchain.cli.validate import validate
from toolchain.cli.variants import variants
from toolchain.cli.verify import verify
from toolchain.errors import SystemRefusalError, ToolchainError
from toolchain.system.files import REFUSALS
from toolchain.system.interrupts import record_interrupts


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Convert a fine-tuned text classifier to ONNX: prune, export, quantise, validate, measure, compare and ship it.

    An environment variable can set each option; TOOLCHAIN_BENCH_THREADS=4 means `toolchain bench --threads 4`.
    """


for command in (
    finetune,
    export,
    prune,
    quantize,
    exits,
    tune,
    init,
    recipe,
    build,
    bench,
    compare,
    plan,
    validate,
    ship,
    verify,
    predict,
    variants,
    explain,
    doctor,
):
    cli.add_command(command)
    for option in command.params:
        if isinstance(option, click.Option):
            # The environment variable is named after the option; Click itself would use the Python parameter's name.
            option.envvar = f"TOOLCHAIN_{command.name}_{option.opts[0].lstrip('-')}".upper().replace("-", "_")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; prints every error as a message.

    Args:
        arguments: Arguments of the command; None for those in `sys.argv`.
    """
    state = {"debug": False}
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show the characters × and Δ must still show the numbers.
            stream.reconfigure(errors="backslashreplace")
    with record_interrupts() as interrupts:
        try:
            code = cli.main(arguments, prog_name="toolchain", standalone_mode=False, obj=state)
            return code if isinstance(code, int) else 0
        except click.Abort:
            return _report_interrupt()
        except click.ClickException as error:
            echo_usage_error(error)
            return error.exit_code
        except Exception as error:
            if state["debug"]:
                echo(traceback.format_exc(), err=True, nl=False)
            if interrupts:
                return _report_interrupt()
            if isinstance(error, OSError) and error.errno in (*REFUSALS, errno.ENOENT, errno.EISDIR):
                error = SystemRefusalError.from_os_error(error)
            if isinstance(error, ToolchainError):
                echo_error(error)
                return error.exit_code
            hint = "" if state["debug"] else " Run the command with --debug to see the traceback."
            echo(f"Error: unexpected {type(error).__name__}: {error}{hint}", err=True)
            return 1


def _report_interrupt() -> int:
    echo("Interrupted. All written files are complete.", err=True)
    return 130
