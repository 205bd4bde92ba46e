"""Builds the site: `make docs`, or `python docs/make_site.py [FOLDER]`. Nothing is fetched, to build it or to read it.

The pages come from all over the repository (README, notebooks, docstrings): they are first laid out in FOLDER/source and then
built by Sphinx into FOLDER/html; a warning is an error. Links between files of the repository become links between pages,
and a link to a file that is not there is an error.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))
import api_pages  # noqa: E402

LINK = re.compile(r"```.*?```|`[^`\n]*`|(?P<open>\]\(|<img [^>]*?src=\")(?P<to>[^)\s\"]+)", re.DOTALL)
ELSEWHERE = re.compile(r"[a-z]+:|#|data:")
WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDERS = {
    "": "index.md", "docs": "index.md", "notebooks": "index.md", "examples": "examples.md", "shiq_lab": "api/index.rst",
    "envs": "environments/index.rst",
}  # fmt: skip


class Stage:
    """The folder that Sphinx reads: files are written where they changed alone, so that a second build is short."""

    def __init__(self, root: Path, folder: Path, modules: dict[str, api_pages.Module]) -> None:
        self.root, self.folder, self.modules = root, folder, modules
        self.written: set[Path] = set()

    def write(self, name: str, data: str | bytes) -> None:
        """A file of the stage."""
        path = self.folder / name
        raw = data.encode() if isinstance(data, str) else data
        self.written.add(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != raw:
            path.write_bytes(raw)

    def clear(self) -> None:
        """Takes away what an earlier build left and this one has not written."""
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in self.written:
                path.unlink()

    def read(self, name: str) -> str:
        """A text file of the repository."""
        return (self.root / name).read_text(encoding="utf-8")

    # ------------------------------------------------------------------------------------------------------- links
    def target(self, name: str) -> str:
        """Where a file of the repository stands on the stage; what is no page is copied, to be shown or downloaded."""
        parts = list(Path(name).with_suffix("").parts)
        if name.endswith(".py") and parts[0] in ("shiq_lab", "envs"):
            module = ".".join(parts if parts[0] == "shiq_lab" else ["shiq_lab", *parts]).removesuffix(".__init__")
            if module in self.modules:
                return "api/index.rst" if module == "shiq_lab" else f"project:#{module}"
        if name in FOLDERS:
            return FOLDERS[name]
        if name.startswith("examples/") and name.endswith(".py"):
            return f"project:#example-{parts[-1]}"
        pages = {"README.md": "guide.md", "CHANGELOG.md": "changelog.md"}
        if name in pages or name.endswith(".ipynb") or (name.startswith("docs/") and name.endswith(".md")):
            return pages.get(name, name.removeprefix("docs/"))
        self.write(f"files/{name}", (self.root / name).read_bytes())
        return f"files/{name}"

    def relink(self, text: str, source: str, page: str) -> str:
        """The text with its links to files of the repository turned into links from `page`; ValueError where there is none."""

        def one(match: re.Match[str]) -> str:
            to = match["to"]
            if to is None or ELSEWHERE.match(to):
                return match[0]
            path, mark, part = to.partition("#")
            name = os.path.relpath(os.path.normpath(self.root / Path(source).parent / path), self.root).replace(os.sep, "/")
            name = "" if name == "." else name
            if name.startswith("..") or not (self.root / name).exists():
                raise ValueError(f"{source} links to {to}, which is not in the repository.")
            there = self.target(name)
            if not there.startswith("project:"):
                there = os.path.relpath(there, Path(page).parent).replace(os.sep, "/") + mark + part
            return match["open"] + there

        return LINK.sub(one, text)

    # ------------------------------------------------------------------------------------------------------- pages
    def prose(self) -> None:
        """README in two parts, the pages of docs/, the changelog, the examples."""
        readme = self.read("README.md")
        top, rest = split_readme(readme)
        self.write("_top.md", self.relink(top, "README.md", "index.md"))
        self.write("guide.md", "# Guide\n\n" + self.relink(rest, "README.md", "guide.md"))
        for path in sorted((self.root / "docs").glob("*.md")):
            name, text = path.name, path.read_text(encoding="utf-8")
            self.write(name, self.listed(text) if name == "index.md" else self.relink(text, f"docs/{name}", name))
        self.write("changelog.md", self.relink(self.read("CHANGELOG.md"), "CHANGELOG.md", "changelog.md"))
        shown = ["# Examples\n\nWhat `shiq-lab check examples/NAME.py:loss` is given; the first is the one to copy.\n"]
        for path in sorted((self.root / "examples").glob("*.py")):
            code = path.read_text(encoding="utf-8").rstrip()
            shown.append(f"(example-{path.stem})=\n## {path.name}\n\n````python\n{code}\n````\n")
        self.write("examples.md", "\n".join(shown))

    def listed(self, text: str) -> str:
        """The start page, with "notebooks/*" in its lists replaced by what there is (Sphinx minds an empty pattern)."""

        def names(match: re.Match[str]) -> str:
            paths = sorted((self.root / "docs").glob(match[0] + ".md")) + sorted(self.root.glob(match[0][:-1] + "[!.]*.ipynb"))
            return "\n".join(match[0].rpartition("/")[0] + "/" * ("/" in match[0]) + path.stem for path in paths)

        return re.sub(r"(?m)^[\w/]+\*$", names, text)

    def notebooks(self) -> None:
        """Every notebook with the outputs that it was committed with."""
        for path in sorted((self.root / "notebooks").glob("[!.]*.ipynb")):
            name = f"notebooks/{path.name}"
            book = without_widgets(json.loads(path.read_text(encoding="utf-8")))
            book["metadata"].setdefault("language_info", {"name": "python"})  # not there before a kernel has seen it
            for cell in book["cells"]:
                if cell["cell_type"] == "markdown":
                    cell["source"] = self.relink("".join(cell["source"]), name, name)
            self.write(name, json.dumps(book, indent=1))

    def api(self) -> None:
        """The API; a public symbol without a docstring ends the build."""
        api_pages.check(self.modules)
        listed = api_pages.pages(self.modules, self.read("README.md"))
        self.write("api/index.rst", api_pages.index(self.modules, listed))
        for name, members in listed.items():
            self.write(f"api/{name}.rst", api_pages.page(name, members))

    def environments(self) -> None:
        """A card a page, with the numbers of `shiq-lab envs --json`, and their list."""
        rows = [(row, self.builder(row["name"])) for row in environment_rows(self.root)]
        for row, symbol in rows:
            self.write(f"environments/{symbol.qualname}.rst", card(row, self.modules[symbol.module]))
        columns = ("states", "tokens", "beta", "gamma")
        lines = [
            (
                f":doc:`{row['name']} <{symbol.qualname}>`",
                api_pages.first_line(row["summary"]),
                *(f"{row[key]:g}" for key in columns),
            )
            for row, symbol in rows
        ]
        parts = [
            api_pages.heading("Environments"),
            "Each is a builder that returns a token automaton, with a card that says what it tests.\n",
            api_pages.table(lines, ("name", "what it is", *columns)),
            api_pages.body(self.modules["shiq_lab.envs"]),
            ".. toctree::\n   :hidden:\n",
            *(f"   {row['name']} <{symbol.qualname}>" for row, symbol in rows),
        ]
        self.write("environments/index.rst", "\n".join(parts) + "\n")

    def builder(self, name: str) -> api_pages.Symbol:
        """The function behind a name of ENVIRONMENTS: the table's entry names it, and an import says whose it is."""
        table = self.modules["shiq_lab.envs"]
        entry = re.search(rf'"{name}": Environment\((\w+)', ast_text(table))
        home = table.imports.get(entry[1]) if entry else None
        for symbol in (s for module in self.modules.values() for s in module.symbols):
            if symbol.name == home:
                return symbol
        raise ValueError(f"no builder found for the environment {name} in envs/__init__.py.")

    def mathjax(self) -> None:
        """MathJax and its fonts, from an installed package: formulas need no network."""
        spec = find_spec("sphinx-mathjax-offline")
        if spec is None or spec.origin is None:
            raise ValueError("sphinx-mathjax-offline is not installed: pip install -e '.[docs]', or make docs.")
        home = Path(spec.origin).parent / "static" / "mathjax"
        for path in [home / "tex-chtml.js", *home.glob("output/chtml/fonts/woff-v2/*"), *home.glob("input/tex/extensions/*")]:
            self.write(f"_static/mathjax/{path.relative_to(home).as_posix()}", path.read_bytes())


