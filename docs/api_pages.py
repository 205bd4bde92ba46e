"""The reference of the package, read from its sources: nothing is imported, so it needs no torch and no extra.

A public module, function, class, method or property without a docstring is a ValueError that names it, and ends the build.
Public is what has no leading underscore on its way: `TokenMDP.show` is, `Solution._layer` is not.
"""

import ast
import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

Definition = ast.FunctionDef | ast.ClassDef
UNLISTED = "shiq_lab.checks.bugs"  # right and wrong code to plant, not to call: docs/planted_bugs.md shows it
ALWAYS = re.compile(r"forward|backward|[gs]et_(in|out)put_embeddings")  # torch's and transformers' names for what they call
UNDERLINES = "=-~"


@dataclass
class Symbol:
    """A function, class, method or property: where it stands, its signature and its docstring."""

    module: str
    qualname: str
    node: Definition
    owner: ast.ClassDef | None = None

    @property
    def name(self) -> str:
        """ "shiq_lab.mdp.TokenMDP.show"."""
        return f"{self.module}.{self.qualname}"

    @property
    def doc(self) -> str:
        """The docstring, without its indentation; "" where there is none."""
        return ast.get_docstring(self.node) or ""

    @cached_property
    def decorators(self) -> set[str]:
        """The last names of its decorators: {"property"}, {"dataclass"}."""
        return {ast.unparse(d).partition("(")[0].rpartition(".")[2] for d in self.node.decorator_list}

    @property
    def kind(self) -> str:
        """The directive of Sphinx's Python domain."""
        if isinstance(self.node, ast.ClassDef):
            return "class"
        if self.owner is None:
            return "function"
        return "property" if self.decorators & {"property", "cached_property"} else "method"

    @property
    def called(self) -> ast.arguments | list[ast.AnnAssign] | None:
        """What it is called with: arguments, the fields of a dataclass or named tuple, or None where the source is silent."""
        node, own = self.node, self.node
        if isinstance(node, ast.ClassDef):
            inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
            if not inits:
                fields = "dataclass" in self.decorators or "NamedTuple" in map(ast.unparse, node.bases)
                return [item for item in node.body if isinstance(item, ast.AnnAssign)] if fields else None
            own = inits[0]
        elif self.kind == "property":
            return None
        assert isinstance(own, ast.FunctionDef)
        method = own is not node or (self.owner is not None and "staticmethod" not in self.decorators)
        return without_self(own.args) if method else own.args

    @property
    def signature(self) -> str:
        """As the source has it, so that aliases keep their names: "(mdp: TokenMDP, *, beta: float) -> Floats"."""
        called, node = self.called, self.node
        if isinstance(called, list):
            return f"({', '.join(map(field_text, called))})"
        returns = f" -> {ast.unparse(bare(node.returns))}" if isinstance(node, ast.FunctionDef) and node.returns else ""
        return "" if called is None else arguments_text(called) + returns

    @property
    def arguments(self) -> list[str]:
        """The names of its arguments, in order."""
        called = self.called
        if not isinstance(called, ast.arguments):
            return [ast.unparse(item.target) for item in called or []]
        first, last = [*called.posonlyargs, *called.args, called.vararg], [*called.kwonlyargs, called.kwarg]
        return [one.arg for one in [*first, *last] if one]


@dataclass
class Module:
    """A source file: its name, docstring, public symbols, and what it imports under which name."""

    name: str
    tree: ast.Module
    symbols: list[Symbol] = field(default_factory=list)

    @property
    def doc(self) -> str:
        """The module's docstring, "" where there is none."""
        return ast.get_docstring(self.tree) or ""

    @cached_property
    def imports(self) -> dict[str, str]:
        """{"TokenMDP": "shiq_lab.mdp.TokenMDP"}: what names in it stand for, imported or second names of its own."""
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = f"{self.name}.{node.value.id}"
        return found


