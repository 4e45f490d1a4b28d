import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from metasepia.errors import InvalidSettings
from metasepia.pages import Page

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
VOID = {"meta", "img", "br"}


class Tree(HTMLParser):
    """The tags in order, the text of each, and whatever was closed wrongly."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)


def test_everything_given_is_text_and_never_markup():
    evil = "<script>alert('x')</script> & \"quoted\""
    page = Page(evil).section(evil).text(evil).items([evil]).code(evil).table([evil], [[evil]], evil)
    page.figure(PNG, evil, evil)
    tree = Tree(page.html())
    assert not tree.open
    assert "script" not in [tag for tag, _ in tree.tags]
    for tag in ("title", "h1", "h2", "p", "li", "pre", "th", "td", "caption", "figcaption"):
        assert tree.texts[tag] == [evil]
    assert [attributes["alt"] for tag, attributes in tree.tags if tag == "img"] == [evil]


def test_a_page_asks_nothing_of_the_network_and_carries_its_pictures():
    html = Page("A").figure(PNG, "caption", "a picture").html()
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', html)
    assert len(links) == 1
    assert base64.b64decode(links[0][0].removeprefix("data:image/png;base64,")) == PNG


def test_cells_show_numbers_to_four_digits_and_none_as_empty():
    rows = [[0.123456, 12345, None], [np.float32(1e-7), np.int64(7), True], [2e6, float("nan"), "x"]]
    assert Tree(Page("A").table(["a", "b", "c"], rows).html()).texts["td"] == [
        "0.1235", "12,345", "1e-07", "7", "True", "2,000,000", "nan", "x",
    ]  # fmt: skip
    assert "<td></td>" in Page("A").table(["a"], [[None]]).html()


def test_parts_stand_in_the_order_of_the_calls():
    html = Page("A").text("one", "two").section("S").items(["three"]).code("four").html()
    assert [html.index(f">{word}<") for word in ("one", "two", "S", "three", "four")] == sorted(
        html.index(f">{word}<") for word in ("one", "two", "S", "three", "four")
    )


def test_writing_is_whole_makes_folders_and_leaves_nothing_else(tmp_path: Path):
    page = Page("Größe").text("é")
    path = page.write(tmp_path / "a" / "report.html")
    assert path.read_text(encoding="utf-8") == page.html()
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]


def test_a_failed_write_leaves_the_earlier_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = Page("first").write(tmp_path / "report.html")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Page("second").write(path)
    assert "first" in path.read_text()
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_a_short_row_and_a_picture_that_is_none_are_refused():
    with pytest.raises(InvalidSettings, match="2 cells long"):
        Page("A").table(["a", "b"], [[1]])
    with pytest.raises(InvalidSettings, match="PNG"):
        Page("A").figure(b"<svg/>", "caption", "alt")
