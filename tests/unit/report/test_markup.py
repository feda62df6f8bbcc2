from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.report.html import Markup, element, escape, notice, pairs, shown, table


def parsed(markup: str) -> tuple[list[str], str]:
    """The tags of a piece of HTML, and its text."""
    tags: list[str] = []
    text: list[str] = []
    parser = HTMLParser(convert_charrefs=True)
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)  # type: ignore[method-assign]
    parser.handle_data = text.append  # type: ignore[method-assign]
    parser.feed(markup)
    parser.close()
    return tags, "".join(text)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])))
def test_any_text_comes_back_from_its_markup(text):
    text = text.replace("\ufffe", "").replace("\uffff", "")
    assert parsed(element("p", text)) == (["p"], text)
    assert parsed(f'<p title="{escape(text)}"></p>') == (["p"], "")


@given(st.text())
def test_whatever_cannot_stand_in_a_file_is_replaced(text):
    escape(text).encode("utf-8")
    assert not set(escape(text)) & {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))}


def test_markup_is_escaped_only_once():
    assert escape(escape("<&>")) == "&lt;&amp;&gt;"
    assert escape(Markup("<b>")) == "<b>"


def test_a_table_escapes_its_cells():
    tags, text = parsed(table(("a<",), [("<b>", 1)]))
    assert "b" not in tags
    assert "<b>" in text


@pytest.mark.parametrize(
    "value, text",
    [
        (True, "yes"),
        (False, "no"),
        (None, "–"),
        (1337, "1337"),
        (524_288, "524,288"),
        (6e-4, "0.0006"),
        ("x", "x"),
        (["a", ""], '["a", ""]'),
        ({"é": 1}, '{"é": 1}'),
    ],
)
def test_values_as_text(value, text):
    assert shown(value) == text


def test_a_hash_is_shortened_and_kept():
    markup = pairs({"sha256": "0123456789abcdef" * 4})
    assert parsed(markup)[1].split() == ["sha2560123456789ab…"]
    assert "0123456789abcdef" * 4 in markup


def test_no_notice_is_no_markup():
    assert notice([]) == ""
    assert parsed(notice(["a < b"]))[0] == ["div", "ul", "li"]
