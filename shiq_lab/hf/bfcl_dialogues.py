"""Off-policy dialogues from BFCL V3: right answers, and wrong ones made from them, judged by the official checker.

Nobody's model wrote them: each entry's right calls, and the same with one thing changed. The back ends run them all, so
the tool replies are what such calls would really have met.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shiq_lab.errors import unknown
from shiq_lab.hf.bfcl import REPLY_CHARACTERS, Entry, documents, messages, score
from shiq_lab.hf.bfcl_calls import Call, show_calls

Perturbation = Callable[[Entry, list[list[Call]], np.random.Generator], bool]


def _spot(
    calls: list[list[Call]], rng: np.random.Generator, fits: Callable[[Call], bool] = lambda call: True
) -> tuple[int, int]:
    """A call among those that fit, as (turn, place); (-1, -1) if there is none."""
    places = [(t, i) for t, turn in enumerate(calls) for i, call in enumerate(turn) if fits(call)]
    return places[int(rng.integers(len(places)))] if places else (-1, -1)


def wrong_argument(entry: Entry, calls: list[list[Call]], rng: np.random.Generator) -> bool:
    """Another value of the same type for one argument: one that the entry uses elsewhere, if there is."""
    t, i = _spot(calls, rng, lambda call: bool(call.values()))
    if t < 0:
        return False
    call = calls[t][i]
    place = int(rng.integers(len(call.values())))
    old = call.values()[place]
    others = [v for turn in entry.truth for c in turn for v in c.values() if type(v) is type(old) and v != old]
    new = others[int(rng.integers(len(others)))] if others else _changed(old)
    values = call.values()
    values[place] = new
    k = len(call.arguments)
    keywords = tuple((name, value) for (name, _), value in zip(call.keywords, values[k:], strict=True))
    calls[t][i] = replace(call, arguments=tuple(values[:k]), keywords=keywords)
    return True


def _changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return f"{value}_2"
    return [*value, "other"] if isinstance(value, list) else None


def dropped_call(entry: Entry, calls: list[list[Call]], rng: np.random.Generator) -> bool:
    """One call left out, of a turn that has several."""
    places = [t for t, turn in enumerate(calls) if len(turn) > 1]
    if not places:
        return False
    turn = calls[places[int(rng.integers(len(places)))]]
    del turn[int(rng.integers(len(turn)))]
    return True


def swapped_function(entry: Entry, calls: list[list[Call]], rng: np.random.Generator) -> bool:
    """Another function in a call's place, one that takes as many arguments, renamed to its parameters."""
    t, i = _spot(calls, rng)
    if t < 0:
        return False
    values = calls[t][i].values()
    fitting = [name for name in entry.functions if name != calls[t][i].name and _takes(entry, name, len(values))]
    if not fitting:
        return False
    name = fitting[int(rng.integers(len(fitting)))]
    calls[t][i] = Call(name, (), tuple(zip(entry.functions[name], values, strict=False)))
    return True


def _takes(entry: Entry, name: str, n: int) -> bool:
    """Whether a function can be called with n arguments."""
    parameters = next(documents(class_)[name] for class_ in entry.classes if name in documents(class_))
    return sum(what["required"] for what in parameters.values()) <= n <= len(parameters)


def repeated_call(entry: Entry, calls: list[list[Call]], rng: np.random.Generator) -> bool:
    """A call made twice in a row; often harmless, so the checker may still call it valid."""
    t, i = _spot(calls, rng)
    if t >= 0:
        calls[t].insert(i, calls[t][i])
    return t >= 0


def empty_turn(entry: Entry, calls: list[list[Call]], rng: np.random.Generator) -> bool:
    """A turn without calls."""
    t, _ = _spot(calls, rng)
    if t >= 0:
        calls[t].clear()
    return t >= 0


PERTURBATIONS: dict[str, Perturbation] = {
    "wrong argument": wrong_argument,
    "dropped call": dropped_call,
    "swapped function": swapped_function,
    "repeated call": repeated_call,
    "empty turn": empty_turn,
}
TRUTH = "truth"


def perturbed(entry: Entry, kind: str, seed: int) -> list[list[Call]] | None:
    """The entry's right calls with one change; None where there is no place for it, or parse_calls would refuse it."""
    digest = hashlib.sha256(f"{seed}:{entry.id}:{kind}".encode()).digest()
    calls = [list(turn) for turn in entry.truth]
    if not PERTURBATIONS[kind](entry, calls, np.random.default_rng(list(digest))):
        return None
    try:
        for turn in calls:
            entry.parse(show_calls(turn))
    except ValueError:  # a large number where it would cost too much
        return None
    return calls


def dialogues(
    found: Sequence[Entry],
    *,
    seed: int,
    perturbations: Sequence[str] = tuple(PERTURBATIONS),
    reply_characters: int = REPLY_CHARACTERS,
) -> list[dict[str, Any]]:
    """For each entry the right answers and perturbed ones, run on the back ends and judged by the official checker.

    A row: `messages` (see messages), `rewards` (score, one an assistant message), `group` (the place of the entry), `right`
    (all turns valid), `entry` (its id), `kind` ("truth" or the perturbation). Left out is a perturbation that an entry has no
    place for, or whose calls are another row's. All rows spell calls alike, so right and wrong differ in what they call,
    never in how it is written. An entry's rows depend on the seed and its id alone.
    """
    for kind in perturbations:
        if kind not in PERTURBATIONS:
            raise unknown("perturbations", "names of perturbations", kind, PERTURBATIONS)
    rows = []
    for group, entry in enumerate(found):
        made = [(TRUTH, [list(turn) for turn in entry.truth])]
        for kind in perturbations:
            calls = perturbed(entry, kind, seed)
            if calls is not None and calls not in [other for _, other in made]:
                made.append((kind, calls))
        for kind, calls in made:
            rewards = score(entry, calls)
            row = {"messages": messages(entry, calls, reply_characters=reply_characters), "rewards": rewards, "group": group}
            rows.append({**row, "right": all(rewards), "entry": entry.id, "kind": kind})
    return rows
