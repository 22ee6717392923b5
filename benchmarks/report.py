"""Turns benchmarks/results/<machine>/*.json into tables and plots: `python benchmarks/report.py [--check]`.

Written are the tables of README.md between the markers, benchmarks/results/<machine>/README.md with every note, and
ratios.png beside it. `--check` writes nothing and fails where a table is not what the JSON says.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import string
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- benchmarks: made by benchmarks/report.py -->"
END = "<!-- benchmarks: end -->"
LETTERS = string.ascii_uppercase  # the machines, in the order of their folders
EMPTY = "No results are recorded yet: `make bench` measures, fills this section and draws the plot."
ORDER = ("topk_gating", "permute_tokens", "radius_graph", "pack_batches", "gather_segments", "moe", "identity")

Document = dict[str, Any]


def read(results: Path) -> dict[str, dict[str, Document]]:
    """{machine folder: {file stem: document}}, ops in the order of the README."""
    found: dict[str, dict[str, Document]] = {}
    for path in sorted(results.glob("*/*.json")):
        document = json.loads(path.read_text())
        # Other figures of a machine may stand beside the rows of benchmarks.
        if isinstance(document, dict) and "rows" in document:
            found.setdefault(path.parent.name, {})[path.stem] = document
    rank = {stem: i for i, stem in enumerate(ORDER)}
    return {
        name: dict(sorted(files.items(), key=lambda item: (rank.get(item[0], len(ORDER)), item[0])))
        for name, files in found.items()
    }


# ---- text ------------------------------------------------------------------------------------------------------------


def number(value: float | None, unit: str) -> str:
    if value is None:
        return "not measured"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def verdict(row: dict[str, Any]) -> str:
    """Losses are bold: a missed target, and being slower than a peer without one."""
    if row["holds"] is not None:
        return "yes" if row["holds"] else "**no**"
    if row["note"].startswith("did not run"):
        return "**did not run**"
    return "**slower**" if row["ratio"] is not None and row["ratio"] < 1 else ""


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| row | moeyard | peer | ratio | target | holds | note |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        peer = "" if row["peer_name"] is None else f"{row['peer_name']}: {number(row['peer'], row['unit'])}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} x"
        cells = [
            row["row"],
            number(row["ours"], row["unit"]),
            peer,
            ratio,
            row["target"] or "",
            verdict(row),
            row["note"],
        ]
        lines.append("| " + " | ".join(cell(text) for text in cells) + " |")
    return lines


def _one_or_all(values: list[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def heading(files: dict[str, Document]) -> str:
    """Machine, date, versions and threads in a sentence each."""
    documents = list(files.values())
    versions: dict[str, str] = {}
    for document in documents:
        versions |= document["versions"]
    stated = ", ".join(f"{name} {version}" for name, version in versions.items())
    threads = _one_or_all([str(document["threads"]) for document in documents])
    return (
        f"{_one_or_all([d['machine'] for d in documents])}; {_one_or_all([d['date'] for d in documents])}; "
        f"{threads} thread{'' if threads == '1' else 's'} unless a row says otherwise; {stated}."
    )


def score(files: dict[str, Document]) -> str:
    rows = [row for document in files.values() for row in document["rows"]]
    judged = [row for row in rows if row["holds"] is not None]
    kept = sum(row["holds"] for row in judged)
    open_ = sum(row["target"] is not None and row["holds"] is None for row in rows)
    text = f"{kept} of {len(judged)} targets hold"
    return text + (f"; {open_} not measured." if open_ else ".")


def figures(row: dict[str, Any]) -> str:
    """Ratio, our time, the peer and its time, and the verdict where it is a loss."""
    ours = number(row["ours"], row["unit"])
    text = ours if row["ratio"] is None else f"{row['ratio']:.2f} x: {ours}"
    if row["peer_name"] is not None:
        text += f", {row['peer_name']} {number(row['peer'], row['unit'])}"
    return f"{text} {verdict(row)}" if "**" in verdict(row) else text


def side_by_side(machines: list[Document | None]) -> list[str]:
    """One op's rows with a column per machine; the rows of one name keep their order."""
    columns: list[dict[tuple[str, int], dict[str, Any]]] = []
    for document in machines:
        column: dict[tuple[str, int], dict[str, Any]] = {}
        for row in document["rows"] if document else []:
            nth = sum(name == row["row"] for name, _ in column)
            column[row["row"], nth] = row
        columns.append(column)
    lines = ["| row | target | " + " | ".join(LETTERS[: len(columns)]) + " |", "|---" * (2 + len(columns)) + "|"]
    for key in dict.fromkeys(key for column in columns for key in column):
        found = [column.get(key) for column in columns]
        target = next((row["target"] for row in found if row and row["target"]), "")
        lines.append(
            "| " + " | ".join(cell(t) for t in [key[0], target, *(figures(r) if r else "" for r in found)]) + " |"
        )
    return lines


