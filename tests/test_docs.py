"""The site: every public symbol is documented, every notebook and environment has its page, and nothing is fetched to read it.

What looks for faults in a built site is a generator of messages, so each is also shown to find a planted one.
"""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

import shiq_lab
from shiq_lab.envs import ENVIRONMENTS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import api_pages  # noqa: E402
import make_site  # noqa: E402

FOUND = api_pages.modules(ROOT)
README = (ROOT / "README.md").read_text(encoding="utf-8")
PARTS = ("README.md", "CHANGELOG.md", "LICENSE", "docs", "examples", "figures", "notebooks", "shiq_lab", "envs")
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "_build", ".*")


# --------------------------------------------------------------------------------------------------------- docstrings
def test_every_public_symbol_has_a_docstring() -> None:
    assert api_pages.undocumented(FOUND) == []


PLANTED = '''
from typing import Annotated, Literal
from dataclasses import dataclass, field
from functools import cached_property

def said() -> None:
    """Says something."""

def unsaid(x: int) -> None:
    return None

def _own() -> None:
    return None

@dataclass
class Thing:
    """A thing."""

    size: "Thing | None"
    kind: Literal["a", "b"] = "a"
    parts: list[int] = field(default_factory=list)

    def forward(self) -> None:
        return None

    def method(self) -> None:
        return None

    @cached_property
    def table(self) -> "Thing":
        return self

    @staticmethod
    def make(a: Annotated[int, "told"], /, *rest: "Thing", b: float = 1 / 16, **more: str) -> "Thing":
        """Makes one."""

class Bare:
    def _own(self) -> None:
        return None

again = said
'''


def small_tree(folder: Path) -> dict[str, api_pages.Module]:
    """A package of two modules: the one above, and one without a docstring."""
    (folder / "shiq_lab").mkdir()
    (folder / "shiq_lab" / "__init__.py").write_text(
        '"""All."""\n_HOME = {"said": "planted", "again": "planted", "gone": "planted"}\n', encoding="utf-8"
    )
    (folder / "shiq_lab" / "planted.py").write_text('"""A module."""\n' + PLANTED, encoding="utf-8")
    (folder / "shiq_lab" / "mute.py").write_text("X = 1\n", encoding="utf-8")
    (folder / "shiq_lab" / "_own.py").write_text("def own(): ...\n", encoding="utf-8")
    return api_pages.modules(folder)


def test_what_says_nothing_is_named_and_nothing_else(tmp_path: Path) -> None:
    found = small_tree(tmp_path)
    missing = [
        "shiq_lab.mute (module)",
        "shiq_lab.planted.unsaid (function)",
        "shiq_lab.planted.Thing.method (method)",
        "shiq_lab.planted.Thing.table (property)",
        "shiq_lab.planted.Bare (class)",
        "shiq_lab.planted.gone (a public name without a definition)",
    ]
    assert api_pages.undocumented(found) == missing
    assert api_pages.public_names(found)["again"] == "shiq_lab.planted.said"  # by its second name
    with pytest.raises(ValueError, match=re.escape(", ".join(missing))):
        api_pages.check(found)


def test_signatures_are_those_of_the_source(tmp_path: Path) -> None:
    symbols = {symbol.qualname: symbol for symbol in small_tree(tmp_path)["shiq_lab.planted"].symbols}
    assert symbols["Thing"].signature == "(size: Thing | None, kind: Literal['a', 'b'] = 'a', parts: list[int] = ...)"
    assert symbols["Thing.make"].signature == "(a: int, /, *rest: Thing, b: float=1 / 16, **more: str) -> Thing"
    assert symbols["Thing.make"].arguments == ["a", "rest", "b", "more"]
    assert ":staticmethod:" in api_pages.describe(symbols["Thing.make"])
    assert ".. py:property:: Thing.table\n      :type: Thing" in api_pages.describe(symbols["Thing.table"])


