"""Tree: every string of a few tokens, a reward on each. See `tree`."""

from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.envs._common import BOS, at_least, checked_seed, stream
from shiq_lab.errors import bad
from shiq_lab.mdp import TokenMDP

LETTERS = "abcdefgh"
MAX_STATES = 30_000


def tree(depth: int = 5, n_tokens: int = 4, seed: int = 0) -> TokenMDP:
    """Tree: the full prefix tree with a random reward on every token.

    Tests       everything at once, in the one world where a state is the string so far and no two strings meet again
    Actions     n_tokens letters "a", "b", ...
    Start       a beginning-of-sequence token
    Rewards     standard normal, one a prefix and token
    End         after depth tokens; (n_tokens^depth - 1) / (n_tokens - 1) policy states, 341 by default, 85 at depth 4
    Closed form none shorter than the list of its strings: at gamma = 1, v* = beta ln sum_y pi_ref(y) exp(R(y) / beta)
    """
    depth = at_least("depth", depth, 1, 8)
    n_tokens = at_least("n_tokens", n_tokens, 1, len(LETTERS))
    n_prefixes = sum(n_tokens**t for t in range(depth))
    if n_prefixes > MAX_STATES:
        raise bad("depth", f"a tree of at most {MAX_STATES} states", f"{depth}, hence {n_prefixes} states")
    rewards = stream(seed).normal(size=(n_prefixes, n_tokens))

    def row(prefix: int) -> Row:
        """Prefixes are numbered as in a heap, level by level: the child of p by token a is p n_tokens + a + 1."""
        children = {a: prefix * n_tokens + a + 1 for a in range(n_tokens)}
        return Row(
            next={a: child if child < n_prefixes else END for a, child in children.items()},
            reward=dict(enumerate(rewards[prefix])),
        )

    mdp = from_states(0, row, n_tokens + 1, tokens=[*LETTERS[:n_tokens], BOS], name="Tree")
    return random_reference(mdp, checked_seed(seed)).with_prompt(BOS)
