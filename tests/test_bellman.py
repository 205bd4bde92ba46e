"""Exact solutions against roads that share nothing with them: listing, a linear system, plain iteration in longer floats.

Random automata come from `strategies.automata`. Every bound below is rounding times a number that theory gives.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import strategies as st
from reference import words
from strategies import EPS, World, assert_near, automata, automaton, decoder, holds_for, radius

from shiq_lab import TokenMDP, bellman, enumerate_trajectories, evaluate, solve
from shiq_lab.bellman import Solution
from shiq_lab.enumeration import count_trajectories
from shiq_lab.graph import blocks
from shiq_lab.roads import FITS, linear_value, plain_iteration, row_terms, second_roads

Long = np.longdouble
LONG_EPS = float(np.finfo(Long).eps)
if LONG_EPS > 1e-18:
    pytest.skip(
        "numpy's longdouble is no longer than float64 here: these truths need 64 bits of mantissa", allow_module_level=True
    )

ROADS = 1e-10  # of the scale: what the project promises; linear systems with condition numbers up to 1e3 take 1e-12
RESIDUAL = 64 * EPS  # of the scale: one log-sum-exp of V <= 4 terms is a dozen roundings, and beta |ln pi_ref| adds to the size
SUM = 512 * EPS  # of the scale: sums over at most 4096 strings of at most 20 terms each, pairwise, and two logarithms an action
DERIVATIVE = 1e-9  # of the scale: 4th-order differences with step h lose (h / beta)^4 < 1e-15 and LONG_EPS scale / h < 1e-12
GREY = 1e-4  # |radius - 1| below which an eigenvalue in float64 does not tell a finite loop from an infinite one

every_world = automata()
listable_worlds = automata(listable=True, prompted=True)


# --------------------------------------------------------------------------------------- the truth, in longer floats
def long_backup(mdp: TokenMDP, v: np.ndarray, after: np.ndarray, beta: Long, gamma: Long) -> np.ndarray:
    """T with `after` behind policy tokens and v behind environment tokens; longdouble [S]."""
    follow, later = np.append(v, Long(0))[mdp.next_state], np.append(after, Long(0))[mdp.next_state]
    logits = mdp.ref_logits.astype(Long)
    chance = np.exp(logits - logits.max(1, keepdims=True))
    chance /= chance.sum(1, keepdims=True)  # environment rows sum to 1 in longdouble too
    q = mdp.reward.astype(Long) + gamma * later
    top = np.where(mdp.allowed, q, -np.inf).max(1)
    soft = (chance * np.exp(np.where(mdp.allowed, q - top[:, None], 0) / beta)).sum(1)
    return np.where(mdp.is_policy, top + beta * np.log(soft), (chance * follow).sum(1))


def long_values(mdp: TokenMDP, beta: float, gamma: float) -> np.ndarray:
    """v* by iteration from 0 with all states at once, longdouble [1, S]; [H + 1, S] under a horizon."""
    beta, gamma = Long(beta), Long(gamma)
    size = 1 + float(beta) * float(np.abs(mdp.ref_log_policy[mdp.allowed]).max())
    if mdp.horizon is None:
        return settled(lambda v: long_backup(mdp, v, v, beta, gamma), mdp.n_states, size)[None]
    layers = [np.zeros(mdp.n_states, Long)]
    for _ in range(mdp.horizon):
        after = layers[0]
        layers.insert(0, settled(lambda v, after=after: long_backup(mdp, v, after, beta, gamma), mdp.n_states, size))
    return np.stack(layers)


def settled(step: Callable[[np.ndarray], np.ndarray], n: int, size: float) -> np.ndarray:
    """The limit of v <- step(v) from 0, to rounding in longdouble; size: of what is added up besides v."""
    v = np.zeros(n, Long)
    for _ in range(100_000):
        new = step(v)
        if np.abs(new - v).max() <= 4 * LONG_EPS * (size + np.abs(new).max()):
            return new
        v = new
    raise AssertionError("the plain iteration did not settle: no truth to compare with")


def stretch(world: World, solution: Solution) -> float:
    """How many roundings add up in a value: expected discounted steps, at least the longest path's share; >= 1.

    Expected visits under pi* from any state: the row sums of (I - gamma P)^-1, environment states undiscounted.
    """
    mdp = world.mdp
    if mdp.horizon is not None:
        mdp = mdp.unroll()
        solution = solve(mdp, beta=world.beta, gamma=world.gamma)
    chance = np.where(mdp.allowed, np.exp(solution.log_policy()), 0.0) * np.where(mdp.is_policy, world.gamma, 1.0)[:, None]
    P = np.zeros((mdp.n_states, mdp.n_states + 1))
    np.add.at(P, (np.arange(mdp.n_states)[:, None], mdp.next_state), chance)
    return float(np.linalg.inv(np.eye(mdp.n_states) - P[:, :-1]).sum(1).max())


def solved(world: World) -> Solution:
    return solve(world.mdp, beta=world.beta, gamma=world.gamma)


def optimal_table(world: World, solution: Solution) -> np.ndarray:
    """pi* as evaluate takes it."""
    if solution.time_dependent:
        return np.stack([solution.log_policy(t) for t in range(len(solution.values) - 1)])
    return solution.log_policy()


# ------------------------------------------------------------------------------------------------------- what is drawn
@holds_for(
    200,
    every_world,
    often={name: 0.15 for name in ("random replies", "single replies", "policy alone", "random prompts", "one prompt",
           "policy root", "forbidden", "loops", "no loops", "horizon", "no horizon", "sparse", "terminal", "dense",
           "beta < 0.2", "beta > 2", "levels", "deep", "choice late", "gamma 1.0", "gamma 0.9", "gamma 0.5")},
)  # fmt: skip
def test_every_stratum_is_drawn(world: World) -> set[str]:
    """At least 15 of 100 automata show each feature that the strategies promise, counted on what is reachable."""
    assert 2 <= world.mdp.n_states <= 10 and 2 <= world.mdp.n_tokens <= 4 and 0.05 <= world.beta <= 5
    return world.strata


@holds_for(
    200,
    listable_worlds,
    often={name: 0.1 for name in ("random replies", "single replies", "policy alone", "random prompts", "one prompt",
           "forbidden", "loops", "horizon", "no horizon", "sparse", "terminal", "dense", "gamma 1.0", "gamma 0.9")},
)  # fmt: skip
def test_listable_automata_can_be_listed(world: World) -> set[str]:
    """`listable` holds by construction (nothing is filtered) and keeps the strata."""
    count = count_trajectories(world.mdp)
    assert count is not None and 1 <= count <= 4096
    return world.strata


# ---------------------------------------------------------------------------------------------------------- two roads
@holds_for(120, every_world)
def test_solve_equals_iteration_in_longer_floats(world: World) -> None:
    """v* in every state and layer, q* of it, and the Bellman residual."""
    solution, truth = solved(world), long_values(world.mdp, world.beta, world.gamma)
    assert solution.time_dependent or world.mdp.horizon is None or not world.cyclic
    values = solution.values
    truth = truth[: len(values)]
    roundings = stretch(world, solution)
    size = solution.scale + world.beta * float(np.abs(world.mdp.ref_log_policy[world.mdp.allowed]).max())
    assert_near("v* = iteration", float(np.abs(values - truth).max()), 8 * EPS * size * roundings)
    assert_near("v* = iteration, promised", float(np.abs(values - truth).max()) / solution.scale, ROADS)
    for t in range(max(len(values) - 1, 1)):
        after = values[min(t + 1, len(values) - 1)].astype(Long)
        backed = long_backup(world.mdp, values[t].astype(Long), after, Long(world.beta), Long(world.gamma))
        assert_near("Bellman residual", float(np.abs(backed - values[t]).max()), RESIDUAL * solution.scale)
        mdp, q = world.mdp, solution.q(t)
        plain = np.append(after, 0)[mdp.next_state]
        environment = np.append(values[t], 0)[mdp.next_state]
        plain = np.where(mdp.is_policy[:, None], mdp.reward + world.gamma * plain, environment)
        assert_near("q* = r + gamma v*", float(np.abs(q - plain)[mdp.allowed].max()), 4 * EPS * solution.scale)
        assert (q[~mdp.allowed] == -np.inf).all()
        assert_near(
            "pi* sums to 1", float(np.abs(np.exp(solution.log_policy(t)).sum(1) - 1).max()), RESIDUAL * size / world.beta
        )


@holds_for(
    60,
    automata(prompted=True),
    often={"listing J(pi*)": 0.3, "listing E exp(R/beta)": 0.08, "linear system": 0.08, "plain iteration": 1.0},
)
def test_package_roads_agree(world: World) -> set[str]:
    """The second roads that selftest prints: each within 1e-10 of the scale, each really taken."""
    met = set()
    for road, gap in second_roads(solved(world)):
        assert_near(road, gap, ROADS)
        met.add(road)
    return met


@holds_for(40, automata(prompted=True, loops=True, horizons=False, deterministic=True, gammas=(1.0,)), often={"loops": 0.4})
def test_linear_system_on_loops(world: World) -> set[str]:
    """gamma = 1, no random reply: exp(v / beta) solves a linear system, loops included."""
    solution = solved(world)
    if solution.scale / world.beta >= FITS:
        return {"too large for z"}
    assert_near("linear system on loops", abs(linear_value(world.mdp, world.beta) - solution.objective) / solution.scale, ROADS)
    iterated = plain_iteration(world.mdp, world.beta, 1.0)
    assert_near("plain iteration on loops", abs(iterated[world.mdp.start] - solution.objective) / solution.scale, ROADS)
    return world.strata


@pytest.mark.parametrize("code", [158392, 45176610751473])
def test_linear_system_where_small_entries_drown(code: int) -> None:
    """Two automata whose small z a single dense solve misses by 1 to 10 % of the scale of v*."""
    world = decoder(prompted=True, loops=True, horizons=False, deterministic=True, gammas=(1.0,))(code)
    solution = solved(world)
    assert abs(linear_value(world.mdp, world.beta) - solution.objective) / solution.scale < ROADS


# ------------------------------------------------------------------------------------------------- listing any policy
@holds_for(40, listable_worlds)
def test_listing_equals_depth_first_words(world: World) -> None:
    """enumerate_trajectories against a recursion that walks one token at a time: strings, rewards, chances, states."""
    behavior = world.policy(forbid=True)
    batch = enumerate_trajectories(world.mdp, behavior=behavior)
    assert len(enumerate_trajectories(world.mdp)) == count_trajectories(world.mdp)
    if behavior.ndim == 3:
        behavior = behavior[0]
        batch = enumerate_trajectories(world.mdp, behavior=behavior)
    listed = {}
    for ids, mask, act, r, weight, states in zip(
        batch.input_ids, batch.attention_mask, batch.completion_mask, batch.rewards, batch.weights, batch.states, strict=True
    ):
        n = int(mask.sum())
        key = (tuple(ids[:n].tolist()), tuple(act[:n].tolist()), tuple(r[:n].tolist()), tuple(states[:n].tolist()))
        assert key not in listed and bool((mask[:n] == 1).all())
        listed[key] = float(weight)
    walked = {(w.tokens, w.actions, w.rewards, w.states): w.probability for w in words(world.mdp, behavior)}
    assert listed.keys() == walked.keys()
    assert_near("listed chances", max(abs(listed[k] - walked[k]) for k in listed), SUM)
    assert_near("listed chances sum to 1", abs(sum(listed.values()) - 1), SUM)


def ratio_table(table: np.ndarray, other: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """ln(policy / other) where both are finite, with one more layer where t counts (it may point past the last token)."""
    live = allowed & (table > -np.inf)
    out = np.where(live, np.where(live, table, 0.0) - np.where(live, other, 0.0), 0.0)
    return np.concatenate([out, out[-1:]]) if out.ndim == 3 else out


def listed_occupancy(world: World, behavior: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """E sum gamma^t 1[s, a] counted string by string, token by token."""
    mdp, out = world.mdp, np.zeros(shape)
    batch = enumerate_trajectories(mdp, behavior=behavior)
    ids, act, length = batch.input_ids.numpy(), batch.completion_mask.numpy(), batch.attention_mask.sum(1).numpy()
    state, spent = np.full(len(batch), mdp.start), np.zeros(len(batch), int)
    for i in range(ids.shape[1]):
        real = i < length
        row = np.minimum(spent, len(out) - 1) if out.ndim == 3 else None
        place = (state[real], ids[real, i]) if row is None else (row[real], state[real], ids[real, i])
        np.add.at(out, place, (batch.weights.numpy() * world.gamma**spent)[real])
        spent = spent + act[:, i]
        state = batch.states.numpy()[:, i]
    return out


@holds_for(120, listable_worlds, st.booleans(), often={"time": 0.15, "random replies": 0.1, "gamma < 1": 0.25})
def test_evaluate_equals_listing(world: World, forbid: bool) -> set[str]:
    """J, return, both KLs and occupancy of a random policy as plain sums over strings; J(pi) = v* - beta KL(pi || pi*)."""
    mdp, beta, gamma, solution = world.mdp, world.beta, world.gamma, solved(world)
    table = world.policy(forbid=forbid)
    got = evaluate(mdp, table, beta=beta, gamma=gamma)
    batch = enumerate_trajectories(mdp, behavior=table)
    best = optimal_table(world, solution)
    if table.ndim == 3 and best.ndim == 2:
        best = np.broadcast_to(best, table.shape)
    zero = np.zeros(mdp.next_state.shape)
    to_ref = ratio_table(table, np.broadcast_to(mdp.ref_log_policy, table.shape), mdp.allowed & mdp.is_policy[:, None])
    to_best = ratio_table(table, best, mdp.allowed & mdp.is_policy[:, None])
    weight = batch.weights.numpy()
    mute = replace(batch, rewards=0 * batch.rewards)
    size = solution.scale + beta * float(max(np.abs(to_ref).max(), np.abs(to_best).max()))
    size *= 1 + batch.completion_mask.sum(1).max().item()
    sums = {
        "listed J": (got.objective, weight @ row_terms(batch, mdp, to_ref, beta, gamma), size),
        "listed return": (got.expected_return, weight @ row_terms(batch, mdp, zero, beta, gamma), size),
        "listed KL to ref": (got.kl_to_ref, -(weight @ row_terms(mute, mdp, to_ref, 1.0, gamma)), size / beta),
        "listed KL to pi*": (got.kl_to_optimal, -(weight @ row_terms(mute, mdp, to_best, 1.0, gamma)), size / beta),
    }
    for name, (value, listed, scale) in sums.items():
        assert_near(name, abs(value - float(listed)), SUM * scale)
    listed = float(weight @ row_terms(mute, mdp, to_best, 1.0, gamma))
    assert_near("J = v* - beta KL(pi || pi*)", abs(sums["listed J"][1] - (solution.objective + beta * listed)), SUM * size)
    assert got.occupancy.shape == (table.shape if len(got.occupancy.shape) == 3 else table.shape[-2:])
    visits = listed_occupancy(world, table, got.occupancy.shape)
    assert_near("listed occupancy", float(np.abs(visits - got.occupancy).max()), SUM * (1 + visits.max()))
    return world.strata | ({"time"} if got.occupancy.ndim == 3 else set()) | ({"gamma < 1"} if gamma < 1 else set())


@holds_for(100, every_world, often={"loops": 0.15, "horizon": 0.3, "random replies": 0.05})
def test_evaluate_solves_its_own_equations(world: World) -> set[str]:
    """v = sum_a pi (q - beta ln(pi / pi_ref)) in policy states, sum_a P q elsewhere, q = r + gamma v'; J = v* - beta KL."""
    mdp, beta, gamma, solution = world.mdp, world.beta, world.gamma, solved(world)
    table = world.policy()
    got = evaluate(mdp, table, beta=beta, gamma=gamma)
    v, q = (got.v, got.q) if got.q.ndim == 3 else (got.v[None], got.q[None])
    pi = np.broadcast_to(table, (len(q), *q.shape[1:])) if table.ndim == 2 else table[: len(q)]
    ratio = ratio_table(pi, np.broadcast_to(mdp.ref_log_policy, pi.shape), mdp.allowed)[: len(q)]
    cost = np.where(mdp.is_policy[:, None], beta * ratio, 0.0)
    mean = (np.exp(pi) * np.where(mdp.allowed, q - cost, 0.0)).sum(-1)
    size = 1 + float(np.abs(q[..., mdp.allowed]).max()) + float(np.abs(cost).max())
    assert_near("v of pi", float(np.abs(mean - v).max()), RESIDUAL * size)
    for t in range(len(q)):
        after = v[t] if got.q.ndim == 2 else (v[t + 1] if t + 1 < len(v) else np.zeros(mdp.n_states))
        later, now = np.append(after, 0)[mdp.next_state], np.append(v[t], 0)[mdp.next_state]
        plain = np.where(mdp.is_policy[:, None], mdp.reward + gamma * later, now)
        assert_near("q of pi", float(np.abs(plain - q[t])[mdp.allowed].max()), 4 * EPS * size)
    roundings = got.occupancy.sum() + stretch(world, solution)
    gap = abs(got.objective - (solution.objective - beta * got.kl_to_optimal))
    assert_near("J = v* - beta KL, any world", gap, 64 * EPS * (size + beta * got.kl_to_optimal) * roundings)
    assert_near(
        "J = return - beta KL", abs(got.objective - got.expected_return + beta * got.kl_to_ref), RESIDUAL * size * roundings
    )
    assert got.objective <= solution.objective + 64 * EPS * size * roundings
    return world.strata


