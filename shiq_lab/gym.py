"""TokenEnv and TokenVectorEnv: the one gymnasium environment that plays any TokenMDP, and its registration.

The policy is the agent; environment states (prompts, turns, tool replies) are played inside `reset` and `step`. So one
step is one policy token, and both environments stop only in policy states or when the episode is over.

Observation  the tokens so far, int32[max_tokens], padded with V (one more than the last token)
Action       a token, 0 .. V - 1
Reward       mdp.reward of the policy's token
terminated   the automaton ended, or its horizon of policy tokens is spent, or the action was a forbidden one (below)
truncated    the next action and the longest reply to it might not fit into max_tokens
info         "state" int, -1 once the automaton has ended; "action_mask" int8[V], 1 = allowed (what `Discrete.sample` takes;
             all 1 once the episode is over); "length" int, the tokens so far

The longest episode is the default max_tokens, and then nothing is ever truncated; where policy tokens can go on for ever
the default is 64, or twice what the first action needs. A row is truncated in a policy state, so v* is there to bootstrap
from; only a reply that has no longest length (a loop of environment states) can be cut inside, and then info["state"] is
an environment state.

Rebuilding rows. observation[:length] is the whole row, for the single and the vector environment alike: with NEXT_STEP
autoreset the last observation and info of an episode come with its `terminated` or `truncated`, and the step after that
only resets (its action is ignored, its reward 0). The row alone says the rest (walk it through the automaton); without a
walk, the policy's token of a step stands at the length before it. A batch's `terminated` is info["state"] == -1.

A forbidden action is no edge of the automaton, so no row can hold it: with on_forbidden="end" (default) the episode is
terminated with reward 0 and the token is not written; info["state"] still names the policy state, and the row is a
truthful one that was cut there. on_forbidden="raise" makes it a ValueError.

Randomness. A seeded reset draws one 64-bit key; the random reply at position n of episode e is a hash of (key, e, n). So
a seed fixes every episode that follows, and the vector environment needs no loop over its sub-environments.
"""

import os
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete, MultiDiscrete
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from shiq_lab.envs import ENVIRONMENTS, make
from shiq_lab.errors import bad, is_whole
from shiq_lab.graph import Block, Bools, Floats, Ints, blocks, reachable_from
from shiq_lab.mdp import TokenMDP

END, FORBIDDEN = -1, -2  # as successors; as indices they are the two rows after the states' own
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the step of splitmix64 (Steele, Lea and Flood 2014)
EPISODE = 0xD1342543DE82EF95  # the step from one episode's stream to the next: another odd multiplier (Steele and Vigna 2021)
LOOP_LENGTH = 64  # default max_tokens where an episode has no longest length
RENDER: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}


def register_environments() -> None:
    """Register every name in ENVIRONMENTS as shiq/NAME-v0; what is registered already stays."""
    for name in ENVIRONMENTS:
        if f"shiq/{name}-v0" not in gymnasium.registry:
            gymnasium.register(
                f"shiq/{name}-v0",
                entry_point="shiq_lab.gym:TokenEnv",
                vector_entry_point="shiq_lab.gym:TokenVectorEnv",
                kwargs={"mdp": name},
            )


def uniform(counter: Any) -> Any:
    """splitmix64's mix of a counter, as a number in [0, 1): a Python int below 2^64 or uint64[n] -> float or float64[n]."""
    x = counter & (2**64 - 1)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return ((x ^ (x >> 31)) >> 11) * 2.0**-53


def render_row(mdp: TokenMDP, row: Sequence[int]) -> str:
    """'<bos> [a0] ok | return 1.5': the tokens of a row, the policy's in brackets, and the undiscounted return so far."""
    state, total, shown = mdp.start, 0.0, []
    for token in row:
        text = mdp.show(token)
        text = text if text and text.isprintable() and " " not in text else repr(text)
        shown.append(f"[{text}]" if mdp.is_policy[state] else text)
        total += float(mdp.reward[state, token])
        state = int(mdp.next_state[state, token])
    return f"{' '.join(shown)} | return {total:g}"


