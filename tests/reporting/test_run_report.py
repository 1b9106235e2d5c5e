"""`report.html`: what it shows, that it needs no network, that a browser draws it."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from browser import Browser, find_browser
from PIL import Image

from blip2fast.command_line import main
from blip2fast.reporting import REPORT, Sample, write_report
from blip2fast.reporting.charts import Line, line_chart

LINES = [
    {"step": 10, "loss": 3.25, "loss_itc": 1.5, "lr": 1e-4, "samples_per_second": 12345.6},
    {"step": 20, "loss": 2.5, "loss_itc": 1.25, "lr": 5e-5, "samples_per_second": 200.0},
    {"step": 20, "eval_loss": 2.75, "eval_t2i_r1": 0.625, "eval_cider": 1.5, "some_new_one": 7},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "<b>bold & run"
    folder.mkdir()
    (folder / "config.yaml").write_text("stage: 1\noptim:\n  max_steps: 40\n")
    write_metrics(folder, LINES)
    starts: list[dict[str, object]] = [{"started": "2026-01-02", "steps": 0, "changes": {}}]
    environment = {"torch": "2.99.1", "device": "a <card>"}
    starts += [{"started": "2026-01-03", "lr": "1 to 2", "environment": environment}]
    (folder / "history.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    return folder


def write_metrics(folder: Path, lines: list[dict[str, float]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """Text outside style, the titles of sections, and every address that a browser would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.titles, self.addresses, self.open = "", [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for n, v in attrs if n in ("src", "href", "data", "poster")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "url(http" not in data
            assert "@import" not in data
            return
        self.text += data
        if self.open[-1:] == ["h3"]:
            self.titles.append(data)


def test_it_shows_the_run(run: Path) -> None:
    path = write_report(run)
    assert path == run / REPORT
    page = Page(path)
    titles = ["Loss", "Retrieval", "Captions and answers", "Learning rate", "Throughput", "Other"]
    assert page.titles == titles
    for said in (
        "<b>bold & run",
        "step 20 of 40",
        "not ended",
        "some_new_one",
        "2026-01-03",
        "environment: torch 2.99.1",
        "environment: device a <card>",
        "max_steps: 40",
    ):
        assert said in re.sub(r"\s+", " ", page.text), said
    rows = re.findall(r"<tr><td>(.*?)</td><td.*?>(.*?)</td><td.*?>(.*?)</td>", path.read_text())
    assert ("loss, held out", "2.75", "20") in rows
    assert ("loss_itc", "1.25", "20") in rows
    assert ("samples_per_second", "200", "20") in rows
    # trained and held out are drawn together: one curve and one of a single point
    assert path.read_text().count("line2d_") > 0


def test_axes_name_their_units(run: Path) -> None:
    line = {
        "step": 30,
        "temperature": 0.07,
        "data_wait_share": 0.25,
        "peak_memory_gib": 0.5,
        "seconds_per_step": 2,
    }
    write_metrics(run, [*LINES, line])
    page = write_report(run).read_text()
    for unit in ("samples a second", "share of the time", "GiB", "s", "temperature"):
        assert re.search(rf"<text [^>]*>{unit}</text>", page), unit


def test_a_short_run_has_no_half_steps() -> None:
    chart = line_chart({"loss": [Line((1, 2, 4), (100.0, 300.0, 200.0))]}, 4)
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", chart)
    assert {"0", "1", "4", "300"} <= {*labels}
    assert not any("." in label for label in labels)


def test_it_needs_no_network_and_runs_no_code(run: Path) -> None:
    sample = Sample(
        Image.new("RGB", (900, 600), "red"),
        "a.png",
        {"caption": "<script>alert(1)</script>"},
        {"query 0": Image.new("L", (30, 20), 128)},
    )
    path = write_report(run, [sample])
    page = Page(path)
    assert all(url.startswith(("data:image/jpeg;base64,", "#")) for url in page.addresses)
    assert "<script" not in path.read_text()
    assert "<script>alert(1)</script>" in page.text
    assert "query 0" in page.text
    sizes = []
    for url in page.addresses:
        if url.startswith("data:"):
            _, _, data = url.partition(",")
            sizes.append(Image.open(BytesIO(base64.b64decode(data))).size)
    assert sizes == [(384, 256), (30, 20)]


def test_the_same_run_gives_the_same_file(run: Path, tmp_path: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run, out=tmp_path / "again.html").read_bytes() == first


def test_a_run_that_has_just_started(run: Path) -> None:
    write_metrics(run, [])
    assert "Nothing has been logged yet." in Page(write_report(run)).text
    (run / "config.yaml").unlink()
    (run / "history.jsonl").unlink()
    assert "step 0" in Page(write_report(run)).text


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(run)])
    assert capsys.readouterr().out == f"{run / REPORT}\n"
    with pytest.raises(SystemExit, match=r"error: no metrics at .*nowhere.*: not a file; give the"):
        main(["report", str(tmp_path / "nowhere")])
    before = (run / REPORT).read_bytes()
    (run / "metrics.jsonl").write_text('{"step": 1\n')
    with pytest.raises(SystemExit, match=r"error: .*metrics.jsonl, line 1 is not JSON"):
        main(["report", str(run)])
    assert (run / REPORT).read_bytes() == before


@pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine")
def test_a_browser_draws_it(run: Path, tmp_path: Path) -> None:
    lines = {"the model's caption": "a red heart", "its captions": "a heart\nred " + 300 * "x"}
    overlays = {f"query {n}": Image.new("RGB", (96, 96), "purple") for n in range(32)}
    samples = [Sample(Image.new("RGB", (40, 30), "red"), f"{n}.png", lines, overlays) for n in "ab"]
    page = write_report(run, samples, tmp_path / "page.html", ["Passed over: c.png: <damaged>"])
    picture = tmp_path / "page.png"
    with Browser(tmp_path / "profile") as browser:
        for width in (1200, 390):
            browser.open(page.as_uri(), width, 1400)
            said = browser.text()
            for expected in ("a red heart", "Passed over: c.png: <damaged>", "b.png", "query 31"):
                assert expected in said, expected
            drawn = browser.run("[...document.images].map(each => each.naturalWidth)")
            assert drawn == 2 * [40, *(32 * [96])]
            assert browser.overflow() == 0
            browser.screenshot(picture)
            image = Image.open(picture).convert("RGB")
            assert image.size == (width, 1400)
            colours = {colour for _, colour in image.getcolors(1 << 24) or ()}
            # the curve of the loss, the cards and the page behind them
            assert {(0, 114, 178), (255, 255, 255), (246, 247, 249)} <= colours
            # nothing stands beyond the right edge: the last column is the page's background
            edge = {image.getpixel((width - 3, y)) for y in range(0, 1400, 7)}
            assert edge == {(246, 247, 249)}
            browser.run("document.querySelector('.sample').scrollIntoView()")
            browser.screenshot(picture)
            colours = {c for _, c in Image.open(picture).convert("RGB").getcolors(1 << 24) or ()}
            assert any(r > 240 and g < 16 and b < 16 for r, g, b in colours), "the picture"
            assert any(abs(r - 128) + g + abs(b - 128) < 24 for r, g, b in colours), "a query"
        # a chart that is alone is as wide as one among others
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        browser.open(write_report(run).as_uri(), 1200)
        assert 0 < browser.run("document.querySelector('.card').offsetWidth") < 600