@pytest.mark.parametrize("name", [name for name in shiq_lab.__all__ if name != "__version__"])
def test_every_public_name_is_found_with_its_arguments(name: str) -> None:
    """By the other road: import it and ask Python."""
    symbols = {symbol.name: symbol for module in FOUND.values() for symbol in module.symbols}
    value, symbol = getattr(shiq_lab, name), symbols[api_pages.public_names(FOUND)[name]]
    assert inspect.getdoc(value) == symbol.doc
    assert [*inspect.signature(value).parameters] == symbol.arguments


def test_every_module_has_one_page() -> None:
    listed = api_pages.pages(FOUND, README)
    shown = [module.name for members in listed.values() for module in members]
    assert sorted(shown) == sorted(name for name in FOUND if name != "shiq_lab" and not name.startswith("shiq_lab.envs"))
    places = [list(listed).index(name) for name in ("mdp", "bellman", "losses", "checks", "cli")]
    assert places == sorted(places)  # as in README's tree
    with pytest.raises(ValueError, match="no tree of files"):
        api_pages.pages(FOUND, "# Nothing\n")


# -------------------------------------------------------------------------------------------------------------- pages
def test_links_between_files_become_links_between_pages(tmp_path: Path) -> None:
    stage = make_site.Stage(ROOT, tmp_path, FOUND)
    relink = lambda text, page="notebooks/01.ipynb": stage.relink(text, "notebooks/01.ipynb", page)  # noqa: E731
    assert relink("[a](../shiq_lab/losses/shiq.py) `[b](c.md)`") == "[a](project:#shiq_lab.losses.shiq) `[b](c.md)`"
    assert relink("[a](../envs/needle.py), [b](../examples/my_shiq.py)") == (
        "[a](project:#shiq_lab.envs.needle), [b](project:#example-my_shiq)"
    )
    assert relink("[a](../docs/planted_bugs.md#x) [b](../README.md)") == "[a](../planted_bugs.md#x) [b](../guide.md)"
    assert relink("[a](https://arxiv.org/abs/2505.11081) [b](#here)") == "[a](https://arxiv.org/abs/2505.11081) [b](#here)"
    assert relink("![a](../figures/selftest.png)") == "![a](../files/figures/selftest.png)"
    assert (tmp_path / "files" / "figures" / "selftest.png").exists()
    assert relink("```\n[a](nowhere.md)\n```") == "```\n[a](nowhere.md)\n```"
    for wrong in ("[a](nowhere.md)", '<img alt="x" src="../gone.png">', "[a](../../outside.md)"):
        with pytest.raises(ValueError, match="which is not in the repository"):
            relink(wrong)


def test_a_slider_leaves_its_static_figure() -> None:
    slider = {"data": {make_site.WIDGET: {"model_id": "x"}, "text/plain": ["interactive(...)"]}}
    both = {"data": {make_site.WIDGET: {"model_id": "y"}, "image/png": "abc", "text/plain": ["<Figure>"]}}
    figure = {"data": {"image/png": "abc"}}
    book = {"metadata": {"widgets": {}}, "cells": [{"cell_type": "code", "outputs": [slider, both, figure]}]}
    kept = make_site.without_widgets(book)["cells"][0]["outputs"]
    assert [sorted(output["data"]) for output in kept] == [["image/png", "text/plain"], ["image/png"]]
    assert "widgets" not in book["metadata"]


def test_the_start_page_shows_the_two_commands_of_the_readme() -> None:
    top, rest = make_site.split_readme(README)
    assert "make demo" in top and "make test" in top
    assert top + rest == README
    with pytest.raises(ValueError, match="Two commands"):
        make_site.split_readme("# A\n\n## Other\n\n## Two commands\n")


# ------------------------------------------------------------------------------------------------- the site, once built
class Page(HTMLParser):
    """What a page links to, loads and offers as anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Gathers hrefs, sources and ids."""
        given = {key: value or "" for key, value in attrs}
        self.ids |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        loaded = "href" if tag == "link" and given.get("rel") not in ("canonical", "author") else "src"
        if loaded in given:
            self.loads.append(given[loaded])


