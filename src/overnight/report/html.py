"""HTML: escaping, tables, and the page around them. One file, no script, nothing loaded from anywhere."""

from __future__ import annotations

import html
import importlib.resources
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Markup(str):
    """Text that is HTML already: `escape` leaves it alone."""

    __slots__ = ()


# Control characters, lone surrogates and the two non-characters cannot stand in an HTML file.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


HASH = re.compile("[0-9a-f]{32,}")
"""Shown by its beginning; the whole of it is in the title."""


def escape(value: object) -> Markup:
    """`value` as HTML text, safe between tags and inside quotes; what cannot be shown becomes U+FFFD."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(UNPRINTABLE.sub("\ufffd", str(value))))


def element(tag: str, content: object, css: str = "") -> Markup:
    """<tag class="css">content</tag>."""
    attribute = f' class="{escape(css)}"' if css else ""
    return Markup(f"<{tag}{attribute}>{escape(content)}</{tag}>")


def joined(parts: Iterable[object]) -> Markup:
    """The parts one below the other."""
    return Markup("\n".join(escape(part) for part in parts))


def section(title: str, *parts: object) -> Markup:
    """A section with its heading; its anchor is the title in lower case."""
    anchor = re.sub(r"[^a-z]+", "-", title.lower()).strip("-")
    return Markup(f'<section id="{anchor}">\n{element("h2", title)}\n{joined(parts)}\n</section>')


def paragraph(content: object, css: str = "") -> Markup:
    """One paragraph."""
    return element("p", content, css)


def notice(sentences: Sequence[str]) -> Markup:
    """What a reader must know before believing a number; nothing if there is nothing."""
    if not sentences:
        return Markup("")
    items = joined(element("li", sentence) for sentence in sentences)
    return Markup(f'<div class="notice" role="note"><ul>\n{items}\n</ul></div>')


def table(header: Sequence[object], rows: Iterable[Sequence[object]], numeric_from: int = 1) -> Markup:
    """A table that scrolls inside its own box; columns from `numeric_from` on are set flush right."""

    def cell(tag: str, index: int, content: object) -> str:
        return element(tag, content, "number" if index >= numeric_from else "")

    def row(tag: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(cell(tag, index, content) for index, content in enumerate(cells)) + "</tr>"

    body = "\n".join(row("td", cells) for cells in rows)
    return Markup(
        f'<div class="scrolls" tabindex="0"><table>\n<thead>{row("th", header)}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def pairs(values: Mapping[str, Any]) -> Markup:
    """Names and their values, one pair a line."""
    return Markup(
        '<dl class="pairs">\n'
        + "\n".join(
            f"<div>{element('dt', name)}{element('dd', shown(value))}</div>" for name, value in values.items()
        )
        + "\n</dl>"
    )


def folded(summary: object, content: object, is_open: bool = False) -> Markup:
    """Content that opens on a click."""
    attribute = " open" if is_open else ""
    return Markup(f"<details{attribute}>{element('summary', summary)}\n{escape(content)}\n</details>")


def code(text: str) -> Markup:
    """A block of commands or other verbatim text."""
    return Markup(f'<pre class="scrolls" tabindex="0"><code>{escape(text)}</code></pre>')


def shown(value: object) -> str:
    """A value from a settings or JSON file as text, long whole numbers with separators."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    if isinstance(value, str) and HASH.fullmatch(value):
        return Markup(f'<span title="{value}">{value[:12]}…</span>')
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def page(title: str, body: object) -> str:
    """The whole document. The policy in its head forbids the browser to load or run anything at all."""
    style = importlib.resources.files("overnight.report").joinpath("style.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{style.strip()}
</style>
</head>
<body>
<main>
{escape(body)}
</main>
</body>
</html>
"""
