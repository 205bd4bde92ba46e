"""Environment steps a second: TokenVectorEnv against gymnasium's own FrozenLake-v1 under SyncVectorEnv, in one run.

    python benchmarks/gym_steps.py [--repeats 5] [--seconds 0.15]

Every number is the median over repeats, and the repeats go round all settings, so that a busy moment hits all alike. A
step of ours includes looking up the random policy's action for each row; FrozenLake's actions are drawn beforehand.
Steps that only reset a row count on both sides. FrozenLake runs with and without gymnasium's checker; the faster counts.

Aims: our best rate >= 100 x FrozenLake's best, each at its own best batch size; >= 10 x at 64 rows against 64 rows.
Floor: the rate at which numpy alone gathers successor, reward and action mask for the same rows.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from shiq_lab.envs import make
from shiq_lab.gym import TokenVectorEnv
from shiq_lab.mdp import TokenMDP

OURS = {  # a tree of 20,000 states; a random prompt; random tool replies between the policy's turns
    "Tree(depth=7, n_tokens=4)": ("Tree", {"depth": 7, "n_tokens": 4}),
    "Needle(length=12)": ("Needle", {"length": 12}),
    "Parity()": ("Parity", {}),
    "RandomTool()": ("RandomTool", {}),
}
BATCHES = (1, 64, 1024, 4096, 16384, 65536)
FROZEN_BATCHES = (1, 16, 64, 256)
AHEAD = 16  # tables of actions drawn beforehand


def rate(step: Callable[[int], None], rows: int, seconds: float) -> float:
    """Row steps a second of `step(k)`, called for about so many seconds."""
    step(0)
    done, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        for k in range(AHEAD):
            step(k)
        done += AHEAD
    return done * rows / spent


def token_steps(mdp: TokenMDP, rows: int, copy: bool) -> Callable[[int], None]:
    """Steps under the uniform policy over allowed tokens, one table of actions by state for each k."""
    env = TokenVectorEnv(rows, mdp, copy=copy)
    weight = np.random.default_rng(0).random((AHEAD, *env.rules.mask.shape)) * env.rules.mask
    actions = weight.argmax(-1)  # (AHEAD, S + 2); the last entry is the end's
    state = env.reset(seed=0)[1]["state"]

    def step(k: int) -> None:
        nonlocal state
        state = env.step(actions[k].take(state))[4]["state"]

    return step


def gathers(mdp: TokenMDP, rows: int) -> Callable[[int], None]:
    """What no numpy implementation goes below: successor, reward and mask of `rows` random edges."""
    follow, reward, mask = mdp.next_state.ravel(), mdp.reward.ravel(), mdp.allowed
    edge = np.random.default_rng(0).integers(follow.size, size=(AHEAD, rows))

    def step(k: int) -> None:
        state = follow.take(edge[k])
        reward.take(edge[k])
        mask.take(state, axis=0)

    return step


def frozen_steps(rows: int, checked: bool) -> Callable[[int], None]:
    env = gymnasium.make_vec("FrozenLake-v1", rows, "sync", disable_env_checker=not checked)
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(4, size=(AHEAD, rows))
    return lambda k: env.step(actions[k])  # type: ignore[return-value]


def settings() -> dict[tuple[str, str, int], Callable[[int], None]]:
    """(group, name, rows) -> its step."""
    out: dict[tuple[str, str, int], Callable[[int], None]] = {}
    for name, (builder, parameters) in OURS.items():
        mdp = make(builder, **parameters)
        for rows in BATCHES:
            out["ours", name, rows] = token_steps(mdp, rows, copy=True)
            out["ours, copy=False", name, rows] = token_steps(mdp, rows, copy=False)
            out["floor", name, rows] = gathers(mdp, rows)
    for rows in FROZEN_BATCHES:
        out["peer", "FrozenLake-v1", rows] = frozen_steps(rows, True)
        out["peer", "FrozenLake-v1, no checker", rows] = frozen_steps(rows, False)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.15, help="of each measurement")
    options = parser.parse_args()
    steps = settings()
    rates: dict[tuple[str, str, int], list[float]] = {key: [] for key in steps}
    for _ in range(options.repeats):
        for key, step in steps.items():
            rates[key].append(rate(step, key[2], options.seconds))
    median = {key: float(np.median(values)) for key, values in rates.items()}

    def best(group: str, rows: int | None = None, name: str | None = None) -> float:
        return max(v for (g, n, r), v in median.items() if g == group and rows in (None, r) and name in (None, n))

    table: dict[str, Any] = {}
    for (group, name, rows), value in median.items():
        table.setdefault(group, {}).setdefault(name, {})[rows] = round(value)
    result = {
        "unit": "environment steps a second",
        "repeats": options.repeats,
        "rates": table,
        "ratio at the best batch sizes (aim 100)": {n: round(best("ours", name=n) / best("peer"), 1) for n in OURS},
        "ratio at 64 rows (aim 10)": {n: round(best("ours", 64, n) / best("peer", 64), 1) for n in OURS},
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}
        | {"gymnasium": gymnasium.__version__},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
