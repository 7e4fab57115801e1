"""Tests of the HTML report and the plots, and that hostile text in them never becomes code."""

import csv
import dataclasses
import io
import itertools
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from conftest import TESTS
from rich_rows import DATA, exits_result, hostile_result, report_html, rich_result
from sample_results import measured_row, result, row_of_cell

from toolchain.compare.report.columns import CELL, columns, host_name
from toolchain.compare.report.flat import to_csv
from toolchain.compare.report.flips import Sentence, Texts
from toolchain.compare.report.notes import notes
from toolchain.compare.report.plots import figures, save
from toolchain.compare.rows import compare
from toolchain.data import inputs
from toolchain.errors import ResultFileError
from toolchain.results.measurements import Measurement
from toolchain.results.result_file import ResultFile


@pytest.fixture(scope="module")
def page():
    return report_html(rich_result())


class Page(HTMLParser):
    """Collects the tags of a page and the texts that a browser without JavaScript shows.

    The list `titles` has the texts of the points of plots, which such a browser shows below the mouse. Fails if a
    closing tag differs from the last open tag.
    """

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.titles, self.open, self.hidden = [], [], [], [], 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)
            self.hidden += bool(self.hidden or "hidden" in dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.hidden = max(0, self.hidden - 1)

    def handle_data(self, data):
        if self.open[-1:] == ["title"] and "svg" in self.open:
            self.titles.append(data)
        elif not self.hidden and self.open[-1:] not in (["style"], ["script"]):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def test_the_report_has_every_section(page):
    parsed = Page(page)
    for heading in ("Comparison", "Plots", "Answers", "Flips", "Not measured", "How it was measured"):
        assert f"> {heading} <" in re.sub(r"\s+", " ", re.sub(r"(<h2[^>]*>)(.*?)(</h2>)", r"\1 \2 \3", page))
    for text in (
        "Comparison of m m on c, 2 cores, 1 GiB; 2 threads, sst2, 8 sentences; 2026-01-01",
        "fastest at batch 1 onnx-pruned50-int8",
        "the host took 30% of the processor time of the virtual machine",
        "onnx-fp32@cuda m c, 2 cores unavailable No GPU answers. Get one.",
        "minimum passes over the sentences 3",
        "sessions may fall back to the CPU no",
        "torch, fp32_gmacs 61.5",
        "torch 2.13.0",
        "Peak memory: VmHWM.",
        "torch-fp32@cpu 1.0 10.0 0.250 50",
    ):
        assert text in parsed.text, text
    marks = {attrs["class"] for tag, attrs in parsed.tags if tag == "span" and "mark" in attrs.get("class", "")}
    assert marks == {"mark baseline", "mark pareto", "mark noisy"}


def test_the_table_of_the_report_has_the_texts_of_the_terminal(page):
    rows = [row for row in compare([rich_result()]) if row.measurement.status == "ok"]
    parsed = Page(page)
    for column in columns(rows):
        assert column.header in parsed.texts
        # the report shows the marks of a cell, such as [noisy], apart from the cell's name
        cell_texts = [row.measurement.cell if column is CELL else column.text(row) for row in rows]
        assert all(cell_text in parsed.texts for cell_text in cell_texts)


def test_the_report_describes_the_flips(page):
    text = Page(page).text
    assert "Lost by all 3 variants, m on c, 2 cores 1 of the sentences that torch-fp32@cpu answers correctly is" in text
    assert "answered wrongly by every other variant: row 2, POSITIVE sentence <b>2</b> By variant" in text
    assert "torch-pruned50@cpu : 2 lost, 1 won against torch-fp32@cpu Lost row 1, NEGATIVE sentence <b>1</b>" in text
    assert "Won row 8, NEGATIVE sentence <b>8</b>" in text


@pytest.mark.slow
def test_the_report_gives_row_numbers_for_unknown_data():
    data = {**rich_result().data, "name": "reviews", "sha256": "another"}
    text = Page(report_html(rich_result(data=data))).text
    assert "row 2, label 1" in text
    assert "sentence <b>" not in text


def test_the_page_makes_no_request(page):
    parsed = Page(page)
    policy = next(attrs["content"] for tag, attrs in parsed.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    for tag, attrs in parsed.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "form")
        assert not {"src", "srcset", "data", "action", "xlink:href", "background"} & set(attrs), (tag, attrs)
        assert attrs.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attrs)
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", page))
    assert not re.search(r"https?:|//[a-z]|@import", page)


