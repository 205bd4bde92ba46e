"""Row: one tokenised training row, the currency of everything in hf/; checks that name row and column; cutting to a length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from shiq_lab.errors import at_least, bad, is_real, is_whole

SHOWN = 5  # offending rows that a message lists; the rest is counted
_BLOCK = 4096  # rows joined at a time: keeps the check's memory small against the data's
_TOKEN_COLUMNS = ("input_ids", "completion_mask", "rewards")
_PROMPT_REMEDY = "Put a beginning-of-sequence token before it."


@dataclass(frozen=True)
class Row:
    """One row of tokens: prompt, answer, tool replies, whatever its format was.

    input_ids        int a token
    completion_mask  {0, 1} a token   1 = chosen by the policy
    rewards          float a token    paid for that token; 0 where the policy did not choose
    terminated       False = the row was cut, and the next token would have been the policy's
    weight           float >= 0
    group            int              same prompt, same number
    """

    input_ids: list[int]
    completion_mask: list[int]
    rewards: list[float]
    terminated: bool = True
    weight: float = 1.0
    group: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


class Problem(NamedTuple):
    """What is wrong with one column of one row."""

    row: int
    column: str
    expected: str
    found: str
    remedy: str = ""


def check_rows(rows: Sequence[Row], *, vocabulary: int, name: str = "train_dataset") -> None:
    """Raise a ValueError that names row and column of the first few rows that cannot be trained on; silent if all can.

    Asked: lengths that agree, whole tokens from 0 to vocabulary - 1, a mask of 0 and 1, at least one action and none at the
    first token (nothing scores it), finite rewards and none off the actions (it would be ignored in silence), terminated
    bool, weight finite and >= 0, group whole. Rows are joined in blocks and asked together, as data sets are large.
    """
    if len(rows) == 0:
        raise bad(name, "at least one row", "none")
    raise_problems(row_problems(rows, vocabulary), name)


def row_problems(rows: Sequence[Row], vocabulary: int) -> list[Problem]:
    """All that check_rows asks, as a list of what does not hold."""
    at_least("vocabulary", vocabulary, 1)
    problems: list[Problem] = []
    for start in range(0, len(rows), _BLOCK):
        arrays: dict[int, list[np.ndarray]] = {}
        for number in range(start, min(start + _BLOCK, len(rows))):
            found = list(_plain_problems(number, rows[number]))
            problems += found
            if not found:
                arrays[number] = [np.asarray(getattr(rows[number], column)) for column in _TOKEN_COLUMNS]
        problems += _token_problems(arrays, vocabulary)
    return problems


def raise_problems(problems: Sequence[Problem], name: str) -> None:
    """The one ValueError for a list of problems, the first rows in full and the others counted; nothing if there are none."""
    if not problems:
        return
    first: dict[int, Problem] = {}
    for p in problems:
        first.setdefault(p.row, p)
    shown = sorted(first)[:SHOWN]
    lines = [str(bad(f"{name} row {p.row}, column {p.column}", *p[2:])) for p in (first[row] for row in shown)]
    more = len(first) - len(shown)
    raise ValueError("\n".join([*lines, *([f"... and {more} more rows."] if more else [])]))


def _plain_problems(number: int, row: object) -> Iterator[Problem]:
    """What a row's types, lengths and single values say."""
    if not isinstance(row, Row):
        yield Problem(number, "(all)", "a Row", type(row).__name__, "Make rows with formats.to_rows.")
        return
    for column, kind in zip(_TOKEN_COLUMNS, ("whole numbers", "0 and 1", "numbers"), strict=True):
        wrong = list_fault(getattr(row, column), whole=column != "rewards")
        if wrong:
            yield Problem(number, column, f"a list of {kind}", wrong)
            return
    lengths = [len(getattr(row, column)) for column in _TOKEN_COLUMNS]
    for column, length in zip(_TOKEN_COLUMNS[1:], lengths[1:], strict=True):
        if length != lengths[0]:
            yield Problem(number, column, f"{lengths[0]} entries, as input_ids", str(length))
    if lengths[0] == 0:
        yield Problem(number, "input_ids", "at least two tokens, the last of them the policy's", "an empty list")
    if not isinstance(row.terminated, (bool, np.bool_)):
        yield Problem(number, "terminated", "True or False", repr(row.terminated))
    if not is_real(row.weight) or not 0 <= row.weight < float("inf"):
        yield Problem(number, "weight", "a finite number >= 0", repr(row.weight))
    if not is_whole(row.group) or not -(2**63) <= row.group < 2**63:
        yield Problem(number, "group", "a whole number", repr(row.group))


def list_fault(values: Any, *, whole: bool) -> str:
    """What `values` is if it is not a flat list of numbers, else nothing."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        return "a ragged or foreign value"
    if array.ndim != 1:
        return f"{type(values).__name__} of shape {array.shape}"
    if array.size and not np.can_cast(array.dtype, np.int64 if whole else np.float64):
        return f"entries such as {next((v for v in values if not (is_whole(v) if whole else is_real(v))), values[0])!r}"
    return ""


def _token_problems(arrays: dict[int, list[np.ndarray]], vocabulary: int) -> list[Problem]:
    """What the tokens of many rows say, all rows joined; keys are row numbers, values the three token columns."""
    if not arrays:
        return []
    numbers, sizes = list(arrays), [len(columns[0]) for columns in arrays.values()]
    ids, mask, rewards = (np.concatenate(column) for column in zip(*arrays.values(), strict=True))
    owner = np.repeat(np.arange(len(numbers)), sizes)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    problems: list[Problem] = []

    def report(column: str, expected: str, where: np.ndarray, values: np.ndarray, remedy: str = "") -> None:
        """A row's first offender of this kind."""
        flat = np.flatnonzero(where)
        for i in flat[np.unique(owner[flat], return_index=True)[1]]:
            token = f"{values[i]} at token {i - starts[owner[i]]}"
            problems.append(Problem(numbers[owner[i]], column, expected, token, remedy))

    report("input_ids", f"tokens from 0 to {vocabulary - 1}", (ids < 0) | (ids >= vocabulary), ids)
    report("completion_mask", "only 0 and 1", (mask != 0) & (mask != 1), mask)
    report("rewards", "finite numbers", ~np.isfinite(rewards), rewards)
    stray = (mask == 0) & (rewards != 0) & np.isfinite(rewards)
    report("rewards", "0 where completion_mask is 0: no action is paid there", stray, rewards)
    lead = np.zeros(len(ids), dtype=bool)
    lead[starts] = mask[starts] == 1
    report(
        "completion_mask", "0 at the first token (an empty prompt: nothing scores its first action)", lead, mask, _PROMPT_REMEDY
    )
    for i in np.flatnonzero(np.bincount(owner[mask == 1], minlength=len(numbers)) == 0):
        problems.append(Problem(numbers[i], "completion_mask", "at least one action, a 1", "an empty completion"))
    return problems


def cut_row(row: Row, max_length: int) -> Row | None:
    """The row if it has at most max_length tokens, else its beginning, marked as not terminated; None if no action is left.

    A cut row bootstraps after its last token, which must be a policy state: so the first token that falls away is an action,
    by the rule of `shiq_lab.batch.cut`, and a cut inside an environment turn goes back to before the last action.
    """
    at_least("max_length", max_length, 1)
    if len(row) <= max_length:
        return row
    keep = next((i for i in range(max_length, -1, -1) if row.completion_mask[i] == 1), 0)
    if not any(row.completion_mask[:keep]):
        return None
    columns = {column: getattr(row, column)[:keep] for column in _TOKEN_COLUMNS}
    return replace(row, **columns, terminated=False)
