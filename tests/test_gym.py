"""TokenEnv and TokenVectorEnv: gymnasium's own checker, the seed, exact probabilities, and the two against each other."""

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shiq_lab.builders import END, Act, Row, Say, from_states, from_turns
from shiq_lab.envs import ENVIRONMENTS, make
from shiq_lab.gym import GOLDEN, Rules, TokenEnv, TokenVectorEnv, render_row, uniform
from shiq_lab.mdp import TokenMDP

# A frequency may be 5 standard deviations off: 6e-7 of right generators fail so (normal tail), and each seed is fixed.
SIGMAS = 5.0
GYMNASIUM_KEYWORDS = {"id", "max_episode_steps", "disable_env_checker", "vectorization_mode", "vector_kwargs", "wrappers"}


# ------------------------------------------------------------------------------------------------ automata to play
def dialogue() -> TokenMDP:
    """A random prompt of 1 or 2 tokens, 2 policy tokens, a random reply of 1 or 2 tokens, 1 policy token."""
    turns: list[Say | Act] = [
        Say({(4,): 0.3, (5, 6): 0.7}),
        Act(2, [0, 1]),
        Say({(5,): 0.25, (6, 4): 0.5, (6, 5): 0.25}),
        Act(1, [0, 1, 2]),
    ]
    return from_turns(turns, lambda prefix: prefix[-1] + 0.25 * len(prefix), 7, name="dialogue")


def calls() -> TokenMDP:
    """A loop without an end of its own: 0 calls a tool that says 1 to 3 tokens, 1 says a word, 2 ends."""
    rows = {
        "prompt": Row({3: "act", 4: "act"}, probs={3: 0.5, 4: 0.5}),
        "act": Row({0: "tool", 1: "act", 2: END}, {0: -0.1, 1: 0.5, 2: 1.0}),
        "tool": Row({3: "act", 4: "more"}, probs={3: 0.6, 4: 0.4}),
        "more": Row({3: "act", 4: "last"}, probs={3: 0.6, 4: 0.4}),
        "last": Row({3: "act"}, probs={3: 1.0}),
    }
    return from_states("prompt", rows.__getitem__, 5, name="calls").with_prompt(4)


def stutter() -> TokenMDP:
    """A reply without a longest length: 2, 2, ..., 3; it may also end the episode."""
    rows = {
        "act": Row({0: "tool", 1: END}, {0: 1.0, 1: 2.0}),
        "tool": Row({2: "tool", 3: "act", 4: END}, probs={2: 0.7, 3: 0.2, 4: 0.1}),
    }
    return from_states("act", rows.__getitem__, 6, name="stutter").with_prompt(5)


# name: (automaton, max_tokens, what must be seen: terminated, truncated)
PLAYED = {
    "dialogue": (dialogue(), None, (True, False)),
    "dialogue, cut": (dialogue(), 5, (True, True)),
    "loop": (calls(), 9, (True, True)),
    "loop with a horizon": (replace(calls(), horizon=4), None, (True, False)),
    "loop with a horizon, cut": (replace(calls(), horizon=4), 8, (True, True)),
    "reply without bound": (stutter(), 7, (True, True)),
}


def random_automaton(seed: int, *, loops: bool) -> TokenMDP:
    """8 states of both owners under a random prompt; without loops edges only lead to later states."""
    rng = np.random.default_rng(seed)
    S, V = 8, 4
    first = np.zeros(S) if loops else np.arange(S) + 1
    next_state = np.floor(first[:, None] + rng.random((S, V)) * (S - first[:, None])).astype(int)
    next_state[(next_state >= S) | (rng.random((S, V)) < 0.15)] = -1
    is_policy = rng.random(S) < 0.5
    is_policy[[1, -1]] = True
    allowed = rng.random((S, V)) < 0.6
    allowed[np.arange(S), rng.integers(V, size=S)] = True
    is_policy[0], next_state[0], allowed[0] = False, [1, 1, 2, 1], [True, True, is_policy[2], False]
    if loops:  # environment states lead to policy states alone, so that every turn is left
        next_state[~is_policy] = np.where(is_policy[next_state[~is_policy]], next_state[~is_policy], S - 1)
    logits = np.where(allowed, rng.normal(size=(S, V)), -np.inf)
    total = np.log(np.exp(logits).sum(1, keepdims=True))
    reward = np.where(is_policy[:, None], rng.normal(size=(S, V)), 0.0)
    horizon = int(rng.integers(1, 5)) if rng.random() < 0.5 else None
    return TokenMDP(next_state, reward, np.where(is_policy[:, None], logits, logits - total), is_policy, 0, horizon)


