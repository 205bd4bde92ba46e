"""Brackets: balanced words of variable length. See `brackets`."""

import math

from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.envs._common import BOS, EOS, at_least, checked_seed, number
from shiq_lab.errors import bad
from shiq_lab.mdp import TokenMDP

OPEN, CLOSE, STOP = range(3)
BROKEN = -1  # the depth of a word that closed what it never opened


def brackets(max_length: int = 10, reward: float = 1.0, seed: int = 0) -> TokenMDP:
    """Brackets: write a balanced word of brackets, and end it yourself; longer words pay more.

    Tests       variable length, the end token as an action, a reward that depends on the whole string
    Actions     "(", ")" and the end token; after max_length brackets the end token alone
    Start       a beginning-of-sequence token
    Rewards     on the end token: reward x pairs where the word is balanced, else 0
    End         at the end token
    Closed form gamma = 1, uniform reference: a sum over Catalan (ballot) numbers, see `brackets_value`
    """
    max_length, reward = at_least("max_length", max_length, 2, 200), number("reward", reward)
    if max_length % 2:
        raise bad("max_length", "an even number (balanced words have even length)", repr(max_length))

    def row(state: tuple[int, int]) -> Row:
        """The state is (brackets said, brackets open)."""
        said, depth = state
        follow: dict[int, tuple[int, int] | None] = {STOP: END}
        if said < max_length:
            follow[OPEN] = (said + 1, depth + 1 if depth != BROKEN else BROKEN)
            follow[CLOSE] = (said + 1, depth - 1 if depth != BROKEN else BROKEN)  # 0 - 1 = BROKEN
        return Row(next=follow, reward={STOP: reward * said / 2 if depth == 0 else 0.0})

    mdp = from_states((0, 0), row, 4, tokens=["(", ")", EOS, BOS], name="Brackets")
    return random_reference(mdp, checked_seed(seed)).with_prompt(BOS)


def ballot(length: int, depth: int = 0) -> int:
    """The number of ways to close `depth` brackets with `length` more, never below 0; ballot(2 n) is Catalan's C_n.

    Reflection principle: binom(m, (m+d)/2) - binom(m, (m+d)/2 + 1).
    """
    if (length + depth) % 2 or depth > length:
        return 0
    half = (length + depth) // 2
    return math.comb(length, half) - math.comb(length, half + 1)


def brackets_value(max_length: int, reward: float, beta: float, said: int = 0, depth: int = 0) -> float:
    """v* at (said, depth) for the uniform reference and gamma = 1, where a word of m more brackets has probability
    3^-(m+1), or 3^-m if it is full (the end token is then the only one):

    v* = beta ln( 1 + sum_m ballot(m, depth) 3^-(m + [said + m < max_length]) (exp(reward (said + m) / 2 beta) - 1) ).
    """
    left = max_length - said
    total = sum(
        ballot(m, depth) * 3.0 ** -(m + (m < left)) * math.expm1(reward * (said + m) / 2 / beta) for m in range(left + 1)
    )
    return beta * math.log1p(total)