class Rules:
    """What playing an automaton needs, computed once. Tables have two rows more than states: FORBIDDEN and END.

    next     int[(S + 2) * V]    successor; FORBIDDEN where a policy token is; from END back to the state after the prompt's
                                 certain part, so that stepping on from END is the reset
    reward   float[(S + 2) * V]  0 where there is no edge
    mask     int8[S + 2, V]      allowed policy tokens; all 1 outside policy states
    turn     bool[S + 2]         environment states
    limit    int[S + 2]          a row longer than this is truncated in the state
    prompt   the tokens that every episode begins with
    """

    def __init__(self, mdp: TokenMDP, max_tokens: int | None) -> None:
        if mdp.is_policy[mdp.start]:
            raise bad("mdp", "an environment root", "a policy state at the start", "mdp.with_prompt(token) adds one.")
        S, V = mdp.next_state.shape
        turns = mdp.allowed & ~mdp.is_policy[:, None]
        after_turns = blocks(mdp.next_state, turns)
        self._set_lengths(mdp, max_tokens, turns, after_turns)
        self.turn = np.append(~mdp.is_policy, [False, False])
        self.mask = np.ones((S + 2, V), dtype=np.int8)
        self.mask[:S][mdp.is_policy] = mdp.allowed[mdp.is_policy]
        self._set_replies(mdp)
        self.prompt: list[int] = []
        self.begin = mdp.start
        while self.turn[self.begin] and mdp.allowed[self.begin].sum() == 1:
            edge = self.last[self.begin]
            self.prompt.append(int(self.token[edge]))
            self.begin = int(self.follow[edge])
        table = np.full((S + 2, V), FORBIDDEN)
        table[:S] = np.where(mdp.allowed, mdp.next_state, FORBIDDEN)
        table[END] = self.begin
        self.next = table.ravel()
        self.reward = np.append(mdp.reward.ravel(), np.zeros(2 * V))
        acted = mdp.reachable & mdp.is_policy
        self.has_turns = bool(self.turn[self.begin] or self.turn[np.unique(mdp.next_state[acted])].any())

    def _set_lengths(self, mdp: TokenMDP, max_tokens: int | None, turns: Bools, order: list[Block]) -> None:
        """max_tokens and limit. All lengths are of the longest way; turns of unbounded length count as far as is known."""
        S, start = mdp.n_states, mdp.start
        reply = _longest(mdp, turns, order, np.zeros(S))
        reply[np.isinf(reply)] = 0.0  # a reply without a longest length may be cut
        room = 1 + np.where(mdp.allowed, np.append(reply, 0.0)[mdp.next_state], 0.0).max(1)
        least = _longest(mdp, turns, order, np.where(mdp.is_policy, room, 0.0))[start]
        if np.isinf(least):
            raise bad("mdp", "a prompt of bounded length", "a loop of environment states before the first policy token")
        if (turns & (mdp.next_state < 0))[reachable_from(start, mdp.next_state, turns)].any():
            raise bad("mdp", "a policy token in every episode", "a prompt that ends the episode")
        longest = _longest_episode(mdp, turns, order)
        if max_tokens is None:
            max_tokens = int(longest) if np.isfinite(longest) else max(LOOP_LENGTH, 2 * int(least))
        elif not isinstance(max_tokens, (int, np.integer)) or isinstance(max_tokens, bool) or max_tokens < least:
            raise bad("max_tokens", f"a whole number >= {least:g}, what the first action needs", repr(max_tokens))
        self.max_tokens = int(max_tokens)
        self.truncates = bool(longest > max_tokens)
        self.limit = np.append(np.where(mdp.is_policy, max_tokens - room, -1), [max_tokens, max_tokens]).astype(np.int64)

    def _set_replies(self, mdp: TokenMDP) -> None:
        """The edges of environment states, state by state; `top` rises through (rank, rank + 1] of the state's rank."""
        turns = np.flatnonzero(~mdp.is_policy)
        cumulative = np.cumsum(np.exp(mdp.ref_logits[turns]), axis=1)
        rank, self.token = np.nonzero(mdp.allowed[turns])
        self.follow = mdp.next_state[turns[rank], self.token]
        self.top = rank + cumulative[rank, self.token] / cumulative[rank, -1]
        last = np.flatnonzero(np.diff(rank, append=len(turns)))  # of each state's edges
        self.top[last] = np.arange(len(turns)) + 1.0  # whatever the sum was rounded to
        self.rank = np.cumsum(self.turn) - 1  # means nothing in policy states, as does last
        self.last = last[self.rank]

    def draw(self, state: Any, u: Any) -> Any:
        """The edge that u in [0, 1) selects in an environment state: the first whose cumulative probability exceeds u."""
        return np.minimum(np.searchsorted(self.top, self.rank[state] + u, side="right"), self.last[state])


