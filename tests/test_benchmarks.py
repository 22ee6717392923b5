"""The benchmark harness and report: order, comparison before timing, missing peers, rows, tables. Never a speed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmark_files import BENCHMARKS, ROOT, environment, load

FIELDS = {"row", "ours", "unit", "peer", "peer_name", "ratio", "target", "holds", "note"}

harness, report = load("_harness"), load("report")
STEMS = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))


def numbers(seed: int) -> torch.Tensor:
    return torch.rand(1000, generator=torch.Generator().manual_seed(seed))


def equal(ours: Any, theirs: Any, inputs: Any) -> None:
    assert torch.equal(ours, theirs), "sums differ"


class TestHarness:
    def suite(self, **options: Any) -> Any:
        return harness.Suite(rounds=5, echo=False, **options)

    def test_sides_take_turns_on_rotating_fresh_inputs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(harness, "LEAST_SECONDS", 0.0)  # one call per round
        monkeypatch.setattr(harness, "WARM_UP_SECONDS", {False: 0.0})
        calls: list[tuple[str, int]] = []

        def side(name: str) -> Any:
            def call(x: torch.Tensor) -> torch.Tensor:
                calls.append((name, x.data_ptr()))
                return x.sum()

            return call

        peers = [harness.Peer(name, side(name), equal) for name in "BC"]
        suite = self.suite()
        suite.compare("turns", numbers, side("A"), peers)
        every = calls[-30:]
        assert "".join(name for name, _ in every) == "BBCCAA" * 5, "an untimed call goes before each timed one"
        turns = every[1::2]
        assert all(warm != timed for warm, timed in zip(every[::2], turns, strict=True)), "both on the same input"
        for start in range(0, 15, 3):
            assert len({x for _, x in turns[start : start + 3]}) == 3, "two sides had the same inputs in one round"
        assert len({x for name, x in turns if name == "A"}) == 3

    @pytest.mark.parametrize(
        ("quick", "threads", "seconds"), [(False, 1, 0.02), (False, 2, 0.04), (True, 1, 0.0), (True, 2, 0.03)]
    )
    def test_calls_go_untimed_first(
        self, monkeypatch: pytest.MonkeyPatch, quick: bool, threads: int, seconds: float
    ) -> None:
        """However many threads a peer leaves behind."""
        monkeypatch.setattr(harness, "LEAST_SECONDS", 0.0)
        monkeypatch.setattr(harness, "WARM_UP_SECONDS", {False: 0.02, True: 0.04})
        monkeypatch.setattr(harness, "QUICK_WARM_UP_SECONDS", {False: 0.0, True: 0.03})
        calls: list[int] = []

        def ours(x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            time.sleep(1e-3)
            return x.sum()

        def one_thread(x: torch.Tensor) -> torch.Tensor:
            torch.set_num_threads(1)
            return x.sum()

        before = torch.get_num_threads()
        suite = self.suite(quick=quick)
        suite.compare("warm", numbers, ours, [harness.Peer("B", one_thread, equal)], threads=threads)
        assert torch.get_num_threads() == before
        per_round = (len(calls) - 2) / 5
        assert per_round == 2 if seconds == 0 else 3 <= per_round <= 3 + 1000 * seconds

    def test_rows_have_the_fields_and_their_meaning(self) -> None:
        suite = self.suite()
        peer = harness.Peer("torch", lambda x: x.sum(), equal, ">= 1000000 x")
        suite.compare("a sum", numbers, lambda x: x.sum(), [peer], limit="<= 10 s", note="said")
        limit, row = suite.rows
        assert set(row) == set(limit) == FIELDS
        assert (limit["unit"], limit["target"], limit["holds"], limit["peer"]) == ("s", "<= 10 s", True, None)
        assert row["peer_name"] == "torch"
        assert row["holds"] is False
        assert row["ratio"] == pytest.approx(row["peer"] / row["ours"], rel=1e-2)
        assert "said" in row["note"]
        assert "5 rounds" in row["note"]

    def test_a_different_output_is_an_error_before_anything_is_timed(self) -> None:
        suite = self.suite()
        rounds = []
        suite.runner = lambda *arguments: rounds.append(arguments)
        peer = harness.Peer("wrong", lambda x: x.sum() + 1, equal)
        with pytest.raises(harness.Mismatch, match="a sum: wrong gives something else: sums differ"):
            suite.compare("a sum", numbers, lambda x: x.sum(), [peer])
        assert not rounds
        assert not suite.rows

    def test_what_lives_on_old_memory_is_found(self) -> None:
        kept = torch.zeros(1000)

        def ours(x: torch.Tensor) -> torch.Tensor:
            kept[:500] = x[:500]
            return kept

        peer = harness.Peer("torch", lambda x: torch.cat([x[:500], torch.zeros(500)]), equal)
        with pytest.raises(harness.Mismatch):
            self.suite().compare("half a copy", numbers, ours, [peer])

    def test_poison_spares_the_inputs(self) -> None:
        x, array = torch.zeros(4), np.zeros(4)
        out = torch.zeros(3)
        harness.poison([x.view(2, 2), (out,), array[1:]], {"x": x, "array": array})
        assert (x.sum(), array.sum(), out.tolist()) == (0, 0, [113] * 3)

    def test_missing_and_failing_peers_are_noted(self, capsys: pytest.CaptureFixture[str]) -> None:
        def broken(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("/some/path")

        peers = [harness.Peer("absent", None, equal, ">= 2 x"), harness.Peer("broken", broken, equal)]
        suite = self.suite()
        suite.compare("a sum", numbers, lambda x: x.sum(), peers)
        assert [row["peer_name"] for row in suite.rows] == ["absent", "broken"]
        for row in suite.rows:
            assert row["ours"] > 0
            assert row["peer"] is row["ratio"] is row["holds"] is None
            assert "absent: not installed" in row["note"]
            assert "broken: failed with RuntimeError" in row["note"]
            assert "/some/path" not in row["note"]

    def test_the_fastest_peer_decides(self) -> None:
        def slow(x: torch.Tensor) -> torch.Tensor:
            for _ in range(2000):
                x.sum()
            return x.sum()

        peers = [
            harness.Peer("slow", slow, equal),
            harness.Peer("fast", lambda x: x.sum(), equal),
            harness.Peer("absent", None, equal),
        ]
        suite = self.suite()
        suite.compare("a sum", numbers, lambda x: x.sum(), peers, best=">= 0.001 x")
        (row,) = suite.rows
        assert row["peer_name"] == "fast"
        assert row["holds"] is True
        assert "others: slow" in row["note"]
        assert "absent: not installed" in row["note"]

    def test_threads_are_set_and_restored(self) -> None:
        seen = set()

        def ours(x: torch.Tensor) -> torch.Tensor:
            seen.add(torch.get_num_threads())
            return x.sum()

        before = torch.get_num_threads()
        self.suite().compare("a sum", numbers, ours, [], best=">= 1 x", threads=1)
        assert seen == {1}
        assert torch.get_num_threads() == before

    @pytest.mark.parametrize(
        ("target", "ours", "ratio", "expected"),
        [
            (None, 1.0, 2.0, None),
            (">= 2 x", 1.0, 2.0, True),
            (">= 2 x", 1.0, 1.99, False),
            (">= 2 x", 1.0, None, None),
            ("<= 5 us", 5.0, None, True),
            ("<= 5 us", 5.1, None, False),
            ("<= 5 us", None, None, None),
        ],
    )
    def test_holds(self, target: str | None, ours: float | None, ratio: float | None, expected: bool | None) -> None:
        assert harness.holds(target, ours, "us", ratio) is expected

    @pytest.mark.parametrize("target", ["10", "> 3 x", "<= 5 s"])
    def test_a_target_that_cannot_be_judged_is_an_error(self, target: str) -> None:
        with pytest.raises(ValueError, match="target: expected"):
            harness.holds(target, 1.0, "us", 1.0)

    def test_the_document_names_no_host(self, tmp_path: Path) -> None:
        suite = self.suite()
        suite.record("a row", None, "ms", note="not measured")
        suite.write(tmp_path / "deep" / "rows.json")
        document = json.loads((tmp_path / "deep" / "rows.json").read_text())
        assert set(document) == {"rows", "machine", "date", "versions", "threads"}
        assert document["rows"][0]["ours"] is None
        assert {"torch", "moeyard", "simd"} <= set(document["versions"])
        assert "core" in document["machine"]
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["rows.json"]


class TestFiles:
    @pytest.mark.parametrize("stem", STEMS)
    def test_every_benchmark_has_a_name_and_cases(self, stem: str) -> None:
        names = [name for name, _ in harness.benchmarks_of(vars(load(stem)))]
        assert names
        assert len(set(names)) == len(names)

    def test_one_tiny_benchmark_as_a_script_and_in_pytest(self, tmp_path: Path) -> None:
        pytest.importorskip("pytest_benchmark")
        file, rows = tmp_path / "bench_tiny.py", tmp_path / "rows"
        file.write_text(TINY.format(folder=str(BENCHMARKS)))
        script = [sys.executable, str(file), "--quick", "--json", str(tmp_path / "script.json")]
        done = subprocess.run(script, cwd=tmp_path, env=environment(), timeout=100)
        assert done.returncode == 1  # one of them disagrees
        found = json.loads((tmp_path / "script.json").read_text())["rows"]
        assert [row["row"] for row in found] == ["copy 10", "copy 20", "bench_wrong"]
        assert found[2]["note"].startswith("did not run: wrong: peer gives something else")

        (tmp_path / "conftest.py").write_text((BENCHMARKS / "conftest.py").read_text())
        options = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-q", *options, "--quick", "--rows", str(rows), str(file)]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), timeout=100, stdout=subprocess.PIPE, text=True)
        output = done.stdout
        assert done.returncode == 1, output
        assert "bench_copy[10]" in output, "pytest-benchmark's table lacks our side"
        assert "1 failed, 2 passed" in output
        (written,) = rows.glob("*/tiny.json")
        assert [row["row"] for row in json.loads(written.read_text())["rows"]] == [
            "copy 10",
            "copy 20",
            "bench_wrong",
        ]

    def test_generated_data_is_as_dense_as_it_should_be(self) -> None:
        import moeyard

        data = load("_data")
        for points, low, high in ((data.make_protein(1), 21, 24), (data.make_molecules(1), 14.5, 16.5)):
            graph = moeyard.radius_graph(points.pos, data.CUTOFF, points.batch, geometry=False)
            assert low < len(graph.edge_index[0]) / len(points.pos) < high
        assert data.make_molecules(1).pos.shape == (17_784, 3)
        assert not torch.equal(data.make_protein(1).pos, data.make_protein(2).pos)

    @pytest.mark.parametrize(
        ("part", "name", "note"),
        [
            ("plan", "permutation plan, 131,072 assignments, E=256: launches", ""),
            ("pack", "pack_batches, 10,000,000 sizes in random order", "waits for the device"),
        ],
    )
    def test_gpu_rows_run_without_a_gpu_and_keep_no_figure(
        self, tmp_path: Path, part: str, name: str, note: str
    ) -> None:
        script = [sys.executable, str(BENCHMARKS / "cuda_ops.py"), "--out", str(tmp_path), "-k", part]
        env = {**environment(), "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(script, cwd=tmp_path, env=env, timeout=100, check=True)
        document = json.loads((tmp_path / "cuda_ops.json").read_text())
        assert document["machine"] == "No GPU"
        (found,) = (row for row in document["rows"] if row["row"] == name)
        assert note in found["note"]
        for row in document["rows"]:
            assert set(row) == FIELDS
            assert row["ours"] is row["peer"] is row["ratio"] is row["holds"] is None
            assert "(once)" not in row["note"]
        assert "not measured" in (tmp_path / "cuda_ops.md").read_text()

    def test_a_row_on_a_gpu_says_which_side_no_graph_could_hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = load("_cuda")
        suite = cuda.CudaSuite(torch.device("cpu"), rounds=2)
        graph = SimpleNamespace(replay=None)
        waits = harness.Peer("waits", lambda x: x.sum(), equal)
        suite.measures, suite.echo = True, False
        monkeypatch.setattr(suite, "_synchronize", lambda: None)
        monkeypatch.setattr(suite, "_capture", lambda call, inputs: None if call is waits.call else graph)
        monkeypatch.setattr(suite, "_one_cold_call", lambda call, inputs: 2e-3)
        monkeypatch.setattr(suite, "_seconds", lambda work: 1e-3)
        ours, by_events = "2 rounds, 1 ns to 1 ns", "2 ms to 2 ms by events, host work included"
        suite.compare("a sum", numbers, lambda x: x.sum(), [waits])
        suite.compare("another", numbers, waits.call, [], limit="<= 3 ms")
        assert [row["note"] for row in suite.rows] == [f"{ours}; peer {by_events}", f"2 rounds, {by_events}"]

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs")
    def test_peak_memory_sees_what_is_freed_again(self, tmp_path: Path) -> None:
        file = tmp_path / "cases.py"
        file.write_text(
            "import torch\n"
            "def memory_cases(quick):\n"
            "    def twice():\n"
            "        scratch = torch.ones(8 << 20, dtype=torch.uint8)\n"
            "        return torch.ones(4 << 20, dtype=torch.uint8)\n"
            "    return {'both': twice}\n"
        )
        found = load("_memory").measure(str(file), True)["both"]
        if found is None:
            pytest.skip("/proc/self/clear_refs is not writable")
        peak, outputs = found
        assert outputs == 4 << 20
        assert 11 << 20 < peak < 20 << 20


TINY = """
import sys
sys.path.insert(0, {folder!r})
import torch
from _harness import Peer, cases, main

