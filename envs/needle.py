"""Needle: one string in n_tokens^length pays. See `needle`."""

from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.envs._common import BOS, at_least, checked_seed, names, number, sparse_value, stream
from shiq_lab.mdp import TokenMDP


def needle(length: int = 12, n_tokens: int = 4, reward: float = 1.0, seed: int = 0) -> TokenMDP:
    """Needle: one rewarded string, as an automaton of "still on it" and "off it" positions.

    Tests       how fast a sparse reward travels back: one token a sweep for one-step losses, at once for multi-step
    Actions     n_tokens tokens "t0", "t1", ...
    Start       a beginning-of-sequence token
    Rewards     `reward` on the last token of the string of `needle_string`, else 0
    End         after length tokens
    Closed form gamma = 1: v* = beta ln(1 + p (exp(reward / beta) - 1)), p the reference probability of the rest of the
                string, 0 off it; see `needle_value`
    """
    length, n_tokens = at_least("length", length, 1, 1000), at_least("n_tokens", n_tokens, 2, 1000)
    reward = number("reward", reward)
    string = needle_string(length, n_tokens, seed)

    def row(state: tuple[int, bool]) -> Row:
        said, on = state
        after = {a: (said + 1, on and a == string[said]) for a in range(n_tokens)}
        if said + 1 < length:
            return Row(next=after)
        return Row(next=dict.fromkeys(after, END), reward={a: reward for a, (_, whole) in after.items() if whole})

    mdp = from_states((0, True), row, n_tokens + 1, tokens=[*names("t", n_tokens), BOS], name="Needle")
    return random_reference(mdp, checked_seed(seed)).with_prompt(BOS)


def needle_string(length: int = 12, n_tokens: int = 4, seed: int = 0) -> tuple[int, ...]:
    """The rewarded string of needle(length, n_tokens, seed=seed), as token ids."""
    return tuple(int(a) for a in stream(seed).integers(n_tokens, size=length))


def needle_value(probability: float, reward: float, beta: float) -> float:
    """v* = beta ln(1 + p (exp(reward/beta) - 1)) at gamma = 1, p the reference probability of what is left to say."""
    return sparse_value(probability, reward, beta)
