"""Random batches in the contract's layout, with garbage wherever nothing is to be read; random automata; how to run both."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import sequences

from shiq_lab import TokenBatch, TokenMDP, TokenStats
from shiq_lab.builders import random_reference
from shiq_lab.graph import blocks

EPS = float(np.finfo(np.float64).eps)
JUNK_IDS = (-100, -1, 10**6)  # what padding holds: never an id of the vocabulary
JUNK = (np.nan, np.inf, -np.inf, 1e308)


@dataclass
class Case:
    """A batch and logits float64[B, L, V] of model, reference and target network; garbage in every unread place."""

    batch: TokenBatch
    logits: torch.Tensor
    ref: torch.Tensor
    target: torch.Tensor
    beta: float
    gamma: float

    def read(self) -> torch.Tensor:
        """bool[B, L]: the columns that score an action or stand at a cut row's end."""
        out = torch.zeros(self.batch.input_ids.shape, dtype=torch.bool)
        for seq in sequences(self.batch):
            for column in [c for c, _, _ in seq.actions] + ([] if seq.end is None else [seq.end]):
                out[seq.where[0], column] = True
        return out

    def clean(self) -> "Case":
        """The same case with zeros in the place of garbage."""
        read = self.read()[..., None]
        return replace(self, **{k: torch.where(read, getattr(self, k), 0.0) for k in ("logits", "ref", "target")})

    def stats(self, logits: torch.Tensor | None = None, joint: bool = True) -> tuple[TokenStats, TokenStats]:
        logits = self.logits if logits is None else logits
        policy = TokenStats.from_logits(logits, self.batch, ref_logits=self.ref if joint else None)
        return policy, TokenStats.from_logits(self.ref, self.batch)

    def size(self) -> float:
        """A bound on the numbers that residuals are differences of, squared and summed over actions: the scale of rounding.

        |rho_t| <= 2 beta (T + 2) max|logit or log-sum-exp| + sum |r|.
        """
        finite = [x[self.read()][x[self.read()].isfinite()] for x in (self.logits, self.ref, self.target)]
        most = max([float(x.abs().max()) for x in finite if x.numel()], default=0.0) + np.log(self.logits.shape[-1])
        rewards = self.batch.rewards[self.batch.completion_mask == 1].abs().sum().item()
        actions = int(self.batch.completion_mask.sum())
        return (2 * self.beta * (actions + 2) * most + rewards + 1) ** 2 * (actions + 1) * float(1 + self.batch.weights.sum())


ROW = st.tuples(
    st.integers(1, 2),  # tokens of the prompt
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2)), max_size=2),  # (actions, environment tokens after them)
    st.booleans(),  # does the row end in an action (else in the last reply)?
    st.booleans(),  # terminated?
    st.integers(0, 2),  # more padding before it, where padding stands on both sides
)


def build(rows: list[Any], layout: str, beta: float, gamma: float, seed: int, V: int = 4) -> Case:
    """The case of these rows; layout "left", "right" or "both" says where padding stands."""
    rng = np.random.default_rng(seed)
    lines = []
    for prompt, turns, ends_in_action, _, _ in rows:
        line = [0] * prompt
        for i, (actions, replies) in enumerate(turns):
            line += [1] * actions + ([0] * replies if i + 1 < len(turns) or not ends_in_action else [])
        lines.append(line)
    B, L = len(rows), max(map(len, lines)) + int(rng.integers(0, 3))
    ids, real, acts = rng.choice(JUNK_IDS, (B, L)), np.zeros((B, L), int), np.zeros((B, L), int)
    for b, line in enumerate(lines):
        room = L - len(line)
        at = {"left": room, "right": 0, "both": min(rows[b][4], room)}[layout]
        ids[b, at : at + len(line)] = rng.integers(0, V, len(line))
        real[b, at : at + len(line)] = 1
        acts[b, at : at + len(line)] = line
    batch = TokenBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(real),
        completion_mask=torch.from_numpy(acts),
        rewards=torch.from_numpy(np.where(acts == 1, rng.normal(size=(B, L)), np.nan)),
        terminated=torch.tensor([row[3] for row in rows]),
        weights=torch.from_numpy(rng.uniform(0.2, 2.0, B)),
        group_ids=torch.arange(B),
    )
    logits, ref, target = (rng.normal(0, 2, (B, L, V)) + rng.uniform(-3, 3, (B, L, 1)) for _ in range(3))
    taken = np.zeros((B, L, V), bool)
    taken[:, :-1] = (np.arange(V) == ids[:, 1:, None]) & (acts[:, 1:, None] == 1)
    taken[..., 0] |= ~taken.any(-1)  # every row keeps an allowed token
    forbidden = (rng.random((B, L, V)) < 0.2) & ~taken
    case = Case(batch, *(torch.from_numpy(np.where(forbidden, -np.inf, x)) for x in (logits, ref, target)), beta, gamma)
    return spoil(case, seed)


