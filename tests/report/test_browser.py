"""The page in a real browser without a network: what is shown, that nothing sticks out, that nothing runs."""

from __future__ import annotations

import html
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ptql.evaluation.report import write_report
from tests.report.synthetic import make_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND")
SECTIONS = ["warnings", "quality", "loss", "layers", "outliers", "size", "cost", "setup"]
WIDTHS = (1280, 390)

MEASURE = """
const seen = {};
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, width = frame.clientWidth, wide = [], small = [], clash = [];
  for (const element of page.querySelectorAll("body *")) {
    const box = element.getBoundingClientRect();
    const scrolls = element.closest(".scroll, pre") && !element.matches(".scroll, pre");
    const out = box.right > width + 0.5 || box.left < -0.5;
    if (box.width && !scrolls && !element.closest("title") && out)
      wide.push(element.outerHTML.slice(0, 120) + " " + box.left + " to " + box.right);
    const size = parseFloat(page.defaultView.getComputedStyle(element).fontSize);
    if (element.matches("p, td, th, li, dd, dt, text") && size < 11) small.push(element.outerHTML.slice(0, 120));
  }
  for (const drawing of page.querySelectorAll("svg")) {
    const boxes = [...drawing.querySelectorAll(":scope > text:not(.cross)")].map(
      t => [t.getBoundingClientRect(), t.textContent]);
    boxes.forEach(([a, x], i) => boxes.slice(i + 1).forEach(([b, y]) => {
      if (a.left < b.right && b.left < a.right && a.top < b.bottom - 3 && b.top < a.bottom - 3)
        clash.push(x + " on " + y + " in " + drawing.getAttribute("aria-label"));
    }));
  }
  seen[frame.id] = {
    wide, small, clash, scrolls: page.documentElement.scrollWidth > width, height: page.body.scrollHeight,
    sections: [...page.querySelectorAll("main [id]")].map(e => e.id).filter(id => id != "config"),
    drawn: [...page.querySelectorAll("svg[role=img]")].filter(e => e.getBoundingClientRect().height > 8).length,
    title: page.title, heading: page.querySelector("h1").innerText, text: page.body.innerText.length,
  };
}
document.body.textContent = JSON.stringify(seen);
"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs the browser with some options on a file; what it prints."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH: install one, e.g. apt-get install chromium")
    profile = tmp_path_factory.mktemp("profile")

    def run(file: Path, *options: str) -> str:
        command = [found, *QUIET, f"--user-data-dir={profile}", *options, file.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return run


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of a usual run, a large one with odd values, and one of which nothing is known."""
    folder = tmp_path_factory.mktemp("runs")
    odd = {3: {"loss": math.nan}, 5: {"loss": math.inf, "layers": {}}, 6: {"seconds": math.nan}}
    (folder / "nothing").mkdir()
    runs = {
        "usual": make_run(folder / "usual", 30, 576),
        "large": make_run(folder / "large", 80, 4096, changes=odd),
        "nothing": folder / "nothing",
    }
    return {name: write_report(run) for name, run in runs.items()}


@pytest.fixture(scope="module")
def measured(reports: dict[str, Path], browse: Callable[..., str], tmp_path_factory: pytest.TempPathFactory):
    """What a script sees of each page in frames of both widths."""
    frames = "".join(
        f'<iframe id="{name}-{width}" style="border:0;width:{width}px;height:6000px" '
        f'srcdoc="{html.escape(page.read_text(encoding="utf-8"))}"></iframe>'
        for name, page in reports.items()
        for width in WIDTHS
    )
    file = tmp_path_factory.mktemp("frames") / "frames.html"
    script = f'<script>addEventListener("load", () => {{ {MEASURE} }})</script>'
    file.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}{script}", encoding="utf-8")
    dom = browse(file, "--dump-dom", "--virtual-time-budget=20000")
    return json.loads(html.unescape(dom[dom.index("<body>") + 6 : dom.index("</body>")]))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["usual", "large", "nothing"])
def test_nothing_sticks_out_and_no_labels_clash(measured, name, width):
    seen = measured[f"{name}-{width}"]
    assert seen["wide"] == []
    assert not seen["scrolls"]
    assert seen["small"] == []
    assert seen["clash"] == []


def test_all_sections_and_charts_are_shown(measured):
    for name, seen in measured.items():
        assert seen["sections"] == SECTIONS, name
    assert measured["usual-1280"]["heading"] == "SmolLM2-135M-Instruct lrquant w4a4"
    assert measured["usual-1280"]["title"] == "SmolLM2-135M-Instruct lrquant w4a4 – ptql"
    # loss, scale and map of layers, two for each of four inputs, size, time, memory
    assert measured["usual-1280"]["drawn"] == measured["large-390"]["drawn"] == 14
    assert measured["nothing-390"]["drawn"] == 0
    assert measured["usual-390"]["height"] > measured["usual-1280"]["height"]


def picture(browse: Callable[..., str], page: Path, file: Path, *options: str) -> np.ndarray:
    browse(page, f"--screenshot={file}", "--window-size=1280,1800", *options)
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def test_the_page_is_drawn_in_light_and_dark(reports, browse, tmp_path):
    light = picture(browse, reports["usual"], tmp_path / "light.png")
    dark = picture(browse, reports["usual"], tmp_path / "dark.png", "--blink-settings=preferredColorScheme=0")
    assert light.shape == dark.shape == (1800, 1280, 3)
    assert tuple(light[5, 5]) == (255, 255, 255)
    assert dark[5, 5].max() < 40
    for pixels in (light, dark):
        ink = np.abs(pixels - pixels[5, 5]).max(2) > 60
        assert 0.01 < ink.mean() < 0.5
        blue = (pixels[..., 2] - pixels[..., 0] > 80) & (pixels[..., 2] > 150)
        assert blue.sum() > 2000  # dots of the losses, cells of the map


def test_what_a_file_says_is_never_run(browse, tmp_path):
    run = make_run(tmp_path / "run", blocks=2)
    evil = "<img src=x onerror=document.title=1><script>document.title='owned'</script>"
    metrics = run / "metrics.json"
    metrics.write_text(metrics.read_text().replace("wikitext2", evil).replace("lrquant", evil))
    page = write_report(run)
    without_policy = page.with_name("bare.html")
    text = page.read_text(encoding="utf-8")
    without_policy.write_text(text.replace("Content-Security-Policy", "x"), encoding="utf-8")
    for file in (page, without_policy):
        dom = browse(file, "--dump-dom", "--virtual-time-budget=2000")
        assert "<img" not in dom
        assert "<script" not in dom
        assert "SmolLM2" in dom[dom.index("<title>") : dom.index("</title>")]


def test_it_prints_on_a_few_pages(reports, browse, tmp_path):
    file = tmp_path / "page.pdf"
    browse(reports["usual"], f"--print-to-pdf={file}", "--no-pdf-header-footer")
    assert 3 <= file.read_bytes().count(b"/Type /Page\n") <= 12
