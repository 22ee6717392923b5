"""The report as one HTML page that needs nothing but itself.

Every text that comes from a file goes through `escape`, and the data that the script draws from through `_as_json`: a
run's files are read, never believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

from moeyard.train.reporting.charts import MAX_POINTS, MAX_TOTAL, Chart, Section, chart_data, charts, spoken
from moeyard.train.reporting.experts import expert_data, experts_section
from moeyard.train.reporting.html import details, escape, rows, section, table
from moeyard.train.reporting.run_folder import RunFolder
from moeyard.train.reporting.verdicts import Verdict, alarms, layer_usage, verdicts

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'unsafe-inline'"
SYMBOLS = {"good": "✓", "warn": "!", "bad": "✕", "plain": ""}
TITLES = {"loss": "Loss", "optimizer": "Optimizer", "metrics": "Other metrics", "speed": "Speed"}
MAX_DEPTH = 8
MAX_OPEN = 30
MAX_FILES = 200
MAX_TEXT = 2000


def render(run: RunFolder) -> str:
    """The whole page. The same files give the same bytes."""
    drawn, left_out = charts(run.history)
    data = page_data(run, drawn)
    parts = dict.fromkeys(get_args(Section), "")
    for index, chart in enumerate(drawn):
        parts[chart.section] += _chart(index, chart, run)
    if left_out:
        parts["metrics"] += f"<p class='note'>Not drawn, for want of room: {escape(', '.join(left_out))}.</p>"
    sections = {
        "loss": section("loss", TITLES["loss"], _grid(parts["loss"]) or "<p>No loss was recorded.</p>"),
        "experts": section("experts", "Expert usage", experts_section(run)),
        **{name: section(name, TITLES[name], _grid(parts[name])) for name in ("metrics", "optimizer", "speed")},
        "config": section("config", "Configuration", _tree(run.config) or "<p>No configuration was recorded.</p>"),
        "environment": section("environment", "Environment", _environment(run)),
        "files": section("files", "Files", _files(run.path)),
    }
    body = "".join([_header(run), _navigation(sections), "<main>", _summary(run), *sections.values(), "</main>"])
    return _document(f"{run.name} · {run.status} · moeyard", body, data)


def page_data(run: RunFolder, drawn: list[Chart]) -> dict[str, Any]:
    """What the script draws: every curve within the budget of points, and the expert usage."""
    curves = max(sum(len(chart.names) for chart in drawn), 1)
    points = min(MAX_POINTS, MAX_TOTAL // curves)
    steps = [run.history.series(name).steps for chart in drawn for name in chart.names]
    return {
        "first": int(min((s[0] for s in steps), default=0)),
        "last": int(max((s[-1] for s in steps), default=0)),
        "charts": [chart_data(chart, run.history, points) for chart in drawn],
        "usage": expert_data(run),
    }


def _document(title: str, body: str, data: dict[str, Any]) -> str:
    assets = files("moeyard.train.reporting") / "assets"
    style, *scripts = ((assets / n).read_text("utf-8") for n in ("page.css", "common.js", "curves.js", "heat.js"))
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        "<meta name='color-scheme' content='light dark'>\n"
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        # The pattern behind cells without tokens, and the place where scripts learn the name space of SVG.
        "<svg id='shared' width='0' height='0' aria-hidden='true'><defs><pattern id='hatch' width='6' height='6' "
        "patternUnits='userSpaceOnUse' patternTransform='rotate(45)'><path d='M0 0V6' class='hatch'/></pattern>"
        "</defs></svg>\n"
        f"<script type='application/json' id='data'>{_as_json(data)}</script>\n"
        + "".join(f"<script>\n{script}</script>\n" for script in scripts)
        + "</body>\n</html>\n"
    )


def _as_json(data: Any) -> str:
    """JSON that HTML cannot mistake for markup: no character that ends a script or opens a comment."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _header(run: RunFolder) -> str:
    state = {"finished": "good", "interrupted": "warn", "failed": "bad"}.get(run.status, "plain")
    when = [str(run.info[key]) for key in ("started", "machine") if run.info.get(key)]
    return (
        f"<header><h1>{escape(run.name)} <span class='badge {state}'>{escape(run.status)}</span></h1>"
        f"<p class='note'>{escape(' · '.join(when))}</p></header>"
    )


def _navigation(sections: Mapping[str, str]) -> str:
    titles = {**TITLES, "experts": "Experts", "config": "Configuration", "environment": "Environment", "files": "Files"}
    links = "".join(f"<a href='#{name}'>{titles[name]}</a>" for name, text in sections.items() if text)
    slider = (
        "<label class='smoothing'>Smoothing <input id='smoothing' type='range' min='0' max='20' step='1' value='5'>"
        "<output id='smoothed' for='smoothing'>5%</output></label>"
    )
    return f"<nav aria-label='Sections'>{links}{slider}</nav>"


