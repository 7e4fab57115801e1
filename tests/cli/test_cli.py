"""Tests of the command line: its output, its exit codes, and that a failed command leaves no incomplete file."""

import csv
import json
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from conftest import make_checkpoint, run_toolchain
from sample_results import FP32, INT8, RUN, measured_row, result

import toolchain
from toolchain.artifacts.variants import DEFAULT_CELLS
from toolchain.bench.journal import Journal
from toolchain.cli import cli
from toolchain.errors import VerdictError
from toolchain.results.result_file import ResultFile


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_has_help_with_an_example(command, say):
    code, out, _ = say(command, "--help")
    assert code == 0
    assert re.search(rf"Examples?:\n +toolchain {command}", out)
    for option in cli.commands[command].params:
        if isinstance(option, click.Option):
            assert option.help, option.name


def test_version_prints_name_and_number(say):
    assert say("--version")[1].startswith("toolchain, version 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["bnech"],
        ["export", "--opset", "12"],
        ["export", "--opset", "many"],
        ["quantize", "--backend", "tflite"],
        ["quantize", "--backend", "bnb", "--scheme", "bf16"],
        ["bench", "--provider", "tpu"],
        ["bench", "--threads", "0"],
        ["bench", "--save-as", "../up"],
        ["bench", "--force"],
        ["validate"],
        ["prune", "--ratio", "0.5", "--exits"],
        ["export", "--surprise"],
    ],
)
def test_a_usage_error_exits_with_2(working_folder, say, arguments):
    code, out, err = say(*arguments)
    assert code == 2
    assert "Error" in err
    assert not out


def test_an_unknown_variant_gives_an_error_with_the_nearest_name(working_folder, say, tiny_checkpoint):
    code, _, err = say("validate", "onnx-int9", "--model", tiny_checkpoint)
    assert code == 1
    assert "Did you mean onnx-int8" in err
    assert not (working_folder / "exported").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--model", "./nowhere"], "There is no folder ./nowhere"),
        (["export", "--model", "nobody/nothing"], "--model PATH"),
        (["quantize", "--from", "onnx-int8"], "takes an fp32 graph such as onnx-fp32"),
        (["bench", "--variant", "onnx-int8", "--provider", "cuda"], "onnx-int8 runs on cpu"),
        (["compare", "nowhere.json"], "There is no result file"),
        (["compare"], "no result of reference"),
        (["export", "--revision", "v1"], "--revision is for hub models only"),
    ],
)
def test_a_failed_command_prints_one_error_and_exits_with_1(working_folder, say, arguments, message):
    code, out, err = say(*arguments)
    assert code == 1
    assert err.startswith("Error: ")
    assert message in err
    assert "Traceback" not in err
    assert not out
    assert not (working_folder / "exported").exists()


def test_debug_shows_the_traceback(working_folder):
    """Runs real processes, since a user sees the exit code of the process."""
    plain_run = run_toolchain("export", "--model", "./nowhere", cwd=working_folder)
    debug_run = run_toolchain("export", "--model", "./nowhere", "--debug", cwd=working_folder)
    assert "Traceback" not in plain_run.stderr
    assert "Traceback" in debug_run.stderr
    assert debug_run.returncode == plain_run.returncode == 1


