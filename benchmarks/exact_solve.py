"""Solving the full 8-token, depth-6 prefix tree exactly, beside quantecon's DiscreteDP and one logsumexp pass.

    python benchmarks/exact_solve.py [--repeats 9]

The tree has 37,449 policy states and 299,592 edges, random rewards and reference logits. All start from the same arrays
[37449, 8]; each repeat builds everything afresh, so the topological order is in our time. Every number is the median over
repeats, in milliseconds, and the repeats go round all entries. quantecon gets state-action pairs, a sparse Q, gamma = 0.99
and a hard maximum; its compilation is done before the first repeat. Its policy iteration is what `DiscreteDP.solve` does
by default, and like ours it is exact and told nothing about the graph: that is the peer. The others are shown beside it:
modified policy iteration and value iteration happen to be exact on a tree of 6 levels, and backward induction is told
the 6.

Agreement: at beta = 1e-6 the soft values lie below the hard ones by at most 6 beta max(-ln pi_ref); asserted.

Aims: build + solve <= 1/10 of quantecon's policy iteration; solve <= 12 passes of torch.logsumexp over the same float64 array.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import quantecon
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from quantecon.markov import DiscreteDP, backward_induction

from shiq_lab import TokenMDP, solve

V, DEPTH, GAMMA = 8, 6, 0.99
S = (V**DEPTH - 1) // (V - 1)
ITERATIONS = ("policy_iteration", "modified_policy_iteration", "value_iteration")


def tree() -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """next_state, reward, ref_logits of the full tree, breadth first: the children of s are V s + 1, ..., V s + V."""
    rng = np.random.default_rng(0)
    child = V * np.arange(S)[:, None] + np.arange(1, V + 1)
    return np.where(child < S, child, -1), rng.normal(size=(S, V)), rng.normal(size=(S, V))


def quantecon_problem(next_state: NDArray[np.int64], reward: NDArray[np.float64], gamma: float) -> DiscreteDP:
    """State-action pairs; the end is one more state, which follows itself and pays nothing."""
    L = S * V + 1
    follow = np.append(np.where(next_state < 0, S, next_state).ravel(), S)
    Q = sp.csr_matrix((np.ones(L), follow, np.arange(L + 1)), shape=(L, S + 1))
    s_indices = np.append(np.repeat(np.arange(S), V), S)
    a_indices = np.append(np.tile(np.arange(V), S), 0)
    return DiscreteDP(np.append(reward.ravel(), 0.0), Q, gamma, s_indices, a_indices)


def timed(job: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = job()
    return 1e3 * (time.perf_counter() - begin), result


def once(arrays: tuple[Any, ...]) -> tuple[dict[str, float], dict[str, Any]]:
    """Milliseconds of every entry, and the values to compare."""
    next_state, reward, ref_logits = arrays
    ms: dict[str, float] = {}
    value: dict[str, Any] = {}
    ms["ours: build"], mdp = timed(lambda: TokenMDP(next_state, reward, ref_logits))
    ms["ours: solve"], solution = timed(lambda: solve(mdp, beta=0.5, gamma=GAMMA))
    value["soft"] = solution.v()
    ms["quantecon: build"], problem = timed(lambda: quantecon_problem(next_state, reward, GAMMA))
    for method in ITERATIONS:
        ms[f"quantecon: {method}"], result = timed(partial(problem.solve, method=method, epsilon=1e-9))
        value[method] = result.v[:S]
    ms["quantecon: backward_induction"], result = timed(lambda: backward_induction(problem, DEPTH))
    value["backward_induction"] = result[0][0, :S]
    table = torch.from_numpy(ref_logits)
    passes = [timed(lambda: torch.logsumexp(table, 1))[0] for _ in range(5)]  # the first ones wake torch's threads
    ms["torch.logsumexp"] = min(passes)  # a floor, so the fastest
    return ms, value


def check(arrays: tuple[Any, ...], hard: NDArray[np.float64]) -> float:
    """The largest distance to the hard maximum at beta = 1e-6; ValueError where it is not within the proved bound."""
    beta, mdp = 1e-6, TokenMDP(*arrays)
    below = hard - solve(mdp, beta=beta, gamma=GAMMA).v()
    bound = DEPTH * beta * float(-mdp.ref_log_policy.min())
    rounding = 1e-12 * float(np.abs(hard).max())
    if below.min() < -rounding or below.max() > bound + rounding:
        raise ValueError(f"values: expected 0 to {bound:g} below quantecon's, got {below.min():g} to {below.max():g}.")
    return float(np.abs(below).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    arrays = tree()
    _, value = once(arrays)  # compiles and warms up
    for method in (*ITERATIONS, "backward_induction"):
        np.testing.assert_allclose(value["policy_iteration"], value[method], rtol=0, atol=1e-9)
    distance = check(arrays, value["policy_iteration"])
    runs = [once(arrays)[0] for _ in range(options.repeats)]
    ms = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
    ms["torch.logsumexp"] = min(run["torch.logsumexp"] for run in runs)  # where its threads must share cores it takes 80 ms
    peer = {m: ms["quantecon: build"] + ms[f"quantecon: {m}"] for m in (*ITERATIONS, "backward_induction")}
    ours = ms["ours: build"] + ms["ours: solve"]
    result = {
        "states": S,
        "edges": S * V,
        "repeats": options.repeats,
        "milliseconds": {key: round(x, 3) for key, x in ms.items()},
        "ours: build + solve": round(ours, 3),
        "quantecon: build + solve": {key: round(x, 3) for key, x in peer.items()},
        "quantecon's policy iteration / ours (aim >= 10)": round(peer["policy_iteration"] / ours, 2),
        "quantecon's fastest road / ours": round(min(peer.values()) / ours, 2),
        "our solve in logsumexp passes (aim <= 12)": round(ms["ours: solve"] / ms["torch.logsumexp"], 2),
        "our build + solve in logsumexp passes": round(ours / ms["torch.logsumexp"], 2),
        "largest distance to the hard maximum at beta = 1e-6": distance,
        "machine": {"cpus": os.cpu_count(), "torch threads": torch.get_num_threads(), "python": platform.python_version()}
        | {"numpy": np.__version__, "torch": torch.__version__, "quantecon": quantecon.__version__},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