def readme_section(results: Path) -> str:
    """What stands between the markers."""
    found = read(results)
    if not found:
        return EMPTY
    parts = []
    for letter, (name, files) in zip(LETTERS, found.items(), strict=False):
        folder = f"benchmarks/results/{name}"
        parts += [f"**{letter}**: {heading(files)} {score(files)} Every note: [{folder}]({folder}/README.md).", ""]
        parts += [f"![Ratio to the peer, row by row, with the targets]({folder}/ratios.png)", ""]
    parts += [
        "In the tables: how many times as fast as the peer, our time, the peer and its time, and what is lost.",
        "",
    ]
    for stem in dict.fromkeys(stem for files in found.values() for stem in files):
        parts += [f"`{stem}`", "", *side_by_side([files.get(stem) for files in found.values()]), ""]
    return "\n".join(parts).rstrip()


def machine_page(files: dict[str, Document]) -> str:
    parts = ["# Benchmark results", "", heading(files), "", score(files), "", *PROTOCOL, ""]
    for stem, document in files.items():
        parts += [f"## {stem}", "", *table(document["rows"]), ""]
    return "\n".join(parts)


PROTOCOL = [
    "`ratio` is the peer's median over ours, both from one run in which the sides took turns; the spread stands in the",
    "note. Before anything is timed the outputs are compared. **no**: the target is missed; **slower**: slower than a",
    "peer for which no target was set.",
]


def with_section(readme: str, section: str) -> str:
    """README.md with a new section between the markers."""
    pattern = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END), re.DOTALL)
    if len(pattern.findall(readme)) != 1:
        raise ValueError(f"README.md: expected {BEGIN!r} and {END!r} once each")
    return pattern.sub(lambda _: f"{BEGIN}\n{section}\n{END}", readme)


# ---- plot ------------------------------------------------------------------------------------------------------------


def plot(files: dict[str, Document], path: Path) -> None:
    """Ratio per row on a log axis; a tick marks the row's target, orange is a loss."""
    import matplotlib
    from PIL import Image

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for document in files.values() for row in document["rows"] if row["ratio"]]
    if not rows:
        return
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.16 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        lost = row["holds"] is False or (row["holds"] is None and row["ratio"] < 1)
        axes.plot([1, row["ratio"]], [place, place], color="#c8c8c8", linewidth=1, zorder=1)
        axes.plot(row["ratio"], place, "o", color="#d1661b" if lost else "#2b6ca3", markersize=4, zorder=3)
        limit = re.fullmatch(r">= ([0-9.]+) x", row["target"] or "")
        if limit:
            axes.plot(float(limit[1]), place, "|", color="black", markersize=8, zorder=2)
    labels = [f"{row['row']}  /  {row['peer_name']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=5.5)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("times as fast as the peer (tick: target; orange: lost)", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", color="#eeeeee", zorder=0)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=90)
    pyplot.close(figure)
    # A palette of few colours is all that this needs: a fifth of the bytes. Median cut would drop the rare orange.
    Image.open(picture).convert("RGB").quantize(32, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


# ---- command ---------------------------------------------------------------------------------------------------------


def outdated(readme: Path, results: Path) -> list[str]:
    """The files whose tables are not what the JSON says."""
    stale = []
    text = readme.read_text()
    if with_section(text, readme_section(results)) != text:
        stale.append(readme.name)
    for name, files in read(results).items():
        page = results / name / "README.md"
        if not page.is_file() or page.read_text() != machine_page(files):
            stale.append(f"{name}/README.md")
    return stale


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    if options.check:
        stale = outdated(options.readme, options.results)
        for name in stale:
            print(f"{name} is not what the results say: run python benchmarks/report.py", file=sys.stderr)
        return 1 if stale else 0
    for name, files in read(options.results).items():
        plot(files, options.results / name / "ratios.png")
        (options.results / name / "README.md").write_text(machine_page(files))
    options.readme.write_text(with_section(options.readme.read_text(), readme_section(options.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
