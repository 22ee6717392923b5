"""Small pieces of HTML. What is called `content` is markup already; everything else is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable


def escape(text: str) -> str:
    """Text as HTML, also inside attributes with either kind of quotes; what a file cannot hold becomes `?`."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"), quote=True)


def section(name: str, title: str, content: str) -> str:
    """A titled part of the page; nothing where there is no content."""
    return f"<section id='{name}'><h2>{escape(title)}</h2>{content}</section>\n" if content else ""


def rows(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<tr><th scope='row'>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in pairs)


def table(content: str) -> str:
    return f"<table><tbody>{content}</tbody></table>" if content else ""


def details(summary: str, content: str, *, opened: bool) -> str:
    """A fold; `summary` is markup."""
    return f"<details{' open' if opened else ''}><summary>{summary}</summary>{content}</details>"
