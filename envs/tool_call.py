"""ToolCall: call a tool that always answers alike, and quote it. See `tool_call`."""

import numpy as np
from numpy.typing import NDArray

from shiq_lab.envs._common import stream
from shiq_lab.envs._tool import ERROR, dialogue, make_tool
from shiq_lab.mdp import TokenMDP


def tool_call(n_functions: int = 3, n_arguments: int = 3, n_values: int = 4, seed: int = 0) -> TokenMDP:
    """ToolCall: two turns of the policy with a tool's reply between them, which depends on the call alone.

    Tests       environment tokens in the middle of an episode: no reward, no discount, no loss, and of unequal number
    Actions     first turn "f<i>" then "x<j>"; second turn values "y<k>" or the end token, two tokens at most
    Start       a beginning-of-sequence token
    Rewards     -price of the call on "x<j>"; the worth of the value on the end token, if the answer is the value replied
    End         after the second turn. The tool replies "=>", "y<k>", or "error", by the table of `tool_table`
    Closed form any gamma: four nested log-sum-exps, `answer_value` and `call_value` of _tool.py
    """
    tool = make_tool(n_functions, n_arguments, n_values, seed)
    table = tool_table(n_functions, n_arguments, n_values, seed)
    return dialogue(tool, lambda f, x: {int(table[f, x]): 1.0}, "ToolCall", seed)


def tool_table(n_functions: int = 3, n_arguments: int = 3, n_values: int = 4, seed: int = 0) -> NDArray[np.int64]:
    """The value that each call returns, int[F, X], ERROR = -1; as evenly spread as the sizes allow."""
    values = np.resize(np.append(np.arange(n_values), ERROR), n_functions * n_arguments)
    return stream(seed, 2).permutation(values).reshape(n_functions, n_arguments)
