"""Star: the path-star graph. See `star`."""

import numpy as np
from numpy.typing import NDArray

from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.envs._common import BOS, at_least, checked_seed, names, number, sparse_value, stream
from shiq_lab.mdp import TokenMDP


def star(arms: int = 4, length: int = 5, reward: float = 1.0, seed: int = 0) -> TokenMDP:
    """Star: the prompt names the end of one arm of a star; walk there from the centre, node by node.

    Tests       the first token decides, the reward comes last; a prompt that says what to do
    Actions     n<i>, the nodes of the next layer, one an arm; labels are shuffled, so that no id tells its arm
    Start       a beginning-of-sequence token, then the last node of an arm drawn uniformly
    Rewards     `reward` on the last node where every node was of that arm, else 0
    End         after length nodes
    Closed form gamma = 1: the mean over arms of beta ln(1 + p (exp(reward / beta) - 1)), p the reference probability of
                the arm, see `star_value`
    """
    arms, length = at_least("arms", arms, 1, 50), at_least("length", length, 1, 50)
    reward = number("reward", reward)
    node = star_labels(arms, length, seed)

    def row(state: tuple[int, int]) -> Row:
        """The state is (wanted arm, nodes said): arm -1 = the prompt is to come, arm `arms` = lost."""
        arm, said = state
        if arm == -1:
            return Row(
                next={int(node[k, -1]): (k, 0) for k in range(arms)},
                probs={int(node[k, -1]): 1 / arms for k in range(arms)},
            )
        after = {int(node[k, said]): (arm if k == arm else arms, said + 1) for k in range(arms)}
        if said + 1 < length:
            return Row(next=after)
        return Row(next=dict.fromkeys(after, END), reward={int(node[arm, said]): reward} if arm < arms else {})

    n_nodes = arms * length
    mdp = from_states((-1, 0), row, n_nodes + 1, tokens=[*names("n", n_nodes), BOS], name="Star")
    return random_reference(mdp, checked_seed(seed)).with_prompt(BOS)


def star_labels(arms: int = 4, length: int = 5, seed: int = 0) -> NDArray[np.int64]:
    """The token of every node, int[arms, length], from the centre outwards."""
    return stream(seed).permutation(arms * length).reshape(arms, length)


def star_value(probabilities: NDArray[np.float64], reward: float, beta: float) -> float:
    """v* at the root, gamma = 1: the mean over arms of beta ln(1 + p (exp(reward/beta) - 1)); probabilities float[arms]."""
    return float(np.mean([sparse_value(float(p), reward, beta) for p in probabilities]))
