"""Shaped: Tree with a potential added to its rewards. See `shaped`."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shiq_lab.envs._common import number, stream
from shiq_lab.envs.tree import tree
from shiq_lab.errors import bad
from shiq_lab.graph import Recursion
from shiq_lab.mdp import TokenMDP


def shaped(depth: int = 5, n_tokens: int = 4, gamma: float = 0.9, seed: int = 0) -> TokenMDP:
    """Shaped: the twin of Tree under potential-based shaping; both have the same optimal policy.

    Tests       invariance: r + gamma Phi(s') - Phi(s) must leave pi* alone and lower v* by Phi (math.md, F7)
    Actions     n_tokens letters "a", "b", ...
    Start       a beginning-of-sequence token
    Rewards     those of tree(depth, n_tokens, seed), shaped by a random Phi; gamma is the discount it is to be solved at
    End         after depth tokens, where Phi = 0
    Closed form pi* = pi* of Tree; v* = v* of Tree - Phi, Phi from `potential`
    """
    gamma = number("gamma", gamma, most=1.0, above=0.0)
    plain = tree(depth, n_tokens, seed)
    return replace(shape(plain, potential(plain, seed), gamma), name="Shaped")


def potential(mdp: TokenMDP, seed: int = 0) -> NDArray[np.float64]:
    """Phi float[S]: standard normal in policy states, Phi(s) = sum_a P(a|s) Phi(s') in environment states, 0 at the end."""
    own = np.where(mdp.is_policy, stream(seed, 2).normal(size=mdp.n_states), 0.0)
    replies = np.where(mdp.is_policy[:, None], 0.0, np.exp(mdp.ref_logits))
    return Recursion(mdp.next_state, replies).solve(own)


def shape(mdp: TokenMDP, phi: NDArray[np.float64], gamma: float) -> TokenMDP:
    """The automaton with r(s, a) + gamma Phi(s') - Phi(s) in place of r (math.md, F7); phi float[S], Phi(end) = 0.

    Raises ValueError for an automaton with a horizon: the episode then ends where Phi is not 0.
    """
    if mdp.horizon is not None:
        raise bad("mdp", "an automaton without a horizon", f"horizon {mdp.horizon}", "Shape mdp.unroll() instead.")
    if np.shape(phi) != (mdp.n_states,):
        raise bad("phi", f"shape ({mdp.n_states},), one number a state", f"shape {np.shape(phi)}")
    gain = gamma * np.append(phi, 0.0)[mdp.next_state] - phi[:, None]  # (S, V)
    return replace(mdp, reward=np.where(mdp.is_policy[:, None], mdp.reward + gain, 0.0))