def _longest(mdp: TokenMDP, active: Bools, order: list[Block], leaf: Floats) -> Floats:
    """float[S]: tokens on the longest way along active edges; a state without any counts as its leaf, a loop as inf."""
    length = np.append(leaf, 0.0)  # the end needs nothing
    for block in order:
        s = block.states[active[block.states].any(1)]
        if block.cyclic:
            length[s] = np.inf
        elif s.size:
            length[s] = 1 + np.where(active[s], length[mdp.next_state[s]], 0.0).max(1)
    return length[:-1]


def _longest_episode(mdp: TokenMDP, turns: Bools, order: list[Block]) -> float:
    """Tokens of the longest episode; inf on loops that no horizon bounds."""
    no_leaf = np.zeros(mdp.n_states)
    seen = mdp.allowed & mdp.reachable[:, None]
    longest = _longest(mdp, seen, blocks(mdp.next_state, seen), no_leaf)[mdp.start]
    if mdp.horizon is None:
        return float(longest)
    length = no_leaf  # with no policy token left the episode is over, whosever turn it is
    for _ in range(mdp.horizon):
        act = 1 + np.where(mdp.allowed, np.append(length, 0.0)[mdp.next_state], 0.0).max(1)
        length = _longest(mdp, turns, order, np.where(mdp.is_policy, act, 0.0))
        if length[mdp.start] >= longest:
            break
    return float(length[mdp.start])


def _automaton(mdp: TokenMDP | str | os.PathLike[str], parameters: dict[str, Any]) -> TokenMDP:
    """The automaton itself, a saved one by its path *.npz, or one of ENVIRONMENTS by name and parameters."""
    if isinstance(mdp, str) and not mdp.endswith(".npz"):
        return make(mdp, **parameters)
    if parameters:
        raise bad("parameters", "none, for an automaton that is built already", ", ".join(parameters))
    return mdp if isinstance(mdp, TokenMDP) else TokenMDP.load(mdp)