def broken_links(site: Path) -> Iterator[str]:
    """Links, scripts, styles and pictures inside the site that lead nowhere, anchors included."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            if re.match(r"[a-z]+:|//", link):
                continue
            target, anchor = urldefrag(link.partition("?")[0] if "#" not in link else link)
            there = (path.parent / unquote(target.partition("?")[0])).resolve() if target else path
            if not there.is_file():
                yield f"{path.name}: {link} is no file"
            elif anchor and there in pages and unquote(anchor) not in pages[there].ids:
                yield f"{path.name}: {link} is no anchor"


def remote(site: Path) -> Iterator[str]:
    """Scripts, styles, fonts and pictures that would be fetched from somewhere else."""
    for path in site.rglob("*.html"):
        yield from (f"{path.name}: {load}" for load in Page(path).loads if re.match(r"https?:|//", load))
        for script in re.findall(r"(?s)<script[^>]*>(.*?)</script>", path.read_text(encoding="utf-8")):
            yield from (f"{path.name}: {url}" for url in re.findall(r"https?://[^\s\"']*\.(?:js|css|woff2?)\b", script))
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)", text)
        yield from (f"{path.name}: {url}" for url in found)


def missing_pages(site: Path) -> Iterator[str]:
    """Notebooks and environments without a page, public names without a place, and docs that were left out."""
    for path in (ROOT / "notebooks").glob("[!.]*.ipynb"):
        if not (site / "notebooks" / f"{path.stem}.html").exists():
            yield f"notebook {path.name}"
    for name, environment in ENVIRONMENTS.items():
        page = site / "environments" / f"{environment.builder.__name__}.html"
        if not page.exists() or f"{environment.builder.__module__}.{environment.builder.__name__}" not in Page(page).ids:
            yield f"environment {name}"
    for path in (ROOT / "docs").glob("*.md"):
        if not (site / f"{path.stem}.html").exists():
            yield f"docs {path.name}"
    places = {name for path in (site / "api").glob("*.html") for name in Page(path).ids}
    places |= Page(site / "environments" / "index.html").ids if (site / "environments").exists() else set()
    yield from (f"public name {name}" for name, home in api_pages.public_names(FOUND).items() if home not in places)


def leftovers(site: Path) -> Iterator[str]:
    """Sphinx's own marks of what it could not read, sliders without a kernel, and roles or links left as text."""
    marks = ("system-message", 'class="problematic"', "interactive(children", "project:#", ":py:obj:", ".. plain::")
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        yield from (f"{path.name}: {mark}" for mark in marks if mark in text)


CHECKS: tuple[Callable[[Path], Iterator[str]], ...] = (broken_links, remote, missing_pages, leftovers)


