"""Runs commands of the toolchain that die at a random moment, or whose system calls fail, and checks what is left.

`python tests/hostile/unlucky.py faults` lets each call of write, fsync, rename and so on fail once, with Debian's
strace. `python tests/hostile/unlucky.py kills --count 200` kills commands at random moments. After each run, every file
is old or new, never half; the same command then succeeds, and leaves no other files and no processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from command_server import MODULES, CommandServer

from toolchain.artifacts import publishing, store
from toolchain.data import inputs
from toolchain.models import checkpoints
from toolchain.results.result_file import ResultFile
from toolchain.ship.bundle_files.verify import read_bundle

HERE = Path(__file__).parent
# System calls with which a command changes files. Python copies files with the last two.
CALLS = ("write", "pwrite64", "fsync", "rename", "link", "unlink", "mkdir", "ftruncate", "sendfile", "copy_file_range")


@dataclass(frozen=True)
class Ended:
    """The end of a command: its exit code, which is negative after a signal, its output, and its seconds."""

    code: int
    output: str
    seconds: float


class TracedServer(CommandServer):
    """Runs commands in forks of one process, which strace can trace."""

    def __init__(self, modules: Sequence[str] = MODULES) -> None:
        """Starts the process, which first imports the modules."""
        variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SHORT_BENCH": "1"}
        path = f"{HERE.parent}{os.pathsep}{HERE.parents[1]}"
        super().__init__(modules, {**os.environ, **variables, "PYTHONPATH": path})

    def run(
        self,
        arguments: Sequence[str],
        folder: Path,
        strace: Sequence[str] = (),
        kill_after: float | None = None,
    ) -> Ended:
        """Runs one command in `folder`.

        Args:
            arguments: Arguments of the command.
            folder: Working directory.
            strace: Arguments of strace, which then traces the command; empty to run without strace.
            kill_after: Seconds until the command is killed; None to let it end.
        """
        path = folder.parent / "output.txt"
        with path.open("w") as output:
            started = self.start(arguments, folder, output, stop=True)
        tracer = None
        if strace:
            tracer = subprocess.Popen(
                ["strace", "-f", "-qq", *strace, "-p", str(started.pid)], stderr=subprocess.DEVNULL
            )
            while "\nTracerPid:\t0\n" in Path(f"/proc/{started.pid}/status").read_text():
                if tracer.poll() is not None:
                    raise RuntimeError("strace cannot trace processes on this machine")
                time.sleep(0.002)
        start = time.monotonic()
        os.kill(started.pid, signal.SIGCONT)
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):  # the command has already ended
                os.kill(started.pid, signal.SIGKILL)
        code = started.wait()
        seconds = time.monotonic() - start
        if tracer:
            tracer.wait()
        self._require_no_processes(started.pid)
        return Ended(code, path.read_text(errors="replace"), seconds)

    def _require_no_processes(self, session: int) -> None:
        """Raises `AssertionError` if processes of an ended command still run after two minutes."""
        deadline = time.monotonic() + 120  # a process ends after its current work, such as an import
        while orphans := list(_processes_of(session)):
            if time.monotonic() > deadline:
                raise AssertionError(f"the command left processes: {orphans}")
            time.sleep(0.05)


def _processes_of(session: int) -> Iterator[str]:
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                yield f"{process.pid} {' '.join(process.cmdline())[:200]}"
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue


MODEL = ("--model", "tiny", "--exported", "exported")
# The layers of this checkpoint have so many FFN neurons that exits save work. It predicts the last label for each text,
# so exits are confident if all labels of the training data are this label.
WIDE_MODEL = ("--model", "wide", "--exported", "exported")
WIDE_NEURONS = 8192
ROWS = 120  # number of labelled sentences
TRAIN = ("--train-data", "rows.csv")
# Each command that writes files. Before it runs, the folder has the checkpoints `tiny` and `wide`, labelled rows, a
# result file, a bundle, and the artifacts of `export` and `quantize` with other settings than those below.
CASES = {
    "import": ("export", "--model", "tiny", "--exported", "other"),
    "export": ("export", "--opset", "17", *MODEL),
    "quantize": ("quantize", "--no-pass", "padding", *MODEL),
    "quantize-torch": ("quantize", "--backend", "torch", *MODEL),
    "exits": ("exits", "--train-data", "positive.csv", *WIDE_MODEL),
    "prune": ("prune", "--ratio", "0.5", "--method", "magnitude", "--recover", "1", *TRAIN, *MODEL),
    "finetune": ("finetune", "--base", "tiny", "--epochs", "1", *TRAIN, "--output", "tuned"),
    "tune": ("tune", "--max-drop", "90", "--budget", "1s", *TRAIN, "--data", "rows.csv", *MODEL),
    "bench": ("bench", "--quick", "--variant", "onnx-int8", "--data", "rows.csv", "--save-as", "run", *MODEL),
    "compare": ("compare", "--plots", "plots", *MODEL),
    "ship": ("ship", "onnx-fp32", "--target", "python", "--license", "MIT", "--output", "bundle", *MODEL),
    "predict": ("predict", "onnx-int8", "rows.csv", "--output", "scores.csv", *MODEL),
}
# Files that the command may leave after an interruption, beside those that it always leaves. The second run of `tune`
# continues the search, which then builds more artifacts, and the journal of the interrupted comparison stays. The
# second run of `predict` refuses to replace complete scores, and leaves the parts of the first run.
MAY_STAY = {
    "tune": r"exported/|benchmarks/results/local/.*\.journal$",
    "predict": rf"{re.escape(publishing.work_folder(Path('scores.csv')).name)}($|/)",
}
PREPARED = (
    ("export", *MODEL),
    ("quantize", *MODEL),
    ("quantize", *WIDE_MODEL),
    ("ship", "onnx-int8", "--target", "python", "--license", "MIT", "--output", "bundle", *MODEL),
    ("bench", "--quick", "--variant", "onnx-int8", "--data", "rows.csv", *MODEL),
)


def write_rows(path: Path, only_positive: bool = False) -> None:
    """Writes labelled sentences to a CSV file; if `only_positive` is true, every label is 1."""
    data = inputs.load_embedded()
    labels = [1] * ROWS if only_positive else data.labels
    rows = [f'"{text}",{label}' for text, label in zip(data.texts[:ROWS], labels, strict=False)]
    path.write_text("\n".join(["sentence,label", *rows]) + "\n", encoding="utf-8")


def prepare(server: TracedServer, folder: Path) -> None:
    """Fills the folder with what the commands of `CASES` need."""
    from conftest import make_checkpoint

    make_checkpoint(folder / "tiny", leaning=20.0)
    make_checkpoint(folder / "wide", leaning=20.0, neurons=WIDE_NEURONS)
    write_rows(folder / "rows.csv")
    write_rows(folder / "positive.csv", only_positive=True)
    for arguments in PREPARED:
        ended = server.run(arguments, folder)
        if ended.code:
            raise RuntimeError(f"{arguments}: {ended.output}")


def incomplete_results(folder: Path) -> list[str]:
    """Returns the results in the folder that are not complete, each with the reason."""
    checks: list[tuple[Path, Callable[[Path], object]]] = []
    artifacts = (path for name in ("tiny", "wide") for path in folder.glob(f"*/{name}/[!.]*"))
    checks += [(path, _check_artifact) for path in artifacts if path.is_dir()]
    checks += [(path, _check_checkpoint) for path in folder.glob("tuned")]
    checks += [(path, read_bundle) for path in folder.glob("bundle")]
    checks += [(path, ResultFile.read) for path in folder.glob("benchmarks/results/**/*.json")]
    checks += [(path, _check_ending) for path in (*folder.glob("plots/*"), *folder.glob("scores.csv"))]
    faults = []
    for path, check in checks:
        try:
            check(path)
        except Exception as error:  # whatever a reader raises, the result is not complete
            faults.append(f"{path.relative_to(folder)}: {error!r}")
    return faults


def _check_artifact(path: Path) -> None:
    artifact = store.load(path)
    assert artifact
    artifact.verify()


def _check_checkpoint(path: Path) -> None:
    checkpoints.check(path)
    assert (path / checkpoints.CARD).is_file()


def _check_ending(path: Path) -> None:
    """Raises `AssertionError` if the file is cut off."""
    content = path.read_bytes()
    if path.suffix == ".csv":
        assert content.count(b"\n") == ROWS + 1, "rows are missing"
    else:
        assert content.rstrip().endswith({".png": b"IEND\xaeB`\x82", ".svg": b"</svg>"}[path.suffix]), "cut off"


def file_names(folder: Path) -> set[str]:
    """Returns the names of all files and folders; digits of times and digests are replaced by `#`."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return {re.sub(r"\d{8}T\d{6}Z|[0-9a-f]{12,}|-\d\.json", "#", name) for name in names}