def spoil(case: Case, seed: int) -> Case:
    """Fresh garbage in every unread place of the logits and in the ids of the padding."""
    rng = np.random.default_rng([seed, 1])
    read = case.read()[..., None]
    junk = lambda x: torch.where(read, x, torch.from_numpy(rng.choice(JUNK, tuple(x.shape))))  # noqa: E731
    ids = torch.where(case.batch.attention_mask == 1, case.batch.input_ids, int(rng.choice(JUNK_IDS)))
    batch = replace(case.batch, input_ids=ids)
    return replace(case, batch=batch, logits=junk(case.logits), ref=junk(case.ref), target=junk(case.target))


def cases(min_rows: int = 1, max_rows: int = 4) -> st.SearchStrategy[Case]:
    """Random cases: unequal lengths, padding on either side or both, two turns, cut and terminated rows, empty completions."""
    return st.builds(
        build,
        st.lists(ROW, min_size=min_rows, max_size=max_rows),
        st.sampled_from(["left", "right", "both"]),
        st.sampled_from([0.1, 0.7, 1.0, 3.0]),
        st.sampled_from([1.0, 0.9, 0.5]),
        st.integers(0, 2**32 - 1),
    )


# Every stratum at once, for tests that need one fixed case: two turns, one ending in a reply, an empty completion, a cut
# row of each kind, unequal lengths.
MIXED_ROWS = [
    (1, [(2, 1), (3, 1)], True, True, 1),
    (2, [(3, 2), (1, 1)], True, False, 0),
    (1, [(2, 2)], False, False, 1),
    (2, [], True, False, 0),
    (1, [], True, True, 2),
    (1, [(1, 1)], True, True, 0),
    (1, [(3, 1), (2, 1)], False, True, 1),
]


def mixed(layout: str = "right", beta: float = 0.7, gamma: float = 0.9, seed: int = 3) -> Case:
    return build(MIXED_ROWS, layout, beta, gamma, seed)


def random_world(seed: int, loops: bool, random_replies: bool) -> tuple[TokenMDP, np.ndarray]:
    """A small random automaton with environment states, forbidden tokens and random levels, and a random behaviour for it.

    State 0 is the root and speaks alone; a state's successors lie behind it unless `loops`. Every state may end (chance at
    least 1/4 in loops, so linear systems stay well conditioned).
    """
    rng = np.random.default_rng(seed)
    S, V = int(rng.integers(3, 7)), 3
    is_policy = rng.random(S) < 0.6
    is_policy[0], is_policy[1] = False, True
    low = np.ones(S, int) if loops else np.arange(1, S + 1)
    follow = np.array([[int(rng.integers(low[s], S)) if low[s] < S else -1 for _ in range(V)] for s in range(S)])
    follow[:, 0] = np.where(np.arange(S) > 0, -1, 1)  # token 0 ends the episode, but says the prompt at the root
    allowed = rng.random((S, V)) < 0.7
    allowed[:, 0] = True
    chance = np.where(allowed, rng.uniform(0.2, 1.0, (S, V)), 0.0)
    if not random_replies:
        chance[1:] = np.eye(V)[np.where(loops, 0, rng.integers(0, V, S))][1:]
    chance /= chance.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        speech = np.log(chance)
    ref = np.where(is_policy[:, None], np.where(allowed, 0.0, -np.inf), speech)
    reward = np.where(is_policy[:, None] & allowed, rng.normal(size=(S, V)), 0.0)
    mdp = random_reference(TokenMDP(follow, reward, ref, is_policy, name="random world"), seed)
    mu = np.where(mdp.allowed, rng.uniform(0.3, 1.0, (S, V)), 0.0)
    mu[:, 0] *= 1.5
    with np.errstate(divide="ignore"):
        behavior = np.log(mu / mu.sum(1, keepdims=True))
    return mdp, np.where(is_policy[:, None], behavior, mdp.ref_log_policy)


