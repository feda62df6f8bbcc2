"""Templates: HTML pages of one file, without scripts, that load nothing; and plain text."""

from __future__ import annotations

import json
import re
from typing import Any

import jinja2
from markupsafe import Markup

from overnight.report.plots import CHART_COLOURS
from overnight.terminal import short

# Control characters, lone surrogates and the two non-characters are not allowed in an HTML file.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
HASH = re.compile("[0-9a-f]{32,}")


def text_templates(package: str) -> jinja2.Environment:
    """The templates of a package for plain text: nothing is escaped, and an unknown name is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, package: str = "overnight.report", **values: Any) -> str:
    """A file of templates/ filled with these values, which are escaped unless they are Markup.

    A template of another package may extend and import those of the report.
    """
    loaders = [jinja2.PackageLoader(name) for name in dict.fromkeys((package, "overnight.report"))]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": show_value, "short": short}
    return environment.get_template(template).render(chart_colours=CHART_COLOURS, **values)


def svg_file(svg: str) -> str:
    """An SVG of plots.py as the content of a file, with the page's colours, fonts and background."""
    opening, content = svg.split(">", 1)
    paper = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    return f"{opening}>\n<style>\n{render('colours.css')}\n</style>\n{paper}{content}\n"


def show_value(value: object) -> str:
    """A value of a TOML or JSON file as text: long integers with separators, hashes shortened."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    if isinstance(value, str) and HASH.fullmatch(value):
        return Markup('<span title="{}">{}…</span>').format(value, value[:12])
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _printable(value: object) -> object:
    """The value with U+FFFD for characters that HTML does not allow."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return UNPRINTABLE.sub("\ufffd", str(value)) if is_text else value