def _option(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise bad(name, " or ".join(map(repr, choices)), repr(value))
    return value


class TokenEnv(gymnasium.Env[NDArray[np.int32], np.int64]):
    """Plays a TokenMDP; the module's docstring has the semantics.

    mdp           a TokenMDP with an environment root, the path of a saved one (*.npz), or a name in ENVIRONMENTS
    max_tokens    tokens an observation holds; default: the longest episode, or 64 where there is none
    on_forbidden  what a forbidden action does: "end" the episode, or "raise" a ValueError
    render_mode   None or "ansi": one line, as `render_row`
    parameters    of the environment's builder, where mdp is a name. Their `seed` picks the automaton; reset's the episodes.
    """

    metadata: dict[str, Any] = RENDER

    def __init__(
        self,
        mdp: TokenMDP | str | os.PathLike[str],
        *,
        max_tokens: int | None = None,
        on_forbidden: str = "end",
        render_mode: str | None = None,
        **parameters: Any,
    ) -> None:
        self.mdp = _automaton(mdp, parameters)
        self.on_forbidden = _option("on_forbidden", on_forbidden, ("end", "raise"))
        self.render_mode = _option("render_mode", render_mode, (None, *RENDER["render_modes"]))
        self.rules = Rules(self.mdp, max_tokens)
        self.observation_space = MultiDiscrete([self.mdp.n_tokens + 1] * self.rules.max_tokens, dtype=np.int32)
        self.action_space = Discrete(self.mdp.n_tokens)
        self._stream: Any = None  # int, once reset
        self._row: list[int] = []
        self._state = END
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.int32], dict[str, Any]]:
        """Begin an episode and play its prompt. A seed begins a new sequence of episodes, None goes on with it."""
        super().reset(seed=seed)
        if seed is not None or self._stream is None:
            self._stream = int(self.np_random.integers(2**63))
        else:
            self._stream += EPISODE
        self._row, self._state, self._over = [], self.mdp.start, False
        self._left = self.mdp.horizon
        self._play()
        return self._observation(), self._info()

    def step(self, action: Any) -> tuple[NDArray[np.int32], float, bool, bool, dict[str, Any]]:
        """The policy's token, then the environment's, up to the next policy state or the end."""
        if self._over:
            raise bad("step", "a reset first", "an episode that is over")
        state, mdp = self._state, self.mdp
        if not isinstance(action, (int, np.integer)) or not 0 <= action < mdp.n_tokens:
            raise bad("action", f"a token from 0 to {mdp.n_tokens - 1}", repr(action))
        if not mdp.allowed[state, action]:
            if self.on_forbidden == "raise":
                raise _forbidden(mdp, state, int(action))
            self._over = True
            return self._observation(), 0.0, True, False, self._info()
        self._row.append(int(action))
        self._state = int(mdp.next_state[state, action])
        if self._left is not None:
            self._left -= 1
            self._state = self._state if self._left else END
        self._play()
        terminated = self._state == END
        truncated = self.rules.truncates and len(self._row) > int(self.rules.limit[self._state])
        self._over = terminated or truncated
        return self._observation(), float(mdp.reward[state, action]), terminated, truncated, self._info()

    def render(self) -> str | None:
        """The row so far, under render_mode="ansi"; None without one."""
        return None if self.render_mode is None else render_row(self.mdp, self._row)

    def _play(self) -> None:
        """Environment tokens until a policy state, the end, or (in a turn of unbounded length) the edge of the buffer."""
        rules = self.rules
        while self._state >= 0 and rules.turn[self._state] and len(self._row) < rules.max_tokens:
            edge = int(rules.draw(self._state, uniform(self._stream + GOLDEN * len(self._row))))
            self._row.append(int(rules.token[edge]))
            self._state = int(rules.follow[edge])

    def _observation(self) -> NDArray[np.int32]:
        tokens = np.full(self.rules.max_tokens, self.mdp.n_tokens, dtype=np.int32)
        tokens[: len(self._row)] = self._row
        return tokens

    def _info(self) -> dict[str, Any]:
        mask = self.rules.mask[END if self._over else self._state]
        return {"state": self._state, "action_mask": mask.copy(), "length": len(self._row)}


