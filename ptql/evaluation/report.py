"""RUN/report.html: one self-contained page on a run, for a reader who did not start it."""

from __future__ import annotations

from pathlib import Path

from ptql.disk import put_text
from ptql.report.page import page
from ptql.report.run_files import read_run

REPORT = "report.html"


def write_report(run: Path) -> Path:
    """Write RUN/report.html from what there is in RUN; a page that is there is replaced in one step.

    Raises:
        OSError: The page can't be written.
    """
    path = run / REPORT
    put_text(path, page(read_run(run)))
    return path