def random_actions(infos: dict[str, Any], rng: np.random.Generator, wild: float) -> np.ndarray:
    """int[B]: uniform over allowed tokens; with probability `wild` over all tokens."""
    mask = infos["action_mask"]
    free = rng.random(len(mask)) < wild
    return np.argmax(rng.random(mask.shape) * (mask.astype(bool) | free[:, None]), axis=1)


def episodes(env: TokenEnv, n: int, seed: int) -> Iterator[tuple[list[int], list[float], dict[str, Any]]]:
    """n episodes under random allowed actions: (row, rewards by position, last info), rebuilt as the docstring says."""
    for episode in range(n):
        observation, info = env.reset(seed=seed if episode == 0 else None)
        rewards: dict[int, float] = {}
        over = False
        while not over:
            at = info["length"]
            action = env.action_space.sample(info["action_mask"])
            observation, reward, terminated, truncated, info = env.step(action)
            rewards[at] = reward
            over = terminated or truncated
        row = observation[: info["length"]].tolist()
        yield row, [rewards.get(i, 0.0) for i in range(len(row))], info


# ------------------------------------------------------------------------------------------- every environment
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_gymnasiums_checker_has_no_complaint(name: str) -> None:
    env = gymnasium.make(f"shiq_lab:shiq/{name}-v0", render_mode="ansi")
    assert isinstance(env.unwrapped, TokenEnv)
    np.testing.assert_array_equal(env.unwrapped.mdp.ref_logits, make(name).ref_logits)
    check_env(env.unwrapped)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_environment_vectorised_equals_its_single_copies(name: str) -> None:
    vector = gymnasium.make_vec(f"shiq/{name}-v0", num_envs=3)
    assert isinstance(vector, TokenVectorEnv)
    sync = gymnasium.make_vec(f"shiq/{name}-v0", num_envs=3, vectorization_mode="sync")
    assert vector.metadata["autoreset_mode"] == sync.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert sum(assert_equal_steps(vector, sync, steps=60, seed=7)) > 0


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_no_builder_parameter_hides_one_of_gymnasiums(name: str) -> None:
    """make(id, **kwargs) hands both sets of keywords to one call."""
    taken = {*inspect.signature(TokenVectorEnv).parameters, *GYMNASIUM_KEYWORDS}
    assert not taken & set(inspect.signature(ENVIRONMENTS[name].builder).parameters)


def test_parameters_reach_the_builder() -> None:
    env = gymnasium.make("shiq_lab:shiq/Bandit-v0", n_arms=3, seed=5)
    np.testing.assert_array_equal(env.unwrapped.mdp.reward, make("Bandit", n_arms=3, seed=5).reward)  # type: ignore[attr-defined]


def test_import_registers_and_stays_light() -> None:
    code = "import sys, shiq_lab, gymnasium; print('shiq/Bandit-v0' in gymnasium.registry, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["True", "False"]


# ------------------------------------------------------------------------------------- the vector environment
def assert_equal_steps(vector: Any, sync: Any, *, steps: int, seed: Any, wild: float = 0.0) -> tuple[int, int, int]:
    """Equal to the last bit in every field; returns how often (terminated, truncated, forbidden) was seen."""
    rng = np.random.default_rng(1)
    a, b = vector.reset(seed=seed), sync.reset(seed=seed)
    assert data_equivalence(a, b, exact=True)
    assert vector.observation_space == sync.observation_space and vector.action_space == sync.action_space
    infos, seen = a[1], np.zeros(3, dtype=int)
    for step in range(steps):
        actions = random_actions(infos, rng, wild)
        a, b = vector.step(actions), sync.step(actions)
        assert data_equivalence(a, b, exact=True), f"step {step}"
        terminated, truncated, infos = a[2:]
        seen += [terminated.sum(), truncated.sum(), (terminated & (infos["state"] >= 0)).sum()]
    return tuple(int(x) for x in seen)  # type: ignore[return-value]


