"""Second roads to the exact answer, each sharing as little as possible with `bellman.solve`.

listing          every string and its probability; a plain weighted sum
linear system    z = exp(v / beta) solves a linear system where gamma = 1 and no reply is random
plain iteration  v <- T(v) on all states at once until nothing moves, in torch, with no order of states and no blocks
"""

from collections.abc import Iterator

import numpy as np
import torch

from shiq_lab.batch import TokenBatch
from shiq_lab.bellman import EPS, Solution
from shiq_lab.enumeration import count_trajectories, enumerate_trajectories
from shiq_lab.graph import Bools, Floats
from shiq_lab.mdp import TokenMDP

LISTABLE = 100_000  # strings; a listing of this size takes under a second
FITS = 600  # |v*| / beta; beyond, z = exp(v / beta) leaves float64 (e^709)


def second_roads(solution: Solution) -> Iterator[tuple[str, float]]:
    """(road, |v*(start) by that road - solution.objective| / scale) for every road that this automaton admits."""
    mdp, beta, gamma = solution.mdp, solution.beta, solution.gamma
    truth, scale = solution.objective, solution.scale
    count = count_trajectories(mdp)
    if count is not None and count <= LISTABLE and not mdp.is_policy[mdp.start]:
        yield "listing J(pi*)", abs(listed_objective(solution) - truth) / scale
        if gamma == 1 and mdp.deterministic:
            yield "listing E exp(R/beta)", abs(listed_value(mdp, beta) - truth) / scale
    if mdp.horizon is None and gamma == 1 and mdp.deterministic and scale / beta < FITS:
        yield "linear system", abs(linear_value(mdp, beta) - truth) / scale
    yield "plain iteration", abs(plain_iteration(mdp, beta, gamma)[mdp.start] - truth) / scale


def row_terms(batch: TokenBatch, mdp: TokenMDP, log_ratio: Floats, beta: float, gamma: float) -> Floats:
    """Of every row: sum_t gamma^t (r_t - beta log_ratio(s_t, a_t)), with plain cumulative counts; float[B]."""
    action = batch.completion_mask.numpy() == 1
    states = np.concatenate([np.full((len(batch), 1), mdp.start), batch.known_states().numpy()[:, :-1]], 1)
    t = np.cumsum(action, 1) - action
    ratio = log_ratio[t, states, batch.input_ids.numpy()] if log_ratio.ndim == 3 else log_ratio[states, batch.input_ids.numpy()]
    return np.where(action, gamma**t * (batch.rewards.numpy() - beta * np.where(action, ratio, 0.0)), 0.0).sum(1)


def listed_objective(solution: Solution) -> float:
    """J(pi*) as a plain sum over all strings, with their probabilities under pi*."""
    mdp = solution.mdp
    layers = range(mdp.horizon or 0) if solution.time_dependent else range(1)
    tables = np.stack([solution.log_policy(t) for t in layers])
    table = tables if solution.time_dependent else tables[0]
    ratio = np.where(mdp.allowed, table, 0.0) - np.where(mdp.allowed, mdp.ref_log_policy, 0.0)
    batch = enumerate_trajectories(mdp, LISTABLE, behavior=table)
    padded = np.concatenate([ratio, ratio[-1:]]) if ratio.ndim == 3 else ratio  # t may point one past the last token
    return float(batch.weights.numpy() @ row_terms(batch, mdp, padded, solution.beta, solution.gamma))


def listed_value(mdp: TokenMDP, beta: float) -> float:
    """E_prompt beta ln E_{y ~ pi_ref | prompt} exp(R / beta), gamma = 1: prompts are averaged outside the logarithm."""
    batch = enumerate_trajectories(mdp, LISTABLE)
    weight, group = batch.weights.numpy(), batch.group_ids.numpy()
    total = row_terms(batch, mdp, np.zeros(mdp.ref_logits.shape), beta, 1.0)
    value = 0.0
    for g in np.unique(group):
        mine = group == g
        top = total[mine].max()
        mass = weight[mine].sum()
        value += mass * (top + beta * np.log((weight[mine] / mass * np.exp((total[mine] - top) / beta)).sum()))
    return float(value)


