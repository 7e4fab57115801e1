"""Tests of the HTML report in a real browser."""

import pytest
from chromium import PROGRAM, Chromium
from rich_rows import ANSWERS, exits_result, hostile_result, report_html, rich_result

pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install --no-install-recommends chromium"),
]


@pytest.fixture(scope="module")
def page():
    return report_html(rich_result())


@pytest.fixture(scope="module")
def page_with_exits():
    return report_html(exits_result())


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


ORDER = "[...document.querySelectorAll('#comparison ~ .wide tbody th')].map(e => e.firstChild.textContent)"
COLOURS = """[document.body, document.querySelector('svg text')].map(e => getComputedStyle(e)).map(
    (s, i) => i ? s.fill : s.backgroundColor)"""


@pytest.mark.parametrize("settings", [{}, {"scheme": "dark"}, {"media": "print", "scheme": "dark"}, {"width": 390}])
def test_a_browser_shows_the_report_without_errors(browser, page_with_exits, tmp_path, settings):
    (tmp_path / "report.html").write_text(page_with_exits)
    browser.show_as(**settings)
    browser.open(tmp_path / "report.html")
    assert browser.complaints(tmp_path / "report.html") == []
    is_dark = settings.get("scheme") == "dark" and "media" not in settings
    light_pair, dark_pair = ["rgb(255, 255, 255)", "rgb(27, 31, 36)"], ["rgb(20, 24, 29)", "rgb(228, 232, 236)"]
    assert browser.run(COLOURS) == (dark_pair if is_dark else light_pair)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_mouse_and_keyboard_sort_the_columns(browser, page, tmp_path):
    (tmp_path / "report.html").write_text(page)
    browser.show_as()
    browser.open(tmp_path / "report.html")
    initial_order = [f"{variant}@cpu" for variant in ANSWERS]
    assert browser.run(ORDER) == initial_order
    header = "document.querySelectorAll('#comparison ~ .wide thead th')[2]"
    assert browser.run(f"{header}.innerText").startswith("p50 ms")
    browser.run(f"{header}.querySelector('button').click()")
    assert browser.run(f"{header}.ariaSort") == "ascending"
    assert browser.run(ORDER) == initial_order[::-1]
    browser.run(f"{header}.querySelector('button').focus()")
    browser.press("Enter", 13)
    assert browser.run(f"{header}.ariaSort") == "descending"
    assert browser.run(ORDER) == initial_order
    browser.run("document.querySelector('#comparison ~ .wide thead button').click()")
    assert browser.run(ORDER) == sorted(initial_order)
    assert browser.run("document.querySelectorAll('#comparison ~ .wide [aria-sort]').length") == 1
    assert browser.complaints(tmp_path / "report.html") == []


def test_hostile_strings_run_no_script_in_a_browser(browser, tmp_path):
    (tmp_path / "report.html").write_text(report_html(hostile_result()))
    browser.open(tmp_path / "report.html")
    assert browser.complaints(tmp_path / "report.html") == []
    assert browser.run("[...document.scripts].map(script => script.type)") == ["application/json", ""]


COMPLAINT_OF = {
    "<script>console.error('planted')</script>": "console.error: ['planted']",
    "<script>undefined.planted</script>": "exception: Uncaught",
    "<script>setTimeout(() => { throw Error('planted') }, 50)</script>": "exception: Uncaught",
    '<img src="http://127.0.0.1:9/planted.png" alt="">': "request: http://127.0.0.1:9/planted.png",
    '<link rel="stylesheet" href="planted.css">': "planted.css",
    "<script>new WebSocket('ws://127.0.0.1:9/planted')</script>": "request: ws://127.0.0.1:9/planted",
}


@pytest.mark.parametrize("element", COMPLAINT_OF)
def test_complaints_has_every_error_and_request_of_a_page(browser, page, tmp_path, element):
    """Adds a forbidden element to a page without a Content Security Policy, then to the report.

    The report's Content Security Policy must block the forbidden element.
    """
    path = tmp_path / "report.html"
    path.write_text(f"<!DOCTYPE html><title>planted</title>{element}")
    browser.open(path)
    assert any(COMPLAINT_OF[element] in line for line in browser.complaints(path)), browser.complaints(path)
    path.write_text(page.replace("</main>", f"{element}</main>"))
    browser.open(path)
    assert any("Content Security Policy" in line for line in browser.complaints(path)), browser.complaints(path)