class TokenVectorEnv(VectorEnv[NDArray[np.int32], Ints, NDArray[Any]]):
    """num_envs copies of a TokenEnv, stepped together in numpy; equal to SyncVectorEnv of TokenEnv number for number.

    Arguments as TokenEnv's, and
    num_envs  B; observations are int32[B, max_tokens], infos {"state": int64[B], "action_mask": int8[B, V],
              "length": int64[B]}, each with the all-true mask "_state", ... that gymnasium's vector environments add
    copy      False hands out the token buffer itself, which the next step overwrites

    A seed s gives copy i the seed s + i; a list gives each its own. Autoreset is NEXT_STEP.
    """

    metadata: dict[str, Any] = RENDER | {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs: int,
        mdp: TokenMDP | str | os.PathLike[str],
        *,
        max_tokens: int | None = None,
        on_forbidden: str = "end",
        render_mode: str | None = None,
        copy: bool = True,
        **parameters: Any,
    ) -> None:
        if not isinstance(num_envs, (int, np.integer)) or isinstance(num_envs, bool) or num_envs < 1:
            raise bad("num_envs", "a whole number >= 1", repr(num_envs))
        single = TokenEnv(mdp, max_tokens=max_tokens, on_forbidden=on_forbidden, render_mode=render_mode, **parameters)
        self.num_envs, self.copy, self.on_forbidden = int(num_envs), copy, on_forbidden
        self.mdp, self.rules, self.render_mode = single.mdp, single.rules, render_mode
        self.single_observation_space, self.single_action_space = single.observation_space, single.action_space
        self.observation_space = batch_space(single.observation_space, self.num_envs)
        self.action_space = batch_space(single.action_space, self.num_envs)
        L = self.rules.max_tokens
        self._prompt = np.full(L, self.mdp.n_tokens, dtype=np.int32)
        self._prompt[: len(self.rules.prompt)] = self.rules.prompt
        self._tokens = np.tile(self._prompt, (self.num_envs, 1))  # (B, L)
        self._flat = self._tokens.reshape(-1)  # a view
        self._row_start = np.arange(self.num_envs) * L  # of each row in _flat
        self._cursor = self._row_start.copy()  # where the next token of each row goes in _flat
        self._state = np.full(self.num_envs, END)
        self._left = np.zeros(self.num_envs, dtype=np.int64)  # policy tokens that the horizon leaves
        self._over = np.arange(0)  # rows that the next step resets
        self._stream: Any = None  # uint64[B], once reset
        self._every = np.ones(self.num_envs, dtype=bool)
        self._every.setflags(write=False)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.int32], dict[str, Any]]:
        """Begin an episode in every row."""
        if options and "reset_mask" in options:
            raise bad("options", "no reset_mask: rows reset themselves on the step after their end", "one")
        self._seed(seed)
        self._state[:] = self.rules.begin
        self._begin(np.arange(self.num_envs))
        self._over = np.arange(0)
        if self.rules.has_turns:
            self._play(self._state)
        return self._observation(), self._info(self._state)

    def step(self, actions: Any) -> tuple[NDArray[np.int32], Floats, Bools, Bools, dict[str, Any]]:
        """One policy token in every row; rows that were over are reset instead."""
        if self._stream is None:
            raise bad("step", "a reset first", "an environment that was never reset")
        rules, over = self.rules, self._over
        actions = self._checked(actions)
        edge = self._state * self.mdp.n_tokens + actions  # END is -1: the last row of the tables, which leads to the prompt
        state = rules.next.take(edge)
        reward = rules.reward.take(edge)
        forbidden = self._forbidden(edge, state)
        self._flat[self._cursor] = actions
        self._cursor += 1
        if over.size:
            self._stream[over] += EPISODE
            self._begin(over)
        if self.mdp.horizon is not None:
            self._left -= 1
            self._left[over] += 1
            state[(self._left == 0) & (state != FORBIDDEN)] = END
        if rules.has_turns:
            self._play(state)
        terminated = state < 0
        if forbidden.size:  # nothing was said: take the token back, and show the state where it happened
            self._cursor[forbidden] -= 1
            self._flat[self._cursor[forbidden]] = self.mdp.n_tokens
            state[forbidden] = self._state[forbidden]
        return self._finish(state, reward, terminated)

    def _finish(
        self, state: Ints, reward: Floats, terminated: Bools
    ) -> tuple[NDArray[np.int32], Floats, Bools, Bools, dict[str, Any]]:
        """Mark the rows that are over, so that their next step resets them, and hand everything out."""
        truncated = np.zeros(self.num_envs, dtype=bool)
        if self.rules.truncates:
            truncated = self._cursor - self._row_start > self.rules.limit[state]
        self._over = np.flatnonzero(terminated | truncated)
        self._state = state.copy()
        self._state[self._over] = END
        info = self._info(state)
        self._cursor[self._over] = self._row_start[self._over]  # the ignored action must not be written into the next row
        return self._observation(), reward, terminated, truncated, info

    def render(self) -> tuple[str, ...] | None:
        """One line a row, under render_mode="ansi"; None without one."""
        if self.render_mode is None:
            return None
        return tuple(render_row(self.mdp, [int(t) for t in row if t < self.mdp.n_tokens]) for row in self._tokens)

    def _seed(self, seed: int | Sequence[int | None] | None) -> None:
        """Streams as TokenEnv's reset picks them, one a row."""
        B = self.num_envs
        seeds = [None] * B if seed is None else seed
        if not is_whole(seeds) and (isinstance(seeds, str) or not isinstance(seeds, Sequence | np.ndarray)):
            raise bad("seed", f"a whole number or {B} of them, one a sub-environment", repr(seed))
        if isinstance(seeds, (int, np.integer)):
            super().reset(seed=int(seeds))
            seeds = [int(seeds) + i for i in range(B)]
        if len(seeds) != B:
            raise bad("seed", f"a whole number or {B} of them, one a sub-environment", f"{len(seeds)}")
        if self._stream is None:
            self._stream = self.np_random.integers(2**63, size=B).astype(np.uint64)
        else:
            self._stream += EPISODE
        for i, one in enumerate(seeds):
            if one is not None and (not is_whole(one) or one < 0):
                raise bad("seed", "whole numbers >= 0, or None", f"{one!r} for sub-environment {i}")
            if one is not None:
                self._stream[i] = seeding.np_random(int(one))[0].integers(2**63)

    def _begin(self, rows: Ints) -> None:
        """The certain part of the prompt, in rows whose state is rules.begin already."""
        self._tokens[rows] = self._prompt
        self._cursor[rows] = self._row_start[rows] + len(self.rules.prompt)
        if self.mdp.horizon is not None:
            self._left[rows] = self.mdp.horizon

    def _play(self, state: Ints) -> None:
        """Environment tokens, a round for all rows that are in a turn; writes the states they reach into `state`."""
        rules = self.rules
        rows = np.flatnonzero(rules.turn.take(state) & (self._cursor < self._row_start + rules.max_tokens))
        while rows.size:
            here, cursor = state[rows], self._cursor[rows]
            length = cursor - self._row_start[rows]
            edge = rules.draw(here, uniform(self._stream[rows] + length.astype(np.uint64) * GOLDEN))
            self._flat[cursor] = rules.token[edge]
            self._cursor[rows] += 1
            follow = rules.follow[edge]
            state[rows] = follow
            rows = rows[rules.turn[follow] & (length + 1 < rules.max_tokens)]

    def _checked(self, actions: Any) -> Ints:
        """int64[B], in range; rows that are about to be reset may hold anything, which becomes 0."""
        actions = np.asarray(actions)
        if actions.dtype.kind not in "iu" or actions.shape != (self.num_envs,):
            came = f"dtype {actions.dtype}, shape {actions.shape}"
            raise bad("actions", f"integers of shape ({self.num_envs},)", came)
        actions = actions.astype(np.int64, copy=False)
        outside = (actions < 0) | (actions >= self.mdp.n_tokens)
        if outside.any():
            wrong = outside.copy()
            wrong[self._over] = False
            if wrong.any():
                row = int(np.argmax(wrong))
                raise bad("actions", f"tokens from 0 to {self.mdp.n_tokens - 1}", f"{actions[row]} in row {row}")
            actions = np.where(outside, 0, actions)
        return actions

    def _forbidden(self, edge: Ints, state: Ints) -> Ints:
        """The rows whose action is a forbidden one."""
        rows = np.flatnonzero(state == FORBIDDEN)
        if rows.size and self.on_forbidden == "raise":
            at, token = divmod(int(edge[rows[0]]), self.mdp.n_tokens)
            raise _forbidden(self.mdp, at, token, f" in row {rows[0]}")
        return rows

    def _observation(self) -> NDArray[np.int32]:
        return self._tokens.copy() if self.copy else self._tokens

    def _info(self, state: Ints) -> dict[str, Any]:
        return {
            "state": state.copy(),
            "_state": self._every,
            "action_mask": self.rules.mask.take(self._state, axis=0),  # of a row that is over: all 1
            "_action_mask": self._every,
            "length": self._cursor - self._row_start,
            "_length": self._every,
        }


def _forbidden(mdp: TokenMDP, state: int, token: int, where: str = "") -> ValueError:
    return bad("action", "an allowed token (info['action_mask'])", f"the forbidden {mdp.place(state, token)}{where}")
