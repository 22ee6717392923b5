"""The report in headless Chromium: it draws, quickly and without an error, and its controls do what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moeyard.train.reporting.page import render
from moeyard.train.reporting.run_folder import read_run
from train.runs import write_run
from train.test_report import write_hostile_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is on PATH")


def page_of(folder: Path) -> Path:
    """The page alone; the plots take longer than all the rest."""
    page = folder / "report.html"
    page.write_text(render(read_run(folder)), encoding="utf-8")
    return page


def opened(page: Path, profile: Path) -> str:
    """The page's elements after its scripts have run. Whatever the browser's console says fails the test."""
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--window-size=1200,3000", f"--user-data-dir={profile}", page.resolve().as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    assert "data-fault" not in result.stdout
    return result.stdout


def drawn_ms(page: str) -> float:
    found = re.search(r'data-drawn-ms="([\d.]+)"', page)
    assert found, "the script has not come to its end"
    return float(found[1])


def with_script(page: Path, script: str) -> Path:
    """A copy that goes on with `script` and notes what it gives in the body's `data-result`."""
    copy = page.with_name("scripted.html")
    ending = f"<script>document.body.dataset.result = JSON.stringify((() => {{{script}}})());</script></body>"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", ending), encoding="utf-8")
    return copy


def test_ten_thousand_steps_are_drawn_within_a_second(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", 10_000, layers=4, domains=12, experts=32, evaluate_every=200))
    times: list[float] = []
    # The best of three: the machine may be busy with something else.
    while len(times) < 3 and not (times and min(times) < 1000):
        times.append(drawn_ms(opened(page, tmp_path / "profile")))
    assert min(times) < 1000, times


def test_curves_and_maps_are_there(tmp_path: Path) -> None:
    page = opened(page_of(write_run(tmp_path / "run", 200, evaluate_every=50)), tmp_path / "profile")
    charts = re.findall(r'<figure class="chart.*?</figure>', page, re.DOTALL)
    assert len(charts) == 10
    for chart in charts:
        lines = re.findall(r'<path d="(M[^"]*)" class="line', chart)
        assert any(line.count("L") > 50 for line in lines)
        assert "NaN" not in chart
        assert "undefined" not in chart
    assert re.search(r'<image [^>]*href="data:image/png', page), "maps on the screen are drawn at once"


def test_markup_in_a_run_does_nothing(tmp_path: Path) -> None:
    write_hostile_run(tmp_path / "run")
    page = opened(page_of(tmp_path / "run"), tmp_path / "profile")
    assert "<title>owned" not in page
    assert "<img" not in page
    drawn_ms(page)


@pytest.mark.parametrize("steps", [0, 1])
def test_few_steps(tmp_path: Path, steps: int) -> None:
    page = opened(page_of(write_run(tmp_path / "run", steps)), tmp_path / "profile")
    drawn_ms(page)
    assert "NaN" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def result_of(page: Path, script: str, profile: Path) -> str:
    found = re.search(r'data-result="([^"]*)"', opened(with_script(page, script), profile))
    assert found
    return found[1].replace("&quot;", '"')


KEYS = """
const press = (element, key) => element.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
"""


def test_paper_shows_everything(tmp_path: Path) -> None:
    """Maps far below and in folds are drawn late on a screen; on paper they must be there."""
    page = page_of(write_run(tmp_path / "run", 100, layers=14, domains=3, experts=4))
    counts = """const count = (what) => document.querySelectorAll(what).length;
        const before = count("image"); dispatchEvent(new Event("beforeprint"));
        return [before < 32, count("image"), count("figure.map"), count("details:not([open])")];"""
    assert result_of(page, counts, tmp_path / "profile") == "[true,32,32,0]"


def test_controls(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", 100, layers=2, domains=1, experts=4))

    def result(script: str) -> str:
        return result_of(page, KEYS + script, tmp_path / "profile")

    # Keys read a curve out, step by step, and all charts show the same step.
    read = result(
        """const chart = document.querySelector("figure.chart"), svg = chart.querySelector("svg[tabindex]");
        press(svg, "End"); const end = chart.querySelector(".tip").textContent; press(svg, "Home");
        const hairs = [...document.querySelectorAll(".chart .hair")].map((hair) => hair.getAttribute("d"));
        const start = chart.querySelector(".tip").textContent; press(svg, "Escape");
        return [end, start, hairs.every((path) => path !== ""), chart.querySelector(".tip").hidden];"""
    )
    assert read.startswith('["step 100loss')
    assert '"step 1loss' in read
    assert read.endswith("true,true]")
    # Smoothing draws a raw and a smooth line, none leaves the raw one.
    assert (
        result(
            """const count = () => document.querySelectorAll(".chart .line.raw").length; const before = count() > 0;
            smoothing.value = 0; smoothing.dispatchEvent(new Event("input"));
            return [before, count(), document.getElementById("smoothed").textContent];"""
        )
        == '[true,0,"0%"]'
    )
    # A legend's button hides its curve; the scale's button changes the axis.
    assert (
        result(
            """const chart = document.querySelectorAll("figure.chart")[1], key = chart.querySelector(".key");
            const count = () => chart.querySelectorAll("svg[tabindex] > g:not(.axes)").length;
            const before = count(); key.click();
            const log = chart.querySelector(".log"), axis = () => chart.querySelector(".axes").innerHTML, old = axis();
            log.click(); return [before - count(), key.getAttribute("aria-pressed"), old !== axis()];"""
        )
        == '[1,"false",true]'
    )
    # Keys read a map's cells.
    cell = result(
        """const map = document.querySelector("figure.map"), svg = map.querySelector("svg[tabindex]");
        maps[0].draw();
        for (const key of ["ArrowRight", "ArrowRight", "ArrowDown"]) press(svg, key);
        return map.querySelector(".tip").textContent;"""
    )
    assert re.match(r'"layer 1, expert 1of the slots\d+(\.\d)?%slots[\d,]+"$', cell)
