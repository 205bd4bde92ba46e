"""The dialogue that ToolCall and RandomTool share: a call of two tokens, a reply, an answer that quotes the reply."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shiq_lab.builders import Act, Say, from_turns, random_reference
from shiq_lab.envs._common import BOS, EOS, at_least, checked_seed, names, stream
from shiq_lab.mdp import TokenMDP

ERROR = -1  # the reply that is no value
Replies = Mapping[int, float]  # {value or ERROR: probability}


@dataclass(frozen=True)
class Tool:
    """What calls cost and values are worth: price float[F, X] of function f with argument x, worth float[Y]."""

    price: NDArray[np.float64]
    worth: NDArray[np.float64]


def make_tool(n_functions: int, n_arguments: int, n_values: int, seed: int) -> Tool:
    """Random prices from 0 to 0.3 and worths from 0.5 to 1.5; checks the sizes by name."""
    n_functions = at_least("n_functions", n_functions, 1, 10)
    n_arguments = at_least("n_arguments", n_arguments, 1, 10)
    n_values = at_least("n_values", n_values, 1, 10)
    rng = stream(seed)
    return Tool(price=rng.uniform(0.0, 0.3, (n_functions, n_arguments)), worth=rng.uniform(0.5, 1.5, n_values))


def dialogue(tool: Tool, replies: Callable[[int, int], Replies], name: str, seed: int) -> TokenMDP:
    """Turns: bos; the policy says a function and an argument; the tool says "=>" and a value, or "error"; the policy
    says up to two tokens. -price on the argument; the value's worth on the end token right after the value quoted."""
    (F, X), Y = tool.price.shape, len(tool.worth)
    tokens = [*names("f", F), *names("x", X), *names("y", Y), "=>", "error", EOS, BOS]
    argument, value, arrow, error, end, bos = F, F + X, F + X + Y, F + X + Y + 1, F + X + Y + 2, F + X + Y + 3

    def reply(prefix: tuple[int, ...]) -> dict[tuple[int, ...], float]:
        said = replies(prefix[-2], prefix[-1] - argument)
        return {(error,) if y == ERROR else (arrow, value + y): p for y, p in said.items() if p > 0}

    def reward(prefix: tuple[int, ...]) -> float:
        if len(prefix) == 3:  # bos f x
            return -float(tool.price[prefix[1], prefix[2] - argument])
        if prefix[3:4] == (arrow,) and prefix[5:] == (prefix[4], end):  # bos f x => y y eos
            return float(tool.worth[prefix[4] - value])
        return 0.0

    turns: list[Say | Act] = [
        Say({(bos,): 1.0}),
        Act(1, range(F)),
        Act(1, range(argument, argument + X)),
        Say(reply),
        Act(2, range(value, value + Y), stop=end),
    ]
    return random_reference(from_turns(turns, reward, len(tokens), tokens=tokens, name=name), checked_seed(seed))


def answer_value(p_value: float, p_end: float, worth: float, beta: float, gamma: float = 1.0) -> float:
    """v* where the answer begins: p_value and p_end are the reference probabilities of the value and of the end after it.

    v_end = beta ln(1 + p_end (e^{worth/beta} - 1)),  v = beta ln(1 + p_value (e^{gamma v_end/beta} - 1)).
    """
    v_end = beta * math.log1p(p_end * math.expm1(worth / beta))
    return beta * math.log1p(p_value * math.expm1(gamma * v_end / beta))


def call_value(
    ref_function: NDArray[np.float64],
    ref_argument: NDArray[np.float64],
    price: NDArray[np.float64],
    after: NDArray[np.float64],
    beta: float,
    gamma: float = 1.0,
) -> float:
    """v* where the call begins; ref_function float[F], the others float[F, X], after = expected answer_value of a call.

    v_f = beta ln sum_x ref(x|f) exp((gamma after(f,x) - price(f,x))/beta),  v = beta ln sum_f ref(f) exp(gamma v_f/beta).
    """
    v_f = beta * np.log((ref_argument * np.exp((gamma * after - price) / beta)).sum(1))
    return float(beta * np.log(ref_function @ np.exp(gamma * v_f / beta)))
