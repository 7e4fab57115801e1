"""The HTML report and the plots: their content, and strings that must not become markup."""

import itertools
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from conftest import TESTS
from rich_rows import hostile, html, rich
from sample_results import measured, result

from toolchain.compare.report.columns import CELL, columns, notes
from toolchain.compare.report.plots import figures, save
from toolchain.compare.rows import compare
from toolchain.errors import ResultFileError
from toolchain.results.measurements import Measurement
from toolchain.results.result_file import ResultFile


@pytest.fixture(scope="module")
def page():
    return html(rich())


class Page(HTMLParser):
    """Collects the tags with their attributes, and the text; asserts that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def test_the_page_has_every_section(page):
    found = Page(page)
    for heading in ("Comparison", "Plots", "Answers", "Flips", "Not measured", "How it was measured"):
        assert f"> {heading} <" in re.sub(r"\s+", " ", re.sub(r"(<h2[^>]*>)(.*?)(</h2>)", r"\1 \2 \3", page))
    for text in (
        "Comparison of m m on c, 2 cores, 1 GiB; 2 threads, sst2, 8 sentences; 2026-01-01",
        "fastest at batch 1 onnx-pruned50-int8",
        "the host took 30% of the processor",
        "onnx-fp32@cuda m c, 2 cores unavailable No GPU answers. Get one.",
        "minimum passes over the sentences 3",
        "sessions may fall back to the CPU no",
        "torch, fp32_gmacs 61.5",
        "torch 2.13.0",
        "Peak memory: VmHWM.",
        "torch-fp32@cpu 1.0 10.0 0.250 50",
    ):
        assert text in found.text, text
    marks = {attrs["class"] for tag, attrs in found.tags if tag == "span" and "mark" in attrs.get("class", "")}
    assert marks == {"mark baseline", "mark pareto", "mark noisy"}


def test_the_table_says_what_the_terminal_says(page):
    rows = [row for row in compare([rich()]) if row.measurement.status == "ok"]
    found = Page(page)
    for column in columns(rows):
        assert column.header in found.texts
        said = [row.measurement.cell if column is CELL else column.text(row) for row in rows]  # its marks stand apart
        assert all(one in found.texts for one in said)


def test_flipped_sentences_are_listed(page):
    text = Page(page).text
    assert "Lost by all 3 variants, m on c, 2 cores 1 of the sentences that torch-fp32@cpu answers correctly is" in text
    assert "answered wrongly by every other variant: row 2, POSITIVE sentence <b>2</b> By variant" in text
    assert "torch-pruned50@cpu : 2 lost, 1 won against torch-fp32@cpu Lost row 1, NEGATIVE sentence <b>1</b>" in text
    assert "Won row 8, NEGATIVE sentence <b>8</b>" in text


@pytest.mark.slow
def test_sentences_of_other_data_are_numbers():
    data = {**rich().data, "name": "reviews", "sha256": "another"}
    text = Page(html(rich(data=data))).text
    assert "row 2, label 1" in text
    assert "sentence <b>" not in text


def test_the_page_makes_no_request(page):
    found = Page(page)
    policy = next(attrs["content"] for tag, attrs in found.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    for tag, attrs in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "form")
        assert not {"src", "srcset", "data", "action", "xlink:href", "background"} & set(attrs), (tag, attrs)
        assert attrs.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attrs)
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", page))
    assert not re.search(r"https?:|//[a-z]|@import", page)


def test_ids_are_unique_and_whatever_is_referred_to_is_there(page):
    found = Page(page)
    ids = Counter(attrs["id"] for _, attrs in found.tags if "id" in attrs)
    assert not [name for name, count in ids.items() if count > 1]
    wanted = {attrs["href"][1:] for _, attrs in found.tags if "href" in attrs} | set(re.findall(r"url\(#(.*?)\)", page))
    assert wanted <= set(ids)


def test_every_plot_is_told_in_words(page):
    drawn = [attrs for tag, attrs in Page(page).tags if tag == "svg"]
    assert [attrs["role"] for attrs in drawn] == ["img"] * 5
    said = [attrs["aria-label"] for attrs in drawn]
    assert "no variant is both faster and more accurate than onnx-pruned50-int8 (62.50 % at 0.73 ms)" in said[0]
    assert "size, MB: 7.00 (onnx-pruned50-int8) to 80.00 (torch-fp32)" in said[1]
    assert "at 64 tokens 2.18 ms (onnx-pruned50-int8) to 24.96 ms (torch-fp32)" in said[3]
    assert "torch-pruned50 predicted 2.00×, measured 1.60×" in said[4]


@pytest.mark.slow
def test_strings_of_a_result_file_are_never_markup():
    text = html(hostile())
    text.encode()
    found = Page(text)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    assert '<script>alert(\'x\')</script>" onload="alert(1)" $\\frac{}$ --> ' in "".join(found.texts)
    assert "{{ 7 * 7 }}" in text
    assert figures(compare([hostile()]))


@pytest.mark.parametrize("status", ["unavailable", "reported", "failed"])
def test_rows_may_lack_nearly_everything(status):
    row = Measurement("m", "torch-fp32", "cpu", None, status, "Why not.", "Do this.")
    text = Page(html(result(row))).text
    assert ("Why not. Do this." in text) == (status != "reported")
    assert "torch-fp32@cpu" in text
    assert figures(compare([result(row)])) == {}


def committed(*names):
    return [ResultFile.read(TESTS.parent / "benchmarks" / "results" / f"{name}.json") for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [["seed-study-t4"], ["seed-study-xeon", "seed-study-gtx1050ti", "reference-xeon-2cores"]]
)
def test_committed_result_files_are_reported(names):
    text = Page(html(*committed(*names))).text
    assert "reported Published figures, not measured here." in text
    assert ("the clock covers" in text) == ("reference-xeon-2cores" in names)


@pytest.fixture(scope="module")
def plots(tmp_path_factory):
    """The paths of the plots of `rich`, in a folder that `save` made."""
    return save(compare([rich()]), tmp_path_factory.mktemp("plots") / "new" / "folder")


@pytest.mark.slow
def test_the_same_rows_are_the_same_bytes(tmp_path, page, plots):
    assert html(rich()) == page
    for one, other in zip(plots, save(compare([rich()]), tmp_path), strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_plots_are_saved_as_svg_and_png(plots):
    names = ["accuracy-latency", "size-memory", "latency", "latency-by-length", "pruning-speedup"]
    assert [path.name for path in plots] == [f"{n}.{e}" for n in names for e in ("svg", "png")]
    assert sorted(plots) == sorted(plots[0].parent.iterdir())
    for path in plots:
        assert path.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")


def test_a_plot_with_nothing_to_show_is_left_out():
    assert list(figures(compare([result(measured("torch-fp32", 8))]))) == ["accuracy-latency", "size-memory", "latency"]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_an_error_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultFileError, match=r"cannot be written: Not a directory\. Free space, or"):
        save(compare([rich()]), tmp_path / "file")
    (tmp_path / "taken" / "accuracy-latency.svg").mkdir(parents=True)
    with pytest.raises(ResultFileError, match="cannot be written"):
        save(compare([rich()]), tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["accuracy-latency.svg"]


def test_notes_name_the_machine_if_there_are_several():
    other = {**result().machine, "id": "y", "cpu": "other", "cores": 3}
    alone, two = notes(compare([rich()])), notes(compare([rich(), rich(machine=other)]))
    for what in (" [noisy]: the host took", ", p50 ms by length", ": 50.0% of the encoder's", " unavailable: No GPU"):
        assert not any(" on other, 3 cores" in line for line in alone)
        assert any(f" on other, 3 cores{what}" in line for line in two), what
    assert len(set(two)) == len(two)


@pytest.mark.slow
def test_machines_have_panels_of_their_own():
    other = {**result().machine, "id": "y", "cpu": "other"}
    drawn = figures(compare([rich(), rich(machine=other)]))["latency"].figure.axes
    assert [axes.get_title("left") for axes in drawn] == [
        f"m on {cpu}, 2 cores, 2 threads; sst2" for cpu in ("c", "other")
    ]


@pytest.mark.slow
def test_labels_keep_out_of_each_others_way():
    from matplotlib.text import Text  # an annotation's own extent has its line in it

    figure = figures(compare(committed("reference-xeon-2cores")))["accuracy-latency"].figure
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(note) for axes in figure.axes for note in axes.texts]
    assert len(boxes) == 17
    frame = figure.axes[0].get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


@pytest.mark.slow
def test_columns_that_the_comparison_leaves_out_have_a_table():
    text = Page(html(ResultFile.read(TESTS.parent / "benchmarks" / "results" / "reference-xeon-2cores.json"))).text
    for header in ("times faster, 95 % interval", "p50 ms with tokenising", "load ms", "after load MB", "gzip MB"):
        assert header in text
    bare = html(rich())
    assert "gzip MB" not in bare
