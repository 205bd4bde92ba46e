"""Loop: an episode without a bound on its length. See `loop`."""

import numpy as np
from numpy.typing import NDArray

from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.envs._common import BOS, at_least, checked_seed, number, stream
from shiq_lab.mdp import TokenMDP

LEFT, RIGHT, STOP = range(3)


def loop(n_states: int = 4, cost: float = 0.2, seed: int = 0) -> TokenMDP:
    """Loop: walk around a ring as long as you like, and stop where it pays.

    Tests       unbounded length at gamma = 1: loops in the recursion, listing is impossible, v* must still be finite
    Actions     "left" and "right" around the ring, "stop"
    Start       a beginning-of-sequence token, then state 0 of the ring
    Rewards     left -cost, right -2 cost, stop standard normal, one a state
    End         at stop. Every step costs, so the rows of diag(pi_ref exp(r / beta)) x successor sum to at most
                exp(-cost / beta) < 1: the spectral radius is below 1 for every reference and every beta
    Closed form gamma = 1: z = exp(v* / beta) solves a linear system, see `loop_values`; for one state `loop_value`
    """
    n_states, cost = at_least("n_states", n_states, 1, 500), number("cost", cost, above=0.0)
    stop = stream(seed).normal(size=n_states)
    mdp = from_states(
        0,
        lambda s: Row(
            next={LEFT: (s - 1) % n_states, RIGHT: (s + 1) % n_states, STOP: END},
            reward={LEFT: -cost, RIGHT: -2 * cost, STOP: stop[s]},
        ),
        4,
        tokens=["left", "right", "stop", BOS],
        name="Loop",
    )
    return random_reference(mdp, checked_seed(seed)).with_prompt(BOS)


def loop_value(p_stop: float, r_stop: float, p_go: float, r_go: float, beta: float) -> float:
    """v* of one state that stops or returns to itself: beta ln( p_stop e^{r_stop/beta} / (1 - p_go e^{r_go/beta}) )."""
    return float(beta * np.log(p_stop * np.exp(r_stop / beta) / (1 - p_go * np.exp(r_go / beta))))


def loop_values(ref: NDArray[np.float64], reward: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    """v* float[n_states] at gamma = 1; ref (probabilities) and reward float[n_states, 3], states in ring order.

    z = exp(v*/beta) solves (I - M) z = b, M(s, s') = pi_ref exp(r/beta) of the token from s to s', b(s) that of "stop".
    """
    weight = ref * np.exp(reward / beta)
    n = len(ref)
    M = np.zeros((n, n))
    for token, turn in ((LEFT, -1), (RIGHT, 1)):
        np.add.at(M, (np.arange(n), (np.arange(n) + turn) % n), weight[:, token])
    return beta * np.log(np.linalg.solve(np.eye(n) - M, weight[:, STOP]))
