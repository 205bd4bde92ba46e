"""BFCL V3's multi-turn part (Apache-2.0, PyPI `bfcl-eval`): its entries, back ends and checker.

An entry is a dialogue of several user turns, a world of simulated services (file system, trading, travel, ...) with an
initial state, and a right list of calls for each turn. The official checker runs the model's calls and the right ones on
two copies of the world, and after each turn compares the states and the replies.

Reward of turn t: 1 if the official checker calls the first t turns valid, else 0. The checker stops at the first turn that
fails, so after a failed turn all rewards are 0 and the return is the number of turns before it; right = all turns valid,
which is the benchmark's own verdict.

Data and checker only: a number that comes from perturbed answers is no benchmark score.
"""

import hashlib
import importlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from decimal import localcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shiq_lab.errors import at_least, bad, unknown
from shiq_lab.hf.bfcl_calls import Call, Functions, parse_calls, show_calls

CATEGORIES = ("base", "miss_func", "miss_param", "long_context")
CHECKER = "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker"
EXECUTOR = "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils"
DOCUMENTS = {
    "GorillaFileSystem": "gorilla_file_system", "MathAPI": "math_api", "MessageAPI": "message_api", "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api", "TradingBot": "trading_bot", "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}  # fmt: skip
TASK = "Call functions to do what the user asks. Answer with a list such as [f(x=1), g()], or [] where none fits. Functions:"
MORE = "I have updated some more functions you can choose from. What about now?"  # what the benchmark says with no user turn
REPLY_CHARACTERS = 200
_PREFIX = "shiq"  # of the names of runs; a letter first (see _world)
_names = itertools.count()

Turns = Sequence[Sequence[Call]]


@dataclass(frozen=True)
class Entry:
    """A dialogue of the benchmark.

    turns       what the user says, a text a turn
    truth       the right calls a turn; no call where the user asks for what cannot be done
    functions   name -> parameters, of all classes; withheld: turn -> names that are told to the model only then
    """

    id: str
    classes: tuple[str, ...]
    config: Mapping[str, Any] = field(repr=False)
    turns: tuple[str, ...]
    truth: tuple[tuple[Call, ...], ...]
    functions: Functions = field(repr=False)
    withheld: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def number(self) -> str:
        """What the categories share: the same number is the same dialogue, varied."""
        return self.id.rpartition("_")[2]

    def first(self, turns: int) -> "Entry":
        """The entry cut to its first turns."""
        keep = at_least("turns", turns, 1)
        return replace(self, turns=self.turns[:keep], truth=self.truth[:keep])

    def narrowed(self, functions: int, *, seed: int = 0) -> "Entry":
        """The entry with fewer functions, for short prompts: those of the right answers, and others by a hash up to so many.

        The model is told of fewer, so the task is easier than the benchmark's.
        """
        used = {call.name for turn in self.truth for call in turn}
        rank = {name: _hash(f"{seed}:{self.number}:{name}") for name in self.functions}
        kept = sorted(self.functions, key=lambda name: (name not in used, rank[name]))
        kept = kept[: max(len(used), at_least("functions", functions, 1))]
        return replace(self, functions={name: given for name, given in self.functions.items() if name in kept})

    def parse(self, text: str) -> list[Call]:
        """parse_calls with this entry's functions."""
        return parse_calls(text, self.functions)

    def system(self) -> str:
        """The first message: the task, and a line for each function that is not withheld."""
        later = set(itertools.chain(*self.withheld.values()))
        return "\n".join([TASK, *(signature(self.classes, name) for name in self.functions if name not in later)])

    def user(self, turn: int) -> str:
        """What the user says in a turn, after the functions that become known in it."""
        return "\n".join([*(signature(self.classes, name) for name in self._told(turn)), self.turns[turn]])

    def _told(self, turn: int) -> list[str]:
        """The functions that become known in a turn."""
        return [name for name in self.withheld.get(turn, ()) if name in self.functions]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- the data
def _root() -> Path:
    """The package's folder; nothing of it is imported."""
    found = find_spec("bfcl_eval")
    if found is None or not found.submodule_search_locations:
        raise bad(
            "bfcl-eval", "the package to be installed", "none",
            "pip install --no-deps -r requirements-assets.txt (a plain install would downgrade numpy).",
        )  # fmt: skip
    return Path(next(iter(found.submodule_search_locations)))


def _lines(*parts: str) -> list[dict[str, Any]]:
    """A file of the package's data, a JSON object a line."""
    path = _root().joinpath("data", *parts)
    if not path.is_file():
        raise bad("bfcl-eval", f"a version that holds {path.name}", "one without it", "Version 2025.6.30.4 holds V3.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@cache
def documents(class_: str) -> dict[str, dict[str, Any]]:
    """A class's functions: name -> its parameters as documented (type, required, default); not to be changed."""
    if class_ not in DOCUMENTS:
        raise unknown("class", "one of the benchmark's", class_, DOCUMENTS)
    found = {}
    for line in _lines("multi_turn_func_doc", f"{DOCUMENTS[class_]}.json"):
        required = line["parameters"].get("required", [])
        given = line["parameters"]["properties"].items()
        found[line["name"]] = {name: {**what, "required": name in required} for name, what in given}
    return found


def functions_of(classes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """name -> parameters of the documented functions of some classes: what parse_calls lets through."""
    return {name: tuple(given) for class_ in classes for name, given in documents(class_).items()}


def signature(classes: Iterable[str], name: str) -> str:
    """A function in one line, `tail(file_name, lines=10)`: the documents are over ten times as long."""
    parameters = next(documents(class_)[name] for class_ in classes if name in documents(class_))
    shown = []
    for parameter, what in parameters.items():
        default = what.get("default")
        shown.append(parameter if what["required"] else f"{parameter}={None if default == 'None' else default!r}")
    return f"{name}({', '.join(shown)})"


def entries(category: str = "base", *, max_turns: int | None = None) -> list[Entry]:
    """The entries of a category, cut to max_turns.

    200 each, but 199 of "base": those whose answers have as many turns as the questions: where they differ, the official
    harness judges every model wrong. Raises ValueError where bfcl-eval is absent or another version.
    """
    if category not in CATEGORIES:
        raise unknown("category", "a category of the multi-turn part", category, CATEGORIES)
    name = f"BFCL_v3_multi_turn_{category}.json"
    answers = {line["id"]: line["ground_truth"] for line in _lines("possible_answer", name)}
    found = [_entry(line, answers[line["id"]]) for line in _lines(name) if len(line["question"]) == len(answers[line["id"]])]
    return found if max_turns is None else [entry.first(max_turns) for entry in found]


def _entry(line: Mapping[str, Any], answer: Sequence[Sequence[str]]) -> Entry:
    functions = functions_of(line["involved_classes"])
    return Entry(
        id=line["id"],
        classes=tuple(line["involved_classes"]),
        config=line["initial_config"],
        turns=tuple("\n".join(message["content"] for message in turn) or MORE for turn in line["question"]),
        truth=tuple(tuple(call for text in turn for call in parse_calls(text, functions)) for turn in answer),
        functions=functions,
        withheld={int(turn): tuple(names) for turn, names in line.get("missed_function", {}).items()},
    )


def split(found: Sequence[Entry], *, train: int, held_out: int, seed: int = 0) -> tuple[list[Entry], list[Entry]]:
    """Disjoint entries for training and for judging, ranked by a hash of the seed and the number: their order does not matter.

    Entries of one number (a dialogue and its variants in other categories) stay on one side.
    Raises ValueError where there are too few.
    """
    ranked = sorted(found, key=lambda entry: (_hash(f"{seed}:{entry.number}"), entry.id))
    first = ranked[: at_least("train", train, 1)]
    numbers = {entry.number for entry in first}
    rest = [entry for entry in ranked[train:] if entry.number not in numbers][: at_least("held_out", held_out, 1)]
    if len(first) < train or len(rest) < held_out:
        raise bad("train + held_out", f"at most the {len(found)} entries there are", f"{train} + {held_out}")
    return first, rest


# ------------------------------------------------------------------------------------------------- back ends and checker
@contextmanager
def _world() -> Iterator[str]:
    """A name for one run on the back ends, which keep their objects as module globals under it; purged afterwards.

    The name becomes part of an identifier: if it began with a digit, every call would fail alike, the right ones too, and
    wrong answers be judged valid. A count makes it fresh, so nothing depends on chance; the mathematical functions set the
    precision of `decimal` and mpmath for the whole process, which is put back.
    """
    executor, mpmath = importlib.import_module(EXECUTOR), importlib.import_module("mpmath")
    name = f"{_PREFIX}{next(_names)}"
    try:
        with localcontext(), mpmath.workprec(mpmath.mp.prec):
            yield name
    finally:
        for key in [key for key in vars(executor) if key.startswith(f"{name}_")]:
            del vars(executor)[key]


def _code(entry: Entry, calls: Turns) -> list[list[str]]:
    """What the official executor evaluates: each call written from literals and read once more, whoever made it."""
    _root()
    if len(calls) > len(entry.truth):
        raise bad("calls", f"at most {len(entry.truth)} turns, as {entry.id} has", str(len(calls)))
    for call in itertools.chain(*calls):
        if entry.parse(call.text) != [call]:
            raise bad("calls", "calls that parse_calls may give", call.text[:80])
    return [[call.code for call in turn] for turn in calls]


def execute(entry: Entry, calls: Turns) -> list[list[str]]:
    """The official back ends' replies to the calls of each turn, from the entry's initial state; a string a call.

    A call that raises gives the reply "Error during execution: ...", as officially.
    """
    code = _code(entry, calls)
    run: Callable[..., tuple[list[str], dict[str, Any]]] = importlib.import_module(EXECUTOR).execute_multi_turn_func_call
    with _world() as name:
        return [
            run(
                func_call_list=turn, initial_config=entry.config, involved_classes=list(entry.classes),
                model_name=name, test_entry_id=entry.id, long_context="long_context" in entry.id,
            )[0]
            for turn in code
        ]  # fmt: skip


def score(entry: Entry, calls: Turns) -> list[float]:
    """The reward of each turn: 1 if the official checker calls the turns up to it valid, else 0 (see the file's head)."""
    _code(entry, calls)
    rewards = [0.0] * len(calls)
    for t in range(len(calls)):
        if not verdict(entry, calls[: t + 1])["valid"]:
            break
        rewards[t] = 1.0
    return rewards


def verdict(entry: Entry, calls: Turns) -> dict[str, Any]:
    """What the official multi_turn_checker says of the first turns: "valid", and where not "error_type" and more.

    A turn's calls are one step; the checker puts the steps of a turn together in any case.
    """
    steps, truth = _code(entry, calls), _code(entry, entry.truth[: len(calls)])
    check: Callable[..., dict[str, Any]] = importlib.import_module(CHECKER).multi_turn_checker
    row = {"id": entry.id, "initial_config": entry.config, "involved_classes": list(entry.classes)}
    with _world() as name:
        return check([[turn] if turn else [] for turn in steps], truth, row, entry.id, name)


# --------------------------------------------------------------------------------------------------------- chat messages
def messages(entry: Entry, calls: Turns, *, reply_characters: int = REPLY_CHARACTERS) -> list[dict[str, str]]:
    """A trajectory as chat messages, up to the last assistant message: nothing that the policy chooses comes after it.

    System: the functions; user; assistant: the calls as text; tool: the replies of the turn, each cut to reply_characters.
    """
    replies = execute(entry, calls[:-1])
    out = [{"role": "system", "content": entry.system()}]
    for t, turn in enumerate(calls):
        out.append({"role": "user", "content": entry.user(t)})
        out.append({"role": "assistant", "content": show_calls(turn)})
        if t < len(replies) and replies[t]:
            out.append({"role": "tool", "content": shown_replies(replies[t], reply_characters)})
    return out


def shown_replies(replies: Sequence[str], characters: int = REPLY_CHARACTERS) -> str:
    """The replies of a turn as one tool message, a line each, each cut to so many characters."""
    return "\n".join(reply if len(reply) <= characters else f"{reply[:characters]}..." for reply in replies)
