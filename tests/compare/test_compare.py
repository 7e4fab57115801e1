"""Tests of ratios, baselines, merged runs, and the printed comparison."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from sample_results import FP32, INT8, NO_GPU, RUN, measured_row, result, row_of_cell

from toolchain.compare.report.columns import columns
from toolchain.compare.report.latex import to_latex
from toolchain.compare.report.markdown import to_markdown
from toolchain.compare.report.notes import notes
from toolchain.compare.report.table import print_table
from toolchain.compare.rows import arrange, compare
from toolchain.errors import ResultFileError
from toolchain.results.result_file import ResultFile
from toolchain.results.scores import Accuracy
from toolchain.system.escaping import escape_latex

MARKDOWN_ATTACKS = [
    "a|b\\|c",
    "`a` ``",
    "<b>c</b><!--",
    "[d](http://e) ![f](g)",
    "*h* _i_ ~~j~~ &amp;",
    "k\n\n# l\r\u2028\x1b[31m\u202e",
    "# m",
    "- n",
    "1. o",
    "[p]: http://q",
    "```",
    "> r",
    "---",
]


def test_every_ratio_is_relative_to_the_baseline_and_better_above_one():
    rows = compare([result(FP32, INT8, run=RUN)])
    int8_row = row_of_cell(rows, "onnx-int8@cpu")
    assert int8_row.baseline is FP32
    assert int8_row.speedup.value == pytest.approx(8)
    assert int8_row.throughput_gain.value == pytest.approx(8, rel=1e-3)
    assert int8_row.memory_reduction == int8_row.size_reduction == pytest.approx(8)
    assert int8_row.accuracy_points == pytest.approx(-1)


def test_a_variant_or_a_cell_can_name_the_baseline():
    runs = [result(FP32, INT8, run=RUN)]
    for name in ("onnx-int8", "onnx-int8@cpu"):
        assert row_of_cell(compare(runs, name), "torch-fp32@cpu").speedup.value == pytest.approx(1 / 8)


def test_a_missing_baseline_gives_an_error_that_lists_the_measured_cells():
    with pytest.raises(
        ResultFileError, match=r"No row is the baseline 'onnx-int4'. The measured cells are: torch-fp32@cpu"
    ):
        compare([result(FP32, run=RUN)], "onnx-int4")


def test_rows_of_different_machines_have_no_ratio():
    other_machine = dict(result().machine, id="y", cpu="other")
    rows = compare(
        [result(FP32, run=RUN), result(INT8, machine=other_machine, run=RUN, created="2026-01-02T00:00:00+00:00")]
    )
    int8_row = row_of_cell(rows, "onnx-int8@cpu")
    assert int8_row.baseline is None
    assert int8_row.speedup is None
    assert "other, 2 cores" in to_markdown(rows)


def test_a_gpu_row_is_compared_with_the_cpu_baseline_or_else_with_a_gpu_baseline():
    gpu, base = measured_row("onnx-fp32", 1, "cuda"), measured_row("torch-fp32", 4, "cuda")
    assert row_of_cell(compare([result(FP32, base, gpu)]), "onnx-fp32@cuda").baseline is FP32
    assert row_of_cell(compare([result(base, gpu)]), "onnx-fp32@cuda").baseline is base


def test_a_row_with_cuda_graphs_is_compared_with_rows_on_cuda():
    base, half = measured_row("torch-fp32", 4, "cuda"), measured_row("onnx-fp16", 2, "cuda")
    with_graphs = measured_row("onnx-fp16", 1, "cuda-graphs")
    run = result(base, half, with_graphs)
    cell = "onnx-fp16@cuda-graphs"
    assert row_of_cell(compare([run]), cell).baseline is base
    assert row_of_cell(compare([run], "torch-fp32"), cell).baseline is base
    assert row_of_cell(compare([run], "onnx-fp16@cuda"), cell).baseline is half
    assert [line for line in notes(compare([run])) if line.startswith("cuda-graphs: one text at a time")]
    assert not [line for line in notes(compare([result(base, half)])) if line.startswith("cuda-graphs")]
    assert len(arrange(compare([run]), None, (), "cuda")) == 3
    assert [row.measurement.cell for row in arrange(compare([run]), None, (), "cuda-graphs")] == [cell]


def test_a_row_on_tensorrt_is_compared_with_rows_on_cuda_and_states_its_precision():
    base, engine = measured_row("torch-fp32", 4, "cuda"), measured_row("onnx-std", 1, "tensorrt")
    rows = compare([result(base, engine)])
    assert row_of_cell(rows, "onnx-std@tensorrt").baseline is base
    assert [line for line in notes(rows) if line.startswith("tensorrt: computes in half precision")]
    assert not [line for line in notes(compare([result(base)])) if line.startswith("tensorrt")]


def test_a_comparison_keeps_the_newest_row_of_each_artifact():
    slower_row = measured_row("onnx-int8", 2)
    rebuilt_row = measured_row("onnx-int8", 3, artifact_id="another id")
    files = [
        result(rebuilt_row, created="2026-01-03T00:00:00+00:00"),
        result(FP32, INT8, created="2026-01-01T00:00:00+00:00"),
        result(slower_row, created="2026-01-02T00:00:00+00:00"),
    ]
    rows = compare(files, None, {("m", "onnx-int8"): "another id"})
    int8_rows = [(r.measurement.latency_ms["p50"], r.stale) for r in rows if r.measurement.variant == "onnx-int8"]
    assert sorted(int8_rows) == [(2.0, True), (3.0, False)]
    assert "[stale]" in to_markdown(rows)


def test_runs_with_other_data_or_threads_keep_separate_rows():
    other_data = {"name": "reviews", "rows": 100, "sha256": "1"}
    files = [
        result(FP32, INT8, run=RUN),
        result(FP32, INT8, run=RUN, data=other_data),
        result(FP32, INT8, run={**RUN, "threads": 1}),
    ]
    assert len(compare(files)) == 6


def test_a_note_states_how_accuracy_and_latency_were_measured():
    full_text = to_markdown(compare([result(FP32, INT8, run={**RUN, "single_sentences": 100})]))
    assert "Latency and accuracy are measured at batch 1, with each sentence at its own length" in full_text
    batched_row = measured_row("torch-fp32", 8, score=Accuracy(90, 100, 32))
    sampled_text = to_markdown(compare([result(batched_row, run={**RUN, "single_sentences": 40})]))
    assert "Latency is measured at batch 1, on 40 of 100 sentences, each at its own length" in sampled_text
    assert "The accuracy is measured on all sentences in batches of 32" in sampled_text


def test_the_table_shows_every_figure_and_the_reason_for_a_missing_one(capsys):
    print_table(compare([result(FP32, INT8, NO_GPU, run=RUN)]))
    output = capsys.readouterr().out
    assert "89.00% (-1.00)" in output
    assert "1.00 (8.00×)" in output
    assert "100 (8.00×)" in output
    assert "10.0 (8.00×)" in output
    assert "onnx-fp32@cuda unavailable: No GPU answers. Get one." in output
    assert "against torch-fp32@cpu" in output
    assert "c, 2 cores" in output


def test_markdown_escapes_bars_in_its_table():
    row_with_bar = dataclasses.replace(INT8, variant="a|b")
    text = to_markdown(compare([result(FP32, row_with_bar, run=RUN)]))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def markdown_structure(text):
    """Returns the kinds of all blocks and inline elements of a Markdown page."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    return [(token.type, token.tag, [child.type for child in token.children or []]) for token in tokens]