def linear_value(mdp: TokenMDP, beta: float) -> float:
    """v*(start) from the dense system z = A z + b of all policy states; prompts are averaged by plain iteration after it."""
    S = mdp.n_states
    step = np.where(mdp.allowed, np.exp(mdp.ref_log_policy + np.where(mdp.is_policy[:, None], mdp.reward / beta, 0.0)), 0.0)
    acted = _from_an_action_on(mdp)  # environment states among these have a single reply each: they pass z on
    A, b = np.zeros((S + 1, S + 1)), np.append(~acted, True).astype(np.float64)  # prompts have no z: 1 stands in
    for a in range(mdp.n_tokens):
        np.add.at(A, (np.flatnonzero(acted), mdp.next_state[acted, a] % (S + 1)), step[acted, a])
    log_z = np.zeros(S + 1)
    with np.errstate(divide="ignore"):
        log_A, log_b = np.log(A), np.log(b)
    for _ in range(4):  # a dense solve is right to eps of the largest entry; in units of the last z all entries are near 1
        A, b = np.exp(log_A + log_z - log_z[:, None]), np.exp(log_b - log_z)
        z = np.maximum(np.linalg.solve(np.eye(S + 1) - A, b), 0.0)
        for _ in range(S):  # what rounding took for 0 comes back, as sums of positive numbers
            z = A @ z + b
        log_z += np.log(z)
    v = beta * np.where(np.append(acted, True), log_z, 0.0)
    prompts = np.flatnonzero(~acted)
    for _ in prompts:
        v[prompts] = (np.where(mdp.allowed, np.exp(mdp.ref_logits), 0.0)[prompts] * v[mdp.next_state[prompts]]).sum(1)
    return float(v[mdp.start])


def _from_an_action_on(mdp: TokenMDP) -> Bools:
    """bool[S]: policy states, and whatever can follow them."""
    acted = np.append(mdp.is_policy, True)
    while True:
        before = acted.copy()
        acted[mdp.next_state[acted[:-1]]] = True
        if (acted == before).all():
            return acted[:-1]


def plain_iteration(mdp: TokenMDP, beta: float, gamma: float) -> Floats:
    """v at t = 0 by v <- T(v) on all states at once, until the largest change is that of rounding; float[S].

    A horizon of H is exactly H rounds, each after the environment's states have settled.
    """
    policy = torch.tensor(np.array(mdp.is_policy))
    allowed, reward = torch.tensor(np.array(mdp.allowed)), torch.tensor(np.array(mdp.reward))
    follow = torch.tensor(np.where(mdp.next_state < 0, mdp.n_states, mdp.next_state))
    log_ref = torch.tensor(np.array(mdp.ref_logits)).log_softmax(1)

    def settle(v: torch.Tensor) -> torch.Tensor:
        while True:
            said = torch.where(allowed, log_ref.exp() * torch.nn.functional.pad(v, (0, 1))[follow], 0.0).sum(1)
            new = torch.where(policy, v, said)
            if torch.equal(new, v) or (new - v).abs().max() <= 4 * EPS * v.abs().max():
                return new
            v = new

    v = torch.zeros(mdp.n_states, dtype=torch.float64)
    size = 1 + beta * log_ref[allowed].abs().max()  # beta ln pi_ref is rounded too: smaller changes may go on for ever
    rounds = 0
    while mdp.horizon is None or rounds < mdp.horizon:
        q = reward + gamma * torch.nn.functional.pad(v, (0, 1))[follow]
        best = beta * (log_ref + torch.where(allowed, q, 0.0) / beta).logsumexp(1)
        new = settle(torch.where(policy, best, v))
        rounds += 1
        still = (new - v).abs().max() <= 2 * EPS * (size + new.abs().max())
        v = new
        if (mdp.horizon is None and still) or rounds > 100_000:
            break
    return v.numpy()