# ------------------------------------------------------------------------------------------------- random automata
RADIUS = 0.9  # of the exponentiated loop, where v* is to be finite: linear systems then stay well conditioned
QUICK, LONG = pytest.param(1, id="quick"), pytest.param(10, id="long", marks=pytest.mark.slow)


@dataclass(frozen=True, eq=False)
class World:
    """A random automaton and what to solve it at; `seed` also seeds whatever else a test draws."""

    mdp: TokenMDP
    beta: float
    gamma: float
    seed: int

    def __repr__(self) -> str:
        mdp = self.mdp
        return (
            f"World(beta={self.beta!r}, gamma={self.gamma!r}, seed={self.seed}, mdp=TokenMDP({mdp.next_state.tolist()}, "
            f"reward={mdp.reward.tolist()}, ref_logits={mdp.ref_logits.tolist()}, is_policy={mdp.is_policy.tolist()}, "
            f"start={mdp.start}, horizon={mdp.horizon}))"
        )

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, 7])

    @cached_property
    def cyclic(self) -> bool:
        return any(block.cyclic for block in blocks(self.mdp.next_state, self.mdp.allowed & self.mdp.reachable[:, None]))

    def policy(self, salt: int = 0, forbid: bool = False) -> np.ndarray:
        """A random policy float[S, V], or [T, S, V] under a horizon; `forbid`: some tokens get no mass at all."""
        mdp, rng = self.mdp, np.random.default_rng([self.seed, 11, salt])
        shape = (mdp.horizon, *mdp.next_state.shape) if mdp.horizon else mdp.next_state.shape
        weight = np.where(mdp.allowed, rng.exponential(size=shape) + 1e-3, 0.0)
        if forbid:  # not the likeliest reference token, so that every row keeps one, and the escape among them
            weight *= (rng.random(shape) < 0.7) | (np.arange(shape[-1]) == mdp.ref_logits.argmax(1)[:, None])
        with np.errstate(divide="ignore"):
            table = np.log(weight / weight.sum(-1, keepdims=True))
        return np.where(mdp.is_policy[:, None], table, mdp.ref_log_policy)

    @property
    def strata(self) -> set[str]:
        """Everything that is true of this one: what `automata` promises to draw often enough."""
        mdp = self.mdp
        live = mdp.reachable
        paid = (mdp.reward != 0)[live].sum()
        early = (mdp.reward != 0) & (mdp.next_state >= 0) & np.append(mdp.is_policy, False)[mdp.next_state]
        facts = {
            "random replies": not mdp.deterministic,
            "single replies": bool((~mdp.is_policy & live)[np.arange(mdp.n_states) != mdp.start].any()) and mdp.deterministic,
            "policy alone": bool(mdp.is_policy[live].sum() >= live.sum() - 1),
            "random prompts": not mdp.is_policy[mdp.start] and bool(mdp.allowed[mdp.start].sum() > 1),
            "one prompt": not mdp.is_policy[mdp.start] and bool(mdp.allowed[mdp.start].sum() == 1),
            "policy root": bool(mdp.is_policy[mdp.start]),
            "forbidden": bool((~mdp.allowed & (mdp.is_policy & live)[:, None]).any()),
            "loops": self.cyclic,
            "no loops": not self.cyclic,
            "horizon": mdp.horizon is not None,
            "no horizon": mdp.horizon is None,
            "sparse": bool(paid <= 1),
            "terminal": bool(paid > 1 and not early[live].any()),
            "dense": bool(paid > 1 and early[live].any()),
            "beta < 0.2": self.beta < 0.2,
            "beta > 2": self.beta > 2,
            "levels": bool(np.ptp(mdp.ref_logsumexp[mdp.is_policy]) > 0.5),
            "deep": bool(live.sum() >= 5),
            "choice late": bool(((mdp.allowed.sum(1) > 1) & mdp.is_policy & live).sum() >= 2),
        } | {f"gamma {g}": self.gamma == g for g in (1.0, 0.9, 0.5)}
        return {name for name, holds in facts.items() if holds}


