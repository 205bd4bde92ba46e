"""Parity: the answer must make the number of ones even. See `parity`."""

import numpy as np
from numpy.typing import NDArray

from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.envs._common import BOS, at_least, checked_seed, number, sparse_value
from shiq_lab.mdp import TokenMDP


def parity(prompt_length: int = 4, length: int = 8, reward: float = 1.0, seed: int = 0) -> TokenMDP:
    """Parity: random bits as a prompt, then bits of one's own; the last is a check bit over prompt and answer.

    Tests       a reward that no token but the last one earns, and that every bit before it decides
    Actions     "0" and "1"
    Start       a beginning-of-sequence token, then prompt_length fair random bits
    Rewards     `reward` on the last bit where the number of ones is even, else 0
    End         after length bits of the policy
    Closed form gamma = 1: v* = beta ln(1 + p (exp(reward / beta) - 1)), p from `parity_probabilities`; uniform reference:
                p = 1/2 in every policy state
    """
    prompt_length = at_least("prompt_length", prompt_length, 0, 1000)
    length, reward = at_least("length", length, 1, 1000), number("reward", reward)

    def row(state: tuple[int, int]) -> Row:
        """The state is (bits so far, their sum modulo 2)."""
        said, odd = state
        follow = {bit: (said + 1, odd ^ bit) for bit in (0, 1)}
        if said < prompt_length:
            return Row(next=follow, probs={0: 0.5, 1: 0.5})
        if said + 1 < prompt_length + length:
            return Row(next=follow)
        return Row(next=dict.fromkeys(follow, END), reward={odd: reward})  # the bit that evens the sum is the sum

    mdp = from_states((0, 0), row, 3, tokens=["0", "1", BOS], name="Parity")
    return random_reference(mdp, checked_seed(seed)).with_prompt(BOS)


def parity_probabilities(ref_one: NDArray[np.float64]) -> NDArray[np.float64]:
    """The reference's probability of an even sum, float[length, 2] by (bits said, sum so far modulo 2).

    ref_one float[length, 2] is its probability of a "1" there. With e(s) = 2 p(s) - 1 the sum's sign averages:
    e(i, odd) = (1 - ref_one) e(i+1, odd) + ref_one e(i+1, 1 - odd), e(end, even) = 1, e(end, odd) = -1.
    """
    sign = np.array([1.0, -1.0])
    out = np.empty_like(ref_one)
    for i in range(len(ref_one))[::-1]:
        sign = (1 - ref_one[i]) * sign + ref_one[i] * sign[::-1]
        out[i] = (1 + sign) / 2
    return out


def parity_value(probability: float, reward: float, beta: float) -> float:
    """v* = beta ln(1 + p (exp(reward/beta) - 1)) at gamma = 1, p the reference's probability of an even sum."""
    return sparse_value(probability, reward, beta)
