"""The processes and machines of a plan: each process is as large as the measured one, and so is each machine."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.errors import BenchError
from toolchain.results.measurements import Measurement
from toolchain.results.providers import is_on_gpu
from toolchain.results.result_file import ResultFile


@dataclass(frozen=True)
class Machines:
    """The measured machine, and the part of it that one process used.

    Attributes:
        unit: ``core`` or ``GPU``: what a price refers to.
        units_of_process: Number of cores, or GPUs, of one process.
        units_of_machine: Number of cores, or GPUs, of the machine; 0 if unknown.
    """

    unit: str
    units_of_process: int
    units_of_machine: int

    @classmethod
    def of(cls, result: ResultFile, row: Measurement) -> Machines:
        """Returns the machine that measured a row."""
        if is_on_gpu(row.provider):
            return cls("GPU", 1, len(result.machine["gpu"]))
        return cls("core", result.run.get("threads") or 1, result.machine["cores"])

    @property
    def processes_of_machine(self) -> int:
        """Returns the number of processes that one machine runs at the same time, at least 1."""
        return max(1, self.units_of_machine // self.units_of_process)

    def count_for(self, processes: int) -> int:
        """Returns the number of machines for a number of processes."""
        return -(-processes // self.processes_of_machine)

    def text(self, units: int) -> str:
        """Returns a number of units as text, such as ``1 core`` or ``2 GPUs``."""
        return f"{units:,} {self.unit}{'' if units == 1 else 's'}"


def missing_samples(row: Measurement, what: str, option: str = "") -> BenchError:
    """Returns the error for a row without the samples that a plan needs.

    Args:
        row: The row.
        what: The samples, such as ``times of single sentences with tokenising``.
        option: Option of `toolchain bench` that measures them; empty if no option is needed.
    """
    command = f"toolchain bench --variant {row.variant} --provider {row.provider} {option}".rstrip()
    return BenchError(f"The result file has no {what} for {row.cell}.", f"Measure them with `{command}`.")
