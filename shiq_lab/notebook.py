"""What the notebooks need and the package does not: figures as PNG, sliders, exercises that check themselves, a clean re-run.

    from shiq_lab.notebook import exercise, show, sliders

    show(figure)                                  a picture, the same bytes every time
    sliders(draw, beta=(0.1, 2.0, 0.1))           draw(beta) -> Figure, redrawn as the slider moves; starts at draw's default
    exercise(answer, expected)                    says "Right.", or what kind of answer is missing; never a traceback

Rules that tests/test_notebooks.py holds every notebook to:

- The first cell has a title ("# "), "About N minutes" (`reading_minutes` counts; the nearest 5) and links to its neighbours.
- Every section ("## ") holds an assertion and an exercise.
- An exercise is a markdown cell that begins with "**Exercise", with the solution as ```python inside <details>, and then a code
  cell whose first line is `name = ...`. The test puts the solution in that line's place and wants to see "Right.".
- Committed by `python -m shiq_lab.notebook notebooks/NAME.ipynb`, which runs it from a clean kernel and keeps what is the same
  in every run: no times, no machine, and of sliders the note and the figure, which is what a page without a kernel shows.
"""

import inspect
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shiq_lab.errors import bad, is_real, is_whole
from shiq_lab.plotting import style
from shiq_lab.progress import progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDGET = "application/vnd.jupyter.widget-view+json"
CLOSE = 1e-3  # relative: what is worked out by hand to three figures and a bit counts
PIXELS = 96  # an inch, as browsers have it: a picture's letters keep the size that they were drawn in


# ---------------------------------------------------------------------------------------------------------- figures
def png(figure: "Figure") -> bytes:
    """The figure as PNG at its own resolution; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _bundle(figure: "Figure", alt: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(data, options) of a display: the picture as wide as its inches, with words for those who cannot see it."""
    width = round(float(figure.get_size_inches()[0]) * PIXELS)
    data = {"image/png": png(figure), "text/plain": f"<Figure: {alt}>" if alt else "<Figure>"}
    return data, {"metadata": {"image/png": {"width": width, **({"alt": alt} if alt else {})}}, "raw": True}


def show(figure: "Figure", alt: str = "") -> None:
    """Display a figure; alt says in words what is on it."""
    _display(figure, alt)


def _display(figure: "Figure", alt: str) -> Any:
    data, options = _bundle(figure, alt)
    return import_module("IPython.display").display(data, **options, display_id=True)


# ---------------------------------------------------------------------------------------------------------- sliders
def sliders(
    draw: Callable[..., "Figure"], alt: str = "", **ranges: tuple[float, float, float] | Sequence[str]
) -> dict[str, Any]:
    """Sliders above a figure that draw(**values) makes anew whenever one moves; returned by name, for code to move.

    ranges  name=(low, high, step), whole numbers or floats, or a list of strings to choose from; each starts at the default of
            draw's argument of that name
    Where no kernel runs, or without ipywidgets, the note and the figure at the start remain. A ValueError of draw is
    shown under the sliders, and the figure stays. Raises ValueError for a name that draw does not take or a start outside.
    """
    start = _starts(draw, ranges)
    try:
        made = {name: _control(name, spec, start[name]) for name, spec in ranges.items()}
    except ImportError:
        made = {}
    display = import_module("IPython.display").display
    note = "Sliders, where a kernel runs this notebook: " + ", ".join(_said(n, s, start[n]) for n, s in ranges.items()) + "."
    box, trouble = _box(made)
    display({"text/plain": note, **({WIDGET: box._repr_mimebundle_()[WIDGET]} if made else {})}, raw=True)
    handle = _display(draw(**start), alt)

    def redraw(_: object) -> None:
        try:
            data, options = _bundle(draw(**{name: widget.value for name, widget in made.items()}), alt)
            handle.update(data, **options)
            trouble.value = ""
        except ValueError as error:
            trouble.value = str(error)

    for widget in made.values():
        widget.observe(redraw, names="value")
    return made


