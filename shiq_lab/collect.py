"""Rows played through gymnasium: the same TokenBatch as sampling gives, from any environment that plays a TokenMDP."""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import at_least, bad
from shiq_lab.graph import Floats
from shiq_lab.mdp import TokenMDP
from shiq_lab.models.tabular import walk
from shiq_lab.policies import check_log_policy
from shiq_lab.progress import progress
from shiq_lab.sampling import prompt_groups, trim_replies


class _One:
    """A single environment as a vector of one, with NEXT_STEP autoreset."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self.env, self.num_envs, self.over = env, 1, False

    def reset(self, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed)
        self.over = False
        return observation[None], {key: np.asarray([value]) for key, value in info.items()}

    def step(self, actions: Any) -> tuple[Any, ...]:
        if self.over:
            observation, info = self.reset()
            return observation, np.zeros(1), np.zeros(1, bool), np.zeros(1, bool), info
        observation, reward, terminated, truncated, info = self.env.step(actions[0])
        self.over = bool(terminated or truncated)
        many = {key: np.asarray([value]) for key, value in info.items()}
        return observation[None], np.array([reward]), np.array([terminated]), np.array([truncated]), many


def collect(env: Any, policy: Floats, episodes: int, *, seed: int = 0) -> TokenBatch:
    """Play `episodes` whole episodes of a policy float[S, V] and return them as rows, with the automaton's states.

    env is a TokenEnv (wrapped or not), a TokenVectorEnv, or a SyncVectorEnv of TokenEnvs. Every sub-environment plays the
    same number of episodes (the first ones one more): taking whichever end first would favour short rows. A row is
    terminated where the automaton ended; one that was truncated is cut in a policy state. The seed fixes everything.
    """
    episodes, seed = at_least("episodes", episodes, 1), at_least("seed", seed, 0)
    mdp, vector = _open(env)
    table = check_log_policy(mdp, policy, "policy")
    if table.ndim != 2 or (np.exp(table[~mdp.allowed]) > 0).any():
        raise bad("policy", "one table [S, V], and no chance of forbidden tokens", f"shape {table.shape}")
    chance = np.where(mdp.allowed, np.exp(table), 0.0)
    ladder = np.cumsum(chance, 1) / np.maximum(chance.sum(1, keepdims=True), 1e-300)
    rng = np.random.default_rng(seed)
    quota = np.full(vector.num_envs, episodes // vector.num_envs)
    quota[: episodes % vector.num_envs] += 1
    observation, info = vector.reset(seed=seed)
    action, reward = (np.zeros(observation.shape) for _ in range(2))
    waiting = np.zeros(vector.num_envs, dtype=bool)  # rows whose next step only resets
    done: list[tuple[Any, ...]] = []
    for _ in progress(_until(lambda: not quota.any()), "playing"):
        state, length = info["state"], info["length"]
        token = (ladder[state] > rng.random(len(state))[:, None]).argmax(1)
        observation, paid, terminated, truncated, info = vector.step(token)
        rows = np.flatnonzero(~waiting)
        action[rows, length[rows]], reward[rows, length[rows]] = 1, paid[rows]
        waiting = terminated | truncated
        ended = np.flatnonzero(waiting & (quota > 0))
        if ended.size:
            done.append((observation[ended], info["length"][ended], action[ended], reward[ended], info["state"][ended]))
            quota[ended] -= 1
        action[waiting], reward[waiting] = 0, 0.0
    parts = [np.concatenate(part) for part in zip(*done, strict=True)]
    return _rows(mdp, *parts)


def _until(over: Any) -> Any:
    """Numbers from 0 up, as long as there is something left to play."""
    count = 0
    while not over():
        yield count
        count += 1


def _open(env: Any) -> tuple[TokenMDP, Any]:
    """The automaton that an environment plays, and the environment as a vector."""
    if isinstance(env, VectorEnv):
        inner: Any = env.unwrapped
        mdp = getattr(inner, "mdp", None)
        if mdp is None and getattr(inner, "envs", None):
            mdp = getattr(inner.envs[0].unwrapped, "mdp", None)
        mode = env.metadata.get("autoreset_mode")
        if isinstance(mdp, TokenMDP) and mode is not AutoresetMode.NEXT_STEP:
            raise bad("env", "a vector environment with NEXT_STEP autoreset", str(mode))
    else:
        mdp = getattr(getattr(env, "unwrapped", None), "mdp", None)
    if not isinstance(mdp, TokenMDP):
        raise bad("env", "an environment that plays a TokenMDP", type(env).__name__, 'gymnasium.make("shiq_lab:shiq/NAME-v0")')
    return mdp, env if isinstance(env, VectorEnv) else _One(env)


def _rows(mdp: TokenMDP, observation: Any, length: Any, action: Any, reward: Any, state: Any) -> TokenBatch:
    real = np.arange(observation.shape[1]) < length[:, None]
    ids = np.where(real, observation, 0).astype(np.int64)
    action = (action > 0) & real  # a forbidden token was never written
    ids_, real_ = torch.from_numpy(ids), torch.from_numpy(real)
    states = walk(torch.from_numpy(np.array(mdp.next_state)), mdp.start, ids_, real_)
    last = torch.from_numpy(np.arange(observation.shape[1]) == length[:, None] - 1)
    states = torch.where(last, torch.from_numpy(state)[:, None], states)  # -1 where a horizon ended the row
    batch = TokenBatch(
        input_ids=ids_,
        attention_mask=real_.long(),
        completion_mask=torch.from_numpy(action.astype(np.int64)),
        rewards=torch.from_numpy(np.where(action, reward, 0.0)),
        terminated=torch.from_numpy(state < 0),
        group_ids=prompt_groups(ids, action),
        states=states,
    )
    return trim_replies(batch, (state >= 0) & ~mdp.is_policy[state])
