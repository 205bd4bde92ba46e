"""Rows played through gymnasium have the exact frequencies, and training on them reaches the same q*."""

import gymnasium
import numpy as np
import pytest
import torch

from shiq_lab import collect, enumerate_trajectories, make, solve
from shiq_lab.envs import ENVIRONMENTS
from shiq_lab.gym import TokenEnv, TokenVectorEnv
from shiq_lab.mdp import TokenMDP
from shiq_lab.policies import covering, mixture, softmax_policy, uniform_policy
from shiq_lab.training import train_on_rows


def rows_of(batch) -> list[tuple]:  # type: ignore[no-untyped-def,type-arg]
    """Each row as plain values: tokens, actions, rewards, states, terminated."""
    out = []
    for i in range(len(batch)):
        real = batch.attention_mask[i] == 1
        parts = (batch.input_ids, batch.completion_mask, batch.rewards, batch.states)
        out.append((*(tuple(p[i][real].tolist()) for p in parts), bool(batch.terminated[i])))
    return out


def open_env(kind: str, mdp: TokenMDP):  # type: ignore[no-untyped-def]
    if kind == "single":
        return TokenEnv(mdp)
    if kind == "vector":
        return TokenVectorEnv(16, mdp)
    return gymnasium.vector.SyncVectorEnv([lambda: TokenEnv(mdp)] * 16)


@pytest.mark.parametrize("kind", ["single", "vector", "sync"])
@pytest.mark.parametrize("name", ["ToolCall", "RandomTool", "Brackets"])
def test_frequencies_match_the_exact_probabilities(name: str, kind: str) -> None:
    """n rows: by Bernstein's inequality every string's frequency lies within sqrt(2 p t / n) + t / n of its probability p,
    t = ln(2 strings / 1e-6), but for a chance of 1e-6. Brackets' rows differ in length: short ones must not be favoured."""
    n = 600 if kind == "single" else 6000
    mdp = make(name)
    policy = softmax_policy(mdp, np.random.default_rng(1).normal(size=mdp.ref_logits.shape))
    truth = enumerate_trajectories(mdp, behavior=policy)
    batch = collect(open_env(kind, mdp), policy, n, seed=3)
    exact = {row[:4]: (weight, row) for row, weight in zip(rows_of(truth), truth.weights.tolist(), strict=True)}
    count = dict.fromkeys(exact, 0)
    for row in rows_of(batch):
        assert row == exact[row[:4]][1], "a row that the automaton cannot say, or with other rewards or states"
        count[row[:4]] += 1
    t = np.log(2 * len(exact) / 1e-6)
    for key, (p, _) in exact.items():
        assert abs(count[key] / n - p) <= np.sqrt(2 * p * t / n) + t / n
    assert sum(count.values()) == n == len(batch)


def test_single_and_vector_tell_the_same_story() -> None:
    """The same seed gives the same rows from the vectorised environment and from gymnasium's own around single ones."""
    mdp = make("RandomTool")
    a, b = (collect(open_env(kind, mdp), uniform_policy(mdp), 100, seed=5) for kind in ("vector", "sync"))
    assert rows_of(a) == rows_of(b)
    assert rows_of(a) != rows_of(collect(open_env("vector", mdp), uniform_policy(mdp), 100, seed=6))


# Rows that act everywhere (F8), so that the zero is q*. Left out: Addition, where the prompts of two of the 179 sums have
# probability 1/8100 and it takes millions of rows to try all tokens after them; Tree and Shaped, which differ from Forbidden
# in size alone; RandomTool, where no finite set of rows has its zero at q* (F9).
ROWS = {"Bandit": 300, "Needle": 2_500, "Chain": 1_000, "Brackets": 25_000, "Parity": 2_000, "Loop": 300}
ROWS |= {"ToolCall": 3_000, "Star": 3_000, "RandomWalk": 8_000, "Forbidden": 3_000}