@holds_for(80, every_world, often={"loops": 0.1})
def test_pi_star_attains_v_star(world: World) -> set[str]:
    """evaluate(pi*): J = v*(start), v = v* in every state, KL to pi* is 0."""
    solution = solved(world)
    got = evaluate(world.mdp, optimal_table(world, solution), beta=world.beta, gamma=world.gamma)
    # ln pi* is rounded by eps scale / beta; so are the sums of its rows, which multiply v once a step
    size = solution.scale * (1 + solution.scale / world.beta) * stretch(world, solution)
    layers = solution.values[:-1] if got.v.ndim == 2 and solution.time_dependent else solution.values[0]
    assert_near("v of pi* = v*", float(np.abs(got.v - layers).max()), 16 * EPS * size)
    assert_near("KL(pi* || pi*)", abs(got.kl_to_optimal), 16 * EPS * size / world.beta)
    return world.strata


# --------------------------------------------------------------------------------------------------------- derivatives
@holds_for(25, every_world, often={"loops": 0.1, "horizon": 0.1})
def test_derivatives_of_v_star(world: World) -> set[str]:
    """dv*/dr(s, a) = discounted occupancy of (s, a) under pi*, dv*/dbeta = -KL(pi* || pi_ref): 4th-order differences.

    r along a random direction and along single edges; the step is small against beta / (steps that a string takes), the
    length on which v* bends.
    """
    mdp, beta, gamma, solution = world.mdp, world.beta, world.gamma, solved(world)
    got = evaluate(mdp, optimal_table(world, solution), beta=beta, gamma=gamma)
    occupancy = (got.occupancy.sum(0) if got.occupancy.ndim == 3 else got.occupancy) * mdp.is_policy[:, None]
    scale = solution.scale + float(occupancy.sum())

    def slope(value: Callable[[Long], Long], h: float) -> float:
        """(8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12 h."""
        f = [value(Long(k) * Long(h)) for k in (-2, -1, 1, 2)]
        return float((8 * (f[2] - f[1]) - (f[3] - f[0])) / (12 * Long(h)))

    def at_start(reward: np.ndarray, at: Long) -> Long:
        moved = replace(mdp)
        object.__setattr__(moved, "reward", reward)  # longdouble: the constructor would round it
        return long_values(moved, at, gamma)[0, mdp.start]

    edges = np.argwhere(mdp.allowed & mdp.is_policy[:, None])
    directions = [world.rng.normal(size=mdp.reward.shape) * (mdp.allowed & mdp.is_policy[:, None])]
    for s, a in edges[world.rng.choice(len(edges), 2)]:
        directions.append(np.zeros(mdp.reward.shape))
        directions[-1][s, a] = 1.0
    steps = stretch(world, solution)
    for direction in directions:
        seen = slope(lambda x, d=direction: at_start(mdp.reward.astype(Long) + x * d, Long(beta)), 1e-4 * beta / steps)
        assert_near("dv*/dr = occupancy", abs(seen - float((occupancy * direction).sum())), DERIVATIVE * scale)
    reach = solution.scale / beta + np.abs(mdp.ref_log_policy[mdp.allowed]).max()  # how fast ln pi* turns with ln beta
    seen = slope(lambda x: at_start(mdp.reward, Long(beta) + x), 1e-4 * beta / (steps * reach))
    assert_near("dv*/dbeta = -KL(pi* || pi_ref)", abs(seen + got.kl_to_ref), DERIVATIVE * scale * reach)
    return world.strata