def test_an_unexpected_exception_prints_one_sentence(working_folder, say, monkeypatch):
    def raise_bug(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("toolchain.build.pipeline.Workspace.open", raise_bug)
    code, _, err = say("variants")
    assert (code, err) == (
        1,
        "Error: unexpected ZeroDivisionError: a bug Run the command with --debug to see the traceback.\n",
    )


def test_an_interrupt_exits_with_130(working_folder, say, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("toolchain.build.pipeline.Workspace.open", interrupt)
    code, _, err = say("variants")
    assert code == 130
    assert "Interrupted" in err


def test_an_interrupt_that_a_library_replaces_by_its_own_error_exits_with_130(working_folder, say, monkeypatch):
    def interrupt(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr("toolchain.build.pipeline.Workspace.open", interrupt)
    code, _, err = say("variants")
    assert (code, err) == (130, "Interrupted. All written files are complete.\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_dry_run_prints_the_plan_and_builds_nothing(working_folder, say, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("toolchain.system.hardware.gpus", lambda: ([], ""))
    code, out, _ = say("export", "--model", tiny_checkpoint, "--opset", 17, "--dry-run")
    assert code == 0
    assert "onnx-std: build (missing); opset=17" in out
    code, out, _ = say("bench", "--model", tiny_checkpoint, "--dry-run")
    assert code == 0
    assert "torch-fp32@cpu: build torch-fp32 (missing), then measure" in out
    assert "onnx-fp32@cuda: unavailable: No NVIDIA GPU" in out
    assert not (working_folder / "exported").exists()


@pytest.mark.parametrize(
    ("rows", "built_fault", "fault"),
    [
        (None, "There is no file", "There is no file"),
        ("text\ngood\n", "no column 'label'", "no column 'label'"),
        ("text,label\ngood,seven\n", "seven", None),
    ],
)
def test_a_dry_run_of_bench_checks_the_data(working_folder, say, tiny_checkpoint, built_tiny, rows, built_fault, fault):
    if rows:
        (working_folder / "rows.csv").write_text(rows)
    options = ("bench", "--data", "rows.csv", "--dry-run", "--model")
    code, out, err = say(*options, built_tiny.model, "--exported", built_tiny.exported)
    assert (code, out, built_fault in err) == (1, "", True)
    # Before the import of the checkpoint, its labels are unknown.
    code, _, err = say(*options, tiny_checkpoint)
    assert (code, (fault or "") in err) == (1 if fault else 0, True)


def test_a_folder_that_cannot_be_written_gives_an_error(working_folder, say, tiny_checkpoint):
    (working_folder / "file").write_text("")
    code, _, err = say("export", "--model", tiny_checkpoint, "--exported", "file/inside")
    assert code == 1
    assert "cannot be written" in err


@pytest.mark.parametrize(
    ("arguments", "place", "code"),
    [
        (["variants", "--exported", "file"], "file", 2),
        (["bench", "--results", "file"], "file", 2),
        (["export", "--as", "x" * 101], "Use at most 100 lower-case letters", 1),
        (["quantize", "--name", "x" * 101], "use at most 100 lower-case letters", 2),
        (["validate", "torch-pruned50-r" + "9" * 5000], "There is no variant", 1),
        (["compare", "x" * 300], "File name too long", 1),
    ],
)
def test_an_impossible_place_gives_one_sentence(working_folder, say, tiny_checkpoint, arguments, place, code):
    (working_folder / "file").write_text("")
    result, out, err = say(*arguments, *([] if arguments[0] == "compare" else ["--model", tiny_checkpoint]))
    assert (result, out) == (code, "")
    assert place in err
    assert "unexpected" not in err
    assert [path.name for path in working_folder.iterdir()] == ["file"]


def test_a_folder_of_temporary_files_that_is_missing_or_full_is_named(working_folder, say, tiny, monkeypatch):
    arguments = ["ship", "onnx-std", "--target", "web", "--no-demo", "--license", "MIT"]
    arguments += ["--model", "tiny", "--exported", tiny.exported, "--output", "bundle"]
    monkeypatch.setattr("tempfile.tempdir", str(working_folder / "missing"))
    code, _, err = say(*arguments)
    assert code == 1
    assert f"{working_folder / 'missing'}" in err
    assert "unexpected" not in err
    assert "No such file or directory" in err
    assert [path.name for path in working_folder.iterdir()] == ["exported"]


def test_a_failed_validation_exits_with_3(working_folder, say, tiny, monkeypatch):
    report = {"passed": False, "agreement": "exact", "finite": True, "grid_largest_delta": {"one": 1.0}}
    report |= {"worst_case": "one", "largest_delta": 1.0, "mean_delta": 1.0, "sentences": 2, "flips": 1}
    monkeypatch.setattr("toolchain.build.validating.validate", lambda *_: report)
    code, out, err = say("validate", "onnx-fp32", "--model", "tiny", "--exported", tiny.exported)
    assert code == 3
    assert "onnx-fp32: FAILED: " in out
    assert "logits of onnx-fp32 differ from PyTorch's" in err


def test_a_tampered_artifact_gives_an_error_with_a_hint(working_folder, say, tiny):
    file = tiny.path("onnx-fp32") / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    for arguments in (["quantize"], ["validate", "onnx-int8"]):
        code, _, err = say(*arguments, "--model", "tiny", "--exported", tiny.exported)
        assert code == 1
        assert "model.onnx has" in err
        assert "Delete the folder" in err
    code, out, _ = say("variants", "--model", "tiny", "--exported", tiny.exported)
    assert code == 0
    assert re.search(r"onnx-fp32 .*tampered: .*model.onnx has", out)


def test_bench_on_cuda_without_a_device_writes_rows_with_reason_and_hint(
    working_folder, say, tiny_checkpoint, monkeypatch
):
    monkeypatch.setattr("toolchain.system.hardware.gpus", lambda: ([], ""))
    code, out, err = say("bench", "--provider", "cuda", "--quick", "--model", tiny_checkpoint)
    assert code == 1
    assert "No cell was measured: No NVIDIA GPU" in err
    cells = [f"{name}@{provider}" for provider in ("cuda", "cuda-graphs") for name in DEFAULT_CELLS[provider]]
    assert ", ".join(cells) + " unavailable" in out
    assert "toolchain doctor" in out
    file = next((working_folder / "benchmarks/results/local").glob("tiny-*.json"))
    # the command saves the result file before it fails
    assert {row.status for row in ResultFile.read(file).rows} == {"unavailable"}


@pytest.mark.slow
@pytest.mark.usefixtures("short_bench")
def test_the_commands_work_in_sequence(working_folder, say, tmp_path_factory, monkeypatch):
    variants = ("torch-fp32", "torch-pruned50", "onnx-std", "onnx-fp32", "onnx-int8")
    monkeypatch.setitem(DEFAULT_CELLS, "cpu", variants)
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("c") / "mine", ("bad", "good"))
    table = working_folder / "reviews.csv"
    table.write_text("review,stars\n" + "".join(f"a film of {i} words,{('bad', 'good')[i % 2]}\n" for i in range(40)))
    model = ("--model", checkpoint)
    code, out, err = say("export", *model)
    assert code == 0
    assert out.split() == [f"exported/mine/{name}" for name in ("torch-fp32", "onnx-std", "onnx-fp32")]
    assert "largest |Δlogit|" in err
    assert say("quantize", "--backend", "ort", *model)[0] == 0
    code, out, err = say("bench", "--quick", *model)
    assert code == 1
    assert "this model has bad, good. Pass data with the model's labels: --data FILE" in err
    columns = ("--data", table, "--text-column", "review", "--label-column", "stars")
    code, out, err = say("bench", "--quick", "--provider", "cpu", "--save-as", "mine", *columns, *model)
    assert (code, err.count("saved: benchmarks/results/mine.json")) == (0, 1)
    assert "onnx-int8@cpu" in out
    code, out, _ = say("compare", "--format", "json", *model)
    assert code == 0
    rows = {row["cell"]: row for row in json.loads(out)}
    assert rows["onnx-int8@cpu"]["status"] == "ok"
    # The labels of SST-2 are not those of this model, so pruning cannot use SST-2, and torch-pruned50 has no artifact.
    # The row of torch-pruned50 states how to build this variant.
    assert rows["torch-pruned50@cpu"]["status"] == "unavailable"
    assert "--train-data FILE" in rows["torch-pruned50@cpu"]["mend"]
    code, out, _ = say("compare", "--format", "markdown", "--baseline", "onnx-fp32", *model)
    assert code == 0
    assert "against onnx-fp32@cpu" in out
    code, out, _ = say("variants", "--json", *model)
    states = {row["variant"]: row["state"] for row in json.loads(out)}
    assert {states[name] for name in variants if "pruned" not in name} == {"built"}
    code, out, _ = say("validate", "onnx-int8", "--json", *model)
    assert json.loads(out)["passed"]


def test_doctor_finds_problems_and_gives_hints(working_folder, say, monkeypatch):
    code, out, _ = say("doctor")
    assert code == 0
    assert re.search(r"ok +torch 2", out)
    versions = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr("toolchain.system.hardware.versions", lambda: versions)
    code, out, _ = say("doctor", "--json")
    assert code == 1
    problem = [finding for finding in json.loads(out) if finding["level"] == "problem"]
    assert "both installed" in problem[0]["what"]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in problem[0]["mend"]
    monkeypatch.setattr("toolchain.system.hardware.versions", dict)
    assert "no ONNX Runtime is installed" in say("doctor")[1]


def test_an_environment_variable_can_set_an_option(working_folder, say, monkeypatch, tiny_checkpoint):
    monkeypatch.setenv("TOOLCHAIN_EXPORT_MODEL", str(tiny_checkpoint))
    assert "torch-fp32: build" in say("export", "--dry-run")[1]
    monkeypatch.setenv("TOOLCHAIN_EXPORT_OPTIMIZE", "none")
    assert "onnx-fp32" not in say("export", "--dry-run")[1]
    monkeypatch.setenv("TOOLCHAIN_COMPARE_FORMAT", "surprise")
    assert say("compare")[0] == 2


def test_every_option_has_an_environment_variable_named_after_it():
    for name, command in cli.commands.items():
        for option in command.params:
            if isinstance(option, click.Option):
                flag = next(text for text in option.opts if text.startswith("--"))
                assert option.envvar == f"TOOLCHAIN_{name}_{flag[2:]}".upper().replace("-", "_")


def test_debug_keeps_the_exit_code(working_folder, say, monkeypatch):
    def raise_verdict(*_):
        raise VerdictError("No.", "Do better.")

    monkeypatch.setattr("toolchain.build.pipeline.Workspace.open", raise_verdict)
    code, _, err = say("validate", "onnx-int8", "--debug")
    assert code == 3
    assert "Traceback" in err
    assert err.endswith("Error: No. Do better. [E-VERDICT]\n")


def test_output_works_in_an_ascii_terminal(working_folder):
    run = run_toolchain("export", "--help", cwd=working_folder, env={"PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0
    run = run_toolchain("variants", cwd=working_folder, env={"PYTHONIOENCODING": "ascii"})
    assert (run.returncode, "onnx-int8" in run.stdout) == (0, True)


def test_a_run_without_a_measured_row_keeps_the_old_result_file(working_folder, say, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("toolchain.system.hardware.gpus", lambda: ([], ""))
    result_file = working_folder / "benchmarks" / "results" / "kept.json"
    result_file.parent.mkdir(parents=True)
    result_file.write_text("{}")
    command = ("bench", "--provider", "cuda", "--save-as", "kept", "--force", "--model", tiny_checkpoint)
    assert say(*command)[0] == 1
    assert result_file.read_text() == "{}"


@pytest.fixture
def bench_as(working_folder, say, monkeypatch, tiny_checkpoint):
    """Returns a function that runs `bench --save-as kept` while `kept.json` holds a result.

    Instead of measuring, `bench` calls `during_measurement`.
    """
    result_file = working_folder / "benchmarks" / "results" / "kept.json"
    result_file.parent.mkdir(parents=True)
    result_file.write_text("older")

    def run(*options, during_measurement=lambda: pytest.fail("it was measured")):
        def measure(*arguments):
            during_measurement()
            return result(FP32, INT8), Journal.begin(working_folder / "x.journal", {})

        monkeypatch.setattr("toolchain.bench.run.measure", measure)
        return *say("bench", "--save-as", "kept", "--model", tiny_checkpoint, *options), result_file

    return run


def test_the_installed_program_runs(tmp_path):
    program = Path(sys.prefix) / "bin" / "toolchain"
    if not program.exists():
        pytest.skip("the toolchain is not installed as a program")
    run = subprocess.run([program, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == f"toolchain, version {toolchain.__version__}\n"


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_save_as_refuses_an_existing_name_before_it_measures(bench_as, options):
    code, out, err, result_file = bench_as(*options)
    assert (code, out) == (1, "")
    assert (
        "benchmarks/results/kept.json exists. Choose another name with --save-as, or replace the file with --force."
        in err
    )
    assert result_file.read_text() == "older"


def test_force_replaces_the_existing_result_file(bench_as):
    code, _, err, result_file = bench_as("--force", during_measurement=lambda: None)
    assert (code, "saved: benchmarks/results/kept.json" in err) == (0, True)
    assert len(ResultFile.read(result_file).rows) == 2


def require_saved_locally(working_folder, err):
    (file,) = (working_folder / "benchmarks" / "results" / "local").iterdir()
    assert len(ResultFile.read(file).rows) == 2
    assert f"saved: {file.relative_to(working_folder)}\n" in err
    assert f"The result of this run is in {file.relative_to(working_folder)}. Rename the file." in err.splitlines()[-1]
    assert not list(working_folder.glob("*.journal"))


def test_a_result_is_kept_where_its_name_appears_during_the_run(working_folder, bench_as):
    result_file = working_folder / "benchmarks" / "results" / "kept.json"
    result_file.unlink()
    code, out, err, _ = bench_as(during_measurement=lambda: result_file.write_text("another run's"))
    assert code == 1
    assert "torch-fp32@cpu" in out
    assert "Error: benchmarks/results/kept.json exists. " in err
    assert result_file.read_text() == "another run's"
    require_saved_locally(working_folder, err)


def test_a_result_is_kept_where_its_name_cannot_be_written(working_folder, bench_as):
    result_file = working_folder / "benchmarks" / "results" / "kept.json"

    def replace_by_folder():
        result_file.unlink()
        result_file.mkdir()

    code, _, err, _ = bench_as("--force", during_measurement=replace_by_folder)
    assert code == 1
    assert "Error: benchmarks/results/kept.json cannot be written: Is a directory. " in err
    require_saved_locally(working_folder, err)


def test_save_as_refuses_an_existing_name_of_a_cluster_machine_before_it_measures(
    working_folder, say, tiny_checkpoint, monkeypatch
):
    nodes = [SimpleNamespace(machine={"id": name}) for name in ("0a", "0b")]
    monkeypatch.setattr("toolchain.distributed.connect", lambda *_: nullcontext(SimpleNamespace(nodes=nodes)))
    results = [replace(result(FP32), machine={**result(FP32).machine, "id": name}) for name in ("0a", "0b")]
    monkeypatch.setattr("toolchain.distributed.benching.measure", lambda *_: iter(results))
    command = ("bench", "--engine", "ray", "--save-as", "kept", "--model", tiny_checkpoint)
    folder = working_folder / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "kept-0b.json").write_text("older")
    code, out, err = say(*command)
    assert (code, out) == (1, "")
    assert "benchmarks/results/kept-0b.json exists. Choose another name" in err
    assert [path.name for path in folder.iterdir()] == ["kept-0b.json"]
    assert say(*command, "--force")[0] == 0
    assert [ResultFile.read(folder / f"kept-{name}.json").machine["id"] for name in ("0a", "0b")] == ["0a", "0b"]


@pytest.fixture
def two_runs(working_folder):
    """Writes the result files of an older run, and of a newer run in which int8 takes twice as long."""
    for name, int8 in (("old", INT8), ("new", measured_row("onnx-int8", 2, correct=89))):
        result(FP32, int8, run={**RUN, "id": name}).write(working_folder / f"{name}.json")
    return working_folder


def test_compare_with_limits_names_the_winner_and_the_nearest_misses(two_runs, say):
    code, out, _ = say("compare", "old.json", "--max-drop", "1.0", "--max-p95-ms", "5", "--max-size-mb", "30")
    assert code == 0
    assert re.search(r"onnx-int8@cpu", out.split("\n\n")[-1])
    assert "torch-fp32@cpu" in out
    code, out, _ = say("compare", "old.json", "--max-drop", "0.5", "--max-p95-ms", "5")
    assert code == 3
    assert "onnx-int8@cpu" in out
    code, out, _ = say("compare", "old.json", "--max-drop", "0.5", "--json")
    assert (code, json.loads(out)["verdict"]["winner"]["cell"]) == (0, "torch-fp32@cpu")
    assert say("compare", "old.json", "--provider", "cuda", "--max-drop", "1")[0] == 1
    assert say("compare", "old.json", "--max-drop", "nan")[0] == 2


def test_compare_against_an_older_run_finds_regressions(two_runs, say):
    code, out, _ = say("compare", "new.json", "--against", "old.json", "--max-regression", "5%")
    assert code == 3
    assert "onnx-int8@cpu" in out
    assert say("compare", "new.json", "--against", "old.json", "--max-regression", "100")[0] == 0
    code, _, err = say("compare", "old.json", "--against", "old.json")
    assert (code, "is the new run itself" in err) == (1, True)
    code, _, err = say("compare", "new.json", "--against", "old.json", "--max-regression", "much")
    assert code == 2
    code, out, _ = say("compare", "new.json", "--against", "old.json", "--json")
    assert (code, "regressions" in json.loads(out)) == (3, True)


@pytest.mark.slow
def test_compare_writes_csv_html_and_plots(two_runs, say):
    code, out, _ = say("compare", "old.json", "--format", "csv", "--sort", "latency", "--max-drop", "5")
    assert (code, [row["cell"] for row in csv.DictReader(out.splitlines())]) == (0, ["onnx-int8@cpu", "torch-fp32@cpu"])
    code, out, err = say("compare", "old.json", "--format", "html", "--plots", "plots")
    assert (code, out.startswith("<!DOCTYPE html>")) == (0, True)
    assert "saved: plots/" in err
    assert list((two_runs / "plots").glob("*.svg"))
    (two_runs / "taken").write_text("")
    code, _, err = say("compare", "old.json", "--plots", "taken/below")
    assert (code, "taken/below" in err) == (1, True)
    assert say("compare", "old.json", "--filter", "bnb-*")[0] == 1


def test_resume_without_an_interrupted_run_gives_an_error(working_folder, say, tiny_checkpoint):
    code, _, err = say("bench", "--quick", "--resume", "--provider", "cuda", "--model", tiny_checkpoint)
    assert (code, "There is no interrupted run of tiny" in err) == (1, True)


@pytest.fixture
def model_options(working_folder, tiny):
    """The command-line options that select the tiny model and the folder of its workspace."""
    return "--model", tiny.model, "--exported", tiny.exported


def test_no_pass_leaves_a_pass_out_of_an_export(say, tiny, model_options):
    code, _, err = say("export", "--no-pass", "first-token", "--name", "whole", *model_options)
    assert code == 0, err
    assert tiny.load("onnx-fp32+whole").manifest.step.passes == ("fuse", "residual-sum", "first-query")
    assert tiny.load("onnx-fp32").manifest.step.passes == ("fuse", "residual-sum", "first-token", "first-query")


def test_no_pass_leaves_a_pass_out_of_a_quantisation(say, tiny, model_options):
    command = ("quantize", "--no-pass", "quantize-embedding", "--name", "fp32-tables", *model_options)
    code, _, err = say(*command)
    assert code == 0, err
    manifest = tiny.load("onnx-int8+fp32-tables").manifest
    assert manifest.step.passes == ("padding", "quantize-linear")
    assert list(manifest.facts["rewrites"]) == ["padding", "quantize-linear"]
    assert "onnx-int8+fp32-tables: skip (fresh)" in say(*command, "--dry-run")[1]


@pytest.mark.parametrize(
    ("options", "plan_text"),
    [
        (
            ("--embeddings", "int4", "--name", "small"),
            "onnx-int8+small: build (missing); backend=ort, scheme=dynamic, embeddings=int4",
        ),
        (
            ("--scheme", "dynamic", "--no-pass", "padding", "--name", "less"),
            "passes=['quantize-linear', 'quantize-embedding']",
        ),
        (("--scheme", "dynamic", "--no-pass", "quantize-linear", "--name", "less"), "passes=['quantize-embedding']"),
        (
            ("--scheme", "static", "--no-pass", "smooth", "--name", "less"),
            "passes=['quantize-linear', 'quantize-embedding']",
        ),
        (("--scheme", "int4", "--no-pass", "quantize-embedding", "--name", "less"), "passes=['quantize-linear']"),
        (("--scheme", "fp16"), "onnx-fp16: build (missing); provider=cuda, passes=['fuse-cuda', 'half']"),
        (
            ("--isa", "portable"),
            "onnx-int8-portable: build (missing); backend=ort, scheme=dynamic, reduce_range=True",
        ),
        (("--scheme", "static"), "onnx-int8-static: build (missing); backend=ort, scheme=static, train=sst2:"),
    ],
)
def test_a_dry_run_of_quantize_prints_the_settings(say, model_options, options, plan_text):
    code, out, err = say("quantize", *options, "--dry-run", *model_options)
    assert code == 0, err
    assert plan_text in out


def test_isa_auto_prints_its_choice(say, model_options):
    err = say("quantize", "--isa", "auto", "--dry-run", *model_options)[2]
    assert re.search(r"^--isa auto chooses (vnni|portable) for this processor$", err, re.MULTILINE)


def test_fp16_takes_no_other_option(say, model_options):
    code, _, err = say("quantize", "--scheme", "fp16", "--keep-fp32", "1", *model_options)
    assert code == 2
    assert "--scheme fp16 cannot be used with --isa portable" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "--no-pass", "half"),
        ("export", "--optimize", "none", "--no-pass", "fuse"),
        ("export", "--name", "Not Good"),
        ("quantize", "--backend", "torch", "--isa", "portable"),
        ("quantize", "--scheme", "int4", "--isa", "portable"),
        ("quantize", "--scheme", "static", "--isa", "portable"),
        ("quantize", "--backend", "torch", "--embeddings", "int4"),
        ("quantize", "--backend", "torch", "--no-pass", "quantize-embedding"),
        ("quantize", "--no-pass", "fuse"),
        ("quantize", "--no-pass", "smooth"),
        ("quantize", "--scheme", "int4", "--no-pass", "padding"),
        ("quantize", "--no-pass", "quantize-embedding", "--embeddings", "int4"),
        ("quantize", "--no-pass", "quantize-linear", "--no-pass", "quantize-embedding"),
        ("quantize", "--no-pass", "quantize-linear", "--keep-fp32", "1"),
        ("quantize", "--no-pass", "quantize-linear", "--isa", "portable"),
    ],
)
def test_options_that_exclude_each_other_give_a_usage_error(say, model_options, arguments):
    assert say(*arguments, *model_options)[0] == 2
