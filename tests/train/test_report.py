"""The report of a run: what is on the page, what must not be, runs with little or nothing to tell, size and time."""

from __future__ import annotations

import json
import math
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs moeyard[train]")

from moeyard.train import report
from moeyard.train.report import UsageError, find_run, summary_lines, write_report
from moeyard.train.reporting.page import render
from moeyard.train.reporting.run_folder import read_run
from moeyard.train.reporting.verdicts import alarms, layer_usage, verdicts
from train.runs import write_run

VOID = {"meta", "input", "br", "hr", "img", "link"}


class Page(HTMLParser):
    """The elements of a page, the text of each section, and whether every tag is closed in its order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._open: list[str] = []
        self._section: str | None = None
        self.data = ""
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert len(given) == len(attributes), "an attribute given twice"
        self.tags.append((tag, given))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = str(given["id"])
            self.sections[self._section] = ""

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "section":
            self._section = None

    def handle_data(self, text: str) -> None:
        if self._section:
            self.sections[self._section] += text
        if self.tags and self.tags[-1][1].get("id") == "data" and self._open[-1] == "script":
            self.data += text

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in wanted.items())]


def page_of(folder: Path) -> Page:
    """The page alone; the plots take longer than all the rest."""
    return Page(render(read_run(folder)))


def report_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_whole_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs/structures/1a2b3c4d", 200, evaluate_every=50)
    page = report_of(folder)
    assert list(page.sections) == [
        "summary", "loss", "experts", "metrics", "optimizer", "speed", "config", "environment", "files",
    ]  # fmt: skip
    for word in ("Steps", "200", "Loss", "Validation", "atoms/s", "Batch fill", "Expert warnings", "none"):
        assert word in page.sections["summary"]
    for chart in ("Loss", "Parts of the loss", "Router losses"):
        assert chart in page.sections["loss"]
    assert "Accuracy" in page.sections["metrics"]
    assert "Learning rate" in page.sections["optimizer"]
    for chart in ("Atoms per second", "Time of a step", "Batch fill"):
        assert chart in page.sections["speed"]
    for text in ("dim", "64", "experts_per_token", "optimizer", "0.002"):
        assert text in page.sections["config"]
    for text in ("torch", "2.13.0", "Linux x86_64", "2026-11-20T10:00:00"):
        assert text in page.sections["environment"]
    for name in ("metrics.jsonl", "config.json", "plots/overview.png"):
        assert name in page.sections["files"]
    assert "report.html" not in page.sections["files"]
    for name in ("overview.png", "loss.png", "experts.png", "throughput.png"):
        assert (folder / "plots" / name).read_bytes().startswith(b"\x89PNG")
    # Layer by expert for all and for 3 domains, domain by expert and over time for 2 layers.
    maps = [(figure["data-map"], figure["data-index"]) for figure in page.all("figure") if "data-map" in figure]
    assert maps == [("all", "0"), *(("domain", str(d)) for d in range(3)), ("layer", "0"), ("layer", "1"), ("time", "0"), ("time", "1")]  # fmt: skip  # noqa: E501


def test_the_page_stands_alone_and_can_be_read_aloud(tmp_path: Path) -> None:
    page = report_of(write_run(tmp_path, 30))
    # No address of anything outside: no script, style, font or picture can come from there.
    assert "//" not in "".join(str(v) for _, a in page.tags for v in a.values())
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert "@import" not in page.source
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'unsafe-inline'"
    assert page.all("html")[0]["lang"] == "en"
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        target = str(link["href"])
        assert target[1:] in ids if target.startswith("#") else (tmp_path / target).is_file()
    pictures = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(pictures) == len(page.all("figure"))
    assert all(len(str(a["aria-label"])) > 20 and a["tabindex"] == "0" for a in pictures)
    headings = [int(tag[1]) for tag, _ in page.tags if tag in {"h1", "h2", "h3"}]
    assert headings[0] == 1
    assert headings.count(1) == 1


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    write_run(tmp_path, 30)
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


# Ends a script, brings its own, breaks out of attributes, and opens what a script's end does not close.
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\"&<!--<script >"
)


def test_nothing_from_a_file_becomes_markup(tmp_path: Path) -> None:
    write_hostile_run(tmp_path)
    page = page_of(tmp_path)
    assert [a.get("id") for a in page.all("script")] == ["data", None, None, None]
    assert page.all("img") == []
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    data = json.loads(page.data)
    assert data["charts"][-1]["curves"][0]["name"] == HOSTILE
    assert data["usage"]["domains"][0] == HOSTILE
    for section in ("config", "environment", "experts", "metrics"):
        assert HOSTILE in page.sections[section]


def write_hostile_run(folder: Path) -> None:
    """Markup in every place where a run holds text."""
    info = {"system": HOSTILE, "signature": HOSTILE, "status": HOSTILE, "machine": HOSTILE, "warnings": [HOSTILE]}
    info |= {"versions": {HOSTILE: HOSTILE}, "domains": [HOSTILE, "b", "c"], HOSTILE: HOSTILE}
    write_run(folder, 5, info=info, config={HOSTILE: HOSTILE, "nested": {HOSTILE: {HOSTILE: [HOSTILE]}}})
    (folder / "'\"&<b> %20#.txt").write_text("")
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 6, HOSTILE: 1.0}) + "\n")


class TestRunsWithLittleToTell:
    """None of these may fail, and each page must say what is missing."""

    def test_no_step(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"a": 1}')
        page = report_of(tmp_path)
        assert "No loss was recorded." in page.sections["loss"]
        assert "No expert usage was recorded." in page.sections["experts"]
        assert not (tmp_path / "plots").exists()
        assert summary_lines(tmp_path)[0] == f"{tmp_path.name}: unknown"

    def test_only_metrics(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
        page = report_of(tmp_path)
        assert "2.5" in page.sections["summary"]
        assert "No configuration was recorded." in page.sections["config"]
        assert (tmp_path / "plots" / "loss.png").exists()
        assert not (tmp_path / "plots" / "experts.png").exists()

    @pytest.mark.parametrize("steps", [0, 1, 2])
    def test_few_steps(self, tmp_path: Path, steps: int) -> None:
        page = report_of(write_run(tmp_path, steps, info={"status": "running"}))
        assert f"Steps{steps}" in page.sections["summary"].replace("\n", "")
        assert len(summary_lines(tmp_path)) >= 2

    def test_cut_off(self, tmp_path: Path) -> None:
        path = write_run(tmp_path, 20) / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-30])
        page = page_of(tmp_path)
        assert "19" in page.sections["summary"]
        assert "the last line is cut off" in page.sections["summary"]
        assert any("cut off" in line for line in summary_lines(tmp_path))

    def test_nothing_finite(self, tmp_path: Path) -> None:
        lines = [{"step": s, "loss": None, "val_loss": None, "experts": [[[0, 0]]]} for s in range(1, 30)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        page = report_of(tmp_path)
        assert "not finite at 29 steps, first at 1" in page.sections["summary"]
        assert "no tokens" in page.sections["experts"]

    def test_some_steps_not_finite(self, tmp_path: Path) -> None:
        lines = [{"step": s, "loss": None if s in (7, 9) else 1.0 / s} for s in range(1, 30)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        page = page_of(tmp_path)
        assert "not finite at 2 steps, first at 7" in page.sections["summary"]
        assert json.loads(page.data)["charts"][0]["curves"][0]["bad"] == [7, 9]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "not readable as JSON"),
            ("[1]", "expected a JSON object, got list"),
            ("\udcff", "not readable as JSON"),
        ],
    )
    def test_damaged_files(self, tmp_path: Path, text: str, message: str) -> None:
        write_run(tmp_path, 3)
        for name in ("config.json", "run.json", "summary.json"):
            (tmp_path / name).write_text(text, errors="surrogateescape")
        page = page_of(tmp_path)
        assert page.sections["summary"].count(message) == 3

    def test_odd_values(self, tmp_path: Path) -> None:
        deep: dict[str, object] = {}
        for _ in range(100):
            deep = {"deeper": deep}
        config = {"deep": deep, "long": "x" * 10_000, "none": None, "empty": {}, "half": "\ud800"}
        info = {"versions": "abc", "domains": [1, None], "status": ["odd"], "warnings": "no list"}
        page = page_of(write_run(tmp_path, 3, config=config, info=info))
        assert "(10,000 characters)" in page.sections["config"]
        assert json.loads(page.data)["usage"]["domains"] == ["1", "None", "domain 2"]

    def test_the_demos_folder(self, tmp_path: Path) -> None:
        write_run(tmp_path, 5)
        (tmp_path / "run.json").unlink()
        (tmp_path / "config.json").write_text(json.dumps({"options": {"top_k": 2}, "versions": {"torch": "2.13.0"}}))
        (tmp_path / "summary.json").write_text(json.dumps({"interrupted": True, "warnings": ["layer 0: odd"]}))
        (tmp_path / "loss.png").write_bytes(b"old")
        page = report_of(tmp_path)
        assert "interrupted" in page.sections["summary"]
        assert "layer 0: odd" in page.sections["environment"]
        assert "torch" not in page.sections["config"]
        assert (tmp_path / "loss.png").read_bytes() == b"old", "the plots that it drew itself stay as they are"
        assert not (tmp_path / "plots").exists()
        assert read_run(tmp_path).experts_per_token == 2


class TestCollapse:
    def usage_run(self, folder: Path, *counts: list[int], k: int = 1) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model": {"experts_per_token": k}}))
        lines = [{"step": s, "loss": 1.0, "experts": [[list(c)] for c in counts]} for s in range(1, 5)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    def test_by_hand(self, tmp_path: Path) -> None:
        run = read_run(self.usage_run(tmp_path, [25, 25, 25, 25], [70, 10, 20, 0], [1, 1, 0, 0]))
        even, skewed, half = layer_usage(run)
        assert even.effective == pytest.approx(4)
        assert half.effective == pytest.approx(2)
        assert skewed.effective == pytest.approx(
            math.exp(-0.7 * math.log(0.7) - 0.1 * math.log(0.1) - 0.2 * math.log(0.2))
        )
        assert alarms([even]) == []
        assert alarms([skewed, half]) == [
            "layer 1: expert 0 takes 70% of the tokens",
            "layer 1: expert 3 got no token",
            "layer 2: experts 2, 3 got no token",
        ]

    def test_banner(self, tmp_path: Path) -> None:
        folder = self.usage_run(tmp_path / "bad", [70, 10, 20, 0])
        page = page_of(folder)
        assert page.all("div", role="alert")
        assert "expert 0 takes 70% of the tokens" in page.sections["summary"]
        assert "warning: layer 0: expert 3 got no token" in summary_lines(folder)
        good = page_of(self.usage_run(tmp_path / "good", [25, 25, 25, 25]))
        assert not good.all("div", role="alert")

    def test_shares_are_of_tokens(self, tmp_path: Path) -> None:
        """With two experts per token, 35 % of the slots are 70 % of the tokens."""
        one = read_run(self.usage_run(tmp_path / "one", [35, 22, 22, 21], k=1))
        two = read_run(self.usage_run(tmp_path / "two", [35, 22, 22, 21], k=2))
        assert alarms(layer_usage(one)) == []
        assert alarms(layer_usage(two)) == ["layer 0: expert 0 takes 70% of the tokens"]


def test_verdicts_by_hand(tmp_path: Path) -> None:
    # Each step: 0.3 s of work, 0.1 s of waiting, 8 atoms; losses 20, 19, ..., 1.
    lines = [
        {
            "step": s, "epoch": 1, "loss": 21.0 - s, "step_seconds": 0.3, "data_seconds": 0.1, "atoms": 8,
            "atoms_per_second": 20.0, "batch_fill": 0.8,
        }
        for s in range(1, 21)
    ]  # fmt: skip
    lines += [{"step": 10, "val_loss": 3.0}, {"step": 20, "val_loss": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run.json").write_text('{"status": "failed"}')
    got = [(v.label, v.value, v.note, v.state) for v in verdicts(read_run(tmp_path))]
    assert got == [
        ("Steps", "20", "failed, epoch 1", "bad"),
        ("Training time", "8.0 s", "300 ms a step (median)", "plain"),
        ("Loss", "1.5", "from 19.5 (last and first tenth)", "good"),
        ("Validation", "3", "best val_loss, step 10", "plain"),
        ("Throughput", "20 atoms/s", "", "plain"),
        ("Batch fill", "80.0%", "mean over all steps", "warn"),
        ("Waiting for data", "25.0%", "of the time", "warn"),
    ]


def test_summary_lines(tmp_path: Path) -> None:
    lines = summary_lines(write_run(tmp_path, 400, layers=2, experts=4))
    assert lines[0] == "structures/1a2b3c4d: finished"
    (loss,) = (line for line in lines if line.startswith("  loss  "))
    blocks = loss.split()[1]
    assert blocks.startswith("█")
    assert blocks.endswith("▁")
    assert len(blocks) == 40
    assert "steps 1 to 400" in loss
    assert [line.split()[0] for line in lines[-2:]] == ["0", "1"], "one line per layer, no warning"


class TestWriting:
    def test_a_failure_leaves_the_old_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        page = write_report(write_run(tmp_path, 3))
        before = page.read_bytes()
        monkeypatch.setattr(report, "render", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_report(tmp_path)
        assert page.read_bytes() == before
        assert list(tmp_path.rglob("*.part")) == []

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"no run: expected metrics\.jsonl, run\.json or config\.json in it"):
            write_report(tmp_path)
        with pytest.raises(UsageError, match="which is not there"):
            write_report(tmp_path / "missing")
        write_run(tmp_path / "1a2b3c4d", 1)
        with pytest.raises(UsageError, match="runs below it: 1a2b3c4d"):
            write_report(tmp_path)

    def test_find_run(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "runs/structures/1a2b3c4d", 1)
        assert find_run(str(folder), tmp_path / "runs") == folder
        assert find_run("structures/1a2b3c4d", tmp_path / "runs") == folder
        with pytest.raises(UsageError, match=r"did you mean structures/1a2b3c4d\?"):
            find_run("structures/1a2b3c4e", tmp_path / "runs")
        with pytest.raises(UsageError, match="; 0 runs are there"):
            find_run("structures/1a2b3c4d", tmp_path / "elsewhere")


def test_ten_thousand_steps(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 10_000, layers=4, domains=12, experts=32, evaluate_every=200)
    started = time.perf_counter()
    page = write_report(folder)
    assert time.perf_counter() - started < 20
    assert page.stat().st_size < 3_000_000
    data = json.loads(Page(page.read_text()).data)
    assert all(len(curve["x"]) <= 1000 for chart in data["charts"] for curve in chart["curves"])
    assert len(data["usage"]["time"]["first"]) <= 60


def test_many_experts_layers_and_domains(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, 300, layers=24, domains=12, experts=100))
    assert len(page.source) < 3_000_000
    usage = json.loads(page.data)["usage"]
    assert (len(usage["slots"]), len(usage["slots"][0]), len(usage["slots"][0][0])) == (24, 12, 100)


def test_too_many_cells_are_left_out_visibly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeyard.train.reporting import experts

    monkeypatch.setattr(experts, "MAX_CELLS", 20)
    monkeypatch.setattr(experts, "MAX_TIME_CELLS", 20)
    page = page_of(write_run(tmp_path, 30, layers=2, domains=3, experts=4))
    assert "The maps by domain are left out" in page.sections["experts"]
    usage = json.loads(page.data)["usage"]
    assert usage["domains"] == ["all"]
    assert len(usage["slots"][0]) == 1
    assert len(usage["time"]["first"]) == 2
    assert (usage["time"]["first"][0], usage["time"]["last"][-1]) == (1, 30)