@pytest.mark.parametrize("wild", [0.0, 0.2], ids=["allowed actions", "any action"])
@pytest.mark.parametrize("name", PLAYED)
def test_vector_equals_sync_step_for_step(name: str, wild: float) -> None:
    mdp, max_tokens, expected = PLAYED[name]
    vector = TokenVectorEnv(5, mdp, max_tokens=max_tokens)
    sync = SyncVectorEnv([lambda: TokenEnv(mdp, max_tokens=max_tokens)] * 5)
    terminated, truncated, forbidden = assert_equal_steps(vector, sync, steps=300, seed=3, wild=wild)
    assert (terminated > 0, truncated > 0) == expected
    assert (forbidden > 0) == (wild > 0)
    assert_equal_steps(vector, sync, steps=50, seed=[9, 8, 7, 6, 5])


def test_a_list_of_seeds_may_leave_rows_to_go_on() -> None:
    mdp = dialogue()
    vector, sync = TokenVectorEnv(3, mdp), SyncVectorEnv([lambda: TokenEnv(mdp)] * 3)
    for seed in (0, [None, 4, None], None):
        assert_equal_steps(vector, sync, steps=40, seed=seed)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), loops=st.booleans(), slack=st.none() | st.integers(0, 6))
def test_vector_equals_sync_on_random_automata(seed: int, loops: bool, slack: int | None) -> None:
    mdp = random_automaton(seed, loops=loops)
    max_tokens = None if slack is None else least_length(mdp) + slack
    vector = TokenVectorEnv(3, mdp, max_tokens=max_tokens)
    sync = SyncVectorEnv([lambda: TokenEnv(mdp, max_tokens=max_tokens)] * 3)
    assert_equal_steps(vector, sync, steps=40, seed=seed, wild=0.1)


def test_rows_that_reset_ignore_their_action() -> None:
    vector = TokenVectorEnv(2, make("Bandit", n_arms=2))
    vector.reset(seed=0)
    vector.step([0, 1])
    observation, reward, terminated, truncated, infos = vector.step([-1, 99])
    np.testing.assert_array_equal(observation, [[2, 3], [2, 3]])
    assert not reward.any() and not terminated.any() and not truncated.any() and (infos["length"] == 1).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_actions_of_any_integer_type(dtype: type) -> None:
    vector = TokenVectorEnv(2, make("Bandit", n_arms=2))
    vector.reset(seed=0)
    np.testing.assert_array_equal(vector.step(np.array([1, 0], dtype=dtype))[0], [[2, 1], [2, 0]])


def test_without_copy_the_buffer_itself_is_handed_out() -> None:
    own, copied = (TokenVectorEnv(2, make("Bandit", n_arms=2), copy=copy) for copy in (False, True))
    for vector, shared in ((own, True), (copied, False)):
        before = vector.reset(seed=0)[0]
        after = vector.step([0, 1])[0]
        assert np.shares_memory(before, after) == shared
        np.testing.assert_array_equal(after, [[2, 0], [2, 1]])


# ------------------------------------------------------------------------------------------------ rows and lengths
def longest_row(mdp: TokenMDP, state: int, left: float) -> int:
    """Tokens still to come, by trying everything."""
    if state < 0 or left == 0:
        return 0
    after = left - 1 if mdp.is_policy[state] else left
    return 1 + max(longest_row(mdp, int(mdp.next_state[state, a]), after) for a in np.flatnonzero(mdp.allowed[state]))


def reply_length(mdp: TokenMDP, state: int) -> int:
    """Tokens until the policy speaks again, at most."""
    if state < 0 or mdp.is_policy[state]:
        return 0
    return 1 + max(reply_length(mdp, int(mdp.next_state[state, a])) for a in np.flatnonzero(mdp.allowed[state]))


def room(mdp: TokenMDP, state: int) -> int:
    """Tokens that the next action and the longest reply to it take."""
    return 1 + max(reply_length(mdp, int(mdp.next_state[state, a])) for a in np.flatnonzero(mdp.allowed[state]))


def least_length(mdp: TokenMDP) -> int:
    """The longest prompt together with the first action and its reply."""

    def walk(state: int) -> int:
        if mdp.is_policy[state]:
            return room(mdp, state)
        return 1 + max(walk(int(mdp.next_state[state, a])) for a in np.flatnonzero(mdp.allowed[state]))

    return walk(mdp.start)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), loops=st.booleans())
