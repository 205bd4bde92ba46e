"""Rows for component checks: dialogues as lists of turns, laid out with either padding side. Truths are read off the lists."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.checks.components.subject import Case, Component

EOS, PAD = 2, 0  # ordinary tokens are 3 to 10
PROMPT, POLICY, OBSERVATION, PADDING = 0, 1, 2, -1


@dataclass(frozen=True)
class Talk:
    """One row before padding: turns (role, tokens), and whether it ended by itself."""

    turns: tuple[tuple[int, tuple[int, ...]], ...]
    terminated: bool

    @property
    def ids(self) -> list[int]:
        """All tokens in order."""
        return [token for _, tokens in self.turns for token in tokens]

    @property
    def roles(self) -> list[int]:
        """Who said each token."""
        return [role for role, tokens in self.turns for _ in tokens]

    @property
    def actions(self) -> list[int]:
        """Positions of policy tokens, counted from the row's first real token."""
        return [i for i, role in enumerate(self.roles) if role == POLICY]


def talk(*turns: tuple[int, tuple[int, ...]], terminated: bool) -> Talk:
    """A talk from its turns, each (role, tokens)."""
    return Talk(turns, terminated)


# Prompts and answers end with EOS, as chat templates have it: an EOS in the middle of a row is no end. Lengths all differ.
PLAIN = (
    talk((PROMPT, (3, 4, EOS)), (POLICY, (5, 6, 7, EOS)), terminated=True),
    talk((PROMPT, (8,)), (POLICY, (EOS,)), terminated=True),
    talk((PROMPT, (9, 3)), (POLICY, (4, 5, 6, 7, 8, 9)), terminated=False),
    talk((PROMPT, (10, 9, 8, 7, EOS)), terminated=False),  # an empty completion
    talk((PROMPT, (6, EOS)), (POLICY, (10, 3, EOS)), terminated=True),
)
TURNS = (
    talk((PROMPT, (3, 5, 7, EOS)), (POLICY, (4, EOS)), (OBSERVATION, (9, 9, 8)), (POLICY, (6, 5, EOS)), terminated=True),
    talk((PROMPT, (8, EOS)), (POLICY, (7, 6)), (OBSERVATION, (10, EOS)), (POLICY, (3, 4, 5, 6)), terminated=False),
    PLAIN[0],
    talk(
        (PROMPT, (5,)),
        (POLICY, (6,)),
        (OBSERVATION, (7, 8)),
        (POLICY, (9,)),
        (OBSERVATION, (3,)),
        (POLICY, (EOS,)),
        terminated=True,
    ),
)
# A row that stops after a reply: its last real token is no action.
TRAILING = talk((PROMPT, (4, EOS)), (POLICY, (8, 9, 10)), (OBSERVATION, (6, 7)), terminated=False)