def radius(mdp: TokenMDP, beta: float) -> float:
    """Spectral radius of diag(pi_ref exp(r / beta)) x successor, environment rows with their own chances."""
    step = np.where(mdp.allowed, np.exp(mdp.ref_log_policy + mdp.reward / beta), 0.0)
    matrix = np.zeros((mdp.n_states, mdp.n_states + 1))
    np.add.at(matrix, (np.arange(mdp.n_states)[:, None], mdp.next_state), step)
    return float(np.abs(np.linalg.eigvals(matrix[:, :-1])).max())


def automaton(
    seed: int,
    *,
    S: int = 6,
    V: int = 3,
    replies: str = "none",
    prompts: int = 1,
    loops: bool = False,
    horizon: int | None = None,
    rewards: str = "dense",
    beta: float = 1.0,
    gamma: float = 1.0,
    size: float = 1.0,
    finite: bool = True,
    listable: bool = False,
) -> TokenMDP:
    """A random automaton: state 0 the root, state 1 a policy state, tokens in random order, levels unlike in every state.

    replies  "none", "single" (environment states, one reply each) or "random"; prompts 0 (a policy root), 1 or 2 (random)
    loops    successors anywhere; else behind the state. Every state has one escape token that leads on, so all can end
    finite   loops at gamma = 1 get a cost per token that brings the exponentiated loop's spectral radius below RADIUS: with
             random replies too v* is then finite, since beta ln E exp(v / beta) >= E v
    listable environment states lead on only, so that a horizon leaves finitely many strings
    """
    rng = np.random.default_rng(seed)
    is_policy = np.ones(S, bool)
    is_policy[0] = prompts == 0
    if replies != "none" and S > 2:
        is_policy[2:] = rng.random(S - 2) > 0.4
        is_policy[int(rng.integers(2, S))] = False
    escape = rng.integers(0, V, S)
    later = [[x for x in range(s + 1, S) if is_policy[s] or is_policy[x]] + [S] for s in range(S)]
    follow = np.array([[later[s][0] if rng.random() < 0.4 else rng.choice(later[s]) for _ in range(V)] for s in range(S)])
    if loops:
        anywhere = np.where(rng.random((S, V)) < 0.2, S, rng.integers(1, S, (S, V)))
        free = (np.arange(V) != escape[:, None]) & (is_policy[:, None] | (not listable))
        follow = np.where(free, anywhere, follow)
    allowed = (rng.random((S, V)) < 0.75) | (np.arange(V) == escape[:, None])
    other = (escape + 1) % V
    follow[0, escape[0]] = 1
    if not is_policy[2:].all():  # the environment is met, and what it says leads on to where the policy chooses
        target = int(2 + np.argmin(is_policy[2:]))
        follow[1, other[1]], allowed[1, other[1]] = target, True
        allowed[target, other[target]] = True
    elif loops and rng.random() < 0.5:
        follow[1, other[1]], allowed[1, other[1]] = 1, True
    if prompts == 1:
        allowed[0] = np.arange(V) == escape[0]
    if prompts == 2:
        allowed[0] = True
        follow[0] = rng.integers(1, S, V)
        follow[0, escape[0]] = 1
    if replies == "single":
        quiet = ~is_policy & (np.arange(S) > 0)
        allowed[quiet] = (np.arange(V) == escape[:, None])[quiet]
    follow = np.where(follow == S, -1, follow)
    speech = np.where(allowed, rng.exponential(size=(S, V)) + 0.05, 0.0)
    speech = 0.75 * speech / speech.sum(1, keepdims=True) + 0.25 * (np.arange(V) == escape[:, None])
    with np.errstate(divide="ignore"):
        speech = np.log(speech / speech.sum(1, keepdims=True))
    logits = np.where(allowed, 1.5 * rng.normal(size=(S, V)) + rng.uniform(-3, 3, (S, 1)), -np.inf)
    edges = allowed & is_policy[:, None]
    pay = np.where(edges, size * rng.normal(size=(S, V)), 0.0)
    if rewards == "terminal":
        pay = np.where((follow < 0) | ~np.append(is_policy, True)[follow], pay, 0.0)  # a reply may be the last word
    if rewards == "sparse":
        chosen = np.zeros(S * V, bool)
        chosen[rng.choice(np.flatnonzero(edges.ravel()))] = True
        pay = np.where(chosen.reshape(S, V), pay, 0.0)
    mdp = TokenMDP(follow, pay, np.where(is_policy[:, None], logits, speech), is_policy, horizon=horizon, name=f"random {seed}")
    if not (loops and finite and gamma == 1 and horizon is None):
        return mdp
    if np.abs(pay).max() / beta > 300:  # e^300 is no entry for an eigenvalue solver: rewards below 0 are finite, too
        return replace(mdp, reward=np.where(edges, pay - max(pay.max(), 0.0) - 0.05 * size, 0.0))
    while (rho := radius(mdp, beta)) > RADIUS:
        mdp = replace(mdp, reward=np.where(edges, mdp.reward - beta * (np.log(rho / RADIUS) + 0.01), 0.0))
    return mdp


