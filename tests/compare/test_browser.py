"""The HTML report in a real browser."""

import pytest
from chromium import PROGRAM, Chromium
from rich_rows import ANSWERS, hostile, html, rich

pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install --no-install-recommends chromium"),
]


@pytest.fixture(scope="module")
def page():
    return html(rich())


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


ORDER = "[...document.querySelectorAll('#comparison ~ .wide tbody th')].map(e => e.firstChild.textContent)"
COLOURS = """[document.body, document.querySelector('svg text')].map(e => getComputedStyle(e)).map(
    (s, i) => i ? s.fill : s.backgroundColor)"""


@pytest.mark.parametrize("shown", [{}, {"scheme": "dark"}, {"media": "print", "scheme": "dark"}, {"width": 390}])
def test_a_browser_has_nothing_to_complain_of(browser, page, tmp_path, shown):
    (tmp_path / "report.html").write_text(page)
    browser.show_as(**shown)
    browser.open(tmp_path / "report.html")
    assert browser.complaints(tmp_path / "report.html") == []
    dark = shown.get("scheme") == "dark" and "media" not in shown
    light_pair, dark_pair = ["rgb(255, 255, 255)", "rgb(27, 31, 36)"], ["rgb(20, 24, 29)", "rgb(228, 232, 236)"]
    assert browser.run(COLOURS) == (dark_pair if dark else light_pair)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_columns_are_sorted_by_mouse_and_keyboard(browser, page, tmp_path):
    (tmp_path / "report.html").write_text(page)
    browser.show_as()
    browser.open(tmp_path / "report.html")
    first = [f"{variant}@cpu" for variant in ANSWERS]
    assert browser.run(ORDER) == first
    header = "document.querySelectorAll('#comparison ~ .wide thead th')[2]"
    assert browser.run(f"{header}.innerText").startswith("p50 ms")
    browser.run(f"{header}.querySelector('button').click()")
    assert browser.run(f"{header}.ariaSort") == "ascending"
    assert browser.run(ORDER) == first[::-1]
    browser.run(f"{header}.querySelector('button').focus()")
    browser.press("Enter", 13)
    assert browser.run(f"{header}.ariaSort") == "descending"
    assert browser.run(ORDER) == first
    browser.run("document.querySelector('#comparison ~ .wide thead button').click()")
    assert browser.run(ORDER) == sorted(first)
    assert browser.run("document.querySelectorAll('#comparison ~ .wide [aria-sort]').length") == 1
    assert browser.complaints(tmp_path / "report.html") == []


def test_hostile_strings_do_nothing_in_a_browser(browser, tmp_path):
    (tmp_path / "report.html").write_text(html(hostile()))
    browser.open(tmp_path / "report.html")
    assert browser.complaints(tmp_path / "report.html") == []
    assert browser.run("document.scripts.length") == 1


PLANTED = {
    "<script>console.error('planted')</script>": "console.error: ['planted']",
    "<script>undefined.planted</script>": "exception: Uncaught",
    "<script>setTimeout(() => { throw Error('planted') }, 50)</script>": "exception: Uncaught",
    '<img src="http://127.0.0.1:9/planted.png" alt="">': "request: http://127.0.0.1:9/planted.png",
    '<link rel="stylesheet" href="planted.css">': "planted.css",
    "<script>new WebSocket('ws://127.0.0.1:9/planted')</script>": "request: ws://127.0.0.1:9/planted",
}


@pytest.mark.parametrize("planted", PLANTED)
def test_an_error_or_request_would_be_seen(browser, page, tmp_path, planted):
    """First on a page without a policy, then in the report, whose policy blocks scripts and requests."""
    path = tmp_path / "report.html"
    path.write_text(f"<!DOCTYPE html><title>planted</title>{planted}")
    browser.open(path)
    assert any(PLANTED[planted] in line for line in browser.complaints(path)), browser.complaints(path)
    path.write_text(page.replace("</main>", f"{planted}</main>"))
    browser.open(path)
    assert any("Content Security Policy" in line for line in browser.complaints(path)), browser.complaints(path)
