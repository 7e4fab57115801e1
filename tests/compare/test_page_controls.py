"""Tests of what a reader can change in the HTML report: the baseline and the shown rows; and of the text of each point.

The tests with Chromium use two committed result files: a server with a GPU, and a small machine without one.
"""

import functools
import json
import re

import pytest
from chromium import PROGRAM, Chromium
from conftest import TESTS
from pdf_texts import page_texts
from rich_rows import HOSTILE, hostile_result, report_html, rich_result
from sample_results import FP32, INT8, measured_row, result, row_of_cell

from toolchain.compare.report import baselines, filters, plots
from toolchain.compare.report.baselines import Baselines, choices
from toolchain.compare.report.columns import columns
from toolchain.compare.report.machines import MachineNames
from toolchain.compare.rows import compare
from toolchain.results.result_file import ResultFile

RESULTS = TESTS.parent / "benchmarks" / "results"
PATHS = [RESULTS / "reference-epyc-server.json", RESULTS / "reference-h100.json"]
SERVER = {**result().machine, "id": "y", "cpu": "server"}
needs_chromium = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium here: apt-get install --no-install-recommends chromium"
)


def two_machines():
    return [result(FP32, INT8), result(measured_row("torch-fp32", 2), measured_row("onnx-std", 4), machine=SERVER)]