# --------------------------------------------------------------------------------------------- loops without discount
def seeded_loops(seeds: range) -> list[tuple[TokenMDP, float]]:
    """Random loops at gamma = 1 that all can end, with rewards of either sign and nothing done about the radius."""
    out = []
    for seed in seeds:
        rng = np.random.default_rng([seed, 3])
        beta = float(np.exp(rng.uniform(np.log(0.3), np.log(3))))
        shape = {"S": int(rng.integers(2, 11)), "V": int(rng.integers(2, 5)), "replies": str(rng.choice(["none", "single"]))}
        mdp = automaton(seed, loops=True, finite=False, beta=beta, rewards=str(rng.choice(["dense", "sparse"])), **shape)
        if any(block.cyclic for block in blocks(mdp.next_state, mdp.allowed)):
            out.append((mdp, beta))
    return out


def can_end(mdp: TokenMDP) -> bool:
    """Certain absorption under pi_ref: the radius of the successor chain itself is below 1."""
    return radius(replace(mdp, reward=np.zeros(mdp.reward.shape)), 1.0) < 1


def naive_linear(mdp: TokenMDP, beta: float) -> np.ndarray:
    """z = (I - A)^-1 b with no look at the radius."""
    step = np.where(mdp.allowed, np.exp(mdp.ref_log_policy + mdp.reward / beta), 0.0)
    A = np.zeros((mdp.n_states, mdp.n_states + 1))
    np.add.at(A, (np.arange(mdp.n_states)[:, None], mdp.next_state), step)
    return np.linalg.solve(np.eye(mdp.n_states) - A[:, :-1], A[:, -1])


