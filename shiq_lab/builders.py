"""Builders: a TokenMDP from functions of a state, from functions of the prefix, or from a list of turns.

One mechanism, `from_states`: explore from the root, ask a function for each state's row. A prefix tree is the case where
the state is the prefix itself; turns are a prefix tree whose rows come from whose turn it is.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shiq_lab.errors import bad
from shiq_lab.mdp import PROBABILITY_TOLERANCE, TokenMDP

END = None  # as a successor: the episode ends


@dataclass(frozen=True)
class Row:
    """One state, by its allowed tokens alone: what is not named in `next` is forbidden.

    next       {token: successor state, or END}
    reward     {token: reward}, 0 where not named (policy states only)
    logits     {token: reference logit}, 0 where not named (policy states only)
    probs      {token: probability}: makes it an environment state
    """

    next: Mapping[int, Hashable]
    reward: Mapping[int, float] = field(default_factory=dict)
    logits: Mapping[int, float] = field(default_factory=dict)
    probs: Mapping[int, float] | None = None


def from_states(
    root: Hashable,
    describe: Callable[[Any], Row],
    n_tokens: int,
    *,
    max_states: int = 1_000_000,
    horizon: int | None = None,
    tokens: Sequence[str] | None = None,
    name: str = "",
) -> TokenMDP:
    """The automaton of all states reachable from `root`, breadth first; `describe(state)` gives each one's Row.

    Raises ValueError where a row names a token outside 0..n_tokens-1, or where more than max_states states appear.
    """
    index: dict[Hashable, int] = {root: 0}
    order: list[Hashable] = [root]
    rows: list[Row] = []
    while len(rows) < len(order):
        state = order[len(rows)]
        row = describe(state)
        if not isinstance(row, Row):
            raise bad("describe", "a Row for every state", repr(row)[:80], f"State {state!r}.")
        _check_row(row, state, n_tokens)
        for follow in row.next.values():
            if follow is not END and follow not in index:
                index[follow] = len(order)
                order.append(follow)
        if len(order) > max_states:
            raise bad("describe", f"at most {max_states} states", "more", "Raise max_states, or let the states repeat.")
        rows.append(row)
    shape = (len(rows), n_tokens)
    next_state, reward = np.full(shape, -1), np.zeros(shape)
    ref_logits = np.full(shape, -np.inf)
    for s, row in enumerate(rows):
        for token, follow in row.next.items():
            next_state[s, token] = -1 if follow is END else index[follow]
            reward[s, token] = row.reward.get(token, 0.0)
            if row.probs is None:
                ref_logits[s, token] = row.logits.get(token, 0.0)
            elif row.probs.get(token, 0.0) > 0:
                ref_logits[s, token] = np.log(row.probs[token])
    return TokenMDP(
        next_state,
        reward,
        ref_logits,
        is_policy=np.array([row.probs is None for row in rows]),
        horizon=horizon,
        tokens=None if tokens is None else tuple(tokens),
        name=name,
    )


def _check_row(row: Row, state: Hashable, n_tokens: int) -> None:
    for name, entries in (
        ("next", row.next),
        ("reward", row.reward),
        ("logits", row.logits),
        ("probs", row.probs or {}),
    ):
        for token in entries:
            if not isinstance(token, (int, np.integer)) or not 0 <= token < n_tokens:
                raise bad(name, f"tokens from 0 to {n_tokens - 1}", f"{token!r} in state {state!r}")
            if token not in row.next and name != "probs":
                raise bad(name, "only tokens that `next` allows", f"{token!r} in state {state!r}")
    for token in row.probs or {}:
        if row.probs is not None and row.probs[token] > 0 and token not in row.next:
            raise bad("probs", "only tokens that `next` allows", f"{token!r} in state {state!r}")


def prefix_tree(describe: Callable[[tuple[int, ...]], Row], n_tokens: int, **options: Any) -> TokenMDP:
    """A prefix tree: `describe(prefix)` returns a Row whose `next` values are True (go on) or END, one a token.

    The state after token a is the prefix + (a,); no two strings meet again, so rewards may depend on everything said.
    """

    def row(prefix: tuple[int, ...]) -> Row:
        said = describe(prefix)
        return replace(said, next={a: END if go is END else (*prefix, int(a)) for a, go in said.next.items()})

    return from_states((), row, n_tokens, **options)


@dataclass(frozen=True)
class Say:
    """An environment turn: one of several strings, by probability. `replies` may be a function of all tokens so far.

    replies: {string of tokens: probability}; strings may share beginnings, but none may be the beginning of another.
    """

    replies: Mapping[tuple[int, ...], float] | Callable[[tuple[int, ...]], Mapping[tuple[int, ...], float]]


@dataclass(frozen=True)
class Act:
    """A policy turn of at most `length` tokens out of `allowed`; `stop`, where given, ends it sooner."""

    length: int
    allowed: Sequence[int]
    stop: int | None = None


def from_turns(
    turns: Sequence[Say | Act],
    reward: Callable[[tuple[int, ...]], float],
    n_tokens: int,
    **options: Any,
) -> TokenMDP:
    """A dialogue as a prefix tree: turns in order, the episode ends after the last.

    reward(prefix) is paid on the policy token that ends the prefix; it is called for every prefix that ends in one.
    """
    if not turns:
        raise bad("turns", "at least one turn", "none")
    for i, turn in enumerate(turns):
        if not isinstance(turn, (Say, Act)):
            raise bad("turns", "Say(...) or Act(...)", f"{turn!r} at position {i}")
        if isinstance(turn, Act) and (turn.length < 1 or not turn.allowed):
            raise bad("turns", "an Act of length >= 1 with an allowed token", f"{turn!r} at position {i}")
    replies: dict[tuple[tuple[int, ...], int], Mapping[tuple[int, ...], float]] = {}

    def options_after(prefix: tuple[int, ...], turn: int) -> Mapping[tuple[int, ...], float]:
        said = turns[turn]
        if (prefix, turn) not in replies and isinstance(said, Say):
            replies[prefix, turn] = said.replies(prefix) if callable(said.replies) else said.replies
        return replies[prefix, turn]

    def step(state: tuple[tuple[int, ...], int, int], token: int) -> Hashable:
        """(prefix, turn, tokens said in this turn) after one more token."""
        prefix, turn, said = state
        prefix, said = (*prefix, int(token)), said + 1
        now = turns[turn]
        if isinstance(now, Act):
            over = said == now.length or token == now.stop
        else:
            over = prefix[-said:] in options_after(prefix[:-said], turn)
        if not over:
            return prefix, turn, said
        return END if turn + 1 == len(turns) else (prefix, turn + 1, 0)

    def row(state: tuple[tuple[int, ...], int, int]) -> Row:
        prefix, turn, said = state
        now = turns[turn]
        if isinstance(now, Act):
            allowed = dict.fromkeys([*now.allowed, *([] if now.stop is None else [now.stop])])
            return Row(next={a: step(state, a) for a in allowed}, reward={a: reward((*prefix, a)) for a in allowed})
        begun = prefix[len(prefix) - said :]
        mass: dict[int, float] = {}
        for reply, probability in options_after(prefix[: len(prefix) - said], turn).items():
            if not reply or not probability > 0:
                raise bad("turns", "replies of at least one token and of probability > 0", f"{reply!r}: {probability!r}")
            if reply[:said] == begun:
                if len(reply) == said:
                    raise bad("turns", "no reply that is the beginning of another", f"{reply!r}")
                mass[reply[said]] = mass.get(reply[said], 0.0) + probability
        total = sum(mass.values())
        if not said and abs(total - 1) > PROBABILITY_TOLERANCE:
            raise bad("turns", "replies whose probabilities sum to 1", f"{total!r} after {prefix!r}")
        return Row(next={a: step(state, a) for a in mass}, probs={a: p / total for a, p in mass.items()})

    return from_states(((), 0, 0), row, n_tokens, **options)


def random_reference(mdp: TokenMDP, seed: int, *, scale: float = 1.0, level: float = 3.0) -> TokenMDP:
    """The same automaton with random reference logits: normal of the given scale, plus a level uniform in [-level, level].

    The level differs in every state, as a pretrained model's does; with level = 0 and log-softmax rows the shift of the
    derivation's step 2 would be a no-op and no test of it would mean anything. Environment rows stay.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, scale, mdp.ref_logits.shape) + rng.uniform(-level, level, (mdp.n_states, 1))
    keep = mdp.is_policy[:, None] & mdp.allowed
    return replace(mdp, ref_logits=np.where(keep, logits, mdp.ref_logits))
