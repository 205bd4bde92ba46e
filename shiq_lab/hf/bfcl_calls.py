"""Function calls as a model writes them, `[cd(folder='a'), ls()]`, read by `ast` alone: a known name with literal arguments.

The official back ends of the Berkeley Function Calling Leaderboard `eval` the text of a call. So a model's text never
reaches them: it is parsed into a name and Python literals here, everything else is refused, and what is evaluated is written
anew from the literals (`Call.code`).
"""

import ast
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shiq_lab.errors import bad, unknown

Functions = Mapping[str, Sequence[str]]  # name -> its parameters, in order
MAX_CHARACTERS = 16_384  # the longest turn of the benchmark's answers has 6,784
MAX_CALLS = 64  # ... and the one with most calls 34
MAX_DEPTH = 8  # of lists and dicts in one another; the answers nest 1
LARGEST = 10**18  # of a number; the answers' largest is 987,654
COSTLY = {"exponent", "precision", "decimal_places"}  # parameters whose size is the time and memory that a call takes;
REPEATS = "multiply"  # ... and this one's, beside a text: 'a' * 10**10 has 10 GB
LARGEST_COSTLY = 1000


@dataclass(frozen=True)
class Call:
    """A call: the function's name, and positional and keyword arguments that are literals."""

    name: str
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()

    @property
    def text(self) -> str:
        """The call as shown to models, `cd(folder='a')`: always the same spelling, whoever wrote it."""
        parts = [repr(value) for value in self.arguments] + [f"{name}={value!r}" for name, value in self.keywords]
        return f"{self.name}({', '.join(parts)})"

    @property
    def code(self) -> str:
        """The call as the official executor may evaluate it: as `text`, with "(" inside strings written \\x28.

        The executor puts an object's name before everything that looks like `method(`, in strings too: a message that says
        "use sort(x)" would be changed, for the model and the answer differently.
        """
        head, _, rest = self.text.partition("(")
        return f"{head}({rest.replace('(', chr(92) + 'x28')}"  # literals hold "(" only in strings

    def values(self) -> list[Any]:
        """All arguments, the positional ones first."""
        return [*self.arguments, *(value for _, value in self.keywords)]


def show_calls(calls: Sequence[Call]) -> str:
    """A turn's calls as one text, `[a(), b(x=1)]`; no call is `[]`. parse_calls reads it back."""
    return f"[{', '.join(call.text for call in calls)}]"


def parse_calls(text: str, functions: Functions) -> list[Call]:
    """The calls in a text: a list `[a(x=1), b('s')]`, or one call a line; `[]` and a blank text are none.

    functions: the names that may be called, with their parameters. An argument is a string, a finite number, True, False,
    None, or a list or dict (string keys) of such; nothing is evaluated. Raises ValueError, naming what it found, for
    anything else: attributes, names, operators, comprehensions, f-strings, starred arguments, bytes, tuples, nested calls,
    another function, a repeated keyword; more than MAX_CHARACTERS, MAX_CALLS or MAX_DEPTH; numbers above LARGEST, and what
    would keep the mathematical functions busy for ever. It bounds nothing else that a known function may cost: an
    adversary can still double a folder by copying it into itself, so play those in a process with a limit on memory.
    """
    if not isinstance(text, str):
        raise bad("text", "a string", type(text).__name__)
    if len(text) > MAX_CHARACTERS:
        raise bad("text", f"at most {MAX_CHARACTERS:,} characters", f"{len(text):,}")
    calls = [_call(node, functions) for node in _expressions(text)]
    if len(calls) > MAX_CALLS:
        raise bad("text", f"at most {MAX_CALLS} calls a turn", str(len(calls)))
    return calls


def _expressions(text: str) -> list[ast.expr]:
    """What should be the calls: the statements of a text, lists at the top taken apart."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string is a warning of the parser's
            body = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # the last two: nested too deep for the parser
        why = error.args[0] if error.args else type(error).__name__
        raise bad("text", "calls such as [f(x=1), g()]", f"text that is no Python ({why})") from None
    found: list[ast.expr] = []
    for statement in body:
        if not isinstance(statement, ast.Expr):
            raise bad("text", "function calls", _named(statement))
        value = statement.value
        found += value.elts if isinstance(value, ast.List) else [value]
    return found


def _call(node: ast.expr, functions: Functions) -> Call:
    """One call."""
    if not isinstance(node, ast.Call):
        raise bad("text", "function calls", _named(node))
    if not isinstance(node.func, ast.Name):
        raise bad("text", "a plain function name", _named(node.func))
    name = node.func.id
    if name not in functions:
        raise unknown("text", "a function of this entry", name[:80], functions)
    where = f"an argument of {name}"
    keys = [keyword.arg for keyword in node.keywords]
    if None in keys:
        raise bad(where, "name=value", "a starred dict (**)")
    if len(set(keys)) < len(keys):
        raise bad(where, "each keyword once", f"{max(keys, key=keys.count)!r} twice")
    call = Call(
        name,
        tuple(_literal(value, where) for value in node.args),
        tuple((str(keyword.arg), _literal(keyword.value, where)) for keyword in node.keywords),
    )
    _check_cost(call, functions[name])
    return call


def _literal(node: ast.expr, where: str, depth: int = 0) -> Any:
    """The value of a literal."""
    if depth >= MAX_DEPTH and isinstance(node, (ast.List, ast.Dict)):
        raise bad(where, f"lists and dicts at most {MAX_DEPTH} deep", "deeper ones")
    if isinstance(node, ast.Constant):
        return _scalar(node.value, where)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = _scalar(node.operand.value, where)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise bad(where, "a minus before a number only", f"-{value!r}")
        return -value
    if isinstance(node, ast.List):
        return [_literal(item, where, depth + 1) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _literal(key, where, depth + 1) for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise bad(where, "dicts with string keys", _named(node))
        return {key: _literal(value, where, depth + 1) for key, value in zip(keys, node.values, strict=True)}
    raise bad(where, "a literal (string, number, True, False, None, list, dict)", _named(node))


def _scalar(value: object, where: str) -> Any:
    """A constant that may pass."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise bad(where, "text that UTF-8 can hold", "a lone surrogate")
        return value
    if isinstance(value, (int, float)):
        if not math.isfinite(value) or abs(value) > LARGEST:
            raise bad(where, f"numbers up to {LARGEST:.0e}", "a larger one")
        return value
    raise bad(where, "a literal (string, number, True, False, None, list, dict)", f"a constant of type {type(value).__name__}")


def _check_cost(call: Call, parameters: Sequence[str]) -> None:
    """Refuse what the mathematical functions would never finish."""
    given = [*zip(parameters, call.arguments, strict=False), *call.keywords]
    repeats = call.name == REPEATS and not all(isinstance(value, (int, float)) for _, value in given)
    for name, value in given:
        if (repeats or name in COSTLY) and isinstance(value, (int, float)) and abs(value) > LARGEST_COSTLY:
            raise bad(f"{name} of {call.name}", f"at most {LARGEST_COSTLY} in size", repr(value))


def _named(node: ast.AST) -> str:
    """What a piece of syntax is, and how it begins: "Attribute `os.system`"."""
    try:
        shown = ast.unparse(node)
    except (RecursionError, ValueError):
        shown = "..."
    return f"{type(node).__name__} `{shown[:60]}`"