def test_every_environment_is_played_or_has_a_reason() -> None:
    assert set(ENVIRONMENTS) - set(ROWS) == {"Addition", "Tree", "Shaped", "RandomTool"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "RandomWalk" else n for n in ROWS])
def test_training_on_played_rows_reaches_the_same_q(name: str) -> None:
    environment = ENVIRONMENTS[name]
    mdp = environment.builder()
    mdp = mdp if mdp.horizon is None else mdp.unroll()
    behavior = covering(mdp)
    if name == "RandomWalk":  # there `covering` alone seldom takes the last step
        behavior = mixture(behavior, uniform_policy(mdp), 0.5)
    batch = collect(TokenVectorEnv(256, mdp), behavior, ROWS[name])
    trained = train_on_rows(mdp, "shiq", batch, beta=environment.beta, gamma=environment.gamma)
    assert trained.untried == 0, "too few rows for full support"
    assert trained.metrics.q_error <= 1e-8  # as for the population loss


def test_rows_of_a_horizon_end_where_it_ends() -> None:
    mdp = make("RandomWalk")
    batch = collect(gymnasium.make("shiq_lab:shiq/RandomWalk-v0"), uniform_policy(mdp), 50)
    spent = batch.completion_mask.sum(1)
    assert batch.terminated.all() and int(spent.max()) == mdp.horizon
    last = batch.states.gather(1, batch.last_index()[:, None])  # type: ignore[union-attr]
    assert (last == -1).all()


def test_truncated_rows_are_cut_in_policy_states_and_still_lead_to_q() -> None:
    """Loop in a buffer of 5 tokens: cut rows bootstrap with Dv, so the zero is the same."""
    mdp = make("Loop")
    batch = collect(TokenVectorEnv(64, mdp, max_tokens=5), uniform_policy(mdp), 2000)
    assert 0 < int((~batch.terminated).sum()) < 2000
    end = batch.states.gather(1, batch.last_index()[:, None])[:, 0][~batch.terminated]  # type: ignore[union-attr]
    assert torch.from_numpy(np.array(mdp.is_policy))[end].all()
    trained = train_on_rows(mdp, "shiq", batch, beta=0.25)
    assert trained.metrics.q_error <= 1e-8


BAD = {
    "env": (lambda: collect(gymnasium.make("FrozenLake-v1"), np.zeros((1, 1)), 1), "env: expected an environment that plays"),
    "episodes": (
        lambda: collect(TokenEnv(make("Bandit")), np.zeros((2, 9)), 0),
        "episodes: expected a whole number >= 1, got 0.",
    ),
    "policy": (
        lambda: collect(TokenEnv(make("Bandit")), np.zeros((3, 9)), 1),
        "policy: expected shape (2, 9), got shape (3, 9).",
    ),
    "mode": (
        lambda: collect(
            gymnasium.vector.SyncVectorEnv(
                [lambda: TokenEnv(make("Bandit"))], autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
            ),
            solve(make("Bandit"), beta=1.0).log_policy(),
            1,
        ),
        "env: expected a vector environment with NEXT_STEP autoreset",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_say_what_is_wrong(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message)


def test_the_first_copies_play_the_odd_episodes() -> None:
    """Bandit's episodes are one step long, so rows come in rounds; 4 episodes on 3 copies end with one more of the first."""
    mdp = make("Bandit", n_arms=1000)
    played = [rows_of(collect(TokenVectorEnv(3, mdp), uniform_policy(mdp), n, seed=2)) for n in (4, 6)]
    assert played[0] == played[1][:4] and len(set(played[1])) == 6


def test_the_seed_draws_actions_too() -> None:
    mdp = make("Bandit", n_arms=1000)
    first, again, other = (rows_of(collect(TokenVectorEnv(3, mdp), uniform_policy(mdp), 9, seed=s)) for s in (0, 0, 1))
    assert first == again != other
