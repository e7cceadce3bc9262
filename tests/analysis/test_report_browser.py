"""Reports in a browser that reaches no network: what is drawn, sorted, saved and printed."""

import time
from pathlib import Path

import pytest
from helpers import browser
from helpers.reports import HOSTILE, finished_run, finished_study

import medmerge_jax.analysis

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.PROGRAM is None, reason="there is no Chromium on this machine"),
]

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
SCRIPT = Path(medmerge_jax.analysis.__file__).with_name("report.js")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a run with figures, of one with hostile names, and of a study of 48 members."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("run", "hostile", "study")}
    finished_run(made["run"], figures=True)
    finished_run(made["hostile"], HOSTILE)
    finished_study(made["study"])
    return made


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["run", "hostile", "study"])
def test_a_report_fits_and_fetches_nothing(page, folders, name, width, scheme):
    report = folders[name] / "report.html"
    page.events.clear()
    page.open(report, width, scheme)
    assert page.value(OVERFLOW) <= 0
    assert page.complaints() == []
    assert page.requests() == [report.resolve().as_uri()]
    bright = page.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert bright == (scheme == "light")
    assert page.value("[...document.images].every((x) => x.complete && x.naturalWidth && x.alt)")
    assert page.value("document.querySelectorAll('script').length") == 1


def column(page, head, number):
    """The cells of a column of the first table with such a head."""
    return page.value(
        f"""[...[...document.querySelectorAll("table")]
        .find((x) => x.tHead.innerText.startsWith({head!r})).tBodies[0].rows]
        .map((row) => row.cells[{number}].innerText)"""
    )


def test_a_table_is_sorted_from_the_keyboard(page, folders):
    page.open(folders["study"] / "report.html", 1280)
    before = column(page, "member", 3)
    page.value(
        """[...document.querySelectorAll("table")]
        .find((x) => x.tHead.innerText.startsWith("member"))
        .tHead.rows[0].cells[3].querySelector("button").focus()"""
    )
    for key, reverse, said in (("Enter", False, "ascending"), (" ", True, "descending")):
        page.press(key)
        assert column(page, "member", 3) == sorted(before, key=float, reverse=reverse) != before
        assert page.value("document.activeElement.parentElement.getAttribute('aria-sort')") == said
    means = column(page, "recipe", 3)
    page.value(
        """document.querySelector("table").tHead.rows[0].cells[3].querySelector("button").click()"""
    )
    assert column(page, "recipe", 3) == sorted(means, key=lambda cell: float(cell.split(" ")[0]))
    assert page.value("document.querySelectorAll('[aria-sort]').length") == 2


def test_names_are_sorted_with_their_numbers_and_undefined_cells_last(page, tmp_path):
    (tmp_path / "a.html").write_text(
        "<table><thead><tr><th><button>a</button></th></tr></thead><tbody>"
        + "".join(f"<tr><td>{x}</td></tr>" for x in ("seed10", "-", "seed2", "Alpha"))
        + "</tbody></table><script>"
        + SCRIPT.read_text()
        + "</script>"
    )
    page.open(tmp_path / "a.html", 1280)
    for wanted in (["Alpha", "seed2", "seed10", "-"], ["seed10", "seed2", "Alpha", "-"]):
        page.value("document.querySelector('button').click()")
        assert column(page, "a", 0) == wanted


def wait(done):
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_table_is_saved(page, folders, tmp_path):
    page.do("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.open(folders["study"] / "report.html", 1280)
    page.events.clear()
    button = "document.querySelector(\"[data-file='members.{}']\")"
    said = f"{button.format('tex')}.parentElement.querySelector('[role=status]').textContent"
    for kind in ("csv", "tex"):
        page.value(f"{button.format(kind)}.click()")
        wait(lambda: page.value(said))
    wait((tmp_path / "members.csv").exists)
    assert (tmp_path / "members.csv").read_text().startswith("member,epochs,seconds")
    # Where the page may not write to the clipboard, it is a file too.
    told = ("LaTeX is in the clipboard", "members.tex is in your downloads")
    wait(lambda: page.value(said) in told)
    assert page.complaints() == []


def test_a_report_is_printed(page, folders, tmp_path):
    page.open(folders["study"] / "report.html", 1280)
    page.pdf(tmp_path / "report.pdf")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content[:5] == b"%PDF-"
    assert 2 <= content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") <= 12
