"""Every link of the documentation leads to a file and a heading that are there."""

import re
from pathlib import Path

import pytest

from tests.docs.shown_commands import FENCE, PAGES, REPOSITORY

LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Names of its headings, as GitHub and MkDocs make them."""
    titles = HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path):
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_is_in_the_menu_of_the_site():
    menu = (REPOSITORY / "mkdocs.yml").read_text()
    assert [page.name for page in (REPOSITORY / "docs").glob("*.md") if f": {page.name}\n" not in menu] == []


def test_the_readme_is_one_page():
    assert len((REPOSITORY / "README.md").read_bytes()) <= 8000