def test_the_default_length_is_the_longest_episode(seed: int, loops: bool) -> None:
    mdp = random_automaton(seed, loops=loops)
    if loops and mdp.horizon is None:
        mdp = replace(mdp, horizon=3)
    assert TokenEnv(mdp).rules.max_tokens == longest_row(mdp, mdp.start, np.inf if mdp.horizon is None else mdp.horizon)
    with pytest.raises(ValueError, match=f"max_tokens: expected a whole number >= {least_length(mdp)}, "):
        TokenEnv(mdp, max_tokens=least_length(mdp) - 1)


def test_the_default_length_on_unbounded_loops() -> None:
    assert TokenEnv(calls()).rules.max_tokens == 64
    long = calls()
    for _ in range(40):
        long = long.with_prompt(0)
    assert TokenEnv(long).rules.max_tokens == 2 * (40 + 2 + 1 + 3)  # prompt 42, one action, the longest reply 3


@pytest.mark.parametrize("name", PLAYED)
def test_rows_rebuilt_from_lengths_are_the_automatons(name: str) -> None:
    """The row alone, walked through the automaton, gives the same rewards and last state as the lengths between steps."""
    mdp, max_tokens, _ = PLAYED[name]
    env = TokenEnv(mdp, max_tokens=max_tokens)
    env.action_space.seed(0)
    cut = 0
    for row, rewards, info in episodes(env, 60, seed=11):
        state, walked, spent = mdp.start, [], 0
        for token in row:
            assert mdp.allowed[state, token]
            spent += bool(mdp.is_policy[state])
            walked.append(float(mdp.reward[state, token]))
            state = int(mdp.next_state[state, token])
        assert walked == rewards
        assert info["state"] == (-1 if spent == mdp.horizon else state)
        if info["state"] >= 0:
            cut += 1
            if name != "reply without bound":
                assert mdp.is_policy[state] and len(row) + room(mdp, state) > env.rules.max_tokens
            elif not mdp.is_policy[state]:
                assert len(row) == env.rules.max_tokens
    assert (cut > 0) == PLAYED[name][2][1]


# ------------------------------------------------------------------------------------------- seeds and probabilities
def prompts(seed: int | None, env: TokenEnv, n: int) -> list[int]:
    return [int(env.reset(seed=seed if i == 0 else None)[0][1]) for i in range(n)]


def test_the_seed_is_obeyed_by_prompts_and_replies() -> None:
    env, other = TokenEnv(calls()), TokenEnv(calls())
    assert prompts(5, env, 50) == prompts(5, other, 50)
    assert prompts(5, env, 50) != prompts(6, other, 50)
    first, again = ([row for row, *_ in replay(seed)] for seed in (5, 5))
    assert first == again != [row for row, *_ in replay(6)]
    unseeded = prompts(None, TokenEnv(calls()), 64)
    assert unseeded != prompts(None, TokenEnv(calls()), 64)  # alike with probability 2^-64


def replay(seed: int) -> list[Any]:
    env = TokenEnv(calls(), max_tokens=30)
    env.action_space.seed(0)
    return list(episodes(env, 20, seed))


def test_uniform_is_splitmix64() -> None:
    """The first outputs of splitmix64 from state 0 (Vigna's splitmix64.c), scalars and arrays alike."""
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    expected = [(x >> 11) * 2.0**-53 for x in known]
    assert [uniform(GOLDEN * (n + 1)) for n in range(3)] == expected
    np.testing.assert_array_equal(uniform(np.arange(1, 4, dtype=np.uint64) * GOLDEN), expected)


def test_a_draw_never_selects_a_reply_of_probability_zero() -> None:
    """At the ends of [0, 1) and on every boundary; ten times 0.1 sums to less than 1."""
    probs = np.array([0.0, *[0.1] * 10, 0.0])
    with np.errstate(divide="ignore"):
        logits = np.log(np.stack([probs, probs, np.ones(12)]))
    mdp = TokenMDP(np.array([[1] * 12, [2] * 12, [-1] * 12]), np.zeros((3, 12)), logits, np.array([False, False, True]))
    rules = Rules(mdp, None)
    largest = 1 - 2.0**-53
    u = np.array([0.0, 2.0**-53, *np.cumsum(probs), largest])
    u = u[u < 1]
    for state in (0, 1):
        token = rules.token[rules.draw(np.full(len(u), state), u)]
        assert probs[token].min() > 0
        assert (rules.follow[rules.draw(np.full(len(u), state), u)] == state + 1).all()
        assert token[0] == 1 and token[-1] == 10