def equal(ours, theirs, inputs):
    assert torch.equal(ours, theirs), "copies differ"

@cases(10, 20)
def bench_copy(suite, case):
    suite.compare(f"copy {{case}}", lambda seed: torch.rand(case), torch.clone, [Peer("peer", torch.clone, equal)])

def bench_wrong(suite):
    suite.compare("wrong", lambda seed: torch.rand(3), torch.clone, [Peer("peer", torch.neg, equal)])

if __name__ == "__main__":
    main(globals())
"""


# ---- the report ------------------------------------------------------------------------------------------------------


def row(**changes: Any) -> dict[str, Any]:
    return {
        "row": "gating", "ours": 1.5, "unit": "ms", "peer": 30.0, "peer_name": "torch", "ratio": 20.0,
        "target": ">= 10 x", "holds": True, "note": "7 rounds",
    } | changes  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "some-machine"
    folder.mkdir(parents=True)
    rows = [
        row(),
        row(row="permute | a", ratio=0.5, holds=False, target=">= 1 x"),
        row(row="slower without a target", ratio=0.9, holds=None, target=None),
        row(row="absent", peer=None, ratio=None, holds=None, note="torch: not installed"),
        row(row="nothing", ours=None, peer=None, peer_name=None, ratio=None, holds=None, note="did not run: Mismatch"),
    ]
    document = {
        "rows": rows, "machine": "Some CPU, 2 cores", "date": "2026-01-02", "versions": {"torch": "2.0"}, "threads": 1,
    }  # fmt: skip
    (folder / "topk_gating.json").write_text(json.dumps(document))
    (folder / "other.json").write_text("[1]")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nyesterday's rows\n{report.END}\nafter\n")
    return tmp_path


class TestReport:
    def arguments(self, folder: Path) -> list[str]:
        return ["--readme", str(folder / "README.md"), "--results", str(folder / "results")]

    def test_tables_and_plot(self, results: Path) -> None:
        pytest.importorskip("matplotlib")
        assert report.main([*self.arguments(results), "--check"]) == 1
        assert report.main(self.arguments(results)) == 0
        assert report.main([*self.arguments(results), "--check"]) == 0
        text = (results / "README.md").read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "yesterday" not in text
        assert "Some CPU, 2 cores; 2026-01-02; 1 thread unless a row says otherwise; torch 2.0. 1 of 2" in text
        assert "| gating | >= 10 x | 20.00 x: 1.5 ms, torch 30 ms |" in text
        assert r"| permute \| a | >= 1 x | 0.50 x: 1.5 ms, torch 30 ms **no** |" in text
        assert "**slower**" in text
        assert "**did not run**" in text
        page = (results / "results" / "some-machine" / "README.md").read_text()
        assert "| gating | 1.5 ms | torch: 30 ms | 20.00 x | >= 10 x | yes | 7 rounds |" in page
        assert "torch: not installed" in page
        assert (results / "results" / "some-machine" / "ratios.png").stat().st_size < 100_000

    def test_machines_stand_side_by_side(self, results: Path) -> None:
        pytest.importorskip("matplotlib")
        other = results / "results" / "z-machine"
        other.mkdir()
        document = json.loads((results / "results" / "some-machine" / "topk_gating.json").read_text())
        document |= {
            "machine": "Other CPU",
            "rows": [row(ratio=4.0, holds=False), row(peer_name="jax"), row(row="new")],
        }
        (other / "topk_gating.json").write_text(json.dumps(document))
        report.main(self.arguments(results))
        text = (results / "README.md").read_text()
        assert "**B**: Other CPU" in text
        assert "| gating | >= 10 x | 20.00 x: 1.5 ms, torch 30 ms | 4.00 x: 1.5 ms, torch 30 ms **no** |" in text
        assert "| gating | >= 10 x |  | 20.00 x: 1.5 ms, jax 30 ms |" in text
        assert "| new | >= 10 x |  | 20.00 x: 1.5 ms, torch 30 ms |" in text

    def test_one_loss_among_many_rows_is_orange(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        image = pytest.importorskip("PIL.Image")
        rows = [row() for _ in range(110)] + [row(ratio=0.9, holds=False)]
        report.plot({"topk_gating": {"rows": rows}}, tmp_path / "ratios.png")
        picture = image.open(tmp_path / "ratios.png").convert("RGB")
        colours = {colour for _, colour in picture.getcolors(1 << 20)}
        for wanted in ((0xD1, 0x66, 0x1B), (0x2B, 0x6C, 0xA3)):
            assert min(sum(abs(a - b) for a, b in zip(colour, wanted, strict=True)) for colour in colours) < 30

    def test_a_changed_figure_is_noticed(self, results: Path) -> None:
        pytest.importorskip("matplotlib")
        report.main(self.arguments(results))
        path = results / "results" / "some-machine" / "topk_gating.json"
        path.write_text(path.read_text().replace("1.5", "1.6"))
        assert report.main([*self.arguments(results), "--check"]) == 1

    def test_lost_markers_are_an_error(self, results: Path) -> None:
        (results / "README.md").write_text("nothing here")
        with pytest.raises(ValueError, match="once each"):
            report.main([*self.arguments(results), "--check"])

    def test_this_readme_is_what_the_results_say(self) -> None:
        if not (BENCHMARKS / "results").is_dir() and report.EMPTY not in (ROOT / "README.md").read_text():
            pytest.skip("the results are not part of a source distribution")
        assert report.outdated(ROOT / "README.md", BENCHMARKS / "results") == []
