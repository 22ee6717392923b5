"""The expert usage of a report: heat maps of layers, domains and experts, usage over time, and a table of the layers.

The maps themselves are drawn by the page's script; here are their places, their words and their numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeyard.train.reporting.history import Counts, UsageBins
from moeyard.train.reporting.html import details, escape
from moeyard.train.reporting.run_folder import RunFolder
from moeyard.train.reporting.verdicts import LayerUsage, layer_usage

#: Numbers that a page holds at most for the maps by domain, and for those over time.
MAX_CELLS = 300_000
MAX_TIME_CELLS = 200_000
#: Shares over time are whole numbers of this size.
SHARE_UNIT = 1e-4
#: More maps than this start folded.
MAX_OPEN = 12


def expert_data(run: RunFolder) -> dict[str, Any] | None:
    """What the script draws the maps from; None when no usage was recorded.

    `slots` is [L][D][E] over the last half of the run, D = 1 where all domains would be too many numbers; `time.share`
    is [L][B][E] in units of `SHARE_UNIT`.
    """
    usage = run.history.usage
    if not usage.records:
        return None
    late = usage.late()
    return {
        "domains": run.domains if _by_domain(run) else ["all"],
        "slots": (late if _by_domain(run) else late.sum(axis=1, keepdims=True)).tolist(),
        "time": _over_time(usage),
    }


def _by_domain(run: RunFolder) -> bool:
    layers, domains, experts = run.history.usage.shape
    return domains > 1 and layers * domains * experts <= MAX_CELLS


def _over_time(usage: UsageBins) -> dict[str, Any]:
    counts, spans = usage.counts.sum(axis=2), usage.spans  # [B,L,E]
    while counts.size > MAX_TIME_CELLS and len(counts) > 1:
        last = len(spans) - 1
        counts = _pairs(counts)
        spans = [(spans[i][0], spans[min(i + 1, last)][1]) for i in range(0, last + 1, 2)]
    shares = counts / np.maximum(counts.sum(axis=2, keepdims=True), 1)
    whole = np.rint(shares / SHARE_UNIT).astype(np.int64)
    # What is not nothing must not look like it.
    whole[(counts > 0) & (whole == 0)] = 1
    return {
        "first": [int(first) for first, _ in spans],
        "last": [int(last) for _, last in spans],
        "share": whole.transpose(1, 0, 2).tolist(),
    }


def _pairs(counts: Counts) -> Counts:
    """Neighbouring bins added up; an odd last one stays alone."""
    merged: Counts = np.add.reduceat(counts, np.arange(0, len(counts), 2), axis=0)
    return merged


def experts_section(run: RunFolder) -> str:
    """The section's content: table, scale, maps."""
    layers = layer_usage(run)
    if not layers:
        return "<p>No expert usage was recorded.</p>"
    k = run.experts_per_token
    per_token = f"{k} experts per token" if k else "experts per token unknown, taken as 1"
    note = f"Shares of the slots (tokens times experts per token) over the last half of the run; {per_token}."
    parts = [
        f"<p class='note'>{note} Hatched: no token at all.</p>",
        _map("all", 0, "All domains: layer by expert", "<p class='scale' data-scale='all'></p>"),
        details("Layers in numbers", _layer_table(layers), opened=len(layers) <= MAX_OPEN),
        _domain_maps(run),
        _fold("Over time, by layer", "time", [f"Layer {usage.layer}" for usage in layers], "each column is a time bin"),
    ]
    return "".join(parts)


def _domain_maps(run: RunFolder) -> str:
    layers, domains, _ = run.history.usage.shape
    if domains == 1:
        return ""
    if not _by_domain(run):
        return "<p class='note'>The maps by domain are left out: they would be too many numbers for one page.</p>"
    slots = run.history.usage.late().sum(axis=(0, 2))
    shares = slots / max(int(slots.sum()), 1)
    titles = [f"{name} ({share:.1%} of the slots)" for name, share in zip(run.domains, shares, strict=True)]
    by_layer = [f"Layer {layer}" for layer in range(layers)]
    return _fold("By domain: layer by expert", "domain", titles, "shares within a domain") + _fold(
        "By layer: domain by expert", "layer", by_layer, "shares within a domain"
    )


def _fold(title: str, kind: str, titles: list[str], note: str) -> str:
    """A grid of maps with one scale."""
    maps = "".join(_map(kind, index, title) for index, title in enumerate(titles))
    summary = f"{escape(title)} <span class='note'>{len(titles)} maps, {escape(note)}</span>"
    content = f"<p class='scale' data-scale='{kind}'></p><div class='maps'>{maps}</div>"
    return details(summary, content, opened=len(titles) <= MAX_OPEN)


def _map(kind: str, index: int, title: str, content: str = "") -> str:
    return (
        f"<figure class='map' data-map='{kind}' data-index='{index}'><figcaption><h3>{escape(title)}</h3></figcaption>"
        f"{content}<div class='scroll'><svg tabindex='0' role='img' aria-label='Heat map of expert usage. "
        f"{escape(title)}. Arrow keys read the cells.'></svg></div>"
        "<div class='tip' role='status' hidden></div></figure>"
    )


def _layer_table(layers: list[LayerUsage]) -> str:
    head = "".join(
        f"<th scope='col'>{name}</th>" for name in ("layer", "largest share", "smallest share", "effective experts", "")
    )
    return (
        "<p class='note'>Effective experts: the exponential of the shares' entropy, that is, how many evenly used "
        "experts would be as diverse.</p>"
        f"<table class='layers'><thead><tr>{head}</tr></thead><tbody>{''.join(map(_layer_row, layers))}</tbody></table>"
    )


def _layer_row(usage: LayerUsage) -> str:
    if not usage.shares.any():
        return f"<tr><th scope='row'>{usage.layer}</th><td colspan='4'>no tokens</td></tr>"
    largest, smallest = int(usage.shares.argmax()), int(usage.shares.argmin())
    return (
        f"<tr{' class=bad' if usage.findings else ''}><th scope='row'>{usage.layer}</th>"
        f"<td>{usage.shares[largest]:.1%} <span class='note'>expert {largest}</span></td>"
        f"<td>{usage.shares[smallest]:.1%} <span class='note'>expert {smallest}</span></td>"
        f"<td>{usage.effective:.1f} <span class='note'>of {len(usage.shares)}</span></td>"
        f"<td>{escape('; '.join(usage.findings))}</td></tr>"
    )
