"""RandomTool: call a tool that answers at random, and quote it. See `random_tool`."""

import numpy as np
from numpy.typing import NDArray

from shiq_lab.envs._common import stream
from shiq_lab.envs._tool import ERROR, dialogue, make_tool
from shiq_lab.mdp import TokenMDP


def random_tool(n_functions: int = 3, n_arguments: int = 3, n_values: int = 4, seed: int = 0) -> TokenMDP:
    """RandomTool: the dialogue of ToolCall where the same call may be answered differently each time.

    Tests       a random world: path by path no logits are consistent, the squared residual is biased (math.md, F9)
    Actions     first turn "f<i>" then "x<j>"; second turn values "y<k>" or the end token, two tokens at most
    Start       a beginning-of-sequence token
    Rewards     -price of the call on "x<j>"; the worth of the value on the end token, if the answer is the value replied
    End         after the second turn. The tool replies "=>", "y<k>", or "error", by the odds of `tool_odds`
    Closed form any gamma: four nested log-sum-exps with a plain mean over replies between, `answer_value` and
                `call_value` of _tool.py
    """
    tool = make_tool(n_functions, n_arguments, n_values, seed)
    odds = tool_odds(n_functions, n_arguments, n_values, seed)

    def replies(f: int, x: int) -> dict[int, float]:
        return {**dict(enumerate(odds[f, x, :-1].tolist())), ERROR: float(odds[f, x, -1])}

    return dialogue(tool, replies, "RandomTool", seed)


def tool_odds(n_functions: int = 3, n_arguments: int = 3, n_values: int = 4, seed: int = 0) -> NDArray[np.float64]:
    """The probability of each reply to each call, float[F, X, n_values + 1], the last one "error"; uniform on the simplex."""
    return stream(seed, 2).dirichlet(np.ones(n_values + 1), size=(n_functions, n_arguments))