@pytest.mark.parametrize(
    ("check", "html", "fault"),
    [
        (broken_links, '<a href="gone.html">x</a>', "gone.html is no file"),
        (broken_links, '<a href="#gone">x</a>', "#gone is no anchor"),
        (broken_links, '<p id="here"></p><a href="index.html#gone">x</a><a href="#here">x</a>', "index.html#gone is no anchor"),
        (broken_links, '<img src="gone.png">', "gone.png is no file"),
        (remote, '<script src="https://cdn.example/x.js"></script>', "https://cdn.example/x.js"),
        (remote, '<link rel="stylesheet" href="//cdn.example/x.css">', "//cdn.example/x.css"),
        (remote, '<script>load("https://cdn.example/x.js")</script>', "https://cdn.example/x.js"),
        (leftovers, '<p class="system-message">?</p>', "system-message"),
        (missing_pages, "", "environment Needle"),
        (missing_pages, "", "public name solve"),
        (missing_pages, "", "docs planted_bugs.md"),
    ],
)
def test_a_fault_in_the_site_is_found(check: Callable[[Path], Iterator[str]], html: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(f"<html><body>{html}</body></html>", encoding="utf-8")
    found = list(check(tmp_path))
    assert any(message.endswith(fault) for message in found), found
    assert check is missing_pages or len(found) == 1


def test_a_font_from_elsewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text("@import 'https://fonts.example/a.css'; a { b: url(x.woff) }", encoding="utf-8")
    (tmp_path / "b.css").write_text("@font-face { src: url(https://fonts.example/b.woff2) }", encoding="utf-8")
    assert sorted(remote(tmp_path)) == ["a.css: https://fonts.example/a.css", "b.css: https://fonts.example/b.woff2"]


def copy_of_the_tree(folder: Path) -> Path:
    """What the site is made from, and a notebook that has something of everything."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=NOT_SOURCES)
        else:
            shutil.copy(source, folder / part)
    (folder / "notebooks" / "98_stand_in.ipynb").write_text(json.dumps(stand_in()), encoding="utf-8")
    (folder / "notebooks" / "99_next.ipynb").write_text(json.dumps(notebook(text("# 99 Next"))), encoding="utf-8")
    return folder


def notebook(*cells: dict[str, Any]) -> dict[str, Any]:
    """A notebook of these cells."""
    cells_ = [cell | {"id": f"c{i}", "metadata": {}} for i, cell in enumerate(cells)]
    return {"cells": cells_, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}


def text(source: str) -> dict[str, Any]:
    """A cell of text."""
    return {"cell_type": "markdown", "source": source}


def stand_in() -> dict[str, Any]:
    """Formulas, links to every kind of page, printed text, a wide table, and a slider beside its static figure."""
    shown = [
        {"output_type": "stream", "name": "stdout", "text": "printed by the cell\n"},
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {make_site.WIDGET: {"model_id": "x"}, "text/plain": "interactive(children"},
        },
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"},
        },
        {"output_type": "display_data", "metadata": {}, "data": {"text/latex": r"$\frac{q}{\beta}$"}},
    ]
    return notebook(
        text("# 98 Stand-in\n\n$v^\\star$ and\n\n$$\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}$$"),
        text("[next](99_next.ipynb), [loss](../shiq_lab/losses/shiq.py)"),
        text("[card](../envs/needle.py), [table](../docs/fixed_points.md)"),
        {"cell_type": "code", "execution_count": 1, "source": "print(1)", "outputs": shown},
    )


def run(tree: Path) -> subprocess.CompletedProcess[str]:
    """`make docs` in a tree."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(tree)}
    return subprocess.run([sys.executable, "docs/make_site.py"], cwd=tree, env=clean, capture_output=True, text=True)


def test_the_build_stops_at_a_function_that_says_nothing(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path)
    (tree / "shiq_lab" / "planted.py").write_text('"""A module."""\n\n\ndef unsaid() -> None: ...\n', encoding="utf-8")
    done = run(tree)
    assert done.returncode == 1
    assert "docs: public, without a docstring: " in done.stderr and "shiq_lab.planted.unsaid (function)" in done.stderr
    assert not (tree / "docs" / "_build" / "html").exists()


@pytest.mark.slow
def test_the_site(tmp_path: Path) -> None:
    """Built with warnings as errors, it has no fault; then a page in no list is a warning, and so an error."""
    tree = copy_of_the_tree(tmp_path)
    done = run(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tree / "docs" / "_build" / "html"
    assert f"Open {(site / 'index.html').as_uri()}" in done.stdout
    assert [f"{check.__name__}: {fault}" for check in CHECKS for fault in check(site)] == []
    page = (site / "notebooks" / "98_stand_in.html").read_text(encoding="utf-8")
    for part in ("printed by the cell", '.svg" />', r"\(v^\star\)", r"\frac{q}{\beta}", 'href="99_next.html"'):
        assert part in page, part
    for link in ("../api/losses.html#module-shiq_lab.losses.shiq", "../environments/needle.html#", "../fixed_points.html"):
        assert f'href="{link}' in page, link
    (tree / "docs" / "lonely.md").write_text("# In no list\n", encoding="utf-8")
    done = run(tree)
    assert done.returncode == 1
    assert "lonely.md" in done.stderr