@pytest.mark.parametrize("seeds", [range(300), pytest.param(range(300, 3300), marks=pytest.mark.slow)], ids=["quick", "long"])
def test_a_loop_is_finite_exactly_where_its_radius_is_below_one(seeds: range) -> None:
    """v* is finite if and only if rho(diag(pi_ref exp(r / beta)) x successor) < 1, although every one of these loops can end.

    Where it is infinite solve says so; where it is finite z = exp(v / beta) solves the linear system in every state.
    """
    finite = infinite = negative = grey = 0
    for mdp, beta in seeded_loops(seeds):
        assert can_end(mdp)
        rho = radius(mdp, beta)
        if abs(rho - 1) < GREY:
            grey += 1
        elif rho < 1:
            finite += 1
            solution = solve(mdp, beta=beta)
            acted = mdp.is_policy | (mdp.allowed.sum(1) == 1)
            z = naive_linear(mdp, beta)
            assert (z > 0).all()
            gap = np.abs(beta * np.log(z[acted]) - solution.v()[acted]).max() / solution.scale
            assert_near("z solves the linear system", float(gap), ROADS * max(1.0, 1e-3 / (1 - rho)))
        else:
            infinite += 1
            negative += bool((naive_linear(mdp, beta) < 0).any())
            with pytest.raises(ValueError, match="mdp: expected a finite v"):
                solve(mdp, beta=beta)
    print(f"{finite} finite, {infinite} infinite ({negative} of them with a negative z), {grey} too near to 1 to tell")
    assert finite >= 0.15 * len(seeds) and infinite >= 0.15 * len(seeds) and grey <= 0.01 * len(seeds)
    assert negative == infinite, "an infinite v* shows as a negative z in some state"


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6, -1e-6, -1e-4, -1e-2])
def test_the_border_of_a_self_loop(distance: float) -> None:
    """One state, round with p = 1/2 for r: exp(v*/beta) = (1/2) / (1 - e^{r/beta} / 2), infinite from r = beta ln 2 on."""
    beta = 0.7
    reward = beta * (np.log(2) + np.log1p(-distance))
    mdp = TokenMDP([[0, -1]], [[reward, 0.0]], [[0.3, 0.3]])
    if distance < 0:
        with pytest.raises(ValueError, match="finite v"):
            solve(mdp, beta=beta)
        return
    truth = beta * np.log(0.5 / distance)  # 1 - e^{r / beta} / 2 = distance, up to the rounding of r
    assert_near("self-loop near its border", abs(solve(mdp, beta=beta).objective - truth), 8 * EPS * 2 / distance)


