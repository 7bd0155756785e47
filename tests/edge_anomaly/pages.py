"""Reading HTML pages back: what the tests of both reports need."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Checks that tags are balanced, and keeps visible text, attributes and the cells of tables."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def read(page: str | Path) -> Reader:
    """Parse a page, given as text or as a file; its tags must be balanced."""
    reader = Reader()
    reader.feed(page.read_text() if isinstance(page, Path) else page)
    reader.close()
    assert reader.open == []
    return reader


def words(page: str | Path) -> str:
    """Return the visible text with single spaces."""
    return " ".join(" ".join(read(page).text).replace("\u00a0", " ").split())


def row_of(page: str | Path, name: str) -> list[str]:
    """Return the cells beside the first one that says `name`."""
    return next([cell.replace("\u00a0", " ") for cell in row[1:]] for row in read(page).rows if row[0] == name)
