"""Finding a function again in another process."""

import importlib
import importlib.util
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from shiq_lab.errors import bad

TOP = "Put it at the top of a module, with def: other processes import it."


def address_of(argument: str, function: Any) -> tuple[str, Any] | None:
    """How another process finds a function: by pickle (module and name), or by "file.py:name" or "module:name".

    ValueError for what no other process can find: no such file, a lambda, a function inside a function, an object.
    """
    if function is None:
        return None
    if isinstance(function, str):
        if ":" not in function:
            raise bad(argument, "'path/to/file.py:name' or 'package.module:name'", repr(function))
        place = function.rpartition(":")[0]
        if _is_file(function) and not os.path.isfile(place):
            raise bad(argument, "a file that exists", repr(function), f"There is no {os.path.abspath(place)}.")
        return "name", os.path.abspath(function) if _is_file(function) else function
    if not callable(function):
        raise bad(argument, "a function", type(function).__name__)
    name = getattr(function, "__qualname__", type(function).__name__)
    if "<" in name:  # <lambda>, or f.<locals>.g
        raise bad(argument, "a function at the top of a module", name, TOP)
    if getattr(function, "__module__", "") == "__main__":  # a script: there "__main__" means something else
        file = getattr(sys.modules["__main__"], "__file__", None)
        if file is None:
            raise bad(
                argument, "a function in a file", "one typed in by hand", "Write it to a file: other processes import it."
            )
        if not hasattr(function, "__qualname__"):
            raise bad(argument, "a function at the top of a module", f"an object of {name}", TOP)
        return "name", f"{os.path.abspath(file)}:{name}"
    try:
        return "pickle", pickle.dumps(function)
    except Exception as error:
        raise bad(argument, "a function that can be pickled", f"{function!r} ({error})", TOP) from None


def _is_file(name: str) -> bool:
    return name.rpartition(":")[0].endswith(".py")


def load(address: tuple[str, Any] | None) -> Any:
    """The function at an address, in this process."""
    if address is None:
        return None
    how, what = address
    if how == "pickle":
        return pickle.loads(what)
    home, _, name = what.rpartition(":")
    if _is_file(what):
        spec = importlib.util.spec_from_file_location(f"_shiq_lab_{Path(home).stem}", home)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot read {home}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(home)
    for part in name.split("."):
        module = getattr(module, part)
    return module
