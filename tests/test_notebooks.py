"""The notebooks: committed with outputs, every claim asserted, every exercise solvable; and their helper.

Unmarked tests read the files. The slow ones run every notebook from a clean kernel, once as it is and once with the exercises'
hidden solutions in the places of the answers.
"""

import ast
import base64
import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient.exceptions import CellExecutionError

from shiq_lab import notebook
from shiq_lab.plotting import figure

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
OUR_IMPORTS = {"shiq_lab", "numpy", "torch", "matplotlib", "sympy", "transformers", "tokenizers"}
# What a reader's own file may take from the standard library; nothing that leaves the machine.
STANDARD = {"dataclasses", "functools", "itertools", "json", "math", "pathlib", "subprocess", "sys", "tempfile"}
MACHINE = re.compile(r"/root/|/home/|/tmp/|/Users/|site-packages|\.venv|[A-Z]:\\\\")
LEAST_ASSERTIONS, LEAST_EXERCISES, LEAST_SECTIONS = 10, 3, 3
CELL_BYTES, FILE_BYTES = 300_000, 1_500_000
NO_ANSWER = "No answer yet"


def text(cell: Any) -> str:
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def load(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_of(book: Any) -> list[Any]:
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def outputs_of(book: Any) -> list[Any]:
    """What a run prints, shows and says, cell by cell: everything but the pictures' pixels."""
    kept = []
    for cell in code_of(book):
        for output in cell["outputs"]:
            data = {mime: x for mime, x in output.get("data", {}).items() if not mime.startswith("image/")}
            kept.append((cell["id"], output["output_type"], output.get("name"), output.get("text"), data))
    return kept


def sections_of(book: Any) -> dict[str, list[Any]]:
    """{"## heading": its code cells}"""
    found: dict[str, list[Any]] = {}
    here = None
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown" and (heading := re.search(r"(?m)^## (.+)$", text(cell))):
            here = heading[1]
            found[here] = []
        elif cell["cell_type"] == "code" and here is not None:
            found[here].append(cell)
    return found


def count(cells: list[Any]) -> tuple[int, int]:
    """(assert statements, calls of `exercise`)"""
    nodes = [node for cell in cells for node in ast.walk(ast.parse(text(cell)))]
    calls = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "exercise"]
    return sum(isinstance(n, ast.Assert) for n in nodes), len(calls)


def complaints(book: Any, path: Path) -> list[str]:
    """Everything that keeps a notebook from being committed."""
    raw, cells = json.dumps(book), code_of(book)
    out = []
    if [c["execution_count"] for c in cells] != list(range(1, len(cells) + 1)):
        out.append("code cells were not run once each, in order, from a clean kernel")
    bad = [o for c in cells for o in c["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"]
    out += [f"an output is an error or a warning: {str(o.get('evalue', o.get('text')))[:80]}" for o in bad]
    out += [f"a path of some machine: {m}" for m in sorted(set(MACHINE.findall(raw)))]
    if book["metadata"] != notebook.tidy(copy.deepcopy(book))["metadata"] or notebook.WIDGET in raw:
        out.append("metadata or widgets of a run: commit with python -m shiq_lab.notebook")
    top = text(book["cells"][0])
    minutes = re.search(r"About (\d+) minutes", top)
    if not top.startswith("# ") or minutes is None:
        out.append("the first cell has no title or does not say how long it takes")
    elif (needed := 5 * round(notebook.reading_minutes(book) / 5)) != int(minutes[1]) or not 10 <= needed <= 20:
        out.append(f"says {minutes[1]} minutes, takes about {notebook.reading_minutes(book):.1f}; 10 to 20 are wanted")
    prose = "\n".join(text(c) for c in book["cells"] if c["cell_type"] == "markdown")
    links = [to.partition("#")[0] for to in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"https?:|#", to)]
    out += [f"links to {to}, which is not there" for to in links if not (path.parent / to).exists()]
    place = [f.name for f in FILES].index(path.name)
    neighbours = {f.name for f in FILES[max(place - 1, 0) : place + 2]} - {path.name}
    out += [f"its first cell does not link to {name}" for name in sorted(neighbours) if f"]({name})" not in top]
    sections = sections_of(book)
    for heading, inside in sections.items():
        assertions, exercises = count(inside)
        if not assertions or not exercises:
            out.append(f"section {heading!r} has {assertions} assertions and {exercises} exercises")
    assertions, exercises = count(cells)
    if len(sections) < LEAST_SECTIONS or assertions < LEAST_ASSERTIONS or exercises < LEAST_EXERCISES:
        out.append(f"{len(sections)} sections, {assertions} assertions, {exercises} exercises")
    if not exercises == prose.count("**Exercise") == len(notebook.SOLUTION.findall(prose)):
        out.append(
            f"{exercises} exercises are checked, {prose.count('**Exercise')} set, "
            f"{len(notebook.SOLUTION.findall(prose))} solved"
        )
    for cell in cells:
        out += [f"imports {name}" for name in sorted(imported(text(cell)) - OUR_IMPORTS - STANDARD)]
        if len(json.dumps(cell["outputs"])) > CELL_BYTES:
            out.append(f"outputs of {cell['id']} are larger than {CELL_BYTES} bytes")
    if len(raw) > FILE_BYTES:
        out.append(f"larger than {FILE_BYTES} bytes")
    return out