def test_replies_have_the_automatons_probabilities() -> None:
    """Joint counts of prompt and reply, of neighbours in the batch, and of one episode and the next.

    A count of n draws of probability p has standard deviation sqrt(n p (1 - p)).
    """
    mdp = dialogue()
    B, rounds = 400, 25
    vector = TokenVectorEnv(B, mdp)
    observation, _ = vector.reset(seed=123)
    short, reply = [], []
    for _ in range(rounds):
        for _ in range(3):
            observation, _, terminated, *_ = vector.step(np.zeros(B, dtype=int))
        assert terminated.all()
        short.append(observation[:, 0] == 4)  # the prompt of one token
        at = np.where(short[-1], 3, 4)
        said = observation[np.arange(B), at], observation[np.arange(B), at + 1]
        reply.append(np.where(said[0] == 5, 0, np.where(said[1] == 4, 1, 2)))
        observation, *_ = vector.step(np.zeros(B, dtype=int))
    first, second = np.array(short), np.array(reply)  # (rounds, B)
    chance_first, chance_second = np.array([0.7, 0.3]), np.array([0.25, 0.5, 0.25])
    pairs = {
        "prompt and reply": (first, second, chance_first, chance_second),
        "episode and next": (second[:-1], second[1:], chance_second, chance_second),
        "prompt and next": (first[:-1], first[1:], chance_first, chance_first),
        "neighbours": (second[:, :-1], second[:, 1:], chance_second, chance_second),
    }
    for name, (x, y, p, q) in pairs.items():
        for i in range(len(p)):
            for j in range(len(q)):
                n, chance = x.size, p[i] * q[j]
                off = abs(int(((x == i) & (y == j)).sum()) - n * chance)
                assert off <= SIGMAS * sqrt(n * chance * (1 - chance)), (name, i, j)


# ------------------------------------------------------------------------------------ forbidden actions, rendering
def test_a_forbidden_action_ends_the_episode_and_is_not_written() -> None:
    env = TokenEnv(make("Bandit", n_arms=2))
    env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(2)
    np.testing.assert_array_equal(observation, [2, 3])
    assert (reward, terminated, truncated, info["state"], info["length"]) == (0.0, True, False, 0, 1)
    np.testing.assert_array_equal(info["action_mask"], [1, 1, 1])


def test_a_forbidden_action_may_raise_instead_and_changes_nothing() -> None:
    mdp = make("Bandit", n_arms=2)
    env = TokenEnv(mdp, on_forbidden="raise")
    vector = TokenVectorEnv(2, mdp, on_forbidden="raise")
    env.reset(seed=0)
    vector.reset(seed=0)
    message = "action: expected an allowed token (info['action_mask']), got the forbidden state 0, token 2 ('<bos>')"
    with raises(message + "."):
        env.step(2)
    with raises(message + " in row 1."):
        vector.step([0, 2])
    np.testing.assert_array_equal(env.step(1)[0], [2, 1])
    np.testing.assert_array_equal(vector.step([0, 1])[0], [[2, 0], [2, 1]])


def test_rendering_marks_the_policys_tokens() -> None:
    names = ("yes", "no", "a b", "", "ok\n", "<bos>", "fine")
    mdp = replace(dialogue(), tokens=names).with_prompt("<bos>")
    env = TokenEnv(mdp, render_mode="ansi")
    vector = TokenVectorEnv(2, mdp, render_mode="ansi")
    env.reset(seed=1)
    vector.reset(seed=0)
    for action in (1, 0, 2):
        env.step(action)
        vector.step([action, action])
    assert env.render() == vector.render()[1]  # type: ignore[index]
    assert render_row(mdp, [5, 4]) == "<bos> 'ok\\n' | return 0"
    assert render_row(mdp, [5, 4, 1, 0, 6, 4, 2]) == "<bos> 'ok\\n' [no] [yes] fine 'ok\\n' ['a b'] | return 5.75"
    assert render_row(dialogue(), [4, 1, 0]) == "4 [1] [0] | return 2.25"
    assert TokenEnv(mdp).render() is None and TokenVectorEnv(1, mdp).render() is None


