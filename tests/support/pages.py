"""Pages as a browser and a screen reader need them: parsed with the standard library alone."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "br", "wbr"}


class Page(HTMLParser):
    """A page that is well formed: every element is closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.headings: list[int] = []
        self.tables: list[dict[str, Any]] = []
        self.coloured: list[str] = []
        self._in_coloured = False
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), f"{tag} has an attribute twice"
        self.tags.append((tag, found))
        if tag in VOID:
            return
        self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "table":
            self.tables.append({"caption": False, "rows": []})
        if tag == "caption":
            self.tables[-1]["caption"] = True
        if tag == "tr":
            self.tables[-1]["rows"].append([])
        if tag in ("td", "th"):
            self.tables[-1]["rows"][-1].append("")
        if tag == "th":
            assert found.get("scope") in ("row", "col")
        if tag == "td" and found.get("class") == "h":
            self.coloured.append("")
            self._in_coloured = True

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._in_coloured &= tag != "td"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("td", "th", "code") and "table" in self.open:
            self.tables[-1]["rows"][-1][-1] += data
        if self._in_coloured:
            self.coloured[-1] += data


def checked(html: str) -> Page:
    """A page that is well formed, accessible as far as that shows, and loads nothing."""
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>\n")
    names = [tag for tag, _ in page.tags]
    assert not {"script", "iframe", "img", "object", "embed", "form", "base", "svg"} & set(names)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(page.headings))
    assert all(table["caption"] for table in page.tables)
    assert all(len({len(row) for row in table["rows"]}) == 1 for table in page.tables)
    assert all(text.strip() for text in page.coloured)
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))
    for tag, found in page.tags:
        assert not any(key.startswith("on") or key in ("src", "srcset", "action", "data") for key in found), found
        href = found.get("href")
        assert href is None or href == "data:," or (tag == "a" and href[0] == "#" and href[1:] in ids)
        assert re.fullmatch(r"--v:[01]\.\d{2,3}", found.get("style") or "--v:0.00")
        assert found.get("aria-labelledby", ids[0]) in ids
    assert "url(" not in html
    assert "@import" not in html
    return page