@dataclass(frozen=True)
class Scene:
    """One command with the prepared folder, and the names of the files that it leaves when nothing fails."""

    server: TracedServer
    prepared: Path
    command: tuple[str, ...]
    expected: set[str]
    seconds: float

    @classmethod
    def open(cls, server: TracedServer, prepared: Path, name: str) -> Scene:
        """Runs the command once without a fault."""
        scene = cls(server, prepared, CASES[name], set(), 0.0)
        with scene.folder() as folder:
            ended = server.run(scene.command, folder)
            assert ended.code == 0, f"{scene.command}: {ended.output}"
            return dataclasses.replace(scene, expected=file_names(folder), seconds=ended.seconds)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Replaces the prepared folder by a fresh copy, and yields the copy.

        The copy has the same path, because the artifacts were built from the checkpoint at this path.
        """
        saved = self.prepared.with_name("saved")
        if not saved.exists():
            shutil.copytree(self.prepared, saved)
        shutil.rmtree(self.prepared)
        yield shutil.copytree(saved, self.prepared)

    def faults_after(
        self, strace: Sequence[str] = (), kill_after: float | None = None, undeleted_may_stay: bool = False
    ) -> tuple[Ended, list[str]]:
        """Runs the command with a fault, and then the same command without a fault; an interrupted benchmark resumes.

        Args:
            strace: Arguments of strace for the first run.
            kill_after: Seconds until the first run is killed.
            undeleted_may_stay: Whether files that the command should delete at its end are no fault.

        Returns:
            The end of the first run, and a description of each fault in the folder after the two runs.
        """
        with self.folder() as folder:
            ended = self.server.run(self.command, folder, strace, kill_after)
            faults = incomplete_results(folder)
            if "unexpected" in ended.output or "Traceback" in ended.output:
                faults.append(f"no message: {ended.output[-300:]}")
            is_resumable = self.command[0] == "bench" and any(folder.glob("benchmarks/results/local/*.journal"))
            again = self.server.run([*self.command, *(["--resume"] if is_resumable else [])], folder)
            faults += [f"again: {fault}" for fault in incomplete_results(folder)]
            is_complete = again.code == 0 or (again.code == 1 and " exists." in again.output)
            if not is_complete:
                faults.append(f"again: exit code {again.code}: {again.output[-300:]}")
            others = file_names(folder) ^ self.expected
            if may_stay := MAY_STAY.get(self.command[0]):
                others = {name for name in others if name in self.expected or not re.match(may_stay, name)}
            if undeleted_may_stay:  # hidden files and journals
                others = {name for name in others if not re.search(r"(^|/)\.|\.journal$", name)}
            if is_complete and others:
                faults.append(f"again: other files: {sorted(others)[:5]}")
            return ended, faults

    def count_calls(self) -> dict[str, int]:
        """Returns how often the command makes each system call in `CALLS`, in the thread that makes it most often."""
        with self.folder() as folder:
            log = folder.parent / "strace.txt"
            self.server.run(self.command, folder, ["-e", f"trace={','.join(CALLS)}", "-o", str(log)])
            calls = Counter(re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE))  # thread and call
        return {call: max((n for (_, c), n in calls.items() if c == call), default=0) for call in CALLS}


@contextmanager
def prepared_server() -> Iterator[tuple[TracedServer, Path]]:
    """Yields a server and the prepared folder."""
    with tempfile.TemporaryDirectory() as scratch:
        server = TracedServer()
        try:
            folder = Path(scratch) / "folder"
            folder.mkdir()
            prepare(server, folder)
            yield server, folder
        finally:
            server.close()


def kill(scene: Scene, source: random.Random) -> tuple[Ended, list[str]]:
    """Kills the command at a random moment; returns its end, and what is wrong afterwards."""
    return scene.faults_after(kill_after=source.uniform(0, scene.seconds))


def inject(scene: Scene, call: str, number: int, error: str = "ENOSPC") -> tuple[Ended, list[str]]:
    """Lets the call with this number fail; returns the end of the command, and what is wrong afterwards."""
    strace = ["-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={number}"]
    return scene.faults_after(strace, undeleted_may_stay=call == "unlink")


def main() -> int:
    """Runs the chosen faults, and prints each one that leaves something wrong, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("faults", "kills"))
    parser.add_argument("--case", choices=CASES, action="append", help="only this command; can be repeated")
    parser.add_argument("--count", type=int, default=200, help="number of kills")
    parser.add_argument("--seed", type=int, default=1, help="seed of the moments of the kills")
    options = parser.parse_args()
    codes: Counter[int] = Counter()
    wrong = 0
    with prepared_server() as (server, folder):
        for position, name in enumerate(names := options.case or list(CASES)):
            scene = Scene.open(server, folder, name)
            if options.kind == "kills":
                source = random.Random(f"{options.seed} {name}")
                share = options.count // len(names) + (position < options.count % len(names))
                attempts = [(f"kill {number}", functools.partial(kill, scene, source)) for number in range(share)]
            else:
                attempts = [
                    (f"{call} {number}", functools.partial(inject, scene, call, number))
                    for call, count in scene.count_calls().items()
                    for number in range(1, count + 1)
                ]
            for label, attempt in attempts:
                ended, faults = attempt()
                codes[ended.code] += 1
                wrong += bool(faults)
                if faults:
                    print(f"{name}, {label}: {'; '.join(faults)}", flush=True)
            print(f"{name}: {len(attempts)} runs, {scene.seconds:.1f} s each without a fault", flush=True)
    print(f"{codes.total()} runs, {wrong} with something wrong; exit codes: {dict(sorted(codes.items()))}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