def test_a_saved_automaton_is_played_from_its_path(tmp_path: Path) -> None:
    mdp = dialogue()
    for path in (tmp_path / "talk.npz", str(tmp_path / "talk.npz")):
        mdp.save(path)
        np.testing.assert_array_equal(TokenEnv(path).reset(seed=4)[0], TokenEnv(mdp).reset(seed=4)[0])


# ---------------------------------------------------------------------------------------------------- bad arguments
def raises(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_bad_automata_are_named() -> None:
    arms = TokenMDP(np.array([[-1, -1]]), np.zeros((1, 2)), np.zeros((1, 2)))
    with raises("mdp: expected an environment root, got a policy state at the start. mdp.with_prompt(token) adds one."):
        TokenEnv(arms)
    rows = {"root": Row({0: "act", 1: END}, probs={0: 0.5, 1: 0.5}), "act": Row({0: END})}
    with raises("mdp: expected a policy token in every episode, got a prompt that ends the episode."):
        TokenEnv(from_states("root", rows.__getitem__, 2))
    rows = {"root": Row({0: "act", 1: "root"}, probs={0: 0.5, 1: 0.5}), "act": Row({0: END})}
    endless = "a loop of environment states before the first policy token"
    with raises(f"mdp: expected a prompt of bounded length, got {endless}."):
        TokenEnv(from_states("root", rows.__getitem__, 2))
    with raises("name: expected an environment, got 'Bandid'. Did you mean 'Bandit'?"):
        TokenEnv("Bandid")
    with raises("parameters: expected none, for an automaton that is built already, got length."):
        TokenEnv(dialogue(), length=3)


def test_bad_arguments_are_named() -> None:
    mdp = dialogue()
    with raises("max_tokens: expected a whole number >= 3, what the first action needs, got 2."):
        TokenEnv(mdp, max_tokens=2)
    with raises("max_tokens: expected a whole number >= 3, what the first action needs, got 9.5."):
        TokenEnv(mdp, max_tokens=9.5)  # type: ignore[arg-type]
    with raises("on_forbidden: expected 'end' or 'raise', got 'stop'."):
        TokenEnv(mdp, on_forbidden="stop")
    with raises("render_mode: expected None or 'ansi', got 'human'."):
        TokenVectorEnv(2, mdp, render_mode="human")
    with raises("num_envs: expected a whole number >= 1, got 0."):
        TokenVectorEnv(0, mdp)


def test_bad_calls_are_named() -> None:
    env, vector = TokenEnv(make("Bandit", n_arms=2)), TokenVectorEnv(2, make("Bandit", n_arms=2))
    with raises("step: expected a reset first, got an episode that is over."):
        env.step(0)
    with raises("step: expected a reset first, got an environment that was never reset."):
        vector.step([0, 0])
    with raises("seed: expected a whole number or 2 of them, one a sub-environment, got 3."):
        vector.reset(seed=[1, 2, 3])
    with raises("options: expected no reset_mask: rows reset themselves on the step after their end, got one."):
        vector.reset(options={"reset_mask": np.array([True, False])})
    env.reset()
    vector.reset()
    for action in (3, -1, 0.0, np.zeros(1, dtype=int)):
        with raises(f"action: expected a token from 0 to 2, got {action!r}."):
            env.step(action)
    with raises("actions: expected tokens from 0 to 2, got 3 in row 1."):
        vector.step([0, 3])
    with raises("actions: expected integers of shape (2,), got dtype float64, shape (2,)."):
        vector.step([0.0, 1.0])
    with raises("actions: expected integers of shape (2,), got dtype int64, shape (3,)."):
        vector.step([0, 1, 1])


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ("x", "seed: expected a whole number or 2 of them, one a sub-environment, got 'x'."),
        (1.5, "seed: expected a whole number or 2 of them, one a sub-environment, got 1.5."),
        ([1.5, 2], "seed: expected whole numbers >= 0, or None, got 1.5 for sub-environment 0."),
        ([1, -2], "seed: expected whole numbers >= 0, or None, got -2 for sub-environment 1."),
    ],
)
def test_bad_seeds_are_named(seed: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        TokenVectorEnv(2, "Bandit").reset(seed=seed)
    assert str(error.value) == message
