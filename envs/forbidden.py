"""Forbidden: tokens that are not allowed, here and there or nowhere. See `forbidden`."""

from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.envs._common import BOS, at_least, checked_seed, names, stream
from shiq_lab.mdp import TokenMDP


def forbidden(depth: int = 6, width: int = 4, n_tokens: int = 6, n_padding: int = 3, seed: int = 0) -> TokenMDP:
    """Forbidden: random layers with holes, and a vocabulary padded with ids that nobody may say.

    Tests       -inf logits: in random places, in single-token states, in whole columns; no NaN may come of them
    Actions     n_tokens tokens "t0", "t1", ..., each allowed with probability 1/2 in a state, one of them surely
    Start       a beginning-of-sequence token; n_padding ids "<pad0>", ... come after it and are forbidden everywhere
    Rewards     standard normal, one a state and token
    End         after depth tokens, or sooner: a token ends the episode with probability 1 / (width + 1)
    Closed form none; cutting the padding off must change nothing
    """
    depth, width = at_least("depth", depth, 1, 200), at_least("width", width, 1, 200)
    n_tokens, n_padding = at_least("n_tokens", n_tokens, 1, 200), at_least("n_padding", n_padding, 0, 1000)
    rng, shape = stream(seed), (depth, width, n_tokens)
    allowed = rng.random(shape) < 0.5
    allowed |= rng.integers(n_tokens, size=(depth, width, 1)) == range(n_tokens)
    place_after = rng.integers(width + 1, size=shape)  # in the next layer; width = the end
    rewards = rng.normal(size=shape)

    def row(state: tuple[int, int]) -> Row:
        layer, place = state
        may = [a for a in range(n_tokens) if allowed[layer, place, a]]
        after = {a: (layer + 1, int(place_after[layer, place, a])) for a in may}
        return Row(
            next={a: END if after[a][0] == depth or after[a][1] == width else after[a] for a in may},
            reward={a: rewards[layer, place, a] for a in may},
        )

    tokens = [*names("t", n_tokens), BOS, *(f"<pad{i}>" for i in range(n_padding))]
    mdp = from_states((0, 0), row, len(tokens), tokens=tokens, name="Forbidden")
    return random_reference(mdp, checked_seed(seed)).with_prompt(BOS)
