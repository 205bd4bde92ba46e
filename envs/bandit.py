"""Bandit: one token and the episode is over. See `bandit`."""

import numpy as np
from numpy.typing import NDArray

from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.envs._common import BOS, at_least, checked_seed, names, stream
from shiq_lab.mdp import TokenMDP


def bandit(n_arms: int = 8, seed: int = 0) -> TokenMDP:
    """Bandit: the smallest token MDP, where q* is the reward itself.

    Tests       the read-out and the level of the logits, with nothing to propagate
    Actions     n_arms tokens "a0", "a1", ...
    Start       a beginning-of-sequence token
    Rewards     standard normal, one an arm
    End         after one action
    Closed form q*(a) = r(a); v* = beta ln sum_a pi_ref(a) exp(r(a) / beta), see `bandit_value`
    """
    n_arms = at_least("n_arms", n_arms, 1, 10_000)
    rewards = stream(seed).normal(size=n_arms)
    arms = range(n_arms)
    mdp = from_states(
        "arm",
        lambda _: Row(next=dict.fromkeys(arms, END), reward=dict(enumerate(rewards))),
        n_arms + 1,
        tokens=[*names("a", n_arms), BOS],
        name="Bandit",
    )
    return random_reference(mdp, checked_seed(seed)).with_prompt(BOS)


def bandit_value(ref: NDArray[np.float64], reward: NDArray[np.float64], beta: float) -> float:
    """v* = beta ln sum_a pi_ref(a) exp(r(a)/beta); ref and reward float[n_arms], ref the reference's probabilities."""
    return float(beta * np.log(ref @ np.exp(reward / beta)))