def decoder(
    *,
    deterministic: bool | None = None,
    loops: bool | None = None,
    horizons: bool | None = None,
    listable: bool = False,
    prompted: bool = False,
    gammas: tuple[float, ...] = (1.0, 0.9, 0.5),
) -> Callable[[int], World]:
    """A function from a whole number to a random world with a finite v*; None = both. Nothing is filtered.

    The digits of the number are the structure, what is left of it is the seed of the numbers. (Drawn one by one, 43
    of 100 automata had two states: few examples repeat each other's parts.)
    listable: at most 4096 strings, hence no loops without a horizon. prompted: the environment speaks first.
    """

    def decode(code: int) -> World:
        def digit(options: Any) -> Any:
            nonlocal code
            code, i = divmod(code, len(options))
            return options[i]

        both = lambda choice: digit([False, True]) if choice is None else choice  # noqa: E731
        S, V = digit(range(3 if deterministic is False else 2, 11)), digit(range(2, 5))
        replies = digit({None: ["none", "single", "random"], True: ["none", "single"], False: ["random"]}[deterministic])
        prompts = digit([1, 2] if prompted else [1, 2, 0])
        loopy, limited = both(loops), both(horizons)
        rewards, gamma, beta = digit(["dense", "terminal", "sparse"]), digit(gammas), digit([0.05, 5.0, None, None])
        steps = digit(range(1, 5))
        if listable:  # without a horizon a string has at most S tokens, with one at most 1 + 2 H
            loopy = loopy and limited
            S, steps = min(S, {2: 10, 3: 8, 4: 7}[V]), min(steps, 3 if V < 4 else 2)
        beta = beta or float(np.exp(np.random.default_rng([code, 5]).uniform(np.log(0.05), np.log(5.0))))
        options = {"beta": beta, "gamma": gamma, "rewards": rewards, "listable": listable, "prompts": prompts}
        horizon = steps if limited else None
        return World(automaton(code, S=S, V=V, replies=replies, loops=loopy, horizon=horizon, **options), beta, gamma, code)

    return decode


def automata(**options: Any) -> st.SearchStrategy[World]:
    """Random worlds; the options of `decoder`."""
    return st.integers(0, 2**48 - 1).map(decoder(**options))


Seen = dict[str, tuple[float, float]]
WORST: Seen = {}  # claim -> (largest measured / bound, that measured), for whoever wants to know how tight a bound is


def assert_near(claim: str, measured: float, bound: float) -> None:
    """measured <= bound, with a message that stands alone; NaN fails."""
    ratio = measured / bound if bound > 0 else (0.0 if measured == 0 else np.inf)
    if not ratio <= WORST.get(claim, (-1.0, 0.0))[0]:
        WORST[claim] = (ratio, measured)
    assert measured <= bound, f"{claim}: measured {measured:.3e}, bound {bound:.3e}"


def holds_for(examples: int, *strategies: st.SearchStrategy[Any], often: dict[str, float] | None = None) -> Any:
    """Decorator: a property of drawn arguments, on so many examples and, marked slow, on ten times as many.

    The property may return labels of what it met; `often` says which share of the examples each must be met in.
    """

    def decorate(body: Any) -> Any:
        @pytest.mark.parametrize("times", [QUICK, LONG])
        def test(times: int) -> None:
            met: Counter[str] = Counter()

            @settings(max_examples=examples * times, deadline=None, derandomize=True, database=None)
            @given(st.tuples(*strategies))
            def run(arguments: tuple[Any, ...]) -> None:
                met.update(["examples", *(body(*arguments) or ())])

            run()
            for label, share in (often or {}).items():
                # what is drawn depends on Hypothesis's version and on what else is imported, so a share may halve, not vanish
                assert met[label] >= share / 2 * met["examples"], (
                    f"{label!r} in only {met[label]} of {met['examples']} examples"
                )

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate
