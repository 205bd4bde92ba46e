"""Exact soft solutions of a TokenMDP, and the exact evaluation of any policy in it.

    policy state        q*(s,a) = r(s,a) + gamma v*(s')       v*(s) = beta ln sum_a pi_ref(a|s) exp(q*(s,a) / beta)
    environment state   v*(s)   = sum_a P(a|s) v*(s')         (no reward, no discount)
    the end             v* = 0

Without loops one sweep in topological order is exact, a horizon is backward induction. In a loop the operator T of the
equations above is convex, so Newton's method on v = T(v), which is soft policy iteration, climbs to the least solution from
the value of pi_ref; everything stays in the log domain, so rewards of 1e3 at beta = 1e-2 overflow nothing. For gamma < 1
the distance to v* is proved: T, with the environment states eliminated, contracts by gamma in the largest norm, and
eliminating them enlarges their residuals at most by w, the longest expected run of environment tokens, so
|v - v*| <= (1 + w) |T(v) - v| / (1 - gamma).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from shiq_lab.errors import at_least, bad, check_beta, check_gamma
from shiq_lab.graph import PIECE, Block, Floats, Ints, Recursion, blocks, loop_matrix, reaches, row_max, row_sum
from shiq_lab.mdp import TokenMDP, check_mdp
from shiq_lab.policies import check_log_policy

EPS = float(np.finfo(np.float64).eps)
MAX_LOOP = 12_000  # states in one loop: its dense system takes 8 * n^2 bytes, 1.2 GB here
MAX_NEWTON = 500  # soft policy iteration takes about 4 steps; one that still climbs here has no finite limit
# A loop's system may enlarge rounding (64 eps) at most to a relative 1e-6 of the answer, else v* counts as not finite.
MAX_AMPLIFICATION = 1e-6 / (64 * EPS)


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """v*, q* and pi* of a TokenMDP at one beta and gamma; t counts the policy tokens already spent.

    values       float[1, S], or float[H + 1, S] where a horizon makes them depend on t
    error_bound  proved bound on |v - v*| in loops with gamma < 1, rounding included; 0.0 where the sweep is exact; for loops
                 with gamma = 1 the last residual times the expected number of steps left (first order in the residual);
                 where a horizon leaves loops of environment states alone, the rounding that these enlarge
    """

    mdp: TokenMDP
    beta: float
    gamma: float
    values: Floats
    error_bound: float = 0.0

    def __repr__(self) -> str:
        return f"<Solution of {self.mdp!r}: beta {self.beta:g}, gamma {self.gamma:g}, J* = {self.objective:.6g}>"

    def _layer(self, t: int) -> int:
        t = at_least("t", t, 0)
        if self.time_dependent and t >= len(self.values):
            raise bad("t", f"at most the horizon {len(self.values) - 1}", repr(t))
        return t if self.time_dependent else 0

    @property
    def objective(self) -> float:
        """J(pi*) = v*(start)."""
        return float(self.values[0, self.mdp.start])

    @property
    def time_dependent(self) -> bool:
        """True where a horizon cuts paths short, so that v* depends on t."""
        return len(self.values) > 1

    def v(self, t: int = 0) -> Floats:
        """v*(s), float[S]."""
        return self.values[self._layer(t)]

    def q(self, t: int = 0) -> Floats:
        """q*(s, a), float[S, V]; -inf where forbidden; environment rows: v* of what follows."""
        layer = self._layer(t)
        if self.time_dependent and layer == len(self.values) - 1:
            raise bad("t", f"less than the horizon {layer}", repr(t), "Nothing is said after the last token.")
        after = self.values[min(layer + 1, len(self.values) - 1)]
        return action_values(self.mdp, after, self.values[layer], self.gamma)

    def log_policy(self, t: int = 0) -> Floats:
        """ln pi*(a|s) = ln pi_ref + (q* - v*) / beta, float[S, V]; environment rows: its own log-probabilities."""
        mdp, q, v = self.mdp, self.q(t), self.v(t)
        tilt = np.where(mdp.is_policy[:, None] & mdp.allowed, (q - v[:, None]) / self.beta, 0.0)
        return mdp.ref_log_policy + tilt

    def optimal_logits(self, t: int = 0) -> Floats:
        """l*: ref_logits + q* / beta, so that the shifted logits are the Q-values; environment rows + v* / beta."""
        mdp = self.mdp
        shift = np.where(mdp.is_policy[:, None], self.q(t), self.v(t)[:, None]) / self.beta
        return np.where(mdp.allowed, mdp.ref_logits + np.where(mdp.allowed, shift, 0.0), -np.inf)

    @cached_property
    def scale(self) -> float:
        """1 + max|q*|: what errors are measured against."""
        last = len(self.values) - 1
        layers = range(last) if last else range(1)
        return 1 + max(float(np.abs(self.q(t)[self.mdp.allowed]).max()) for t in layers)


def action_values(mdp: TokenMDP, v_after: Floats, v_now: Floats, gamma: float) -> Floats:
    """q(s, a) from v one policy token later (policy rows) and v at the same count (environment rows); float[S, V]."""
    after, now = np.append(v_after, 0.0), np.append(v_now, 0.0)
    q = np.where(mdp.is_policy[:, None], mdp.reward + gamma * after[mdp.next_state], now[mdp.next_state])
    return np.where(mdp.allowed, q, -np.inf)


def soft_max(q: Floats, log_ref: Floats, beta: float) -> Floats:
    """beta ln sum_a pi_ref(a) exp(q(a) / beta) for rows float[n, V], -> max q as beta -> 0, -> E_ref q as beta -> infinity.

    A flat row (range of q below beta) goes through expm1 / log1p, whose rounding is relative to the range and not to beta.
    """
    logits = q / beta
    logits += log_ref  # forbidden: -inf in log_ref
    top = row_max(logits)
    logits -= top[:, None]
    np.exp(logits, out=logits)
    out: Floats = beta * (np.log(row_sum(logits)) + top)
    if beta <= np.abs(out).max(initial=0.0):  # |out| <= max|q|: not flat
        return out
    live = log_ref > -np.inf
    if beta > np.abs(q[live]).max(initial=0.0):
        middle = np.where(live, q, 0.0).sum(1, keepdims=True) / live.sum(1, keepdims=True)
        flat = np.where(live, np.exp(log_ref) * np.expm1((np.where(live, q, middle) - middle) / beta), 0.0)
        out = middle[:, 0] + beta * np.log1p(flat.sum(1))
    return out


def _backup(mdp: TokenMDP, v: Floats, index: slice | Ints, beta: float, gamma: float) -> Floats:
    """T(v) on some states; v float[S + 1] with v[-1] = 0 for the end."""
    follow = v[mdp.next_state[index]]
    policy = mdp.is_policy[index]
    if policy.all():
        follow *= gamma
        follow += mdp.reward[index]
        return soft_max(follow, mdp.ref_logits[index] - mdp.ref_logsumexp[index][:, None], beta)
    out = (np.exp(mdp.ref_logits[index]) * follow).sum(1)
    if policy.any():
        q = mdp.reward[index][policy] + gamma * follow[policy]
        out[policy] = soft_max(q, mdp.ref_log_policy[index][policy], beta)
    return out


def solve(mdp: TokenMDP, *, beta: float, gamma: float = 1.0) -> Solution:
    """The exact soft-optimal values: F1 holds for what it returns, to rounding.

    Raises ValueError for beta <= 0, gamma outside (0, 1], and where v* is infinite or an episode never ends at gamma = 1.
    """
    check_mdp(mdp)
    beta, gamma = check_beta(beta), check_gamma(gamma)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows ends in a value that is not finite: said just below
        if mdp.horizon is not None and _longest(mdp) > mdp.horizon:
            solution = _backward_induction(mdp, beta, gamma)
        else:
            solution = _sweep(mdp, beta, gamma)
    lost = ~np.isfinite(solution.values).all(0)
    if lost.any():
        state = int(np.argmax(lost))
        raise bad(
            "mdp", "v* / beta within float64", f"one beyond it in {mdp.place(state)}", "Scale rewards down or raise beta."
        )
    return solution


def _sweep(mdp: TokenMDP, beta: float, gamma: float) -> Solution:
    """Block by block, successors first: one backup a state, Newton's method in loops."""
    v = np.zeros(mdp.n_states + 1)
    bound = 0.0
    for block in blocks(mdp.next_state):
        if block.cyclic:
            bound = max(bound, _solve_loop(mdp, v, block, beta, gamma))
        else:
            for piece in block.pieces(PIECE // mdp.n_tokens):
                v[piece] = _backup(mdp, v, piece, beta, gamma)
    if bound > 0 and gamma < 1:
        bound *= 1 + _longest_wait(environment_average(mdp), mdp)
    return Solution(mdp, beta, gamma, v[None, :-1], bound)


def _longest_wait(lift: Recursion, mdp: TokenMDP) -> float:
    """w: the largest expected number of environment tokens in a row; 0 where the policy speaks alone."""
    return float(lift.solve((~mdp.is_policy).astype(np.float64)).max())


def _longest(mdp: TokenMDP) -> float:
    """Policy tokens of the longest episode from any state; infinite with loops."""
    length = np.zeros(mdp.n_states + 1)
    for block in blocks(mdp.next_state):
        if block.cyclic:
            return np.inf
        length[block.states] = mdp.is_policy[block.states] + length[mdp.next_state[block.states]].max(1)
    return float(length.max())


def _backward_induction(mdp: TokenMDP, beta: float, gamma: float) -> Solution:
    horizon = int(mdp.horizon or 0)
    mdp.check_layers(horizon)
    lift = environment_average(mdp)
    policy = np.flatnonzero(mdp.is_policy)
    values = np.zeros((horizon + 1, mdp.n_states))
    for t in reversed(range(horizon)):
        values[t, policy] = _backup(mdp, np.append(values[t + 1], 0.0), policy, beta, gamma)
        values[t] = lift.solve(np.where(mdp.is_policy, values[t], 0.0))
    bound = 0.0
    if any(block.cyclic for block in lift.blocks):  # in a layer a few eps, enlarged by the wait; layers add up
        size = 1 + float(np.abs(values).max()) + float(np.abs(mdp.reward).max())
        bound = 8 * EPS * size * horizon * (1 + _longest_wait(lift, mdp))
    return Solution(mdp, beta, gamma, values, bound)


def environment_average(mdp: TokenMDP) -> Recursion:
    """x(s) = c(s) in policy states and c(s) + sum_a P(a|s) x(s') in environment states."""
    return Recursion(mdp.next_state, np.where(mdp.is_policy[:, None], 0.0, np.exp(mdp.ref_logits)))


def _solve_loop(mdp: TokenMDP, v: Floats, block: Block, beta: float, gamma: float) -> float:
    """Soft policy iteration on one loop, in place in v; returns the bound on its error."""
    states = block.states
    if len(states) > MAX_LOOP:
        raise bad("mdp", f"loops of at most {MAX_LOOP} states", f"one of {len(states)}", "Give it a horizon.")
    if gamma == 1:
        _check_ends(mdp, states)
    scale = 1.0
    step = np.full(len(states), np.inf)
    for iteration in range(MAX_NEWTON):
        log_policy = mdp.ref_log_policy[states] if iteration == 0 else _greedy(mdp, v, states, beta, gamma)
        chance = np.exp(log_policy)
        inverse = _inverse(mdp, states, chance, gamma)
        if iteration == 0:  # the value of pi_ref: where the climb begins
            residual = (chance * np.where(mdp.allowed[states], _q_rows(mdp, v, states, gamma), 0.0)).sum(1)
        else:
            residual = _backup(mdp, v, states, beta, gamma) - v[states]
        with np.errstate(invalid="ignore"):  # infinity * 0 where the system is singular; said just below
            before, step = step, inverse @ residual
        if not np.isfinite(step).all():
            raise _infinite(mdp, states)
        v[states] += step
        scale = 1 + float(np.abs(v[states]).max()) + float(np.abs(mdp.reward[states]).max())
        if iteration > 1 and np.abs(residual).max() <= 16 * EPS * scale:
            if 2 * np.abs(step).max() >= np.abs(before).max() or np.abs(step).max() <= EPS * scale:
                break
    else:
        raise _infinite(mdp, states)
    steps_left = float(np.abs(inverse).sum(1).max())
    if steps_left > MAX_AMPLIFICATION:
        raise _infinite(mdp, states)
    rest = float(np.abs(_backup(mdp, v, states, beta, gamma) - v[states]).max())
    # rounding of one backup: a few eps of the largest number in it; it passes through the same amplification
    return (rest + 8 * EPS * scale) * (1 / (1 - gamma) if gamma < 1 else steps_left)


def _q_rows(mdp: TokenMDP, v: Floats, states: Ints, gamma: float) -> Floats:
    follow = v[mdp.next_state[states]]
    return np.where(mdp.is_policy[states][:, None], mdp.reward[states] + gamma * follow, follow)


def _greedy(mdp: TokenMDP, v: Floats, states: Ints, beta: float, gamma: float) -> Floats:
    """ln of softmax(ln pi_ref + q / beta) in policy rows, the environment's own elsewhere."""
    logits = mdp.ref_log_policy[states] + _q_rows(mdp, v, states, gamma) / beta
    logits -= logits.max(1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return np.where(mdp.is_policy[states][:, None], logits, mdp.ref_log_policy[states])


def _inverse(mdp: TokenMDP, states: Ints, chance: Floats, gamma: float) -> Floats:
    """(I - gamma P)^-1 inside the loop; all-infinite where the policy never leaves it."""
    weights = np.zeros(mdp.next_state.shape) if len(states) < mdp.n_states else np.empty(mdp.next_state.shape)
    weights[states] = chance * np.where(mdp.is_policy[states], gamma, 1.0)[:, None]
    matrix = np.eye(len(states)) - loop_matrix(mdp.next_state, weights, states)
    try:
        inverse: Floats = np.linalg.inv(matrix).astype(np.float64, copy=False)
        return inverse
    except np.linalg.LinAlgError:
        return np.full(matrix.shape, np.inf)


def _infinite(mdp: TokenMDP, states: Ints) -> ValueError:
    state = int(states.min())
    return bad(
        "mdp",
        "a finite v*",
        f"an infinite one (or one beyond float64) in the loop through {mdp.place(state)}: going round pays more than beta "
        "times its information cost, so the expected exponentiated reward diverges",
        "Lower the loop's reward, raise beta, take gamma < 1 or a horizon.",
    )


def _check_ends(mdp: TokenMDP, states: Ints) -> None:
    done = np.logical_or.reduce(mdp.allowed & (mdp.next_state < 0), axis=1)
    stuck = ~reaches(mdp.next_state, mdp.allowed, done)[states]
    if stuck.any():
        state = int(states[np.argmax(stuck)])
        raise bad("gamma", "< 1, or an end that every state can reach", f"1.0 and {mdp.place(state)}, which never ends")


# ----------------------------------------------------------------------------------------------------- evaluation
@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a policy is worth, exactly; [S, V] arrays become [T, S, V] (and v [T, S]) where the policy depends on t.

    objective        J(pi) = E sum gamma^t [ r - beta ln(pi / pi_ref) ]
    expected_return  E sum gamma^t r
    kl_to_ref        E sum gamma^t KL(pi(.|s_t) || pi_ref(.|s_t)), in nats
    kl_to_optimal    the same against pi*: J(pi) = v*(start) - beta kl_to_optimal
    v, q             of pi, KL included; q of environment rows: v of what follows
    occupancy        expected discounted number of visits to (s, a) from the start

    A policy that gives mass to a forbidden token has infinite KLs and J = -inf; its expected_return counts such a token
    as the end of the episode.
    """

    objective: float
    expected_return: float
    kl_to_ref: float
    kl_to_optimal: float
    v: Floats
    q: Floats
    occupancy: Floats


def evaluate(mdp: TokenMDP, log_policy: ArrayLike, *, beta: float, gamma: float = 1.0) -> Evaluation:
    """J, return, KLs, q, v and occupancy of any policy, float[S, V] or float[T, S, V] log-probabilities (T = horizon).

    Environment rows are ignored: the environment speaks for itself. Raises ValueError where a policy row does not sum to 1.
    """
    beta, gamma = check_beta(beta), check_gamma(gamma)
    table = check_log_policy(mdp, log_policy)
    optimum = solve(mdp, beta=beta, gamma=gamma)
    if table.ndim == 2 and not (mdp.horizon is not None and optimum.time_dependent):
        return _evaluate_stationary(mdp, table, optimum)
    return _evaluate_layers(mdp, table, optimum)


def _terms(mdp: TokenMDP, log_policy: Floats, log_optimal: Floats) -> tuple[Floats, Floats]:
    """Chances on edges float[S, V], and a row's expected (reward, KL to ref, KL to pi*, forbidden mass), float[S, 4]."""
    chance = np.where(mdp.allowed, np.exp(log_policy), 0.0)
    live = (chance > 0) & mdp.is_policy[:, None]
    minus = lambda other: np.where(live, log_policy - np.where(live, other, 0.0), 0.0)  # noqa: E731
    rows = [(chance * x).sum(1) for x in (mdp.reward, minus(mdp.ref_log_policy), minus(log_optimal))]
    forbidden = np.where(mdp.allowed, 0.0, np.exp(log_policy)).sum(1) * mdp.is_policy
    return chance, np.stack([*rows, forbidden], 1)


def _spread_infinity(mdp: TokenMDP, values: Floats, beta: float) -> tuple[Floats, Floats]:
    """(v, values) with v = return - beta KL, and infinite KLs wherever forbidden mass lies ahead; values float[..., 4]."""
    reward, kl_ref, kl_optimal, forbidden = np.moveaxis(values, -1, 0)
    kl_ref, kl_optimal = (np.where(forbidden > 0, np.inf, x) for x in (kl_ref, kl_optimal))
    return reward - beta * kl_ref, np.stack([reward, kl_ref, kl_optimal], -1)


def _evaluate_stationary(mdp: TokenMDP, log_policy: Floats, optimum: Solution) -> Evaluation:
    beta, gamma = optimum.beta, optimum.gamma
    chance, terms = _terms(mdp, log_policy, optimum.log_policy())
    leaves = reaches(mdp.next_state, chance > 0, ((mdp.next_state < 0) & (chance > 0)).any(1) | (terms[:, 3] > 0))
    if gamma == 1 and not leaves.all():
        state = int(np.argmin(leaves))
        raise bad("log_policy", "a policy whose episodes end (gamma = 1)", f"one that never ends from state {state}")
    recursion = Recursion(mdp.next_state, chance * np.where(mdp.is_policy, gamma, 1.0)[:, None])
    v, values = _spread_infinity(mdp, recursion.solve(terms), beta)
    visits = recursion.solve_transpose(np.eye(1, mdp.n_states, mdp.start)[0])
    earned, kl_ref, kl_optimal = values[mdp.start].tolist()
    q = action_values(mdp, v, v, gamma)
    return Evaluation(float(v[mdp.start]), earned, kl_ref, kl_optimal, v, q, visits[:, None] * chance)


def _evaluate_layers(mdp: TokenMDP, log_policy: Floats, optimum: Solution) -> Evaluation:
    beta, gamma, T = optimum.beta, optimum.gamma, int(mdp.horizon or 0)
    tables = np.broadcast_to(log_policy, (T, *mdp.next_state.shape))
    lift = environment_average(mdp)
    policy = mdp.is_policy[:, None]
    values, chances = np.zeros((T + 1, mdp.n_states, 4)), np.zeros(tables.shape)
    for t in reversed(range(T)):
        chances[t], terms = _terms(mdp, tables[t], optimum.log_policy(t))
        after = np.append(values[t + 1], np.zeros((1, 4)), 0)[mdp.next_state]  # (S, V, 4)
        values[t] = lift.solve(np.where(policy, terms + gamma * np.einsum("sv,svk->sk", chances[t], after), 0.0))
    v, values = _spread_infinity(mdp, values, beta)
    occupancy = np.zeros(tables.shape)
    arriving = np.eye(1, mdp.n_states, mdp.start)[0]
    for t in range(T):
        occupancy[t] = lift.solve_transpose(arriving)[:, None] * chances[t]
        flow = np.where(policy, gamma * occupancy[t], 0.0)
        arriving = np.bincount(mdp.next_state.ravel() + 1, flow.ravel(), mdp.n_states + 1)[1:]
    q = np.stack([action_values(mdp, v[t + 1], v[t], gamma) for t in range(T)])
    earned, kl_ref, kl_optimal = values[0, mdp.start].tolist()
    return Evaluation(float(v[0, mdp.start]), earned, kl_ref, kl_optimal, v[:-1], q, occupancy)