def test_ids_are_unique_and_every_reference_has_a_target(page):
    parsed = Page(page)
    ids = Counter(attrs["id"] for _, attrs in parsed.tags if "id" in attrs)
    assert not [name for name, count in ids.items() if count > 1]
    referenced_ids = {attrs["href"][1:] for _, attrs in parsed.tags if "href" in attrs} | set(
        re.findall(r"url\(#(.*?)\)", page)
    )
    assert referenced_ids <= set(ids)


def test_every_plot_has_a_description(page):
    attributes = [attrs for tag, attrs in Page(page).tags if tag == "svg"]
    assert [attrs["role"] for attrs in attributes] == ["img"] * 5
    descriptions = [attrs["aria-label"] for attrs in attributes]
    assert "no variant is both faster and more accurate than onnx-pruned50-int8 (62.50 % at 0.73 ms)" in descriptions[0]
    assert "size, MB: 7.00 (onnx-pruned50-int8) to 80.00 (torch-fp32)" in descriptions[1]
    assert "at 64 tokens, median 2.18 ms (onnx-pruned50-int8) to 24.96 ms (torch-fp32)" in descriptions[3]
    assert "torch-pruned50 predicted 2.00×, measured 1.60×" in descriptions[4]


@pytest.mark.slow
def test_hostile_text_of_a_result_file_stays_text():
    text = report_html(hostile_result())
    text.encode()
    parsed = Page(text)
    assert [attrs.get("type") for tag, attrs in parsed.tags if tag == "script"] == ["application/json", None]
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert '<script>alert(\'x\')</script>" onload="alert(1)" $\\frac{}$ --> ' in "".join(parsed.texts)
    assert "{{ 7 * 7 }}" in text
    assert not set("\x00\x1b\x9b\u202e") & set(text)
    assert figures(compare([hostile_result()]))


@pytest.mark.parametrize("status", ["unavailable", "reported", "failed"])
def test_the_report_accepts_rows_with_few_figures(status):
    row = Measurement("m", "torch-fp32", "cpu", None, status, "Why not.", "Do this.")
    text = Page(report_html(result(row))).text
    assert ("Why not. Do this." in text) == (status != "reported")
    assert "torch-fp32@cpu" in text
    assert figures(compare([result(row)])) == {}


def committed_results(*names):
    return [ResultFile.read(TESTS.parent / "benchmarks" / "results" / f"{name}.json") for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [["seed-study-t4"], ["seed-study-xeon", "seed-study-gtx1050ti", "reference-xeon-2cores"]]
)
def test_committed_result_files_give_a_report(names):
    text = Page(report_html(*committed_results(*names))).text
    assert "reported Published figures, not measured here." in text
    assert ("the clock covers" in text) == ("reference-xeon-2cores" in names)


@pytest.fixture(scope="module")
def plots(tmp_path_factory):
    """The paths of the plots of `rich_result`, in a new folder that `save` creates."""
    return save(compare([rich_result()]), tmp_path_factory.mktemp("plots") / "new" / "folder")


@pytest.mark.slow
def test_the_same_rows_give_the_same_bytes(tmp_path, page, plots):
    assert report_html(rich_result()) == page
    for first, second in zip(plots, save(compare([rich_result()]), tmp_path), strict=True):
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_plots_are_saved_as_svg_and_png(plots):
    names = ["accuracy-latency", "size-memory", "latency", "latency-by-length", "pruning-speedup"]
    assert [path.name for path in plots] == [f"{n}.{e}" for n in names for e in ("svg", "png")]
    assert sorted(plots) == sorted(plots[0].parent.iterdir())
    for path in plots:
        assert path.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")


def test_a_plot_without_data_is_left_out():
    assert list(figures(compare([result(measured_row("torch-fp32", 8))]))) == [
        "accuracy-latency",
        "size-memory",
        "latency",
    ]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_gives_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultFileError, match=r"cannot be written: Not a directory\. Free space, or"):
        save(compare([rich_result()]), tmp_path / "file")
    (tmp_path / "taken" / "accuracy-latency.svg").mkdir(parents=True)
    with pytest.raises(ResultFileError, match="cannot be written"):
        save(compare([rich_result()]), tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["accuracy-latency.svg"]


def test_notes_name_the_machine_of_a_row_where_there_are_several():
    other_machine = {**result().machine, "id": "y", "cpu": "d", "cores": 3}
    notes_of_one, notes_of_two = (
        notes(compare([rich_result()])),
        notes(compare([rich_result(), rich_result(machine=other_machine)])),
    )
    for note in (
        " [noisy]: the host took",
        ", p50 ms by length",
        ": torch-pruned50@cpu ",
        " unavailable: No GPU",
    ):
        assert not any(" on d, 3 cores" in line for line in notes_of_one)
        assert any(f" on d, 3 cores{note}" in line for line in notes_of_two), note
    assert len(set(notes_of_two)) == len(notes_of_two)
    assert sum("Pruning removed" in line for line in notes_of_two) == sum(
        "Pruning removed" in line for line in notes_of_one
    )


@pytest.mark.parametrize(
    ("processor", "short"),
    [
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel Xeon @ 2.20GHz"),
        ("AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763 64-Core"),
        ("Apple M1", "Apple M1"),
        ("Processor", "Processor"),
    ],
)
def test_the_name_of_a_machine_is_short(processor, short):
    machine = {**result().machine, "cpu": processor, "cores": 2}
    assert host_name(compare([rich_result(machine=machine)])[0]) == f"{short}, 2 cores"


@pytest.mark.slow
def test_each_machine_has_its_own_panel():
    other_machine = {**result().machine, "id": "y", "cpu": "d"}
    panels = figures(compare([rich_result(), rich_result(machine=other_machine)]))["latency"].figure.axes
    assert [axes.get_title("left") for axes in panels] == [
        f"m on {cpu}, 2 cores, 2 threads; sst2" for cpu in ("c", "d")
    ]


@pytest.mark.slow
def test_labels_of_a_plot_do_not_overlap():
    # The extent of a Matplotlib Annotation includes the line to the annotated point, so the test uses only the extent
    # of the text.
    from matplotlib.text import Text

    figure = figures(compare(committed_results("reference-xeon-2cores")))["accuracy-latency"].figure
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(note) for axes in figure.axes for note in axes.texts]
    assert len(boxes) == 17
    frame = figure.axes[0].get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


@pytest.mark.slow
def test_the_mean_and_the_expected_work_are_shown_if_a_variant_has_exits():
    exits = {
        "layers": [0, 2],
        "confidence": 0.95,
        "shares": [0.25, 0.5],
        "drop": 0.4,
        "work": 0.37,
        "held_out_rows": 40,
    }
    dense = measured_row("onnx-fp32", 4)
    early = measured_row("onnx-exits-int8", 1, facts={"exits": {**exits, "curve": []}})
    assert not {"mean", "work"} & {column.name for column in columns(compare([result(dense)]))}
    rows = compare([result(dense, early)], baseline="onnx-fp32")
    shown = {column.name: column for column in columns(rows)}
    names = list(shown)
    assert names[names.index("p50") - 2 : names.index("p50")] == ["mean", "work"]
    row = row_of_cell(rows, "onnx-exits-int8@cpu")
    assert shown["mean"].text(row) == "1.00 (4.00×)"
    assert shown["work"].text(row) == "37%"
    (note,) = [note for note in notes(rows) if "held-out rows" in note]
    assert (
        "Of 40 held-out rows, 25% exit after the embeddings, 50% exit after layer 2. A text exits if its confidence"
        in note
    )
    assert "the accuracy drop is 0.40 points, and the expected work is 37% of the work without exits" in note