def imported(source: str) -> set[str]:
    """The top names of what a cell imports."""
    tree = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in tree if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


# -------------------------------------------------------------------------------------------------------- the files
def test_there_are_notebooks() -> None:
    assert len(FILES) >= 4 and [f.name[:2] for f in FILES] == [f"{i:02d}" for i in range(len(FILES))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_notebook_is_fit_to_be_committed(path: Path) -> None:
    book = load(path)
    nbformat.validate(book)
    assert complaints(book, path) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_pictures_are_png_and_fit_a_page(path: Path) -> None:
    """Every slider leaves its note and a picture; every picture says how wide it wants to be, and no page scrolls for it."""
    notes = 0
    for cell in code_of(load(path)):
        for output in cell["outputs"]:
            data = output.get("data", {})
            notes += data.get("text/plain", "").startswith("Sliders, where a kernel runs")
            if "image/png" in data:
                assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
                assert (
                    200 <= output["metadata"]["image/png"]["width"] <= 1100 and len(output["metadata"]["image/png"]["alt"]) > 10
                )
        assert text(cell).count("sliders(") <= sum("image/png" in o.get("data", {}) for o in cell["outputs"])
    assert notes == sum(text(c).count("\nsliders(") + text(c).startswith("sliders(") for c in code_of(load(path)))


def break_order(book: Any) -> None:
    code_of(book)[1]["execution_count"] = 7


def break_stderr(book: Any) -> None:
    code_of(book)[0]["outputs"].append({"output_type": "stream", "name": "stderr", "text": "RuntimeWarning: overflow"})


def break_path(book: Any) -> None:
    book["cells"][2]["source"] += "\n\n/home/me/run.py"


def break_widget(book: Any) -> None:
    output = {"output_type": "display_data", "metadata": {}, "data": {notebook.WIDGET: {"model_id": "1"}}}
    code_of(book)[0]["outputs"].append(output)


def break_minutes(book: Any) -> None:
    book["cells"][0]["source"] = re.sub(r"About \d+", "About 5", text(book["cells"][0]))


def break_link(book: Any) -> None:
    book["cells"][0]["source"] += "\n[elsewhere](99_nowhere.ipynb)"


def break_neighbour(book: Any) -> None:
    book["cells"][0]["source"] = text(book["cells"][0]).replace("](0", "](./0")


def break_section(book: Any) -> None:
    book["cells"].append({"cell_type": "markdown", "id": "x", "metadata": {}, "source": "## Only words"})


def break_exercise(book: Any) -> None:
    task = next(c for c in book["cells"] if notebook.SOLUTION.search(text(c)))
    task["source"] = notebook.SOLUTION.sub("", text(task))


def break_import(book: Any) -> None:
    code_of(book)[0]["source"] += "\nimport requests"


def break_size(book: Any) -> None:
    code_of(book)[0]["outputs"].append({"output_type": "stream", "name": "stdout", "text": "x" * CELL_BYTES})


PLANTED = {
    break_order: "not run once each, in order",
    break_stderr: "an error or a warning: RuntimeWarning",
    break_path: "a path of some machine: /home/",
    break_widget: "metadata or widgets of a run",
    break_minutes: "says 5 minutes, takes about",
    break_link: "links to 99_nowhere.ipynb, which is not there",
    break_neighbour: "its first cell does not link to",
    break_section: "section 'Only words' has 0 assertions and 0 exercises",
    break_exercise: "solved",
    break_import: "imports requests",
    break_size: "are larger than 300000 bytes",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda f: f.__name__.removeprefix("break_"))
def test_a_planted_fault_is_found(plant: Any) -> None:
    book = load(FILES[1])
    plant(book)
    found = complaints(book, FILES[1])
    assert any(PLANTED[plant] in line for line in found), found


# ------------------------------------------------------------------------------------------------------- the helper
@pytest.mark.parametrize(
    ("answer", "expected", "said"),
    [
        (2.0005, 2.0, "Right."),
        (2.01, 2.0, "Not yet: 2.01 is too large."),
        (-3, 2.0, "Not yet: -3 is too small."),
        (np.float32(2.0), 2, "Right."),
        (torch.tensor(2.0, requires_grad=True), 2.0, "Right."),
        (float("nan"), 2.0, "Not yet: a number expected, all finite."),
        (float("inf"), float("inf"), "Right."),
        (1e300, float("inf"), "Not yet: 1e+300 is too small."),
        ("2", 2.0, "Not yet: a number expected, and this is a string."),
        (True, 1.0, "Not yet: a number expected, and this is True or False."),
        ([1, 2], 2.0, "Not yet: a number expected, and this is a list of 2."),
        ([1, 2], [1.0, 2.0], "Right."),
        ([1, 3], np.array([1.0, 2.0]), "Not yet: 1 of 2 numbers are off."),
        (np.zeros(3), [1.0, 2.0], "Not yet: numbers of shape (2,) expected, and this is of type ndarray of shape (3,)."),
        ([[1], [1, 2]], [1.0, 2.0], "Not yet: numbers of shape (2,) expected, and this is a list of 2."),
        (0, 0.0, "Right."),
        (1e-9, 0.0, "Not yet: 1e-09 is too large."),
        (" Yes ", "yes", "Right."),
        ("no", "yes", "Not yet: 'no' is not it."),
        (1, "yes", "Not yet: a string was expected, and this is a number."),
        (False, False, "Right."),
        (np.True_, False, "Not yet: np.True_ is not it."),
        (0, False, "Not yet: True or False was expected, and this is a number."),
        (3, lambda x: x == 3, "Right."),
        (4, lambda x: x == 3, "Not yet: the check does not hold."),
        (4, lambda x: "" if x == 3 else "three was meant", "Not yet: three was meant."),
        ("abc", lambda x: x / 2 == 1, "Not yet: checking it ended in TypeError: unsupported operand"),
        (lambda x: x / 0, lambda f: f(1) == 1, "Not yet: checking it ended in ZeroDivisionError: division by zero."),
    ],
)  # fmt: skip
def test_an_exercise_says_what_is_missing(answer: Any, expected: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    notebook.exercise(answer, expected)
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("nothing", [None, ...])
def test_no_answer_is_no_failure(nothing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    notebook.exercise(nothing, 1.0, hint="none")
    assert capsys.readouterr().out.startswith(NO_ANSWER)


def test_a_hint_comes_with_a_wrong_answer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    notebook.exercise(1.0, 2.0, hint="count again.")
    notebook.exercise(2.0, 2.0, hint="count again.")
    assert capsys.readouterr().out == "Not yet: 1 is too small. Hint: count again.\nRight.\n"


def line(beta: float = 0.5, kind: str = "a") -> Any:
    if beta > 1.5:
        raise ValueError("beta: expected at most 1.5.")
    page = figure(figsize=(4, 2))
    page.add_subplot().plot([0, beta])
    return page


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a notebook would be sent: data of displays and of updates, in order."""
    sent: list[dict[str, Any]] = []

    class Handle:
        def update(self, data: dict[str, Any], **options: Any) -> None:
            sent.append(data)

    def display(data: dict[str, Any], **options: Any) -> Handle:
        sent.append(data)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    return sent


def test_a_slider_redraws_its_figure(shown: list[dict[str, Any]]) -> None:
    """Sliders with a note, then the figure; moved, the same figure is updated; trouble is said and the figure stays."""
    made = notebook.sliders(line, alt="a line", beta=(0.1, 2.0, 0.1), kind=["a", "b"])
    note, first = shown
    assert notebook.WIDGET in note and "beta (0.1 to 2; here 0.5), kind (a or b; here a)" in note["text/plain"]
    assert first == {"image/png": notebook.png(line()), "text/plain": "<Figure: a line>"}
    made["beta"].value = 1.0
    assert shown[2]["image/png"] == notebook.png(line(1.0)) != first["image/png"]
    made["beta"].value = 1.8
    assert len(shown) == 3  # draw raised: nothing new is drawn
    made["kind"].value = "b"
    made["beta"].value = 0.5
    assert shown[-1]["image/png"] == first["image/png"]


def test_without_ipywidgets_the_figure_remains(shown: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert notebook.sliders(line, beta=(0.1, 2.0, 0.1)) == {}
    assert [sorted(data) for data in shown] == [["text/plain"], ["image/png", "text/plain"]]


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"alpha": (0, 1, 0.1)}, r"ranges: expected arguments of draw that have a default \(beta, kind\), got alpha\."),
        ({"beta": (0.6, 2.0, 0.1)}, r"beta: expected a default of draw within \(0.6, 2.0, 0.1\), got 0.5\."),
        ({"beta": (2.0, 0.1, 0.1)}, r"beta: expected \(low, high, step\), or a list of strings"),
        ({"beta": (0.1, 2.0)}, r"beta: expected \(low, high, step\), or a list of strings"),
        ({"kind": ["b", "c"]}, r"kind: expected a default of draw within \['b', 'c'\], got 'a'\."),
    ],
)
def test_bad_ranges_are_named(ranges: dict[str, Any], message: str, shown: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=message):
        notebook.sliders(line, **ranges)
    assert not shown


def test_tidy_keeps_nothing_of_a_run() -> None:
    """Widgets, times, ids and the machine's kernel go; what stays of sliders is their note."""
    widget = {
        "output_type": "display_data",
        "metadata": {},
        "data": {notebook.WIDGET: {"model_id": "8f"}, "text/plain": "note"},
    }
    cell = {"cell_type": "code", "id": "8f3a", "source": "1", "execution_count": 1, "outputs": [widget]}
    cell["metadata"] = {"execution": {"iopub.status.busy": "now"}, "tags": ["keep"]}
    book = {"cells": [cell], "metadata": {"widgets": {"state": {}}, "kernelspec": {"name": "mine"}}, "nbformat": 4}
    clean = notebook.tidy(book)
    assert clean["cells"][0]["outputs"][0]["data"] == {"text/plain": "note"}
    assert clean["cells"][0]["id"] == "cell-00" and clean["cells"][0]["metadata"] == {"tags": ["keep"]}
    assert set(clean["metadata"]) == {"kernelspec", "language_info"} and clean["metadata"]["kernelspec"]["name"] == "python3"


def test_solutions_take_the_answers_places() -> None:
    task = "**Exercise 1.** Two?\n<details><summary>Solution</summary>\n\n```python\nx = 1\nanswer = x + 1\n```\n</details>"
    cells = [{"cell_type": "markdown", "source": task}, {"cell_type": "code", "source": "answer = ...\nexercise(answer, 2)"}]
    assert notebook.solved({"cells": cells})["cells"][1]["source"] == "x = 1\nanswer = x + 1\nexercise(answer, 2)"
    assert cells[1]["source"].startswith("answer = ...")  # the book itself stays
    cells[1]["source"] = "exercise(3, 2)"
    with pytest.raises(ValueError, match=r"a code cell that begins with `name = \.\.\.`"):
        notebook.solved({"cells": cells})


# ---------------------------------------------------------------------------------------------------------- running
def fresh(cells: list[tuple[str, str]]) -> Any:
    """A notebook of (kind, source) cells that has not run."""
    make = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    return nbformat.v4.new_notebook(cells=[make[kind](source) for kind, source in cells])


@pytest.mark.slow
def test_a_false_assertion_fails_the_run(tmp_path: Path) -> None:
    """The run of a real notebook with one claim turned round ends in that claim's AssertionError."""
    book = load(FILES[0])
    cell = next(c for c in code_of(book) if "== 2**2" in text(c))
    cell["source"] = text(cell).replace("== 2**2", "== 2**3")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        notebook.run(book, tmp_path)


@pytest.mark.slow
def test_the_command_writes_what_it_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sliders moved from inside the kernel change the committed figure; a failed run leaves the file as it was."""
    path = tmp_path / "moved.ipynb"
    draw = "from shiq_lab.notebook import sliders\nfrom shiq_lab.plotting import figure\ndef draw(x=1):\n    page = figure()\n"
    draw += "    page.add_subplot().plot([0, x])\n    return page\nmade = sliders(draw, x=(0, 5, 1))"
    path.write_text(nbformat.writes(fresh([("code", draw)])))
    notebook.main([str(path)])
    still = load(path)
    assert "moved.ipynb: " in capsys.readouterr().out
    path.write_text(nbformat.writes(fresh([("code", draw), ("code", "made['x'].value = 4")])))
    notebook.main([str(path)])
    moved = load(path)
    pictures = [[o["data"].get("image/png") for o in code_of(book)[0]["outputs"]] for book in (still, moved)]
    assert [len(x) for x in pictures] == [2, 2] and pictures[0][0] is pictures[1][0] is None
    assert pictures[0][1] != pictures[1][1]
    bad = nbformat.writes(fresh([("code", "assert 1 == 2")]))
    path.write_text(bad)
    with pytest.raises(Exception, match="AssertionError"):
        notebook.main([str(path)])
    assert path.read_text() == bad and [p.name for p in tmp_path.iterdir()] == ["moved.ipynb"]


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_notebook_runs_and_says_the_same_again(path: Path) -> None:
    """From a clean kernel, in its own folder: every assertion holds, and all that is printed is what was committed."""
    committed = load(path)
    again = notebook.run(load(path), path.parent)
    assert outputs_of(again) == outputs_of(committed)
    assert complaints(again, path) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_hidden_solution_is_right(path: Path) -> None:
    """With the solutions in the answers' places every exercise says "Right."; as committed each says that none is there."""
    book = load(path)
    _, exercises = count(code_of(book))
    printed = lambda b: "".join(o.get("text", "") for c in code_of(b) for o in c["outputs"])  # noqa: E731
    assert printed(book).count(NO_ANSWER) == exercises
    after = printed(notebook.run(notebook.solved(book), path.parent))
    assert after.splitlines().count("Right.") == exercises and "Not yet" not in after and NO_ANSWER not in after