def ast_text(module: api_pages.Module) -> str:
    """A module's source without its formatting."""
    return api_pages.ast.unparse(module.tree).replace("'", '"')


def split_readme(readme: str) -> tuple[str, str]:
    """(what the start page shows: up to the two commands and these, the rest)."""
    sections = re.split(r"(?m)^(?=## )", readme)
    if len(sections) < 3 or not sections[1].startswith("## Two commands"):
        raise ValueError("README.md is to begin with a title, what this is, and '## Two commands': the start page shows that.")
    return "".join(sections[:2]), "".join(sections[2:])


def without_widgets(book: dict[str, Any]) -> dict[str, Any]:
    """The notebook without sliders, which need a kernel: their static figure stays, and a lone one leaves nothing."""
    book.get("metadata", {}).pop("widgets", None)
    for cell in book["cells"]:
        kept = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if data.pop(WIDGET, None) is None or any(key.startswith(("image/", "text/html")) for key in data):
                kept.append(output)
        if "outputs" in cell:
            cell["outputs"] = kept
    return book


def environment_rows(root: Path) -> list[dict[str, Any]]:
    """What `shiq-lab envs --json` prints."""
    command = [sys.executable, "-c", "from shiq_lab.cli import main; main()", "envs", "--json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"shiq-lab envs --json failed:\n{done.stderr}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def card(row: dict[str, Any], module: api_pages.Module) -> str:
    """The page of an environment: its numbers, how it is made, its card, and what else stands in its file."""
    numbers = {
        "states": f"{row['states']}; the policy's that can be reached: {row['policy_states']}",
        "tokens": row["tokens"],
        "horizon": "none" if row["horizon"] is None else f"{row['horizon']} policy tokens",
        "replies": "certain after the first action" if row["deterministic"] else "random",
        "beta": f"{row['beta']:g}",
        "gamma": f"{row['gamma']:g}",
    }
    return "\n".join([
        api_pages.heading(row["name"]),
        f".. py:module:: {module.name}\n",
        ".. code-block:: python\n",
        f'   shiq_lab.make("{row["name"]}")\n   gymnasium.make("shiq_lab:shiq/{row["name"]}-v0")\n',
        *(api_pages.describe(symbol) for symbol in module.symbols),
        api_pages.heading("As the selftest solves it", 1),
        api_pages.plain("\n".join(f"{name:10}{value}" for name, value in numbers.items())),
    ])  # fmt: skip


def build(root: Path, folder: Path) -> int:
    """Lays out the pages and runs Sphinx; its exit code."""
    stage = Stage(root, folder / "source", api_pages.modules(root))
    stage.api()  # first: the check for docstrings takes no time
    stage.prose()
    stage.notebooks()
    stage.environments()
    stage.mathjax()
    stage.clear()
    from sphinx.cmd.build import main

    docs = str(root / "docs")
    html = folder / "html"
    return main(["-W", "--keep-going", "-q", "-c", docs, "-d", str(folder / "cache"), str(stage.folder), str(html)])


if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "docs" / "_build"
    try:
        code = build(ROOT, where)
    except ValueError as error:
        sys.exit(f"docs: {error}")
    files = [path for path in (where / "html").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    if code == 0:
        count = sum(path.suffix == ".html" for path in files)
        print(f"{count} pages, {size:.1f} MiB. Open {(where / 'html' / 'index.html').as_uri()}")
    shutil.rmtree(where / "html" / ".doctrees", ignore_errors=True)
    sys.exit(code)
