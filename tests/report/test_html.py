from __future__ import annotations

from html.parser import HTMLParser

from ptql.report.html import Markup, join, tag


def test_text_and_attributes_are_escaped_and_markup_is_not():
    evil = '"><script>alert(1)</script>'
    made = tag("p", evil, tag("b", "x"), title=evil, class_="a")
    assert "<script" not in made
    assert made.endswith("<b>x</b></p>")
    seen = []

    class Parser(HTMLParser):
        def handle_starttag(self, name, attributes):
            seen.append((name, dict(attributes)))

        def handle_data(self, data):
            seen.append(data)

    Parser().feed(made)
    assert seen[0] == ("p", {"title": evil, "class": "a"})
    assert "".join(part for part in seen if isinstance(part, str)) == evil + "x"


def test_names_of_attributes():
    made = tag("rect", stroke_width=2, x=0, viewBox="0 0 1 1", open=True, class_=None, hidden=False)
    assert made == '<rect stroke-width="2" x="0" viewBox="0 0 1 1" open=""></rect>'
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'


def test_children_may_be_lists_numbers_and_nothing():
    assert join([tag("i"), [1, None]], 2.5, Markup("&amp;"), "&") == "<i></i>12.5&amp;&amp;"


def test_what_html_can_not_hold_is_replaced():
    made = tag("p", "a\x00b\ud800c\n")
    assert made == "<p>a�b?c\n</p>"
    made.encode("utf-8")
