"""What Sphinx needs to show our docstrings: the directive `plain`, and names in signatures and backticks that become links.

Our docstrings are plain text. A paragraph stays a paragraph; "name   what it is" in columns becomes a list of definitions,
which folds on a narrow screen; whatever else is indented or aligned (equations, tables) is shown as it stands.
"""

import re
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx import addnodes
from sphinx.application import Sphinx

ENTRY = re.compile(r"(\S(?:.*?\S)?)\s{2,}(?=\S)")  # a name, a gap of two blanks or more, and what it is


def paragraphs(lines: list[str]) -> list[list[str]]:
    """The lines between blank ones."""
    text = "\n".join(lines).strip("\n")
    return [block.split("\n") for block in re.split(r"\n\s*\n", text) if block.strip()]


def columns(lines: list[str]) -> list[tuple[str, str]] | None:
    """[(name, what it is)] where all lines are "name   what it is" in columns, else None; a third column follows a colon."""
    first = ENTRY.match(lines[0])
    if first is None:
        return None
    rows: list[tuple[str, str]] = []
    for line in lines:
        left, right = line[: first.end()], line[first.end() :]
        if left[-1:] != " " or not right or right[0] == " " or (rows and left[0] == " " and left.strip()):
            return None
        if left.strip():
            rows.append((left.strip(), right))
        else:
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {right}")
    return [(name, re.sub(r"(?<=\S) {2,}(?=\S)", ": ", meaning)) for name, meaning in rows]


class Plain(Directive):
    """A docstring as it was written; the arguments are names that are no links."""

    optional_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        """The docstring's paragraphs, definitions and literal blocks."""
        return [node for block in paragraphs(list(self.content)) for node in self.block(block)]

    def block(self, lines: list[str]) -> list[nodes.Node]:
        """One paragraph of the docstring; prose may lead into aligned lines, and is then taken apart from them."""
        rows = columns(lines)
        if rows:
            return [self.definitions(rows)]
        aligned = next((i for i, line in enumerate(lines) if line[:1] == " " or re.search(r"\S {3,}\S", line)), None)
        if aligned is None:
            return [self.paragraph(" ".join(lines))]
        if aligned and (lines[aligned][:1] == " " or columns(lines[aligned:])) and lines[aligned - 1].endswith((":", ".")):
            return [self.paragraph(" ".join(lines[:aligned])), *self.block(lines[aligned:])]
        text = "\n".join(lines)
        return [nodes.literal_block(text, text, language="none")]

    def definitions(self, rows: list[tuple[str, str]]) -> nodes.Node:
        """A definition list that lies side by side where there is room."""
        out = nodes.definition_list(classes=["columns"])
        for name, text in rows:
            meaning = nodes.definition("", self.paragraph(text))
            out += nodes.definition_list_item("", nodes.term("", "", *self.inline(name)), meaning)
        return out

    def paragraph(self, text: str) -> nodes.paragraph:
        """Text with `names` in backticks."""
        return nodes.paragraph("", "", *self.inline(text))

    def inline(self, text: str) -> list[nodes.Node]:
        """Every second piece between backticks is code, and a link where it is a name that we know."""
        context: dict[str, Any] = self.state.document.settings.env.ref_context
        unlinked = set(" ".join(self.arguments).split())
        out: list[nodes.Node] = []
        for i, piece in enumerate(re.split(r"``?", text)):
            if i % 2 == 0:
                out += [nodes.Text(piece)] if piece else []
                continue
            code = nodes.literal(piece, piece)
            name = piece.partition("(")[0]
            if name in unlinked or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
                out.append(code)
                continue
            where = {"py:module": context.get("py:module"), "py:class": context.get("py:class")}
            out.append(addnodes.pending_xref("", code, refdomain="py", reftype="obj", reftarget=name, refwarn=False, **where))
        return out


def resolve(app: Sphinx, doctree: nodes.document) -> None:
    """Names become links to what their module means by them: its own, an imported or a public name. Others become text."""
    for node in list(doctree.findall(addnodes.pending_xref)):
        if node.get("refdomain") != "py":
            continue
        module, target = node.get("py:module") or "", node["reftarget"]
        head, dot, rest = target.partition(".")
        meant = [f"{module}.{node.get('py:class')}.{target}", f"{module}.{target}", target]
        meant += [
            names[head] + dot + rest
            for names in (app.config.api_imports.get(module, {}), app.config.api_public)
            if head in names
        ]
        known = next((name for name in meant if name in app.config.api_symbols), None)
        if known is None:
            node.replace_self(node.children)
        else:
            node["reftarget"] = known


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_config_value("api_imports", {}, "env")
    app.add_config_value("api_public", {}, "env")
    app.add_config_value("api_symbols", set(), "env")
    app.add_directive("plain", Plain)
    app.connect("doctree-read", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