class Bare(ast.NodeTransformer):
    """Annotations for reading: Annotated[T, what a command line says of it] -> T, and no quotes around a later name."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """One subscript of an annotation; what Literal holds are values."""
        name = ast.unparse(node.value)
        if name == "Annotated" and isinstance(node.slice, ast.Tuple):
            return self.visit(node.slice.elts[0])
        return node if name == "Literal" else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """A quoted annotation."""
        return ast.parse(node.value, mode="eval").body if isinstance(node.value, str) else node


def bare(annotation: ast.expr | None) -> Any:
    """An annotation for reading."""
    return Bare().visit(copy.deepcopy(annotation)) if annotation else None


def arguments_text(given: ast.arguments) -> str:
    """The arguments as the source has them, with annotations for reading."""
    shown = copy.deepcopy(given)
    for name in ("posonlyargs", "args", "kwonlyargs"):
        setattr(shown, name, [ast.arg(one.arg, bare(one.annotation)) for one in getattr(shown, name)])
    for name in ("vararg", "kwarg"):
        one = getattr(shown, name)
        setattr(shown, name, one and ast.arg(one.arg, bare(one.annotation)))
    return f"({ast.unparse(shown)})"


def without_self(given: ast.arguments) -> ast.arguments:
    """The arguments of a method, as its caller sees them."""
    first = "posonlyargs" if given.posonlyargs else "args"
    return ast.arguments(**{**dict(ast.iter_fields(given)), first: getattr(given, first)[1:]})


def field_text(item: ast.AnnAssign) -> str:
    """A field of a dataclass as an argument; a default that is made anew each time is "..."."""
    default = ast.unparse(item.value) if item.value else ""
    default = " = ..." if default.startswith("field(") else default and f" = {default}"
    return f"{ast.unparse(item.target)}: {ast.unparse(bare(item.annotation))}{default}"


def symbols_of(module: str, body: list[ast.stmt], owner: ast.ClassDef | None = None, outer: str = "") -> Iterator[Symbol]:
    """The public definitions of a module or class, in the order of the source; methods follow their class."""
    for node in body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        symbol = Symbol(module, outer + node.name, node, owner)
        if symbol.decorators & {"setter", "overload"}:
            continue
        yield symbol
        if isinstance(node, ast.ClassDef):
            yield from symbols_of(module, node.body, node, f"{outer}{node.name}.")


def modules(root: Path) -> dict[str, Module]:
    """Every public module of the tree by its name; the folder envs/ is shiq_lab.envs."""
    found = {}
    for folder, package in ((root / "shiq_lab", "shiq_lab"), (root / "envs", "shiq_lab.envs")):
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if name.startswith(UNLISTED) or any(part.startswith("_") for part in name.split(".")):
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found[name] = Module(name, tree, list(symbols_of(name, tree.body)))
    return found


def public_names(found: dict[str, Module]) -> dict[str, str]:
    """shiq_lab's lazy public names and where each is defined: {"solve": "shiq_lab.bellman.solve"}."""
    for node in found["shiq_lab"].tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            return {name: origin(found, f"shiq_lab.{home}.{name}") for name, home in ast.literal_eval(node.value).items()}
    raise ValueError("shiq_lab/__init__.py has no table _HOME of its public names.")


def origin(found: dict[str, Module], name: str) -> str:
    """The definition behind a name that a module may only import or assign: "shiq_lab.bellman.solve"."""
    module, _, last = name.rpartition(".")
    behind = found[module].imports.get(last) if module in found else None
    return origin(found, behind) if behind else name


def undocumented(found: dict[str, Module]) -> list[str]:
    """Public modules and symbols that say nothing, and public names of shiq_lab that no source defines."""
    symbols = {symbol.name: symbol for module in found.values() for symbol in module.symbols}
    missing = [f"{module.name} (module)" for module in found.values() if not module.doc]
    missing += [
        f"{symbol.name} ({symbol.kind})"
        for symbol in symbols.values()
        if not symbol.doc and not (symbol.owner and ALWAYS.fullmatch(symbol.node.name))
    ]
    return missing + [
        f"{home} (a public name without a definition)" for home in public_names(found).values() if home not in symbols
    ]


def check(found: dict[str, Module]) -> None:
    """ValueError for a public symbol without a docstring."""
    missing = undocumented(found)
    if missing:
        raise ValueError(f"public, without a docstring: {', '.join(missing)}. Write one, or begin its name with _.")


# ------------------------------------------------------------------------------------------------------------ pages
def order(readme: str) -> dict[str, int]:
    """The place of every file and folder in README's tree."""
    tree = readme.partition("## Where things are")[2].partition("```")[2].partition("```")[0]
    names = re.findall(r"\b(\w+)(?:\.py\b|/)", tree)
    if not names:
        raise ValueError("README.md has no tree of files below '## Where things are'.")
    return {name: place for place, name in reversed(list(enumerate(names)))}


