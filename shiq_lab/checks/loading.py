"""From `path/to/file.py:name` or `package.module:name` to a loss, and from an exception to the user's own line.

Whatever goes wrong here is the user's: one sentence, with the place in the user's file, and no frame of this package.
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from shiq_lab.errors import bad

FORMS = "FILE.py:NAME or package.module:NAME"
ADAPTERS = ("from_logprobs", "from_response_logprobs", "from_stats")  # of checks.adapters: what they return is a loss
MOST = 400  # characters of a user's message that are shown
_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARIES = {str(Path(p).resolve()) for k, p in sysconfig.get_paths().items() if k in ("stdlib", "platstdlib")}


def load_loss(which: str) -> Callable[..., Any]:
    """The callable that `which` names. The file's own folder, or for a module the working folder, becomes importable.

    A file inside a package (a folder with __init__.py) is imported under its full name, so that its relative imports work.
    Raises ValueError, with the nearest name where there is one.
    """
    place, colon, name = which.rpartition(":")
    if not colon or not place or not name:
        file = place or name
        found = _functions_in(Path(file)) if file.endswith(".py") and Path(file).is_file() else []
        raise bad("LOSS", FORMS, repr(which), f"Functions in {file}: {', '.join(found)}." if found else "")
    module = _from_file(place) if _is_file_name(place) else _from_module(place)
    return _callable(_attribute(module, name, place), which)


def name_of(loss: object) -> str:
    """What to call a loss in a report or a test id: its own name, that of its class, or of what a partial wraps."""
    inner = getattr(loss, "func", loss)  # functools.partial
    name = getattr(inner, "__name__", None)
    return name if isinstance(name, str) else type(inner).__name__


def file_of(loss: object) -> Path | None:
    """The source file of a loss, where it has one."""
    inner: Any = inspect.unwrap(getattr(loss, "func", loss))  # type: ignore[arg-type]  # it takes any object
    try:
        found = inspect.getsourcefile(inner if inspect.isroutine(inner) else type(inner))
    except TypeError:
        return None
    return Path(found).resolve() if found else None


# ---------------------------------------------------------------------------------------------------------- importing
def _is_file_name(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place


def _from_file(place: str) -> ModuleType:
    path = Path(place)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        raise bad(
            "LOSS", f"{FORMS} with an existing file", repr(place), _near(path.name, [p.name for p in folder.glob("*.py")])
        )
    if path.suffix != ".py":
        raise bad("LOSS", f"{FORMS} with a Python file", repr(place))
    path = path.resolve()
    _importable(path.parent)
    if not (path.parent / "__init__.py").is_file():
        return _import(place, lambda: _execute(path))
    root, parts = path.parent, [] if path.stem == "__init__" else [path.stem]
    while (root / "__init__.py").is_file():
        root, parts = root.parent, [root.name, *parts]
    _importable(root)
    full = ".".join(parts)
    module = _import(place, lambda: importlib.import_module(full))
    other = getattr(module, "__file__", None)
    if other is None or Path(other).resolve() != path:
        raise bad("LOSS", f"{place!r} to be importable as {full}", f"another module of that name, {other}", "Rename one.")
    return module


def _execute(path: Path) -> ModuleType:
    """Run a lone file as a module. Its name is our own, so that loss.py or random.py shadows no other module of that name."""
    name = f"shiq_lab_subject_{path.stem}_{abs(hash(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def _from_module(place: str) -> ModuleType:
    if not all(part.isidentifier() for part in place.split(".")):
        raise bad("LOSS", FORMS, repr(place), "A file's name ends in .py.")
    _importable(Path.cwd())
    return _import(place, lambda: importlib.import_module(place))


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def _import(place: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not _is_file_name(place) and (place == missing or place.startswith(missing + ".")):
            stem, _, last = missing.rpartition(".")
            raise bad("LOSS", "a module that can be imported", f"no module {missing!r}", _near(last, _modules(stem))) from None
        raise bad("LOSS", "a file that can be imported", f"{place!r}, which raises {blame(error)}") from None
    except (Exception, SystemExit) as error:
        raise bad("LOSS", "a file that can be imported", f"{place!r}, which raises {blame(error)}") from None


def _modules(package: str) -> list[str]:
    """Names of the modules in a package; of the top-level ones for "". Nothing is imported."""
    paths: Iterable[str] | None = None
    if package:
        paths = getattr(sys.modules.get(package), "__path__", [])
    return [m.name for m in pkgutil.iter_modules(paths)]


# -------------------------------------------------------------------------------------------------------------- names
def _attribute(module: ModuleType, name: str, place: str) -> Any:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = (
                [n for n, v in vars(value).items() if callable(v) and not n.startswith("_")]
                if hasattr(value, "__dict__")
                else []
            )
            mine = [n for n in known if _is_own(vars(value)[n], module)]
            raise bad("LOSS", f"a name in {place}", repr(name), _near(part, known) or _listed(mine))
        value = getattr(value, part)
    return value


def _callable(value: Any, which: str) -> Callable[..., Any]:
    if inspect.isclass(value):
        remedy = f"Put an instance into the file, `loss = {value.__name__}()`, and name that."
        raise bad("LOSS", "a function, or an object that can be called", f"the class {which!r}", remedy)
    if not callable(value):
        raise bad("LOSS", "a function, or an object that can be called", f"{which!r}, of type {type(value).__name__}")
    return value


def _is_own(value: Any, module: ModuleType) -> bool:
    """Defined there, or a loss that an adapter made, whose module is the adapter's."""
    return getattr(value, "__module__", None) == module.__name__ or hasattr(value, "shiq_lab_traits")