def test_the_sentences_that_exit_are_shown_if_a_run_measured_them():
    rows = compare([exits_result()], baseline="onnx-int8")
    row = row_of_cell(rows, "onnx-exits-int8@cpu")
    shown = {column.name: column for column in columns(rows)}
    names = list(shown)
    assert names[names.index("p50") - 3 : names.index("p50")] == ["mean", "exits", "work"]
    assert [shown["exits"].text(each) for each in (row, row_of_cell(rows, "onnx-int8@cpu"))] == ["71%", "–"]
    shares = "43% exit after the embeddings, 29% exit after layer 2, and 29% use no exit."
    assert f"onnx-exits-int8@cpu: of 7 sentences, {shares}" in notes(rows)
    assert row.to_json()["exit_shares"] == [0.4286, 0.2857, 0.2857]
    assert "exits" not in row.to_json()
    (line,) = [line for line in csv.DictReader(io.StringIO(to_csv(rows))) if line["cell"] == "onnx-exits-int8@cpu"]
    assert line["exit_shares"] == "0.4286; 0.2857; 0.2857"


def test_the_plots_of_exits_show_each_threshold_and_the_measured_variants():
    plots = figures(compare([exits_result()], baseline="onnx-int8"))
    (axes,) = plots["exits-work"].figure.axes
    curves = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert [line.get_xdata().tolist() for line in curves] == [[30, 50, 80]] * 2
    assert curves[0].get_ydata().tolist() == [-3.0, -0.4, 0.0]
    rings = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in rings] == [(30, -3.0), (50, -0.4)]
    assert (
        "onnx-exits-int8 from -3.00 points at 30 % of the work to +0.00 points at 80 %, "
        "with its threshold 0.95 -0.40 points at 50 %"
    ) in plots["exits-work"].alt
    (axes,) = plots["exits-latency"].figure.axes
    assert axes.get_xlabel() == "mean latency at batch 1, ms"
    places = [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines if line.get_marker() == "s"]
    assert [round(y, 1) for _, y in places] == [62.5, 75.0, 75.0]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert "onnx-exits-int8+low 62.50 % at" in plots["exits-latency"].alt
    one = dataclasses.replace(exits_result(), rows=tuple(exits_result().rows[2:5:2]))
    assert [name for name in figures(compare([one])) if "exits" in name] == ["exits-work"]


def test_figures_outside_the_comparison_have_their_own_table():
    text = Page(
        report_html(ResultFile.read(TESTS.parent / "benchmarks" / "results" / "reference-xeon-2cores.json"))
    ).text
    for header in ("times faster, 95 % interval", "p50 ms with tokenising", "load ms", "after load MB", "gzip MB"):
        assert header in text
    page_without_sizes = report_html(rich_result())
    assert "gzip MB" not in page_without_sizes


def test_a_file_with_the_digest_of_sst2_and_other_labels_shows_no_texts(monkeypatch):
    monkeypatch.setattr(inputs, "load_embedded", lambda: DATA)
    data = {"name": "sst2", "sha256": DATA.sha256}
    same, other = (rich_result(data={**data, "rows": len(y), "labels": y}) for y in (list(DATA.labels), [1] * 20))
    assert Texts().sentences(same, [1]).shown[0].text == DATA.texts[1]
    assert Texts().sentences(other, [19]).shown == [Sentence(20, "", "label 1")]