def _starts(draw: Callable[..., "Figure"], ranges: Mapping[str, Any]) -> dict[str, Any]:
    """Each range's start, from the defaults of draw's arguments."""
    known = inspect.signature(draw).parameters
    start = {}
    for name, spec in ranges.items():
        value = known[name].default if name in known else inspect.Parameter.empty
        if value is inspect.Parameter.empty:
            has = ", ".join(known) or "none"
            raise bad("ranges", f"arguments of draw that have a default ({has})", name, f"Write def draw({name}=...).")
        choices = all(isinstance(x, str) for x in spec)
        if not choices and not (len(spec) == 3 and all(map(is_real, spec)) and spec[0] < spec[1] and spec[2] > 0):
            raise bad(name, "(low, high, step), or a list of strings", repr(spec))
        if value not in spec if choices else not (is_real(value) and spec[0] <= value <= spec[1]):
            raise bad(name, f"a default of draw within {spec}", repr(value))
        start[name] = value
    return start


def _control(name: str, spec: Sequence[Any], value: Any) -> Any:
    """The widget of one range."""
    widgets = import_module("ipywidgets")
    if isinstance(value, str):
        return widgets.Dropdown(options=list(spec), value=value, description=name)
    low, high, step = spec
    whole = is_whole(low) and is_whole(high) and is_whole(step) and is_whole(value)
    make = widgets.IntSlider if whole else widgets.FloatSlider
    return make(value=value, min=low, max=high, step=step, description=name, continuous_update=False)


def _box(made: Mapping[str, Any]) -> tuple[Any, Any]:
    """(all controls in a column with a line for trouble, that line)."""
    if not made:
        return None, None
    widgets = import_module("ipywidgets")
    trouble = widgets.Label()
    return widgets.VBox([*made.values(), trouble]), trouble


def _said(name: str, spec: Sequence[Any], value: Any) -> str:
    where = " or ".join(spec) if isinstance(value, str) else f"{spec[0]:g} to {spec[1]:g}"
    return f"{name} ({where}; here {value if isinstance(value, str) else format(value, 'g')})"


# -------------------------------------------------------------------------------------------------------- exercises
def exercise(answer: Any, expected: Any, hint: str = "") -> None:
    """Print whether the reader's answer is right; what is missing or wrong is said in words, and nothing is raised.

    answer    None or ... : no answer yet
    expected  a number or array (right to 1e-3 of its largest entry), a string, True or False; or a function of the answer that
              returns True, or False, or a string with what is wrong
    """
    if answer is None or answer is ...:
        print("No answer yet: put yours in place of the ... and run this cell again.")
        return
    try:
        wrong = _wrong(answer, expected)
    except Exception as error:  # whatever the reader's answer does, the notebook goes on
        wrong = f"checking it ended in {type(error).__name__}: {error}"
    print("Right." if not wrong else f"Not yet: {wrong.rstrip('.')}." + (f" Hint: {hint}" if hint else ""))


def _wrong(answer: Any, expected: Any) -> str:
    """What is wrong with an answer; "" where nothing is."""
    if callable(expected):
        verdict = expected(answer)
        return verdict if isinstance(verdict, str) else "" if bool(verdict) else "the check does not hold"
    if isinstance(expected, (str, bool, np.bool_)):
        kind = "a string" if isinstance(expected, str) else "True or False"
        if not isinstance(answer, str if isinstance(expected, str) else (bool, np.bool_)):
            return f"{kind} was expected, and this is {_kind(answer)}"
        same = str(answer).strip().lower() == str(expected).lower()
        return "" if same else f"{answer!r} is not it"
    return _wrong_numbers(answer, _numbers(expected))