def _functions_in(path: Path) -> list[str]:
    """What can be named as a loss, the file not run: first what takes `logits` or comes of an adapter."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    first: list[str] = []
    other: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            arguments = (*node.args.args, *node.args.kwonlyargs)
            (first if any(a.arg == "logits" for a in arguments) else other).append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call):
            maker = node.value.func
            made_by = maker.attr if isinstance(maker, ast.Attribute) else maker.id if isinstance(maker, ast.Name) else ""
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if made_by in ADAPTERS:
                first += [t.id for t in targets if isinstance(t, ast.Name)]
    return [name for name in dict.fromkeys(first + other) if not name.startswith("_")]


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def _listed(names: list[str]) -> str:
    return f"It defines: {', '.join(names)}." if names else "It defines no function."


# -------------------------------------------------------------------------------------------------------------- blame
def blame(error: BaseException, loss: object = None) -> str:
    """`TypeError: what it says (my_loss.py:12, in loss)`: the last line of a traceback, and the last of the user's own frames.

    The user's are all frames outside this package, the standard library and site-packages, and those in the loss's own file
    wherever that is. A syntax error stands in the line that cannot be read.
    """
    if isinstance(error, SyntaxError) and error.filename:
        text = f" `{error.text.strip()}`" if error.text and error.text.strip() else ""
        return f"{type(error).__name__}: {error.msg}{text} ({_shown(error.filename)}:{error.lineno})"
    own = file_of(loss) if loss is not None else None
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if _is_users(code.co_filename, own):
            inside = "" if code.co_name == "<module>" else f", in {code.co_name}"
            place = f" ({_shown(code.co_filename)}:{line}{inside})"
    return last_line(error) + place


def last_line(error: BaseException) -> str:
    """`TypeError: what it says`, on one line and not endless, even where the message itself cannot be made."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its message cannot be shown)"
    text = text if len(text) <= MOST else text[: MOST - 4] + " ..."
    return type(error).__name__ + (f": {text}" if text else "")


def _is_users(filename: str, own: Path | None) -> bool:
    if filename.startswith("<"):
        return False
    path = Path(filename).resolve()
    if own is not None and path == own:
        return True
    if _PACKAGE in path.parents or {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return not any(str(path).startswith(library) for library in _LIBRARIES)


def _shown(filename: str) -> str:
    """Relative to the working folder where the file lies in it."""
    path = Path(filename).resolve()
    return str(path.relative_to(Path.cwd())) if Path.cwd() in path.parents else filename
