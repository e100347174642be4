"""The report in a headless Chromium: what it draws on a wide screen, a phone and paper, and that it loads nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_pages import make_run

from mae_dist import image_grid
from mae_dist.monitor import report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
RED, BLUE = (200, 0, 0), (0, 0, 200)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium"),
]


def browse(tmp_path: Path, page: Path, *options: str) -> str:
    """What Chromium prints about a page."""
    command = [str(BROWSER), *QUIET, "--no-first-run", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'browser'}"]
    done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def screenshot(tmp_path: Path, page: Path, width: int, *options: str) -> np.ndarray:
    """The pixels of a page, uint8 (height, width, 3)."""
    file = tmp_path / f"{width}.png"
    browse(tmp_path, page, f"--window-size={width},6000", f"--screenshot={file}", *options)
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def has(pixels: np.ndarray, colour: tuple[int, int, int], least: int = 200) -> bool:
    """Whether so many pixels have this colour, roughly."""
    return bool((abs(pixels - np.array(colour)).max(-1) < 12).sum() >= least)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A report of a run with two pictures, an early red and a late blue one."""
    run = make_run(tmp_path / "run")
    for step, colour in ((10, RED), (40, BLUE)):
        image = np.full((8, 8, 3), colour, np.uint8)
        image_grid.sheet([[image]]).save(run / f"reconstruction-{step:09d}.png")
    (run / "pictures").mkdir()
    for file in run.glob("*.png"):
        file.rename(run / "pictures" / file.name)
    assert report.main([str(run)]) == 0
    return run / "report.html"


def test_report_in_chromium_shows_one_step_of_the_slider_and_follows_the_theme(tmp_path: Path, page: Path) -> None:
    light = screenshot(tmp_path, page, 1240)
    assert has(light, BLUE)
    assert not has(light, RED)
    assert light[0, 0].min() > 240
    dark = screenshot(tmp_path, page, 1241, "--blink-settings=preferredColorScheme=0")
    assert dark[0, 0].max() < 40
    early = page.with_name("early.html")
    text = page.read_text()
    early.write_text(
        text.replace(' checked aria-label="step 40"', ' aria-label="step 40"').replace(
            'id="film-1-1"', 'id="film-1-1" checked'
        )
    )
    assert has(pixels := screenshot(tmp_path, early, 1242), RED)
    assert not has(pixels, BLUE)


def test_report_in_chromium_fits_a_phone(tmp_path: Path, page: Path) -> None:
    frame = page.with_name("frame.html")
    measure = "document.title = 'width ' + this.contentDocument.documentElement.scrollWidth"
    frame.write_text(f'<title></title><iframe width="390" height="900" src="{page.name}" onload="{measure}"></iframe>')
    dom = browse(tmp_path, frame, "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom")
    assert "<title>width 390</title>" in dom


def test_report_on_paper_has_all_steps(tmp_path: Path, page: Path) -> None:
    file = tmp_path / "report.pdf"
    browse(tmp_path, page, f"--print-to-pdf={file}")
    assert file.read_bytes().count(b"/Subtype /Image") >= 2