@pytest.mark.parametrize("leave", [1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("horizon", [None, 3])
def test_error_bound_where_a_reply_may_wait(leave: float, horizon: int | None) -> None:
    """An environment that talks for 1 / leave tokens before it answers changes no value, and enlarges rounding by as much.

    The truth is the same automaton whose environment answers at once. Without the wait in the bound, errors of 5e-9 stood
    beside a "proved" 1e-14.
    """
    for seed in range(25):
        rng = np.random.default_rng(seed)
        chance = rng.random((2, 3))
        talk = np.log(np.column_stack([chance / chance.sum(1, keepdims=True) * (1 - leave), [leave] * 2]))
        at_once = np.array([[-np.inf, -np.inf, -np.inf, 0.0]] * 2)
        reward, logits = rng.normal(size=4), rng.normal(size=4)
        long, short = (
            TokenMDP(
                [[1, 1, 2, -1], [1, 2, 1, 0], [2, 1, 2, 0]],
                [reward, [0] * 4, [0] * 4],
                [logits, *speech],
                [True, False, False],
                horizon=horizon,
            )
            for speech in (talk, at_once)
        )
        solution, truth = solve(long, beta=0.5, gamma=0.5), solve(short, beta=0.5, gamma=0.5)
        gap = float(np.abs(solution.values - truth.values).max())
        assert_near(f"waiting replies, horizon {horizon}", gap, solution.error_bound + truth.error_bound)
        if horizon is None:
            assert_near(
                "waiting replies: the bound is no looser than it must be", solution.error_bound, 1e3 * EPS * (2 + 2 / leave)
            )


@holds_for(60, automata(loops=True, horizons=False, gammas=(0.5, 0.9)), often={"loops": 0.5, "random replies": 0.15})
def test_error_bound_bounds_the_error(world: World) -> set[str]:
    """gamma < 1: |v - v*| <= error_bound + the rounding of states outside loops, and the bound itself is below 1e-10."""
    solution, truth = solved(world), long_values(world.mdp, world.beta, world.gamma)
    size = solution.scale + world.beta * float(np.abs(world.mdp.ref_log_policy[world.mdp.allowed]).max())
    gap = float(np.abs(solution.values - truth).max())
    assert_near("|v - v*| <= error_bound + sweep", gap, solution.error_bound + 4 * EPS * size)
    assert_near("error_bound", solution.error_bound, ROADS * solution.scale)
    inner = np.concatenate([b.states for b in blocks(world.mdp.next_state, world.mdp.allowed) if b.cyclic] or [[0]]).astype(int)
    if solution.error_bound > 0:
        assert_near(
            "|v - v*| in loops", float(np.abs(solution.values - truth)[0, inner].max()), solution.error_bound + 2 * EPS * size
        )
    return world.strata


# ------------------------------------------------------------------------------------------------------------ extremes
def hard_values(mdp: TokenMDP, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """The hard maximum float[S] and what its greedy policy costs in nats, E sum gamma^t -ln pi_ref(a*|s), by iteration."""
    v, cost = np.zeros(mdp.n_states), np.zeros(mdp.n_states)
    rows = np.arange(mdp.n_states)
    chance = np.where(mdp.allowed, np.exp(mdp.ref_log_policy), 0.0)
    for _ in range(20_000):
        q = np.where(mdp.allowed, mdp.reward + gamma * np.append(v, 0)[mdp.next_state], -np.inf)
        talk = (chance * np.append(v, 0)[mdp.next_state]).sum(1)
        a = q.argmax(1)
        later = np.append(cost, 0)[mdp.next_state]
        new = np.where(mdp.is_policy, q.max(1), talk)
        paid = np.where(mdp.is_policy, -mdp.ref_log_policy[rows, a] + gamma * later[rows, a], (chance * later).sum(1))
        if np.abs(new - v).max() <= 1e-15 * (1 + np.abs(new).max()) and np.abs(paid - cost).max() <= 1e-13 * (1 + paid.max()):
            return new, paid
        v, cost = new, paid
    raise AssertionError("the hard iteration did not settle")


@pytest.mark.parametrize(("size", "beta"), [(1e3, 1e-2), (1.0, 1e-8), (1e3, 1e-6)])
@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_cold_and_large(size: float, beta: float, loops: bool, gamma: float) -> None:
    """r / beta up to 1e9: no overflow, no warning, and v_hard - beta * (cost of the hard policy) <= v* <= v_hard."""
    for seed in range(12):
        shape = {"S": 7, "V": 3, "replies": ("none", "single", "random")[seed % 3], "prompts": seed % 2}
        mdp = automaton(seed, loops=loops, size=size, beta=beta, gamma=gamma, **shape)
        solution = solve(mdp, beta=beta, gamma=gamma)
        hard, cost = hard_values(mdp, gamma)
        room = 64 * EPS * solution.scale * 20
        assert_near("v* <= hard maximum", float((solution.v() - hard).max()), room)
        assert_near("v* >= hard maximum - beta cost", float((hard - beta * cost - solution.v()).max()), room)
        v = solution.v().astype(Long)
        residual = np.abs(long_backup(mdp, v, v, Long(beta), Long(gamma)) - v).max()
        assert_near("cold: Bellman residual", float(residual), RESIDUAL * solution.scale)
        assert np.isfinite(solution.q()[mdp.allowed]).all() and np.isfinite(solution.optimal_logits()[mdp.allowed]).all()


@holds_for(40, every_world, st.sampled_from([1e2, 1e4, 1e6, 1e12]), often={"loops": 0.1})
def test_hot(world: World, beta: float) -> set[str]:
    """beta -> infinity: 0 <= v* - E_ref[return] <= visits x max (range of q*)^2 / (8 beta), by Hoeffding's lemma."""
    mdp = world.mdp
    solution = solve(mdp, beta=beta, gamma=world.gamma)
    ref = evaluate(mdp, mdp.ref_log_policy, beta=beta, gamma=world.gamma)
    layers = range(len(solution.values) - 1) if solution.time_dependent else range(1)
    rows = mdp.is_policy
    least = lambda q: np.where(mdp.allowed, q, np.inf)[rows].min(1)  # noqa: E731
    spread = max(float((solution.q(t)[rows].max(1) - least(solution.q(t))).max()) for t in layers)
    visits = ref.occupancy.sum()
    room = RESIDUAL * solution.scale * (1 + visits)
    assert_near("hot: E_ref return <= v*", ref.expected_return - solution.objective, room)
    assert_near("hot: v* - E_ref return", solution.objective - ref.expected_return, visits * spread**2 / (8 * beta) + room)
    return world.strata


# ------------------------------------------------------------------------------------------------------------- horizon
@holds_for(80, automata(horizons=True), often={"loops": 0.1, "random replies": 0.1})
def test_a_horizon_is_the_unrolled_automaton(world: World) -> set[str]:
    """v(t)(s) of the horizon = v of unrolled state t S + s, and the same for q and evaluate."""
    mdp, S = world.mdp, world.mdp.n_states
    solution, flat = solved(world), solve(world.mdp.unroll(), beta=world.beta, gamma=world.gamma)
    table = world.policy()
    got = evaluate(mdp, table, beta=world.beta, gamma=world.gamma)
    unrolled = evaluate(mdp.unroll(), table.reshape(-1, mdp.n_tokens), beta=world.beta, gamma=world.gamma)
    size = 8 * EPS * solution.scale * (1 + flat.mdp.n_states)
    for t in range(int(mdp.horizon or 0)):
        rows = slice(t * S, (t + 1) * S)
        if solution.time_dependent:
            assert_near("v(t) = unrolled", float(np.abs(solution.v(t) - flat.v()[rows]).max()), size)
            gap = np.abs(np.where(mdp.allowed, solution.q(t), 0) - np.where(mdp.allowed, flat.q()[rows], 0))
            assert_near("q(t) = unrolled", float(gap.max()), size)
    assert_near("v(0) = unrolled", float(abs(solution.objective - flat.objective)), size)
    room = 64 * EPS * (solution.scale + world.beta * (got.kl_to_ref + got.kl_to_optimal + 10)) * 10
    for name in ("objective", "expected_return"):
        assert_near(f"evaluate {name} = unrolled", abs(getattr(got, name) - getattr(unrolled, name)), room)
    for name in ("kl_to_ref", "kl_to_optimal"):
        assert_near(f"evaluate {name} = unrolled", abs(getattr(got, name) - getattr(unrolled, name)), room / world.beta)
    if got.occupancy.ndim == 3:
        gap = np.abs(got.occupancy.reshape(unrolled.occupancy.shape) - unrolled.occupancy)
        assert_near("occupancy = unrolled", float(gap.max()), RESIDUAL)
    return world.strata


@holds_for(30, automata(loops=False, horizons=False))
def test_a_vacuous_horizon_is_none(world: World) -> None:
    """As many policy tokens as there are states cut no string of an automaton without loops: the same v*, to the bit."""
    limited = solve(replace(world.mdp, horizon=world.mdp.n_states), beta=world.beta, gamma=world.gamma)
    assert not limited.time_dependent
    np.testing.assert_array_equal(limited.values, solved(world).values)


@holds_for(40, automata(loops=True, horizons=False), st.sampled_from([1, -1]), often={"loops": 0.5})
def test_values_grow_with_the_horizon_towards_the_fixed_point(world: World, sign: int) -> set[str]:
    """T is monotone: v_H rises with H for rewards >= 0 and falls for rewards <= 0; |v_H - v*| <= gamma^H max|v*|."""
    gamma = min(world.gamma, 0.9)
    mdp = replace(world.mdp, reward=sign * np.abs(world.mdp.reward))
    limit = solve(mdp, beta=world.beta, gamma=gamma)
    H = 25
    solution = solve(replace(mdp, horizon=H), beta=world.beta, gamma=gamma)
    if not solution.time_dependent:
        return world.strata
    room = 64 * EPS * limit.scale * 10
    for t in range(H):
        assert_near("v_H monotone in H", float((sign * (solution.v(t + 1) - solution.v(t))).max()), room)
        gap = np.abs(solution.v(t) - limit.v()).max()
        assert_near("|v_H - v*| <= gamma^H max|v*|", float(gap), gamma ** (H - t) * float(np.abs(limit.v()).max()) + room)
    return world.strata


# ------------------------------------------------------------------------------------------------------ odd policies
@holds_for(40, automata(horizons=False), often={"some finite": 0.1})
def test_mass_on_a_forbidden_token(world: World) -> set[str]:
    """J = -inf and infinite KLs exactly in the states from which the policy can get there; elsewhere nothing changes."""
    mdp = world.mdp
    holes = np.argwhere(~mdp.allowed & mdp.is_policy[:, None])
    if not len(holes):
        return set()
    s, a = holes[world.rng.integers(len(holes))]
    table = world.policy()
    plain = evaluate(mdp, table, beta=world.beta, gamma=world.gamma)
    bad = table.copy()
    bad[s] += np.log(0.75)
    bad[s, a] = np.log(0.25)
    got = evaluate(mdp, bad, beta=world.beta, gamma=world.gamma)
    ahead = np.arange(mdp.n_states) == s
    for _ in range(mdp.n_states):
        ahead |= (np.append(ahead, False)[mdp.next_state] & mdp.allowed).any(1)
    assert (got.v[ahead] == -np.inf).all()
    size = RESIDUAL * (1 + np.abs(plain.v).max()) * (1 + plain.occupancy.sum())
    assert_near("states that cannot reach it", float(np.abs(got.v - plain.v)[~ahead].max(initial=0.0)), size)
    if ahead[mdp.start]:
        assert got.objective == -np.inf and got.kl_to_ref == np.inf and got.kl_to_optimal == np.inf
        assert np.isfinite(got.expected_return)
    else:
        assert abs(got.objective - plain.objective) <= size
    return {"some finite"} if (~ahead).any() else {"all infinite"}


def test_forbidden_mass_under_a_horizon() -> None:
    """Mass on a forbidden token in one layer: states of later layers stay finite."""
    mdp = TokenMDP([[0, -1, 0]], [[0.5, 0.1, 0.0]], [[0.0, 1.0, -np.inf]], horizon=3)
    tables = np.log(np.full((3, 1, 3), [0.5, 0.5, 1e-300]))
    tables[..., 2] = -np.inf
    tables[1, 0] = np.log([0.25, 0.5, 0.25])
    got = evaluate(mdp, tables, beta=0.5)
    assert got.objective == -np.inf and got.kl_to_ref == np.inf and got.v[1, 0] == -np.inf and np.isfinite(got.v[2, 0])


@pytest.mark.parametrize(("off", "accepted"), [(5e-7, True), (-5e-7, True), (5e-6, False), (-5e-6, False)])
def test_rows_of_a_policy_sum_to_one_within_1e_6(off: float, accepted: bool) -> None:
    mdp = TokenMDP(np.array([[-1, -1]]), np.zeros((1, 2)), np.zeros((1, 2)))
    table = np.log([[0.5, 0.5 + off]])
    if accepted:
        assert evaluate(mdp, table, beta=1.0).objective == pytest.approx(0.0, abs=1e-6)
    else:
        with pytest.raises(ValueError, match="log_policy: expected rows whose exponentials sum to 1"):
            evaluate(mdp, table, beta=1.0)


def test_a_policy_that_never_ends() -> None:
    """gamma = 1: a ValueError that names the state; gamma < 1 is fine and the sum is geometric."""
    mdp = TokenMDP([[0, -1]], [[1.0, 0.0]], [[0.0, 0.0]])
    forever = np.array([[0.0, -np.inf]])
    with pytest.raises(ValueError, match=r"log_policy: expected a policy whose episodes end .* state 0"):
        evaluate(mdp, forever, beta=2.0)
    got = evaluate(mdp, forever, beta=2.0, gamma=0.5)
    assert got.expected_return == 2.0 and abs(got.kl_to_ref - 2 * np.log(2)) <= 4 * EPS
    assert abs(evaluate(replace(mdp, horizon=5), forever, beta=2.0).expected_return - 5.0) <= 8 * EPS


def test_a_loop_without_an_end() -> None:
    """No allowed token ends: a ValueError at gamma = 1, v* = r / (1 - gamma) with a discount."""
    mdp = TokenMDP([[0, 0]], [[1.0, 1.0]], [[0.0, 0.0]])
    with pytest.raises(ValueError, match="never ends"):
        solve(mdp, beta=1.0)
    assert abs(solve(mdp, beta=1.0, gamma=0.75).objective - 4.0) <= 16 * EPS


# --------------------------------------------------------------------------------------------------------- invariances
def assert_same(name: str, world: World, actual: np.ndarray, expected: np.ndarray, solution: Solution) -> None:
    size = solution.scale + world.beta * float(np.abs(world.mdp.ref_logits[world.mdp.allowed]).max())
    assert_near(name, float(np.abs(actual - expected).max()), 8 * EPS * size * stretch(world, solution))


@holds_for(80, every_world)
def test_gauge(world: World) -> None:
    """ref_logits + c(s) in policy states: the same v* and pi*."""
    shift = np.where(world.mdp.is_policy[:, None], world.rng.normal(size=(world.mdp.n_states, 1)) * 3, 0.0)
    other = replace(world.mdp, ref_logits=world.mdp.ref_logits + shift)
    solution, moved = solved(world), solve(other, beta=world.beta, gamma=world.gamma)
    assert_same("gauge", world, moved.values, solution.values, solution)


@holds_for(80, every_world)
def test_names_of_states_and_tokens(world: World) -> None:
    """Permuting states and tokens permutes v*, q* and nothing else."""
    mdp, rng = world.mdp, world.rng
    rows, columns = rng.permutation(mdp.n_states), rng.permutation(mdp.n_tokens)
    where = np.append(np.argsort(rows), -1)
    place = np.ix_(rows, columns)
    other = TokenMDP(
        where[mdp.next_state[place]], mdp.reward[place], mdp.ref_logits[place], mdp.is_policy[rows],
        start=int(where[mdp.start]), horizon=mdp.horizon,
    )  # fmt: skip
    solution, moved = solved(world), solve(other, beta=world.beta, gamma=world.gamma)
    assert_same("permutation", world, moved.values, solution.values[:, rows], solution)
    q = np.where(mdp.allowed[place], solution.q()[place], 0)
    assert_same("permutation of q", world, np.where(other.allowed, moved.q(), 0), q, solution)


@holds_for(80, every_world)
def test_a_silent_tool_changes_nothing(world: World) -> None:
    """An edge split by an environment state with one reply: the same v* everywhere, under a horizon and a discount too."""
    mdp = world.mdp
    edges = np.argwhere(mdp.allowed)
    s, a = edges[world.rng.integers(len(edges))]
    reply = np.full((1, mdp.n_tokens), -np.inf)
    said = int(world.rng.integers(mdp.n_tokens))
    reply[0, said] = 0.0
    follow = np.concatenate([mdp.next_state, np.full((1, mdp.n_tokens), mdp.next_state[s, a])])
    follow[s, a] = mdp.n_states
    split = replace(
        mdp,
        next_state=follow,
        reward=np.concatenate([mdp.reward, np.zeros((1, mdp.n_tokens))]),
        ref_logits=np.concatenate([mdp.ref_logits, reply]),
        is_policy=np.append(mdp.is_policy, False),
    )
    solution, moved = solved(world), solve(split, beta=world.beta, gamma=world.gamma)
    assert_same("split edge", world, moved.values[:, :-1], solution.values, solution)


# -------------------------------------------------------------------------------------------------------- second roads
def test_the_linear_system_where_z_spans_hundreds_of_decades() -> None:
    """A chain of loops whose every step costs 20 beta: z = exp(v / beta) falls by nine decades a state."""
    n = 30
    next_state = np.array([[min(s + 1, n - 1), max(s - 1, 0), -1] for s in range(n)])
    reward = np.tile([-20.0, -21.0, -600.0], (n, 1))
    reward[-1] = [-20.0, -21.0, 0.0]
    mdp = TokenMDP(next_state, reward, np.zeros((n, 3)))
    solution = solve(mdp, beta=1.0)
    assert solution.v().max() - solution.v().min() > 500
    assert abs(linear_value(mdp, 1.0) - solution.objective) <= ROADS * solution.scale


def test_no_linear_system_where_z_overflows() -> None:
    mdp = TokenMDP(np.array([[-1, -1]]), np.array([[1.0, 0.0]]), np.zeros((1, 2))).with_prompt(0)
    gaps = dict(second_roads(solve(mdp, beta=1e-3)))
    assert (
        "linear system" not in gaps
        and max(gaps.values()) <= ROADS
        and "linear system" in dict(second_roads(solve(mdp, beta=0.1)))
    )


def test_roads_differ_by_a_size_whatever_the_sign() -> None:
    solution = solve(TokenMDP(np.array([[-1, -1]]), np.array([[1.0, 0.0]]), np.zeros((1, 2))).with_prompt(0), beta=1.0)
    for off in (-0.5, 0.5):
        values = solution.values.copy()
        values[0, solution.mdp.start] += off
        wrong = replace(solution, values=values)
        gaps = dict(second_roads(wrong))
        assert len(gaps) == 4 and min(gaps.values()) > 0.1


def test_an_error_bound_without_environment_states() -> None:
    """w = 0: the bound is the residual's own and not 0, as rounding is always in it."""
    mdp = TokenMDP(np.array([[0, -1]]), np.array([[0.3, 0.1]]), np.zeros((1, 2)))
    bound = solve(mdp, beta=0.7, gamma=0.9).error_bound
    assert EPS < bound < 1e-12
    assert solve(mdp.with_prompt(0), beta=0.7, gamma=0.9).error_bound == pytest.approx(2 * bound, rel=1e-12, abs=0.0)


def test_the_scale_looks_at_every_layer() -> None:
    """To and fro, +5 and -5: over two tokens q is 0, with one left it is 5."""
    mdp = TokenMDP(np.array([[1], [0]]), np.array([[5.0], [-5.0]]), np.zeros((2, 1)), horizon=2)
    solution = solve(mdp, beta=1.0)
    np.testing.assert_allclose(solution.q(0), 0.0, atol=1e-14)
    assert solution.scale == pytest.approx(6.0)


def test_a_loop_left_by_forbidden_tokens_alone() -> None:
    """gamma = 1: a forbidden token counts as the end, so an episode goes round once on average and is worth -inf."""
    mdp = TokenMDP(np.array([[0, -1, -1]]), np.array([[1.0, 0.0, 0.0]]), np.array([[-2.0, 0.0, -np.inf]]))
    half = np.log(0.5)
    seen = evaluate(mdp, np.array([[half, -np.inf, half]]), beta=1.0)
    assert seen.expected_return == pytest.approx(1.0) and seen.kl_to_ref == np.inf and seen.objective == -np.inf


def test_a_loop_too_large_for_a_dense_system_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly as many states as fit are solved; the limit is of one loop, not of the automaton."""
    ring = np.stack([(np.arange(4) + 1) % 4, np.full(4, -1)], 1)
    mdp = TokenMDP(ring, np.zeros((4, 2)), np.zeros((4, 2))).with_prompt(0)
    monkeypatch.setattr(bellman, "MAX_LOOP", 4)
    assert solve(mdp, beta=1.0).objective == pytest.approx(0.0)
    monkeypatch.setattr(bellman, "MAX_LOOP", 3)
    with pytest.raises(ValueError, match=r"mdp: expected loops of at most 3 states, got one of 4\. Give it a horizon"):
        solve(mdp, beta=1.0)


def test_the_bound_under_a_horizon_grows_with_it() -> None:
    """No rewards: every value is 0, so only the number of layers is left in the bound."""
    logits = np.log([[0.5, 0.5], [0.25, 0.75]])
    mdp = TokenMDP(np.array([[1, 1], [1, 0]]), np.zeros((2, 2)), logits, np.array([True, False]))
    four, eight = (solve(replace(mdp, horizon=h), beta=1.0).error_bound for h in (4, 8))
    assert 0 < 2 * four == pytest.approx(eight, rel=1e-12, abs=0.0)