@pytest.mark.parametrize("attack", MARKDOWN_ATTACKS)
def test_markdown_shows_hostile_text_and_no_markup(attack):
    def page(text):
        machine = {**result().machine, "id": text, "cpu": text, "isa": [text]}
        note = {"session": {"note": text, "fallback": text}}
        rows = [FP32, dataclasses.replace(INT8, variant=text, model=text, facts=note)]
        rows += [dataclasses.replace(NO_GPU, reason=text, mend=text)]
        data = {**result(FP32).data, "name": text}
        return to_markdown(compare([result(*rows, run=RUN, machine=machine, data=data, created=text)]))

    assert markdown_structure(page(attack)) == markdown_structure(page("good"))
    assert not set("\x1b\u202e\u2028\r") & set(page(attack))


def latex_commands(text):
    """Returns the commands, braces and column separators of a LaTeX text, without escaped characters."""
    return re.findall(r"\\[A-Za-z]+|(?<!\\)[{}&%$#_^~]", re.sub(r"\\[&%$#_{}]", "", text))


@pytest.mark.parametrize("text", ["\\input{/etc/passwd}", "a & b % c", "$x_1^2$", "#1 {", "~", "\\", "50 %"])
def test_latex_shows_hostile_text_and_runs_no_command(text):
    shown = escape_latex(text)
    known = {"\\textbackslash", "\\textasciitilde", "\\textasciicircum", "{", "}"}
    assert set(latex_commands(shown)) <= known
    assert shown.replace(r"\{", "").replace(r"\}", "").count("{") == shown.replace(r"\{", "").replace(r"\}", "").count(
        "}"
    )


def test_a_latex_table_has_a_column_for_each_header():
    lines = to_latex(compare([result(FP32, INT8, run=RUN)])).splitlines()
    start = lines.index(r"\midrule")
    rows = [lines[start - 1], *lines[start + 1 : lines.index(r"\bottomrule")]]
    assert len(rows) == 3
    assert {row.count(" & ") + 1 for row in rows} == {lines[lines.index(r"\toprule") - 1].split("{")[-1].count("r") + 1}
    assert all(row.endswith(r" \\") for row in rows)


