"""The pages that a report writes: complete, the same bytes, self-contained, and looked at."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from benchmarks.errors import UserError
from benchmarks.report import write_report
from benchmarks.report.index import write_index
from tests.harness import ROOT, files_of
from tests.sweeps import Sweep, full_sweep

SMALL = {
    "seeds": [0, 1, 2],
    "datasets": ["fashion_mnist"],
    "methods": ["sam", "sam+pof"],
    "training": {"epochs": 6, "post_epochs": 2, "batch_size": 256},
}
COMMITTED = sorted(path.parent for path in (ROOT / "results").glob("*/plan.json"))


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A measured sweep with its report; for reading."""
    sweep = full_sweep(tmp_path_factory.mktemp("sweep"), SMALL)
    sweep.text = write_report(sweep.folder)
    return sweep


@pytest.mark.parametrize("committed", COMMITTED, ids=lambda path: path.name)
def test_committed_pages_are_what_their_runs_give(committed, tmp_path):
    """Regenerate with ``make report PROFILE=<name>``."""
    copy = tmp_path / committed.name
    shutil.copytree(committed, copy)
    for path in copy.rglob("*"):
        if path.is_file() and "runs" not in path.parts and path.name != "plan.json":
            path.unlink()
    write_report(copy)
    assert files_of(copy) == files_of(committed)


def test_two_reports_have_the_same_bytes(reported, tmp_path):
    copy = tmp_path / "made"
    shutil.copytree(reported.folder, copy)
    shutil.rmtree(copy / "plots")
    (copy / "report.html").unlink()
    (copy / "README.md").write_text("something else")
    write_report(copy)
    assert files_of(copy) == files_of(reported.folder)


def test_every_part_is_written_and_a_stale_plot_removed(reported):
    names = set(files_of(reported.folder))
    tables = {"errors.csv", "differences.csv", "hessian.csv", "range.csv", "claims.csv"}
    assert names >= tables | {"README.md", "report.html"}
    assert {"plots/differences.svg", "plots/differences.csv"} <= names
    plots = {name for name in names if name.startswith("plots/") and not name.endswith(".csv")}
    assert {name.rpartition(".")[0] + ".csv" for name in plots} <= names
    stale = reported.folder / "plots" / "old.svg"
    stale.write_text("<svg/>")
    write_report(reported.folder)
    assert not stale.exists()


def test_no_date_version_or_path_is_in_a_plot(reported):
    for name, content in files_of(reported.folder / "plots").items():
        if name.endswith(".svg"):
            text = content.decode()
            assert "Matplotlib" not in text
            assert "dc:date" not in text
            assert str(reported.folder) not in text


def test_a_missing_seed_changes_its_row_and_is_named_and_nothing_else(reported, tmp_path):
    copy = tmp_path / "made"
    shutil.copytree(reported.folder, copy)
    run = reported.final("sam+pof", 1)
    shutil.rmtree(copy / "runs" / run.name)
    before = (copy / "errors.csv").read_text().splitlines()
    write_report(copy)
    after = (copy / "errors.csv").read_text().splitlines()
    assert after[:2] == before[:2]  # header and SAM
    assert before[2].split(",")[4:6] == ["3", "3"]
    assert after[2].split(",")[4:6] == ["2", "3"]
    assert after[2].split(",")[7] != before[2].split(",")[7]  # the interval
    page = (copy / "README.md").read_text()
    assert f"- PENDING: {run.label}" in page
    assert page.count("PENDING") == 2  # there, and beside n


