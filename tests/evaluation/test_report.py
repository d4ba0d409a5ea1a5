"""The report's file; what is on the page is tested in tests/report."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from ptql.evaluation.report import write_report
from tests.report.synthetic import make_run

EVIL = '</style></pre>"\'><script src="//evil.example/x.js">alert(1)</script><img src=x onerror=alert(1)>'


class Elements(HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_is_put_in_place_whole(tmp_path):
    run = make_run(tmp_path / "run", blocks=3)
    assert write_report(run) == run / "report.html"
    first = (run / "report.html").read_text(encoding="utf-8")
    assert first.endswith("</html>\n")
    write_report(run)
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize(("blocks", "channels", "most"), [(30, 576, 250_000), (80, 8192, 400_000)])
def test_large_runs_make_small_pages_without_references(tmp_path, blocks, channels, most):
    page = write_report(make_run(tmp_path / "run", blocks, channels)).read_text(encoding="utf-8")
    assert len(page.encode()) < most
    assert "url(" not in page
    assert "@import" not in page
    elements = Elements(page).found
    assert {"script", "link", "img", "iframe", "object", "image", "use", "a"}.isdisjoint(name for name, _ in elements)
    assert not [a for _, attributes in elements for a in attributes if a in ("src", "href", "srcset") or a[:2] == "on"]
    assert re.search(r"https?://|//\w", page) is None


def test_a_run_of_nothing_has_a_page(tmp_path):
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "metrics.json is missing" in page


def test_nothing_out_of_a_file_becomes_markup(tmp_path):
    run = make_run(tmp_path / "run", blocks=2)
    for name in ("metrics.json", "ledger/manifest.json", "config.yaml", "model/config.json"):
        text = (run / name).read_text()
        for word in ("wikitext2", "piqa", "lrquant", "SmolLM2", "q_proj", "NVIDIA", "Smooth", "initial", "0.4.11"):
            evil = EVIL if name == "config.yaml" else EVIL.replace('"', '\\"')
            text = text.replace(word, f"'{EVIL.replace(chr(39), chr(39) * 2)}'" if name == "config.yaml" else evil)
        (run / name).write_text(text)
    page = write_report(run).read_text(encoding="utf-8")
    names = {name for name, _ in Elements(page).found}
    assert {"script", "img"}.isdisjoint(names)
    assert "&lt;script" in page