def test_latex_keeps_a_row_apart_from_the_line_break_before_it():
    assert escape_latex("[noisy] * -- 'x'") == r"{[}noisy] {*} -{}- \textquotesingle{}x\textquotesingle{}"


def test_json_has_the_ratios_and_no_samples():
    body = row_of_cell(compare([result(FP32, INT8, run=RUN)]), "onnx-int8@cpu").to_json()
    assert body["speedup"] == {"value": 8.0}
    assert body["baseline"] == "torch-fp32@cpu"
    assert body["machine"]["cpu"] == "c"
    assert "samples" not in body
    json.dumps(body)


def test_a_comparison_without_rows_gives_an_error():
    with pytest.raises(ResultFileError, match="no rows"):
        compare([result()])


@pytest.mark.slow
def test_committed_result_files_can_be_read():
    from conftest import TESTS

    files = list((TESTS.parent / "benchmarks" / "results").glob("*.json"))
    studies = (TESTS.parent / "benchmarks" / "studies").glob("*.json")
    # A file in benchmarks/studies/ whose name starts with one of these prefixes is not a result file.
    other_prefixes = (
        "pruning-",
        "pairs-",
        "runs-",
        "clients-",
        "answers-",
        "browser-",
        "operators-",
        "saturation-",
        "precision-",
        "memory-",
        "serving-",
        "capacity-",
    )
    files += [file for file in studies if not file.name.startswith(other_prefixes)]
    assert files
    for file in files:
        assert ResultFile.read(file).rows


SEED_STUDY = sorted((Path(__file__).parent.parent.parent / "benchmarks" / "results").glob("seed-study-*.json"))


def test_the_seed_study_files_hold_the_published_figures():
    rows = compare([ResultFile.read(path) for path in SEED_STUDY])
    assert {row.measurement.status for row in rows} == {"reported"}
    assert all(row.measurement.artifact_id is None and not row.measurement.latency for row in rows)
    figures = {
        (row.run.machine["id"].removeprefix("seed-study-"), row.measurement.cell): (
            f"{row.measurement.score.value:.2%}",
            row.measurement.latency_ms.get("mean"),
        )
        for row in rows
    }
    assert figures == {
        ("xeon", "torch-fp32@cpu"): ("91.06%", 72.0),
        ("xeon", "torch-int8@cpu"): ("89.68%", 158.0),
        ("xeon", "torch-pruned30-mask-int8@cpu"): ("90.48%", None),
        ("xeon", "torch-pruned40-mask-int8@cpu"): ("88.53%", None),
        ("xeon", "torch-pruned50-mask-int8@cpu"): ("87.16%", None),
        ("gtx1050ti", "torch-fp32@cuda"): ("91.06%", 12.0),
        ("gtx1050ti", "bnb-int8@cuda"): ("90.71%", 205.0),
        ("t4", "torch-fp32@cuda"): ("91.06%", 7.0),
        ("t4", "bnb-int8@cuda"): ("90.71%", 47.0),
        ("t4", "bnb-fp4@cuda"): ("91.17%", 27.0),
    }


def test_a_comparison_marks_published_figures_as_reported():
    rows = compare([ResultFile.read(path) for path in SEED_STUDY] + [result(FP32, INT8, run=RUN)])
    text = to_markdown(rows)
    assert "| Tesla T4 | bnb-fp4@cuda [reported] | 91.17% (+0.11) | 27.00 mean | – |" in text.replace(
        "| distilbert-base-uncased-finetuned-sst-2-english ", ""
    )
    assert "[reported]: published figures, not measured here: https://github.com/" in text
    # The report quotes a note from the result file seed-study-xeon.json. In the note, 70.55 s is the latency that the
    # study published; the note says that the figure and the unit come from the study.
    assert "Intel Xeon (Google Colab): its latency was printed as 70.55 s: the study's own figure and unit." in text
    int8_row = next(row for row in rows if row.measurement is INT8)
    assert int8_row.baseline is FP32  # the baseline is a measured row, not the published row of the same name
    assert all(row.memory_reduction is None for row in rows if row.measurement.status == "reported")


def test_a_cell_on_two_machines_gives_two_rows_with_their_hardware():
    gpu = {"id": "t4", "cpu": "Xeon", "cores": 2, "gpu": [{"name": "Tesla T4"}], "ram_gib": 12, "isa": []}
    gpu_result = result(measured_row("torch-fp32", 5, "cuda"), measured_row("torch-fp32", 30), run=RUN, machine=gpu)
    rows = compare([result(FP32, run=RUN), gpu_result])
    text = next(column.text for column in columns(rows) if column.name == "machine")
    cells = {(text(row), row.measurement.cell) for row in rows}
    assert cells == {
        ("c, 2 cores", "torch-fp32@cpu"),
        ("Xeon, 2 cores", "torch-fp32@cpu"),
        ("Tesla T4", "torch-fp32@cuda"),
    }