def _summary(run: RunFolder) -> str:
    tiles = "".join(map(_tile, verdicts(run)))
    alarm = alarms(layer_usage(run))
    banner = ""
    if alarm:
        lines = "".join(f"<li>{escape(line)}</li>" for line in alarm)
        banner = f"<div class='alarm' role='alert'><h3>Collapse alarm, last half of the run</h3><ul>{lines}</ul></div>"
    problems = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    notes = f"<ul class='problems'>{problems}</ul>" if problems else ""
    return f"<section id='summary' aria-label='Summary'>{banner}{notes}<dl class='tiles'>{tiles}</dl></section>"


def _tile(verdict: Verdict) -> str:
    symbol = SYMBOLS[verdict.state]
    mark = f"<span class='mark' role='img' aria-label='{verdict.state}'>{symbol}</span>" if symbol else ""
    return (
        f"<div class='tile {verdict.state}'><dt>{escape(verdict.label)}{mark}</dt>"
        f"<dd>{escape(verdict.value)}</dd><dd class='note'>{escape(verdict.note)}</dd></div>"
    )


def _grid(content: str) -> str:
    return f"<div class='grid'>{content}</div>" if content else ""


def _chart(index: int, chart: Chart, run: RunFolder) -> str:
    unit = f" <span class='note'>{escape(chart.unit)}</span>" if chart.unit else ""
    return (
        f"<figure class='chart{' wide' if chart.wide else ''}' data-chart='{index}'>"
        f"<figcaption><h3>{escape(chart.title)}{unit}</h3>"
        "<button type='button' class='log' aria-pressed='false'>log scale</button></figcaption>"
        f"<div class='legend'></div><svg tabindex='0' role='img' aria-label='{escape(spoken(chart, run.history))}'>"
        "</svg><div class='tip' role='status' hidden></div></figure>"
    )


def _tree(tree: Mapping[str, Any], depth: int = 0) -> str:
    """Nested dictionaries as foldable tables: plain values first, then a fold for each dictionary."""
    plain = {key: value for key, value in tree.items() if not _nests(value, depth)}
    folds = ((key, value) for key, value in tree.items() if _nests(value, depth))
    shown = table(rows((key, _text(value)) for key, value in plain.items())) if plain else ""
    return shown + "".join(
        details(_counted(key, value), _tree(value, depth + 1), opened=len(value) <= MAX_OPEN) for key, value in folds
    )


def _counted(key: str, value: Mapping[str, Any]) -> str:
    return f"{escape(key)} <span class='note'>{len(value)}</span>"


def _nests(value: Any, depth: int) -> bool:
    return isinstance(value, dict) and bool(value) and depth < MAX_DEPTH


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text):,} characters)"


def _environment(run: RunFolder) -> str:
    about = table(rows((key, _text(value)) for key, value in run.environment.items()))
    versions = table(rows((key, _text(value)) for key, value in run.versions.items()))
    recorded = run.info.get("warnings")
    told = [str(line) for line in recorded] if isinstance(recorded, list) else []
    spoken_up = "".join(f"<li>{escape(line)}</li>" for line in told)
    return (
        "<div class='grid'>"
        f"<div><h3>Run</h3>{about or '<p>Not recorded.</p>'}</div>"
        f"<div><h3>Versions</h3>{versions or '<p>Not recorded.</p>'}</div></div>"
        + (f"<h3>Warnings during the run</h3><ul class='problems'>{spoken_up}</ul>" if told else "")
    )


def _files(folder: Path) -> str:
    found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".part"))
    listed = [p for p in found if p != folder / "report.html"]
    lines = "".join(_file(path, folder) for path in listed[:MAX_FILES])
    more = f"<p class='note'>and {len(listed) - MAX_FILES:,} more</p>" if len(listed) > MAX_FILES else ""
    plots = [p for p in listed if p.suffix == ".png"]
    links = ", ".join(_link(path, folder) for path in plots)
    # Without scripts the curves are missing; the same are on disk as pictures.
    fallback = f"<noscript><p>The curves need scripts; the plots do not: {links}</p></noscript>" if plots else ""
    return f"{fallback}<table class='files'><tbody>{lines}</tbody></table>{more}"


def _file(path: Path, folder: Path) -> str:
    return f"<tr><th scope='row'>{_link(path, folder)}</th><td>{_size(path.stat().st_size)}</td></tr>"


def _link(path: Path, folder: Path) -> str:
    relative = path.relative_to(folder).as_posix()
    return f"<a href='{escape(quote(f'./{relative}'))}'>{escape(relative)}</a>"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
