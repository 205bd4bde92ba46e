"""Chain: a long way to a discounted goal, or a small reward now. See `chain`."""

import numpy as np
from numpy.typing import NDArray

from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.envs._common import BOS, at_least, checked_seed, number
from shiq_lab.mdp import TokenMDP

WALK, RUN, STOP = range(3)
RUN_COST = 3  # running costs so many times what walking costs


def chain(
    length: int = 12, stops: int = 1, cost: float = 0.2, goal: float = 5.0, leave: float = 0.3, seed: int = 0
) -> TokenMDP:
    """Chain: deep-sea-like; every step costs, the goal lies `length` discounted steps away, stopping pays now.

    Tests       discounting: the powers of gamma in every return, and the choice between a near and a far reward
    Actions     "walk" and "run" lead on; "stop" leaves, offered in the first `stops` states
    Start       a beginning-of-sequence token
    Rewards     walk -cost, run -3 cost, the last of them + goal; stop `leave`
    End         after length steps, or at stop
    Closed form any gamma. Where all tokens lead to one successor, log-sum-exp lets it out: v_i = c_i + gamma v_{i+1} with
                c_i = beta ln sum_a pi_ref(a) exp(r(a) / beta), hence v_i = sum_{k>=i} gamma^{k-i} c_k. With stops = 1 this
                is every state but the first, whose value is one more log-sum-exp; stops = length is the full deep sea,
                a formula nested so many times; see `chain_values`
    """
    length = at_least("length", length, 1, 1000)
    stops = at_least("stops", stops, 0, length)
    cost, goal, leave = number("cost", cost, 0.0), number("goal", goal), number("leave", leave)

    def row(i: int) -> Row:
        last = i + 1 == length
        follow: dict[int, int | None] = dict.fromkeys((WALK, RUN), END if last else i + 1)
        reward = {WALK: -cost + goal * last, RUN: -RUN_COST * cost + goal * last}
        if i < stops:
            follow[STOP], reward[STOP] = END, leave
        return Row(next=follow, reward=reward)

    mdp = from_states(0, row, 4, tokens=["walk", "run", "stop", BOS], name="Chain")
    return random_reference(mdp, checked_seed(seed)).with_prompt(BOS)


def chain_values(
    ref: NDArray[np.float64], cost: float, goal: float, leave: float, beta: float, gamma: float
) -> NDArray[np.float64]:
    """v* float[length] of a chain whose reference has the probabilities ref float[length, 3] (walk, run, stop).

    States without "stop":  v_i = sum_{k>=i} gamma^{k-i} c_k, c_k = beta ln(ref_walk e^{-cost/beta} + ref_run e^{-3 cost/beta}),
    the last one plus the goal. States with it, from the last to the first:
    v_i = beta ln( ref_stop e^{leave/beta} + exp( (c_i + gamma v_{i+1}) / beta ) ).
    """
    length = len(ref)
    steps = np.exp(np.array([-cost, -RUN_COST * cost]) / beta)
    c = beta * np.log(ref[:, :STOP] @ steps)
    c[-1] += goal
    v = np.array([gamma ** np.arange(length - i) @ c[i:] for i in range(length)])
    for i in np.flatnonzero(ref[:, STOP] > 0)[::-1]:
        on = c[i] + gamma * v[i + 1] if i + 1 < length else c[i]
        v[i] = beta * np.logaddexp(np.log(ref[i, STOP]) + leave / beta, on / beta)
    return v