def page_data(page):
    """Returns the data for the page's script."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_each_choice_of_the_baseline_has_the_figures_of_compare():
    rows = compare([rich_result()])
    page = Baselines([row for row in rows if row.measurement.status == "ok"])
    data = page.to_data(lambda row: [id(each) for each in page.choices[0].rows].index(id(row)))
    assert [choice.label for choice in page.choices][:2] == ["torch-fp32@cpu", "torch-pruned50@cpu"]
    assert len(page.choices) == 4
    for choice, content in zip(page.choices, data["choices"], strict=True):
        expected = [row for row in compare([rich_result()], choice.label) if row.measurement.status == "ok"]
        shown = [data["contents"][index] for index in content["places"]]
        for line, row in enumerate(expected):
            for position, column in enumerate(columns(expected)[1:], 1):
                place = page.place("comparison", line, position)
                assert place is None or shown[place][0] == column.text(row)
        assert [expected[row].measurement.cell for row in content["baselines"]] == [choice.label]
    p50 = page.place("comparison", 2, 2)
    texts = {data["contents"][content["places"][p50]][0] for content in data["choices"]}
    assert texts == {"1.04 (8.00×)", "1.04 (5.00×)", "1.04", "1.04 (0.70×)"}


def test_an_interval_against_another_baseline_is_computed_from_the_rounds_of_both_rows():
    page = Baselines(compare([rich_result()])[:4])
    row = page.choices[1].rows[2]
    assert page.choices[1].label == "torch-pruned50@cpu"
    expected = row_of_cell(compare([rich_result()], "torch-pruned50"), "onnx-int8@cpu").speedup
    assert row.speedup == expected
    assert None not in (expected.low, expected.high)
    text = dict(page.to_data(id)["choices"][1]["rows"])[id(page.choices[0].rows[2])]
    assert f"{expected.value:.2f}× as fast, 95 % interval {expected.low:.2f} to {expected.high:.2f}" in text


def test_ratios_are_never_taken_across_machines():
    rows = compare(two_machines())
    labels = {choice.label: choice for choice in choices(rows)}
    assert list(labels) == ["torch-fp32@cpu", "onnx-int8@cpu", "onnx-std@cpu"]
    speedups = {
        label: [row.speedup and round(row.speedup.value, 3) for row in choice.rows] for label, choice in labels.items()
    }
    assert [row.measurement.cell for row in rows] == [
        "torch-fp32@cpu",
        "onnx-int8@cpu",
        "torch-fp32@cpu",
        "onnx-std@cpu",
    ]
    assert speedups == {
        "torch-fp32@cpu": [1, 8, 1, 0.5],
        "onnx-int8@cpu": [0.125, 1, None, None],
        "onnx-std@cpu": [None, None, 2, 1],
    }


def test_a_variant_on_several_providers_can_be_the_baseline_of_all_its_rows():
    rows = compare([result(FP32, INT8, measured_row("onnx-int8", 0.5, "cuda"))])
    assert [choice.label for choice in choices(rows)] == [
        "torch-fp32@cpu",
        "onnx-int8",
        "onnx-int8@cpu",
        "onnx-int8@cuda",
    ]


def test_a_page_offers_only_as_many_baselines_as_it_can_compute(monkeypatch):
    monkeypatch.setattr(baselines, "MOST_PAIRS", 8)
    assert len(choices(compare(two_machines()))) == 2
    monkeypatch.setattr(baselines, "MOST_PAIRS", 1)
    assert [choice.label for choice in choices(compare(two_machines()))] == ["torch-fp32@cpu"]


def test_a_run_without_a_baseline_offers_its_rows_as_baselines():
    page = report_html(result(INT8, measured_row("onnx-std", 4)))
    assert '<option value="0">none</option>' in page
    data = page_data(page)
    assert data["contents"][data["choices"][0]["places"][0]][0] == "There is no baseline."
    texts = [text for text, _ in data["contents"]]
    assert "Ratios are against onnx-std@cpu of the same run; above 1 is better." in texts


def test_filters_have_the_properties_with_several_values():
    rows = compare(two_machines())
    assert [(each.name, each.values, each.indices) for each in filters.filters(rows)] == [
        ("machine", ["c, 2 cores", "server, 2 cores"], [0, 0, 1, 1]),
        ("runtime", ["torch", "onnx"], [0, 1, 0, 1]),
    ]
    assert filters.filters(rows[:1]) == []
    assert 'id="controls"' not in report_html(result(FP32))


def test_machines_with_one_name_get_numbers_and_threads_separate_rows():
    twin = {**result().machine, "id": "z"}
    rows = compare([result(FP32), result(FP32, machine=twin)])
    assert [MachineNames(rows).name(row) for row in rows] == ["c, 2 cores", "c, 2 cores (2)"]
    rows = compare([result(FP32, run={"threads": count}) for count in (1, 2)])
    assert [MachineNames(rows).name(row) for row in rows] == ["c, 2 cores, 1 threads", "c, 2 cores, 2 threads"]


def test_several_machines_share_a_panel_with_a_colour_and_a_shape_for_each():
    drawn = plots.figures(compare(two_machines()))
    assert list(drawn)[:3] == ["accuracy-latency-machines", "latency-machines", "accuracy-latency"]
    assert "accuracy-latency-machines" not in plots.figures(compare([rich_result()]))
    (axes,) = drawn["accuracy-latency-machines"].figure.axes
    points = {
        (line.get_color(), line.get_marker(), float(line.get_xdata()[0]))
        for line in axes.lines
        if line.get_marker() in "os" and line.get_markersize() == 6
    }
    assert points == {("#0072b2", "o", 8), ("#0072b2", "o", 1), ("#d55e00", "s", 2), ("#d55e00", "s", 4)}
    fronts = {line.get_linestyle() for line in axes.lines if len(line.get_xdata()) > 1 or line.get_marker() == "None"}
    assert fronts == {"--", ":"}
    assert [text.get_text() for text in drawn["accuracy-latency-machines"].figure.legends[0].get_texts()] == [
        "c, 2 cores",
        "server, 2 cores",
        "Pareto front of a machine",
        "baseline",
    ]
    (axes,) = drawn["latency-machines"].figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["torch-fp32"]
    assert "server, 2 cores: fastest is torch-fp32, 2.00 ms" in drawn["accuracy-latency-machines"].alt


def test_every_point_has_a_text_with_value_unit_and_interval():
    page = report_html(rich_result())
    points = re.findall(
        r'<g data-rows="(\d+)" class="point(?: baseline)?"[^>]*>\s*<title>(.*?)</title>', page, re.DOTALL
    )
    # Four rows: accuracy, size, memory and distribution once, two numbers of tokens; two pruned rows: the speed-up.
    assert len(points) == 4 * (1 + 2 + 1 + 2) + 2
    figure = r"\d (ms|MB|%)?,? ?(95 % interval [\d.]+ to [\d.]+( ms| %)?|no interval)|×.*interval"
    assert all(re.search(figure, text) for _, text in points)
    texts = [text for row, text in points if row == "2"]
    accuracy = next(text for text in texts if "accuracy" in text).split("\n")
    assert accuracy[0] == "onnx-int8@cpu on c, 2 cores, 2 threads"
    assert re.fullmatch(r"latency at batch 1: median 1\.04 ms, 95 % interval 1\.0\d to 1\.0\d ms", accuracy[1])
    assert accuracy[2] == "accuracy: 75.00 %, 95 % interval 40.93 to 92.85 %"
    assert re.fullmatch(r"against torch-fp32@cpu: 8\.00× as fast, 95 % interval .*; -12\.50 points", accuracy[3])
    assert "size: 10.0 MB, no interval" in "\n".join(texts)
    assert re.search(r"latency at batch 1, 64 tokens: median 3\.12 ms, 95 % interval", "\n".join(texts))


def test_a_published_figure_has_no_interval():
    page = report_html(ResultFile.read(RESULTS / "seed-study-t4.json"))
    assert "latency at batch 1: mean 7.00 ms, published, no interval" in page


def test_hostile_names_stay_text_in_the_data_and_the_controls():
    base = hostile_result()
    other = hostile_result().__class__(**{**vars(base), "machine": {**base.machine, "id": "z", "cpu": f"{HOSTILE}\n2"}})
    page = report_html(base, other)
    scripts = re.findall(r"<script[^>]*>", page)
    assert scripts == ['<script type="application/json" id="data">', "<script>"]
    text = page.split(scripts[0])[1].split("</script>")[0]
    assert "<" not in text
    data = page_data(page)
    names = [text for text, _ in data["contents"] if "alert" in text]
    assert names
    assert not set("\x00\x1b\x9b\u202e") & set("".join(names))
    assert re.search(r'<option value="1">&lt;script&gt;alert\(', page)
    titles = re.findall(r"<title>(.*?)</title>", page, re.DOTALL)[1:]
    assert titles
    assert all("<" not in title for title in titles)
    assert "\n2, 2 cores" not in "".join(titles)  # a line break in a name begins no new line of the text


class Reader:
    """A reader with a browser who has opened the report of `PATHS`."""

    def __init__(self, browser, path):
        self.browser, self.path = browser, path

    def choose(self, label):
        self.browser.run(
            "((s, label) => { s.value = [...s.options].find(o => o.text === label).value; "
            f"s.dispatchEvent(new Event('change')) }})(document.getElementById('baseline'), {json.dumps(label)})"
        )

    def check(self, value):
        self.browser.run(
            "[...document.querySelectorAll('#controls label')].find(l => l.textContent.trim() === "
            f"{json.dumps(value)}).control.click()"
        )

    def table(self, name):
        """Returns the headers and the lines that the browser shows, without marks."""
        shown = self.browser.run(
            f"[...document.querySelector('[data-table={name}]').rows].filter(r => r.offsetHeight).map(r => [...r.cells]"
            ".filter(c => c.offsetWidth).map(c => (c.querySelector('.short, button') ?? c).textContent.trim()))"
        )
        return shown[0], shown[1:]

    def points(self, plot):
        """Returns the texts of the points that the browser shows."""
        return self.browser.run(
            f"[...document.querySelectorAll('#{plot} ~ .plot .point')].filter(p => p.getBoundingClientRect().width)"
            ".map(p => p.getAttribute('aria-label') ?? p.querySelector('title').textContent)"
        )

    def tip(self):
        return self.browser.run("document.getElementById('tip').hidden ? '' : document.getElementById('tip').innerText")

    def centre(self, plot, index):
        """Scrolls to a point of a plot and returns its centre in the window."""
        point = f"[...document.querySelectorAll('#{plot} ~ .plot .point')][{index}]"
        box = f"(b => [b.left + b.width / 2, b.top + b.height / 2])({point}.getBoundingClientRect())"
        return self.browser.run(f"({point}.scrollIntoView({{block: 'center'}}), {box})")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report_html(*map(ResultFile.read, PATHS)))
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture
def reader(browser, report):
    browser.show_as()
    browser.open(report)
    yield Reader(browser, report)
    assert browser.complaints(report) == []


@functools.cache
def rows_with(baseline):
    return [row for row in compare([*map(ResultFile.read, PATHS)], baseline) if row.measurement.status == "ok"]


@pytest.mark.web
@needs_chromium
@pytest.mark.parametrize("baseline", ["onnx-int8@cpu", "onnx-fp32"])
def test_another_baseline_shows_what_compare_prints_for_it(reader, say, baseline):
    reader.choose(baseline)
    code, out, _ = say("compare", *PATHS, "--baseline", baseline, "--format", "markdown", "--provider", "cpu")
    assert code == 0
    code, cuda, _ = say("compare", *PATHS, "--baseline", baseline, "--format", "markdown", "--provider", "cuda")
    assert code == 0
    header, lines = reader.table("comparison")
    found = {(line[0], line[1]): dict(zip(header, line, strict=True)) for line in lines}
    compared = 0
    for text, provider in ((out, "cpu"), (cuda, "cuda")):
        lines = [line.strip("| ") for line in text.splitlines() if line[:1] == "|"]
        table = [[cell.strip() for cell in line.split(" | ")] for line in lines]
        for line in table[2:]:
            expected = dict(zip(table[0], line, strict=True))
            cell = expected.pop("cell").split(" ")[0]
            (shown,) = [row for (machine, name), row in found.items() if name == cell and cell.endswith(f"@{provider}")]
            for column, value in expected.items():
                if column != "machine":
                    assert shown[column] == value, (cell, column)
                    compared += "(" in value
    assert compared > 10
    marked = reader.browser.run(
        "[...document.querySelectorAll('[data-table=comparison] .mark.baseline')].map(m => m.parentElement.innerText)"
    )
    cells = dict.fromkeys(row.baseline.cell for row in rows_with(baseline) if row.baseline)
    assert {text.split()[0] for text in marked} == set(cells)
    assert f"Ratios are against {' and '.join(cells)} of the same run" in reader.browser.run("document.body.innerText")


@pytest.mark.web
@needs_chromium
def test_another_baseline_changes_intervals_answers_points_and_rings(reader):
    header, lines = reader.table("stages")
    assert "times faster, 95 % interval" in header
    reader.choose("onnx-fp32")
    rows = {(row.measurement.cell, row.run.machine["id"]): row for row in rows_with("onnx-fp32")}
    ratio = rows["onnx-int8@cpu", next(key[1] for key in rows if key[0] == "onnx-int8@cpu")].speedup
    header, lines = reader.table("stages")
    (line,) = [line for line in lines if line[1] == "onnx-int8@cpu"]
    assert line[header.index("times faster, 95 % interval")] == f"{ratio.low:.2f} to {ratio.high:.2f}"
    header, lines = reader.table("quality")
    (line,) = [line for line in lines if line[1] == "onnx-int8@cpu"]
    quality = next(row.quality for (cell, _), row in rows.items() if cell == "onnx-int8@cpu")
    assert (line[header.index("lost")], line[header.index("won")]) == (str(quality.lost), str(quality.won))
    (text,) = [text for text in reader.points("accuracy-latency") if text.startswith("onnx-int8@cpu")]
    bounds = f"{ratio.low:.2f} to {ratio.high:.2f}"
    assert f"against onnx-fp32@cpu: {ratio.value:.2f}× as fast, 95 % interval {bounds}" in text
    rings = reader.browser.run(
        "[...document.querySelectorAll('#accuracy-latency ~ .plot .ring')].filter(r => r.getBoundingClientRect().width)"
        ".map(r => r.parentElement.getAttribute('aria-label').split('@')[0])"
    )
    assert set(rings) == {"onnx-fp32"}
    assert reader.browser.run("!document.getElementById('flips-baseline').hidden")
    reader.choose(reader.browser.run("document.getElementById('baseline').options[0].text"))
    (text,) = [text for text in reader.points("accuracy-latency") if text.startswith("onnx-int8@cpu")]
    assert "against torch-fp32@cpu" in text


@pytest.mark.web
@needs_chromium
def test_filters_hide_rows_and_points_together(reader):
    everything = len(reader.table("comparison")[1])
    assert everything == 10
    reader.check("cuda")
    assert all("@cpu" in line[1] for line in reader.table("comparison")[1])
    for plot in ("accuracy-latency", "accuracy-latency-machines", "latency", "size-memory"):
        assert reader.points(plot)
        assert all("@cpu" in text for text in reader.points(plot))
    assert "4 of 10 rows are shown." in reader.browser.run("document.getElementById('shown').textContent")
    # The panel of the machine without shown rows is hidden too.
    assert reader.browser.run(
        "[...document.querySelectorAll('#latency ~ .plot .panel')].map(p => p.offsetHeight > 0)"
    ) == [False, True]
    reader.check("onnx")
    assert {line[1] for line in reader.table("comparison")[1]} == {"torch-fp32@cpu"}
    reader.browser.run("document.getElementById('show-all').click()")
    assert len(reader.table("comparison")[1]) == everything


@pytest.mark.web
@needs_chromium
def test_mouse_keyboard_and_finger_reach_the_text_of_a_point(reader):
    texts = reader.points("accuracy-latency")
    x, y = reader.centre("accuracy-latency", 2)
    reader.browser.move_mouse(x + 3, y + 3)
    assert reader.tip() == texts[2]
    assert "95 % interval" in texts[2]
    reader.browser.press("Escape", 27)
    assert reader.tip() == ""
    reader.browser.tap(*reader.centre("accuracy-latency", 1))
    assert reader.tip() == texts[1]
    reader.browser.tap(2, 2)
    assert reader.tip() == ""
    stops = reader.browser.run("document.querySelectorAll('#accuracy-latency ~ .plot [tabindex=\"0\"].point').length")
    assert stops == 1
    reader.browser.run("document.querySelector('#accuracy-latency ~ .plot').focus()")
    reader.browser.press("Tab", 9)
    assert reader.tip() == texts[0]
    reader.browser.press("ArrowRight", 39)
    assert reader.tip() == texts[1]
    reader.browser.press("End", 35)
    assert reader.tip() == texts[-1]
    assert reader.browser.run("document.querySelectorAll('.point:not([role=img])').length") == 0


@pytest.mark.web
@needs_chromium
def test_a_page_without_javascript_shows_everything_and_no_controls(browser, report):
    browser.show_as()
    browser.open_without_scripts(report)
    reader = Reader(browser, report)
    assert len(reader.table("comparison")[1]) == len(rows_with(None))
    assert len(reader.points("accuracy-latency")) == len(rows_with(None))
    assert all("95 % interval" in text for text in reader.points("accuracy-latency"))
    assert browser.run("document.getElementById('controls').offsetHeight") == 0
    assert browser.run("document.querySelectorAll('th button, #tip').length") == 0


@pytest.mark.web
@needs_chromium
def test_a_printed_report_has_all_rows_the_headers_and_no_controls(reader):
    pages = page_texts(reader.browser.print())
    texts = [text for page in pages for text in page]
    for row in rows_with(None):
        assert row.measurement.cell in texts
    assert "Accuracy against latency on several machines" in texts
    assert "Show all rows" not in texts
    assert not any("rows are shown" in text for text in texts)
    reader.check("cuda")
    texts = [text for page in page_texts(reader.browser.print()) for text in page]
    assert not {row.measurement.cell for row in rows_with(None) if row.measurement.provider == "cuda"} & set(texts)
    assert any("4 of 10 rows are shown" in text for text in texts)


@pytest.mark.web
@needs_chromium
def test_each_printed_page_of_a_table_has_the_headers(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report_html(result(*(measured_row(f"onnx-v{number}", number + 1) for number in range(30)))))
    browser.show_as()
    browser.open(path)
    pages = [page for page in page_texts(browser.print()) if sum("@cpu" in text for text in page) > 1]
    assert sum(text.startswith("onnx-v") for page in pages[:2] for text in page) > 25
    assert all("p95" in " ".join(page) for page in pages[:2])


@pytest.mark.web
@needs_chromium
def test_hostile_names_run_no_script_when_a_reader_chooses_them(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report_html(hostile_result()))
    browser.show_as()
    browser.open(path)
    browser.run("(s => { s.value = 1; s.dispatchEvent(new Event('change')) })(document.getElementById('baseline'))")
    browser.run("document.querySelector('.point').focus()")
    assert "<script>alert" in browser.run("document.getElementById('tip').textContent")
    assert "<script>alert" in browser.run("document.querySelector('[data-place]').closest('body').innerText")
    assert browser.run("[...document.scripts].map(s => s.type)") == ["application/json", ""]
    assert browser.complaints(path) == []