def pages(found: dict[str, Module], readme: str) -> dict[str, list[Module]]:
    """{"mdp": [its module], "losses": [its modules], ...}: a page a file, or a folder, in the order of README's tree."""
    places = order(readme)
    by_place = lambda module: [places.get(part, len(places)) for part in module.name.split(".")[1:]]  # noqa: E731
    out: dict[str, list[Module]] = {}
    for module in sorted(found.values(), key=by_place):
        inner = module.name.split(".")[1:]
        if inner and inner[0] != "envs":
            page = inner if module.name in packages(found) or len(inner) == 1 else inner[:-1]
            out.setdefault(".".join(page), []).append(module)
    return out


def packages(found: dict[str, Module]) -> set[str]:
    """The modules that are folders."""
    return {name.rpartition(".")[0] for name in found}


def heading(title: str, level: int = 0) -> str:
    """A heading of reStructuredText."""
    return f"{title}\n{UNDERLINES[level] * len(title)}\n"


def plain(doc: str, indent: str = "", arguments: Sequence[str] = ()) -> str:
    """A docstring under the directive `plain` (docs/plain_docstrings.py), which links no `name` that is an argument's."""
    lines = [" ".join([".. plain::", *arguments]), "", *(f"   {line}" for line in doc.splitlines())]
    return "\n".join(f"{indent}{line}".rstrip() for line in lines) + "\n"


def describe(symbol: Symbol) -> str:
    """A symbol as a directive of the Python domain."""
    depth = "   " * symbol.qualname.count(".")
    head = [f"{depth}.. py:{symbol.kind}:: {symbol.qualname}{symbol.signature}"]
    if symbol.kind == "property" and isinstance(symbol.node, ast.FunctionDef) and symbol.node.returns:
        head.append(f"{depth}   :type: {ast.unparse(bare(symbol.node.returns))}")
    head += [f"{depth}   :{name}:" for name in ("staticmethod", "classmethod") if name in symbol.decorators]
    body = plain(symbol.doc, depth + "   ", symbol.arguments) if symbol.doc else ""
    return "\n".join(head) + "\n\n" + body


def body(module: Module) -> str:
    """A module's docstring and its symbols."""
    parts = [f".. py:module:: {module.name}\n", plain(module.doc)]
    return "\n".join([*parts, *(describe(symbol) for symbol in module.symbols)])


def page(name: str, members: list[Module]) -> str:
    """The page of a file, or of a folder with a section a file."""
    title = f"shiq_lab.{name}"
    if len(members) == 1 and members[0].name == title:
        return heading(title) + "\n" + body(members[0])
    parts = [heading(title)]
    for module in members:
        own = module.name == title
        parts.append(body(module) if own else heading(module.name.rpartition(".")[2], 1) + "\n" + body(module))
    return "\n".join(parts)


def first_line(doc: str) -> str:
    """The first line in reStructuredText: as it stands, `names` in backticks as code."""
    pieces = doc.partition("\n")[0].split("`")
    return "".join(f"``{piece}``" if i % 2 else re.sub(r"([\\*_|])", r"\\\1", piece) for i, piece in enumerate(pieces))


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """A list-table; cells are reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
    for row in [header, *rows]:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def index(found: dict[str, Module], listed: dict[str, list[Module]]) -> str:
    """The reference's first page: the public names, then every page in README's order."""
    docs = {symbol.name: symbol.doc for module in found.values() for symbol in module.symbols}
    names = [(f":py:obj:`{name} <{home}>`", first_line(docs[home])) for name, home in public_names(found).items()]
    rooms = [
        (f":doc:`{name} <{name}>`", first_line(found[f"shiq_lab.{name}"].doc)) for name in listed if f"shiq_lab.{name}" in found
    ]
    return "\n".join([
        heading("Reference"),
        "Importable from ``shiq_lab``; each name leads to the file that defines it.\n",
        table(names, ("name", "what it is")),
        heading("Files and folders", 1),
        "A file imports only files above it. The environments have :doc:`pages of their own <../environments/index>`.\n",
        table(rooms, ("shiq_lab.", "what it holds")),
        ".. toctree::\n   :hidden:\n",
        *(f"   {name} <{name}>" for name in listed),
        "",
    ])  # fmt: skip