def _wrong_numbers(answer: Any, truth: np.ndarray[Any, Any]) -> str:
    wanted = "a number" if truth.ndim == 0 else f"numbers of shape {truth.shape}"
    try:
        given = _numbers(answer)
    except (TypeError, ValueError):
        return f"{wanted} expected, and this is {_kind(answer)}"
    if given.shape != truth.shape:
        return f"{wanted} expected, and this is {_kind(answer)}"
    if not np.isfinite(given).all() and np.isfinite(truth).all():
        return f"{wanted} expected, all finite"
    finite = np.abs(truth[np.isfinite(truth)]).max(initial=0.0)
    off = ~np.isclose(given, truth, rtol=0.0, atol=CLOSE * max(float(finite), 1e-12))
    if truth.ndim == 0 and off:
        return f"{float(given):g} is too {'small' if given < truth else 'large'}"
    return f"{int(off.sum())} of {truth.size} numbers are off" if off.any() else ""


def _numbers(value: Any) -> np.ndarray[Any, Any]:
    """As float64; TypeErrors and ValueErrors for what is none. Tensors may carry a gradient."""
    if isinstance(value, (str, bool)):
        raise TypeError(value)
    return np.asarray(value.detach() if hasattr(value, "detach") else value, dtype=np.float64)


def _kind(value: Any) -> str:
    """What an answer is, in words."""
    shape = getattr(value, "shape", None)
    if isinstance(value, (bool, np.bool_)):
        return "True or False"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    names = {str: "a string", int: "a number", float: "a number"}
    name = names.get(type(value), f"of type {type(value).__name__}")
    return f"{name} of shape {tuple(shape)}" if shape else name


# ------------------------------------------------------------------------------------------------- running the files
SOLUTION = re.compile(r"<details>.*?```python\n(.*?)```.*?</details>", re.DOTALL)


def reading_minutes(book: Any) -> float:
    """200 words or 15 lines of code a minute, and 1.5 minutes an exercise; solutions are not read."""
    prose = " ".join(SOLUTION.sub("", c["source"]) for c in book["cells"] if c["cell_type"] == "markdown")
    code = [line for c in book["cells"] if c["cell_type"] == "code" for line in c["source"].splitlines() if line.strip()]
    return len(prose.split()) / 200 + len(code) / 15 + 1.5 * prose.count("**Exercise")


def solved(book: Any) -> Any:
    """A copy of the notebook in which every exercise's hidden solution stands in its answer's place."""
    out = import_module("copy").deepcopy(book)
    for task, cell in zip(out["cells"], out["cells"][1:], strict=False):
        found = SOLUTION.search(task["source"])
        if task["cell_type"] == "markdown" and found:
            head, _, rest = cell["source"].partition("\n")
            if not re.match(r"\w+ = \.\.\.", head):
                raise bad("book", "a code cell that begins with `name = ...` after a solution", repr(head))
            cell["source"] = found[1] + rest
    return out


def run(book: Any, folder: Path) -> Any:
    """The notebook executed from a clean kernel in `folder`, as `tidy` leaves it. Raises what its cells raise."""
    client = import_module("nbclient").NotebookClient(
        book, timeout=300, kernel_name="python3", record_timing=False, store_widget_state=False, coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    client.execute()
    return tidy(book)


def tidy(book: Any) -> Any:
    """Metadata, cell ids and outputs without anything of this run or this machine."""
    spec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book["metadata"] = {"kernelspec": spec, "language_info": {"name": "python"}}
    book["nbformat"], book["nbformat_minor"] = 4, 5
    for i, cell in enumerate(book["cells"]):
        cell["id"] = f"cell-{i:02d}"
        cell["metadata"] = {"tags": cell["metadata"]["tags"]} if cell["metadata"].get("tags") else {}
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
    return book


def main(paths: Sequence[str]) -> None:
    """Run the notebooks and write them back with their outputs; a file appears whole or not at all."""
    nbformat = import_module("nbformat")
    for path in progress([Path(p) for p in paths], "notebooks"):
        book = run(nbformat.read(path, as_version=4), path.resolve().parent)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(nbformat.writes(book).rstrip() + "\n", encoding="utf-8")
        partial.replace(path)
        print(f"{path.name}: {reading_minutes(book):.1f} minutes to read")


if __name__ == "__main__":
    main(sys.argv[1:])
