"""Builders: a TokenMDP from functions of a state, from functions of the prefix, or from a list of turns.

One mechanism, `from_states`: explore from the root, ask a function for each state's row. A prefix tree is the case where
the state is the prefix itself; turns are a prefix tree whose rows come from whose turn it is.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shiq_lab.errors import at_least, bad, is_real, is_whole
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
    n_tokens, max_states = at_least("n_tokens", n_tokens, 1), at_least("max_states", max_states, 1)
    _check_callable("describe", describe)
    if root is END or not _hashable(root):
        raise bad("root", "a hashable state that is not END", repr(root)[:80], "Use a tuple for a list.")
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
        tokens=tokens,  # type: ignore[arg-type]  # TokenMDP makes a tuple of it
        name=name,
    )


def _check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise bad(name, "a function", repr(value)[:80])


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _check_row(row: Row, state: Hashable, n_tokens: int) -> None:
    """A ValueError, naming the state as its builder knows it, for a Row that says what no automaton can hold."""
    place = f"in state {state!r}"
    kinds: tuple[tuple[str, Any, str, Callable[[Any], bool]], ...] = (
        ("next", row.next, "hashable states or END", _hashable),
        ("reward", row.reward, "finite numbers", lambda x: is_real(x) and abs(x) < np.inf),
        ("logits", row.logits, "numbers, or -inf where a token is forbidden", lambda x: is_real(x) and x < np.inf),
        (
            "probs",
            {} if row.probs is None else row.probs,
            "probabilities",
            lambda x: is_real(x) and 0 <= x <= 1 + PROBABILITY_TOLERANCE,
        ),
    )
    for name, entries, expected, fits in kinds:
        if not isinstance(entries, Mapping):
            raise bad(name, "a dict from tokens", f"{entries!r} {place}")
        for token, value in entries.items():
            if not is_whole(token) or not 0 <= token < n_tokens:
                raise bad(name, f"tokens from 0 to {n_tokens - 1}", f"{token!r} {place}")
            if token not in row.next and not (name == "probs" and value == 0):
                raise bad(name, "only tokens that `next` allows", f"{token!r} {place}")
            if not fits(value):
                raise bad(name, expected, f"{value!r} for token {token} {place}")
    if not row.next:
        raise bad("next", "at least one allowed token", f"none {place}")
    if row.probs is not None:
        for name, entries in (("reward", row.reward), ("logits", row.logits)):
            if any(entries.values()):
                raise bad(name, "none in a Row with probs, where the environment speaks", f"{entries!r} {place}")
        total = sum(row.probs.values())
        if abs(total - 1) > PROBABILITY_TOLERANCE:
            raise bad("probs", "probabilities that sum to 1", f"a sum of {total:.12g} {place}")


def prefix_tree(describe: Callable[[tuple[int, ...]], Row], n_tokens: int, **options: Any) -> TokenMDP:
    """A prefix tree: `describe(prefix)` returns a Row whose `next` values are True (go on) or END, one a token.

    The state after token a is the prefix + (a,); no two strings meet again, so rewards may depend on everything said.
    """

    n_tokens = at_least("n_tokens", n_tokens, 1)
    _check_callable("describe", describe)

    def row(prefix: tuple[int, ...]) -> Row:
        said = describe(prefix)
        if not isinstance(said, Row):
            return said  # from_states says what is wrong
        _check_row(said, prefix, n_tokens)
        for a, go in said.next.items():
            if go is not END and go is not True:
                raise bad("next", "True (go on) or END", f"{go!r} for token {a} in state {prefix!r}")
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
    _check_turns(turns)
    _check_callable("reward", reward)
    replies: dict[tuple[tuple[int, ...], int], Mapping[tuple[int, ...], float]] = {}

    def options_after(prefix: tuple[int, ...], turn: int) -> Mapping[tuple[int, ...], float]:
        said = turns[turn]
        if (prefix, turn) not in replies and isinstance(said, Say):
            replies[prefix, turn] = said.replies(prefix) if callable(said.replies) else said.replies
            _check_replies(replies[prefix, turn], prefix)
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
            if reply[:said] == begun:
                mass[reply[said]] = mass.get(reply[said], 0.0) + probability
        total = sum(mass.values())
        return Row(next={a: step(state, a) for a in mass}, probs={a: p / total for a, p in mass.items()})

    return from_states(((), 0, 0), row, n_tokens, **options)


def _check_turns(turns: Sequence[Say | Act]) -> None:
    if not isinstance(turns, Sequence) or not turns:
        raise bad("turns", "a list of at least one turn", repr(turns)[:80])
    for i, turn in enumerate(turns):
        if not isinstance(turn, (Say, Act)):
            raise bad("turns", "Say(...) or Act(...)", f"{turn!r} at position {i}")
        if isinstance(turn, Act) and (
            not is_whole(turn.length) or turn.length < 1 or not isinstance(turn.allowed, Sequence) or not turn.allowed
        ):
            raise bad("turns", "an Act of whole length >= 1 with a list of allowed tokens", f"{turn!r} at position {i}")


def _check_replies(replies: Mapping[tuple[int, ...], float], prefix: tuple[int, ...]) -> None:
    """What a Say offers after a prefix: non-empty tuples, none the beginning of another, probabilities that sum to 1."""
    place = f"after {prefix!r}"
    if not isinstance(replies, Mapping):
        raise bad("turns", "a Say whose replies are a dict {(token, ...): probability}", f"{replies!r} {place}")
    for reply, probability in replies.items():
        if not isinstance(reply, tuple) or not reply:
            raise bad("turns", "replies that are tuples of at least one token", f"{reply!r} {place}")
        if not is_real(probability) or not probability > 0:
            raise bad("turns", "replies of probability > 0", f"{probability!r} for {reply!r} {place}")
        longer = [other for other in replies if other[: len(reply)] == reply and other != reply]
        if longer:
            raise bad("turns", "no reply that is the beginning of another", f"{reply!r} and {longer[0]!r} {place}")
    total = sum(replies.values())
    if abs(total - 1) > PROBABILITY_TOLERANCE:
        raise bad("turns", "replies whose probabilities sum to 1", f"a sum of {total:.12g} {place}")


def random_reference(mdp: TokenMDP, seed: int, *, scale: float = 1.0, level: float = 3.0) -> TokenMDP:
    """The same automaton with random reference logits: normal of the given scale, plus a level uniform in [-level, level].

    The level differs in every state, as a pretrained model's does; with level = 0 and log-softmax rows the shift of the
    derivation's step 2 would be a no-op and no test of it would mean anything. Environment rows stay.
    """
    for name, value in (("scale", scale), ("level", level)):
        if not is_real(value) or not 0 <= value < np.inf:
            raise bad(name, "a finite number >= 0", repr(value))
    rng = np.random.default_rng(at_least("seed", seed, 0))
    logits = rng.normal(0.0, scale, mdp.ref_logits.shape) + rng.uniform(-level, level, (mdp.n_states, 1))
    keep = mdp.is_policy[:, None] & mdp.allowed
    return replace(mdp, ref_logits=np.where(keep, logits, mdp.ref_logits))