@dataclass(frozen=True, eq=False)
class Rows:
    """Talks laid out as a padded batch."""

    talks: tuple[Talk, ...]
    side: str = "right"
    pad_id: int = PAD
    extra: int = 0

    @cached_property
    def width(self) -> int:
        """L: the longest row and the extra padding."""
        return max(len(t.ids) for t in self.talks) + self.extra

    def spread(self, per_row: list[list[Any]], fill: Any) -> Tensor:
        """Lists a row as one padded tensor [B, L]."""
        left = self.side == "left"
        empty = lambda row: [fill] * (self.width - len(row))  # noqa: E731
        return torch.tensor([empty(r) + list(r) if left else list(r) + empty(r) for r in per_row])

    @cached_property
    def input_ids(self) -> Tensor:
        """int[B, L], padded with pad_id."""
        return self.spread([t.ids for t in self.talks], self.pad_id)

    @cached_property
    def attention_mask(self) -> Tensor:
        """{0, 1}[B, L]: 0 on padding."""
        return self.spread([[1] * len(t.ids) for t in self.talks], 0)

    @cached_property
    def completion_mask(self) -> Tensor:
        """{0, 1}[B, L]: 1 on the policy's tokens."""
        return self.spread([[int(r == POLICY) for r in t.roles] for t in self.talks], 0)

    @cached_property
    def roles(self) -> Tensor:
        """int[B, L]: who said each token, PADDING on padding."""
        return self.spread([t.roles for t in self.talks], PADDING)

    @cached_property
    def terminated(self) -> Tensor:
        """bool[B]."""
        return torch.tensor([t.terminated for t in self.talks])

    @cached_property
    def lengths(self) -> Tensor:
        """int[B]: real tokens."""
        return torch.tensor([len(t.ids) for t in self.talks])

    @cached_property
    def actions(self) -> list[list[int]]:
        """Columns of every row's policy tokens."""
        shift = [self.width - len(t.ids) if self.side == "left" else 0 for t in self.talks]
        return [[i + s for i in t.actions] for t, s in zip(self.talks, shift, strict=True)]

    @cached_property
    def last_real(self) -> list[int]:
        """The place of every row's last real token."""
        return [self.width - 1 if self.side == "left" else len(t.ids) - 1 for t in self.talks]

    def common(self) -> dict[str, Any]:
        """The arguments that most kinds offer."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "completion_mask": self.completion_mask,
            "lengths": self.lengths,
            "terminated": self.terminated,
            "truncated": ~self.terminated,
            "pad_id": self.pad_id,
            "eos_id": EOS,
            "side": self.side,
        }

    def random(self, seed: int, off_actions: float = 0.0) -> Tensor:
        """Standard normal numbers on actions, float[B, L]; off them `off_actions` times another."""
        rng = np.random.default_rng(seed)
        on, off = torch.from_numpy(rng.normal(size=(2, len(self.talks), self.width)))
        return torch.where(self.completion_mask == 1, on, off_actions * off)


def strata(component: Component, *, trailing: bool = False, nonempty: bool = False) -> Iterator[tuple[str, str, Rows]]:
    """(code, name, rows): unequal lengths, both sides, pad = EOS, cut rows, two turns, single rows, another order.

    trailing adds rows whose last token is no action; nonempty leaves out empty completions.
    """
    sides = component.padding
    plain = tuple(t for t in PLAIN if t.actions or not nonempty)
    turns = (*TURNS, TRAILING) if trailing else TURNS
    ended, stopped = (tuple(t for t in plain if t.terminated is end) for end in (True, False))
    first = sides[0]
    yield "OR", f"rows of unequal length, {first} padding", Rows(plain, first)
    yield "TE", "rows that ended, pad id = EOS id", Rows(ended, first, EOS)
    yield "TE", "rows that were cut, pad id = EOS id", Rows(stopped, first, EOS, 1)
    for side in sides:
        yield "PAD", f"{side} padding", Rows(plain, side)
        yield "PAD", f"{side} padding, three columns wider, pad id = EOS id", Rows(plain, side, EOS, 3)
        if component.multi_turn:
            yield "MT", f"two turns with observation tokens, {side} padding", Rows(turns, side)
            yield "MT", f"two turns with observation tokens, {side} padding, pad id = EOS id", Rows(turns, side, EOS, 2)
    for i, one in enumerate(plain):
        yield "BS", f"row {i} alone", Rows((one,), first)
    yield "BS", "the rows in reverse order", Rows(plain[::-1], first)


Build = Callable[[Rows], Iterator[tuple[dict[str, Any], Tensor, Tensor | None, float]]]


def build_cases(component: Component, build: Build, axes: tuple[str, ...] = ("row", "position"), **options: bool) -> list[Case]:
    """Cases of all strata; `build` gives (arguments, expected, live, tolerance) for rows. What has nothing live is left out."""
    cases = []
    for code, name, rows in strata(component, **options):
        for arguments, expected, live, tolerance in build(rows):
            if live is None or live.any():
                cases.append(Case(code, name, {**rows.common(), **arguments}, expected, tolerance, live, axes=axes))
    return cases


def no_turns(component: Component) -> dict[str, str]:
    """The reason to skip MT."""
    return {} if component.multi_turn else {"MT": "declared: multi_turn=False"}