def test_a_report_does_not_load_pytorch(reported):
    code = (
        "import sys; from pathlib import Path; from benchmarks.report import write_report; "
        f"write_report(Path({str(reported.folder)!r})); "
        "assert not [m for m in sys.modules if m.split('.')[0] in ('torch', 'timm')]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


class Page(HTMLParser):
    """What a page holds: elements, addresses, and text by element."""

    VOID = frozenset({"meta", "link", "img", "br", "input", "hr"})

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.unbalanced = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def test_the_page_is_whole_and_needs_nothing_but_itself(reported):
    text = (reported.folder / "report.html").read_text()
    page = Page(text)
    assert not page.unbalanced
    assert not page.open
    assert not page.all("script", "iframe", "object")
    images = page.all("img")
    plots = [n for n in files_of(reported.folder / "plots") if not n.endswith(".csv")]
    assert len(images) == len(plots) > 3
    assert all(image["src"].startswith("data:image/") for image in images)
    assert all(len(image["alt"]) > 40 for image in images)
    assert all(re.search(r"\d", image["alt"]) for image in images)  # the finding, in numbers
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    assert "default-src 'none'" in text  # a browser would refuse to load anything else
    for link in page.all("a"):
        target = link["href"]
        if target.startswith("#"):
            assert any(a.get("id") == target[1:] for _, a in page.elements)
        else:
            path = target.replace("%2B", "+")
            assert (reported.folder / path).is_file(), target
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all("scope" in cell for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) >= 6


def test_the_pages_say_what_the_verdicts_are_and_what_differs(reported):
    html = (reported.folder / "report.html").read_text()
    page = (reported.folder / "README.md").read_text()
    assert '<span class="badge reproduced">REPRODUCED †</span>' in html
    for text in (page, html, reported.text):
        assert "REPRODUCED †" in text
    assert "6 + 2 epochs (paper: 200 + 50)" in page
    assert "NOT RUN, because not in this profile: error on cifar10, cifar100, svhn" in page


def test_what_a_profile_says_of_itself_cannot_break_the_page(tmp_path):
    sweep = Sweep(tmp_path, SMALL | {"title": "</title><script>alert(1)</script>"})
    sweep.finish_all(lambda run: 4.0, warnings=["a <b> | pipe"])
    write_report(sweep.folder)
    text = (sweep.folder / "report.html").read_text()
    assert not Page(text).all("script", "b")
    assert "a &lt;b&gt; | pipe" in text


def test_a_sweep_with_nothing_done_has_its_pages_too(tmp_path):
    sweep = Sweep(tmp_path, SMALL)
    write_report(sweep.folder)
    page = Page((sweep.folder / "report.html").read_text())
    assert not page.unbalanced
    assert not page.all("img")
    assert "No run is done yet" in (sweep.folder / "report.html").read_text()
    assert not (sweep.folder / "hessian.csv").exists()


def test_the_index_lists_every_profile_and_outlives_a_broken_one(reported, tmp_path):
    shutil.copytree(reported.folder, tmp_path / "made")
    shutil.copytree(reported.folder, tmp_path / "broken")
    plan = tmp_path / "broken" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"schema_version": 0}))
    write_index(tmp_path)
    text = (tmp_path / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| [")]
    assert [line.split("]")[0] for line in lines] == ["| [broken", "| [made"]
    assert "| 12/12" not in lines[0]
    assert f"{len(reported.plan.runs)}/{len(reported.plan.runs)}" in lines[1]
    assert "Cannot be reported: " in text
    assert "schema version 0" in text
    assert "(made/plots/differences.svg)" in text
    for target in re.findall(r"\]\(((?:made|broken)/[^)]*)\)", text):
        assert (tmp_path / target).is_file()
    with pytest.raises(UserError, match="schema version 0"):
        write_report(tmp_path / "broken")
    (tmp_path / "findings.md").write_text("## What was found\n\nλ₁ falls.\n")
    write_index(tmp_path)
    assert (
        "\n\n## What was found\n\nλ₁ falls.\n\n## The claims"
        in (tmp_path / "README.md").read_text()
    )


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def browse(page, folder, width, *, dark=False):
    """Render a page; returns the picture and what the browser's console said."""
    folder.mkdir()
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'user'}",
        f"--window-size={width},1600",
        f"--screenshot={folder / 'page.png'}",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return folder / "page.png", console


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: pages not rendered")
def test_a_browser_shows_the_page_without_error_or_request(reported, tmp_path):
    """The page's own policy makes every request an error in the console: none is none at all."""
    page = reported.folder / "report.html"
    for width, dark in ((1280, False), (500, True)):
        picture, console = browse(page, tmp_path / str(width), width, dark=dark)
        assert console == []
        with Image.open(picture) as image:
            assert image.size == (width, 1600)
            corner = image.convert("RGB").getpixel((3, 800))
            assert max(corner) < 60 if dark else min(corner) > 240
            assert len(image.convert("L").getcolors(256)) > 20  # something was drawn
    asking = tmp_path / "asking.html"
    asking.write_text(page.read_text().replace("<main>", '<main><img src="a.png" alt="">'))
    _, console = browse(asking, tmp_path / "asking", 500)
    assert any("Content Security Policy" in line for line in console)
