"""Bad input: every malformed call gives a ValueError whose message is known to the letter.

A message names the argument, what was expected, what came, where (state, token), and the remedy where there is one. The
table is one call a line; files on disk, whose messages hold a path, have their own tests below.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_lab import TabularLM, TokenBatch, TokenMDP, TokenStats, enumerate_trajectories, evaluate, make, shiq_loss, solve
from shiq_lab.batch import concatenate, cut, pack, pad
from shiq_lab.builders import END, Act, Row, Say, from_states, from_turns, prefix_tree, random_reference
from shiq_lab.losses import methods, shiq
from shiq_lab.policies import mixture, on_path, softmax_policy
from shiq_lab.population import Population
from shiq_lab.sampling import sample
from shiq_lab.training import train, train_sampled

nan, inf = float("nan"), float("inf")


def mdp(**fields: Any) -> TokenMDP:
    """A prompt, then one choice between "a" (pays 1) and "b" (pays 2), with some fields replaced."""
    good: dict[str, Any] = {
        "next_state": [[1, -1], [-1, -1]],
        "reward": [[0, 0], [1, 2]],
        "ref_logits": [[0, -inf], [0, 0]],
        "is_policy": [False, True],
        "tokens": ("a", "b"),
    }
    return TokenMDP(**(good | fields))


def turns(*parts: Any, reward: Any = lambda prefix: 0.0) -> TokenMDP:
    return from_turns(parts, reward, 2)


def state(*parts: Any, **fields: Any) -> TokenMDP:
    return from_states(0, lambda s: Row(*parts, **fields), 2)


OK = mdp()
LOOP = TokenMDP([[0, -1]], [[1.0, 0.0]], [[0.0, 0.0]])  # "again" pays 1 for ever, "stop" ends
PROMPTED_LOOP = LOOP.with_prompt(0)
STAY = np.array([[0, -inf], [0, -inf]])  # the policy that never stops there
LONG = mdp(next_state=[[1, -1], [1, -1]], horizon=3)  # "a" goes on, cut after three tokens
ENDLESS = TokenMDP([[0, 0]], [[-1.0, -2.0]], [[0.0, 0.0]])
UNWINNABLE = TokenMDP([[0, -1]], [[-1.0, 0.0]], [[0.0, 0.0]])
REF = OK.ref_log_policy
ROWS = enumerate_trajectories(OK)
PACKED = pack(ROWS, 4)
STATS = TokenStats.from_table(torch.tensor(OK.ref_logits), ROWS)
UNIFORM_3 = np.full((3, 2, 2), np.log(0.5))


def deep() -> TokenMDP:
    """Two choices a token, 70 tokens deep, in 70 states: 2^70 strings, which only an exact count can name."""
    go = lambda depth: depth + 1 if depth < 69 else END  # noqa: E731
    return from_states(0, lambda depth: Row({0: go(depth), 1: go(depth)}), 2).with_prompt(0)


def batch(**fields: Any) -> TokenBatch:
    """One row of a prompt and two actions, with some fields replaced."""
    good: dict[str, Any] = {
        "input_ids": torch.tensor([[0, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1]]),
        "completion_mask": torch.tensor([[0, 1, 1]]),
        "rewards": torch.zeros(1, 3),
        "terminated": torch.tensor([True]),
    }
    return TokenBatch(**(good | fields))


def loss(policy: Any = STATS, ref: Any = STATS, rows: Any = ROWS, beta: Any = 1.0, **options: Any) -> Any:
    return shiq_loss(policy, ref, rows, beta=beta, **options)


def descend(batches: Any = (), **options: Any) -> Any:
    return train_sampled(OK, "shiq", batches, **({"beta": 1.0, "learning_rate": 0.1, "steps": 2} | options))


CALLS: list[tuple[str, Callable[[], Any], str]] = [
    (
        "next-ragged",
        lambda: mdp(next_state=[[1, -1], [-1]]),
        "next_state: expected a rectangular array, got a ragged one.",
    ),
    (
        "next-float",
        lambda: mdp(next_state=[[1.0, 1.0], [-1, -1]]),
        "next_state: expected integers, got dtype float64.",
    ),
    (
        "next-string",
        lambda: mdp(next_state=[["a", "b"], ["c", "d"]]),
        "next_state: expected integers, got dtype <U1.",
    ),
    (
        "next-bool",
        lambda: mdp(next_state=[[True, False], [True, False]]),
        "next_state: expected integers, got dtype bool.",
    ),
    ("next-none", lambda: mdp(next_state=None), "next_state: expected integers, got dtype object."),
    (
        "next-vector",
        lambda: mdp(next_state=[1, -1]),
        "next_state: expected an array [S, V] with S >= 1 and V >= 1, got shape (2,).",
    ),
    (
        "next-no-states",
        lambda: mdp(next_state=np.zeros((0, 2), int)),
        "next_state: expected an array [S, V] with S >= 1 and V >= 1, got shape (0, 2).",
    ),
    (
        "next-too-large",
        lambda: mdp(next_state=[[5, -1], [-1, -1]]),
        "next_state: expected a state from 0 to 1, or -1 for the end, got 5 at state 0, token 0.",
    ),
    (
        "next-negative",
        lambda: mdp(next_state=[[1, -1], [-2, -1]]),
        "next_state: expected a state from 0 to 1, or -1 for the end, got -2 at state 1, token 0.",
    ),
    (
        "next-beyond-int64",
        lambda: mdp(next_state=np.full((2, 2), 2**63, dtype=np.uint64)),
        "next_state: expected integers that int64 can hold, got 9223372036854775808.",
    ),
    (
        "next-endless-replies",
        lambda: mdp(next_state=[[0, 0], [-1, -1]]),
        "next_state: expected every loop of environment states to be left with probability 1, got"
        " environment state 0, from which neither the policy nor the end can be reached.",
    ),
    (
        "next-endless-loop-of-two",
        lambda: mdp(
            next_state=[[1, 1], [0, 0]], reward=np.zeros((2, 2)), ref_logits=[[0, -inf], [0, -inf]], is_policy=[False, False]
        ),
        "next_state: expected every loop of environment states to be left with probability 1, got"
        " environment state 0, from which neither the policy nor the end can be reached.",
    ),
    (
        "reward-nan",
        lambda: mdp(reward=[[0, 0], [nan, 2]]),
        "reward: expected finite numbers, got nan at state 1, token 0. Forbid a token with ref_logits = -inf.",
    ),
    (
        "reward-inf",
        lambda: mdp(reward=[[0, 0], [1, inf]]),
        "reward: expected finite numbers, got inf at state 1, token 1. Forbid a token with ref_logits = -inf.",
    ),
    (
        "reward-minus-inf",
        lambda: mdp(reward=[[0, 0], [1, -inf]]),
        "reward: expected finite numbers, got -inf at state 1, token 1. Forbid a token with ref_logits = -inf.",
    ),
    ("reward-ragged", lambda: mdp(reward=[[0, 0], [1]]), "reward: expected a rectangular array, got a ragged one."),
    ("reward-shape", lambda: mdp(reward=[[0, 0]]), "reward: expected shape (2, 2), as next_state, got shape (1, 2)."),
    ("reward-scalar", lambda: mdp(reward=0.0), "reward: expected shape (2, 2), as next_state, got shape ()."),
    ("reward-string", lambda: mdp(reward=[["a", "b"], ["c", "d"]]), "reward: expected real numbers, got dtype <U1."),
    ("reward-complex", lambda: mdp(reward=[[0, 0], [1j, 2]]), "reward: expected real numbers, got dtype complex128."),
    ("reward-none", lambda: mdp(reward=None), "reward: expected real numbers, got dtype object."),
    (
        "reward-in-environment",
        lambda: mdp(reward=[[1, 0], [1, 2]]),
        "reward: expected 0 in environment states, got a reward at state 0, token 0. Pay it on the policy token before.",
    ),
    (
        "logits-nan",
        lambda: mdp(ref_logits=[[0, -inf], [nan, 0]]),
        "ref_logits: expected finite numbers, or -inf where a token is forbidden, got NaN at state 1, token 0.",
    ),
    (
        "logits-inf",
        lambda: mdp(ref_logits=[[0, -inf], [0, inf]]),
        "ref_logits: expected finite numbers, or -inf where a token is forbidden, got +inf at state 1, token 1.",
    ),
    (
        "logits-ragged",
        lambda: mdp(ref_logits=[[0, -inf], [0]]),
        "ref_logits: expected a rectangular array, got a ragged one.",
    ),
    (
        "logits-shape",
        lambda: mdp(ref_logits=[[0, -inf], [0, 0], [0, 0]]),
        "ref_logits: expected shape (2, 2), as next_state, got shape (3, 2).",
    ),
    (
        "logits-with-gradient",
        lambda: mdp(ref_logits=torch.zeros(2, 2, requires_grad=True)),
        "ref_logits: expected an array, got a Tensor that numpy cannot read. Take x.detach().cpu() of a tensor.",
    ),
    (
        "no-token-policy",
        lambda: mdp(ref_logits=[[0, -inf], [-inf, -inf]]),
        "ref_logits: expected at least one allowed token in every row, got none in policy state 1.",
    ),
    (
        "no-token-environment",
        lambda: mdp(ref_logits=[[-inf, -inf], [0, 0]]),
        "ref_logits: expected at least one allowed token in every row, got none in environment state 0.",
    ),
    (
        "environment-sum-below-1",
        lambda: mdp(ref_logits=[[-0.5, -inf], [0, 0]]),
        "ref_logits: expected log-probabilities that sum to 1 in every environment state, got a s"
        "um of 0.606530659713 in state 0. Subtract the log-sum-exp of the row.",
    ),
    (
        "environment-sum-above-1",
        lambda: mdp(ref_logits=[[0, 0], [0, 0]]),
        "ref_logits: expected log-probabilities that sum to 1 in every environment state, got a s"
        "um of 2 in state 0. Subtract the log-sum-exp of the row.",
    ),
    (
        "is-policy-ints",
        lambda: mdp(is_policy=[0, 1]),
        "is_policy: expected booleans of shape (2,), got dtype int64, shape (2,).",
    ),
    (
        "is-policy-short",
        lambda: mdp(is_policy=[True]),
        "is_policy: expected booleans of shape (2,), got dtype bool, shape (1,).",
    ),
    (
        "is-policy-scalar",
        lambda: mdp(is_policy=True),
        "is_policy: expected booleans of shape (2,), got dtype bool, shape ().",
    ),
    ("start-too-large", lambda: mdp(start=2), "start: expected a whole number from 0 to 1, got 2."),
    ("start-negative", lambda: mdp(start=-1), "start: expected a whole number from 0 to 1, got -1."),
    ("start-bool", lambda: mdp(start=True), "start: expected a whole number from 0 to 1, got True."),
    ("start-float", lambda: mdp(start=1.0), "start: expected a whole number from 0 to 1, got 1.0."),
    ("start-none", lambda: mdp(start=None), "start: expected a whole number from 0 to 1, got None."),
    (
        "horizon-zero",
        lambda: mdp(horizon=0),
        "horizon: expected a whole number of policy tokens >= 1, or None, got 0.",
    ),
    (
        "horizon-bool",
        lambda: mdp(horizon=True),
        "horizon: expected a whole number of policy tokens >= 1, or None, got True.",
    ),
    (
        "horizon-float",
        lambda: mdp(horizon=1.5),
        "horizon: expected a whole number of policy tokens >= 1, or None, got 1.5.",
    ),
    (
        "horizon-string",
        lambda: mdp(horizon="8"),
        "horizon: expected a whole number of policy tokens >= 1, or None, got '8'.",
    ),
    ("tokens-short", lambda: mdp(tokens=("a",)), "tokens: expected 2 strings, one a token, got 1."),
    ("tokens-one-string", lambda: mdp(tokens="ab"), "tokens: expected a sequence of 2 strings, got 'ab'."),
    ("tokens-ints", lambda: mdp(tokens=(1, 2)), "tokens: expected a sequence of 2 strings, got (1, 2)."),
    ("tokens-number", lambda: mdp(tokens=5), "tokens: expected a sequence of 2 strings, got 5."),
    (
        "tokens-dict",
        lambda: mdp(tokens={"a": 0, "b": 1}),
        "tokens: expected a sequence of 2 strings, got {'a': 0, 'b': 1}.",
    ),
    ("name-number", lambda: mdp(name=5), "name: expected a string, got 5."),
    (
        "token-unknown",
        lambda: OK.token("c"),
        "token: expected a string that shows one of the 2 tokens, got 'c', which shows 0. Give its id.",
    ),
    (
        "token-near",
        lambda: mdp(tokens=("<search>", "b")).token("<serch>"),
        "token: expected a string that shows one of the 2 tokens, got '<serch>', which shows 0. Did you mean '<search>'?",
    ),
    (
        "token-twice",
        lambda: mdp(tokens=("a", "a")).token("a"),
        "token: expected a string that shows one of the 2 tokens, got 'a', which shows 2. Give its id.",
    ),
    ("token-float", lambda: OK.token(1.0), "token: expected a whole number from 0 to 1, got 1.0."),
    ("show-outside", lambda: OK.show(7), "token: expected a whole number from 0 to 1, got 7."),
    (
        "prompt-unnamed",
        lambda: LOOP.with_prompt("a"),
        "token: expected an id from 0 to 1, as this automaton names no tokens, got 'a'.",
    ),
    ("prompt-outside", lambda: OK.with_prompt(2), "token: expected a whole number from 0 to 1, got 2."),
    ("prompt-none", lambda: OK.with_prompt(None), "token: expected a whole number from 0 to 1, got None."),
    (
        "unroll-without-horizon",
        lambda: OK.unroll(),
        "horizon: expected a whole number >= 1, as the automaton has none of its own, got None. Say unroll(horizon=8).",
    ),
    ("unroll-zero", lambda: OK.unroll(0), "horizon: expected a whole number >= 1, got 0."),
    ("unroll-bool", lambda: OK.unroll(True), "horizon: expected a whole number >= 1, got True."),
    ("unroll-float", lambda: OK.unroll(1.5), "horizon: expected a whole number >= 1, got 1.5."),
    ("unroll-beyond", lambda: LONG.unroll(4), "horizon: expected at most the automaton's own 3, got 4."),
    (
        "solve-name",
        lambda: solve("Bandit", beta=1.0),
        "mdp: expected a TokenMDP, got 'Bandit'. shiq_lab.make(name) builds one by name, TokenMDP.load(path) reads one.",
    ),
    ("beta-zero", lambda: solve(OK, beta=0), "beta: expected a finite number > 0, got 0."),
    ("beta-negative", lambda: solve(OK, beta=-1.0), "beta: expected a finite number > 0, got -1.0."),
    ("beta-nan", lambda: solve(OK, beta=nan), "beta: expected a finite number > 0, got nan."),
    ("beta-inf", lambda: solve(OK, beta=inf), "beta: expected a finite number > 0, got inf."),
    ("beta-bool", lambda: solve(OK, beta=True), "beta: expected a finite number > 0, got True."),
    ("beta-string", lambda: solve(OK, beta="1"), "beta: expected a finite number > 0, got '1'."),
    ("beta-none", lambda: solve(OK, beta=None), "beta: expected a finite number > 0, got None."),
    (
        "beta-complex",
        lambda: solve(OK, beta=np.complex128(1)),
        "beta: expected a finite number > 0, got np.complex128(1+0j).",
    ),
    ("beta-numpy-int", lambda: solve(OK, beta=np.int64(-3)), "beta: expected a finite number > 0, got np.int64(-3)."),
    ("gamma-zero", lambda: solve(OK, beta=1.0, gamma=0), "gamma: expected a number in (0, 1], got 0."),
    ("gamma-above-1", lambda: solve(OK, beta=1.0, gamma=1.1), "gamma: expected a number in (0, 1], got 1.1."),
    ("gamma-nan", lambda: solve(OK, beta=1.0, gamma=nan), "gamma: expected a number in (0, 1], got nan."),
    ("gamma-bool", lambda: solve(OK, beta=1.0, gamma=True), "gamma: expected a number in (0, 1], got True."),
    ("gamma-string", lambda: solve(OK, beta=1.0, gamma="x"), "gamma: expected a number in (0, 1], got 'x'."),
    (
        "v-infinite",
        lambda: solve(LOOP, beta=1.0),
        "mdp: expected a finite v*, got an infinite one (or one beyond float64) in the loop throu"
        "gh state 0: going round pays more than beta times its information cost, so the expected "
        "exponentiated reward diverges. Lower the loop's reward, raise beta, take gamma < 1 or a "
        "horizon.",
    ),
    (
        "v-overflows",
        lambda: solve(mdp(reward=[[0, 0], [1e308, 1e308]]), beta=1e-3),
        "mdp: expected v* / beta within float64, got one beyond it in state 0. Scale rewards down or raise beta.",
    ),
    (
        "never-ends",
        lambda: solve(ENDLESS, beta=1.0),
        "gamma: expected < 1, or an end that every state can reach, got 1.0 and state 0, which never ends.",
    ),
    ("t-negative", lambda: solve(OK, beta=1.0).q(-1), "t: expected a whole number >= 0, got -1."),
    ("t-float", lambda: solve(OK, beta=1.0).q(1.5), "t: expected a whole number >= 0, got 1.5."),
    ("t-bool", lambda: solve(OK, beta=1.0).v(True), "t: expected a whole number >= 0, got True."),
    ("t-beyond", lambda: solve(LONG, beta=1.0).v(4), "t: expected at most the horizon 3, got 4."),
    (
        "t-after-the-last",
        lambda: solve(LONG, beta=1.0).q(3),
        "t: expected less than the horizon 3, got 3. Nothing is said after the last token.",
    ),
    ("t-string", lambda: solve(LONG, beta=1.0).optimal_logits("a"), "t: expected a whole number >= 0, got 'a'."),
    (
        "policy-shape",
        lambda: evaluate(OK, [[0, 0]], beta=1.0),
        "log_policy: expected shape (2, 2), got shape (1, 2).",
    ),
    (
        "policy-layers",
        lambda: evaluate(LONG, UNIFORM_3[:2], beta=1.0),
        "log_policy: expected shape (2, 2) or (3, 2, 2), got shape (2, 2, 2).",
    ),
    (
        "policy-logits",
        lambda: evaluate(OK, [[0, 0], [0, 0]], beta=1.0),
        "log_policy: expected rows whose exponentials sum to 1, got a sum of 2 in state 1. polici"
        "es.softmax_policy(mdp, logits) makes such rows.",
    ),
    (
        "policy-layer-sum",
        lambda: evaluate(LONG, np.log([[[1, 1], [1, 1]]] * 3), beta=1.0),
        "log_policy: expected rows whose exponentials sum to 1, got a sum of 2 in state 1 at t = "
        "0. policies.softmax_policy(mdp, logits) makes such rows.",
    ),
    (
        "policy-nan",
        lambda: evaluate(OK, [[0, 0], [nan, 0]], beta=1.0),
        "log_policy: expected log-probabilities, got NaN at state 1, token 0 ('a').",
    ),
    (
        "policy-overflow",
        lambda: evaluate(OK, [[0, 0], [1000, 0]], beta=1.0),
        "log_policy: expected rows whose exponentials sum to 1, got a sum of inf in state 1. poli"
        "cies.softmax_policy(mdp, logits) makes such rows.",
    ),
    (
        "policy-ragged",
        lambda: evaluate(OK, [[0, 0], [0]], beta=1.0),
        "log_policy: expected a rectangular array, got a ragged one.",
    ),
    ("policy-string", lambda: evaluate(OK, "uniform", beta=1.0), "log_policy: expected real numbers, got dtype <U7."),
    ("policy-none", lambda: evaluate(OK, None, beta=1.0), "log_policy: expected real numbers, got dtype object."),
    (
        "policy-never-ends",
        lambda: evaluate(UNWINNABLE, [[0, -inf]], beta=1.0),
        "log_policy: expected a policy whose episodes end (gamma = 1), got one that never ends from state 0.",
    ),
    (
        "evaluate-name",
        lambda: evaluate("Bandit", REF, beta=1.0),
        "mdp: expected a TokenMDP, got 'Bandit'. shiq_lab.make(name) builds one by name, TokenMDP.load(path) reads one.",
    ),
    (
        "list-too-many",
        lambda: enumerate_trajectories(OK, 1),
        "max_trajectories: expected at least the number of strings, 2, got 1. Sample instead.",
    ),
    (
        "list-exact-size",
        lambda: enumerate_trajectories(deep()),
        "max_trajectories: expected at least the number of strings, 1180591620717411303424, got 1000000. Sample instead.",
    ),
    (
        "list-loop",
        lambda: enumerate_trajectories(PROMPTED_LOOP),
        "max_trajectories: expected at least the number of strings, infinitely many, got 1000000. Sample instead.",
    ),
    (
        "list-no-prompt",
        lambda: enumerate_trajectories(LOOP),
        "mdp: expected an environment state at the start, got policy state 0. Add one: mdp.with_prompt(token).",
    ),
    (
        "list-name",
        lambda: enumerate_trajectories("Bandit"),
        "mdp: expected a TokenMDP, got 'Bandit'. shiq_lab.make(name) builds one by name, TokenMDP.load(path) reads one.",
    ),
    (
        "list-most-string",
        lambda: enumerate_trajectories(OK, "x"),
        "max_trajectories: expected a whole number >= 1, got 'x'.",
    ),
    (
        "list-most-none",
        lambda: enumerate_trajectories(OK, None),
        "max_trajectories: expected a whole number >= 1, got None.",
    ),
    (
        "list-behavior-shape",
        lambda: enumerate_trajectories(OK, behavior=[[0, 0]]),
        "behavior: expected shape (2, 2), or [T, S, V], got shape (1, 2).",
    ),
    (
        "list-behavior-logits",
        lambda: enumerate_trajectories(OK, behavior=[[0, 0], [0, 0]]),
        "behavior: expected rows whose exponentials over allowed tokens sum to 1, got a sum of 2 in state 1.",
    ),
    (
        "list-behavior-string",
        lambda: enumerate_trajectories(OK, behavior="x"),
        "behavior: expected real numbers, got dtype <U1.",
    ),
    (
        "sample-no-prompt",
        lambda: sample(LOOP, LOOP.ref_log_policy, 2, rng=0),
        "mdp: expected an environment state at the start, got policy state 0. Add one: mdp.with_prompt(token).",
    ),
    (
        "sample-logits",
        lambda: sample(OK, [[0, 0], [0, 0]], 2, rng=0),
        "log_policy: expected rows whose exponentials over allowed tokens sum to 1, got a sum of 2 in state 1.",
    ),
    (
        "sample-nan",
        lambda: sample(OK, [[0, 0], [nan, 0]], 2, rng=0),
        "log_policy: expected rows whose exponentials over allowed tokens sum to 1, got a sum of nan in state 1.",
    ),
    ("sample-none-rows", lambda: sample(OK, REF, 0, rng=0), "n: expected a whole number >= 1, got 0."),
    ("sample-rows-float", lambda: sample(OK, REF, 1.5, rng=0), "n: expected a whole number >= 1, got 1.5."),
    (
        "sample-rng-string",
        lambda: sample(OK, REF, 2, rng="a"),
        "rng: expected a whole number >= 0, got 'a'. Give a seed or a numpy Generator.",
    ),
    (
        "sample-rng-none",
        lambda: sample(OK, REF, 2, rng=None),
        "rng: expected a whole number >= 0, got None. Give a seed or a numpy Generator.",
    ),
    (
        "sample-no-tokens",
        lambda: sample(OK, REF, 2, rng=0, max_tokens=0),
        "max_tokens: expected a whole number >= 1, got 0.",
    ),
    (
        "softmax-shape",
        lambda: softmax_policy(OK, [[0]]),
        "logits: expected shape (2, 2), as next_state, got shape (1, 1).",
    ),
    (
        "softmax-nan",
        lambda: softmax_policy(OK, [[0, 0], [nan, 0]]),
        "logits: expected a finite largest logit over the allowed tokens of every policy state, g"
        "ot a largest one of nan in state 1.",
    ),
    (
        "softmax-inf",
        lambda: softmax_policy(OK, [[0, 0], [inf, 0]]),
        "logits: expected a finite largest logit over the allowed tokens of every policy state, g"
        "ot a largest one of inf in state 1.",
    ),
    (
        "softmax-no-token",
        lambda: softmax_policy(OK, [[0, 0], [-inf, -inf]]),
        "logits: expected a finite largest logit over the allowed tokens of every policy state, g"
        "ot a largest one of -inf in state 1.",
    ),
    ("mixture-weight", lambda: mixture(REF, REF, 2), "weight: expected a number from 0 to 1, got 2."),
    ("mixture-weight-string", lambda: mixture(REF, REF, "a"), "weight: expected a number from 0 to 1, got 'a'."),
    (
        "mixture-shapes",
        lambda: mixture(REF, REF[:1], 0.5),
        "second: expected shape (2, 2), as first, got shape (1, 2).",
    ),
    ("leave-one", lambda: on_path(OK, REF, 1), "leave: expected a probability between 0 and 1, got 1."),
    ("leave-string", lambda: on_path(OK, REF, "a"), "leave: expected a probability between 0 and 1, got 'a'."),
    ("on-path-shape", lambda: on_path(OK, [[0]], 0.5), "log_policy: expected shape (2, 2), got shape (1, 1)."),
    (
        "row-none",
        lambda: from_states(0, lambda s: None, 2),
        "describe: expected a Row for every state, got None. State 0.",
    ),
    ("row-empty", lambda: state({}), "next: expected at least one allowed token, got none in state 0."),
    ("row-list", lambda: state([0]), "next: expected a dict from tokens, got [0] in state 0."),
    ("row-token-outside", lambda: state({5: END}), "next: expected tokens from 0 to 1, got 5 in state 0."),
    ("row-token-string", lambda: state({"a": END}), "next: expected tokens from 0 to 1, got 'a' in state 0."),
    ("row-token-bool", lambda: state({True: END}), "next: expected tokens from 0 to 1, got True in state 0."),
    (
        "row-reward-elsewhere",
        lambda: state({0: END}, reward={1: 1.0}),
        "reward: expected only tokens that `next` allows, got 1 in state 0.",
    ),
    (
        "row-reward-nan",
        lambda: state({0: END}, reward={0: nan}),
        "reward: expected finite numbers, got nan for token 0 in state 0.",
    ),
    (
        "row-reward-none",
        lambda: state({0: END}, reward={0: None}),
        "reward: expected finite numbers, got None for token 0 in state 0.",
    ),
    (
        "row-logit-string",
        lambda: state({0: END}, logits={0: "x"}),
        "logits: expected numbers, or -inf where a token is forbidden, got 'x' for token 0 in state 0.",
    ),
    (
        "row-unhashable",
        lambda: state({0: [1]}),
        "next: expected hashable states or END, got [1] for token 0 in state 0.",
    ),
    (
        "row-probs-sum",
        lambda: state({0: END}, probs={0: 0.5}),
        "probs: expected probabilities that sum to 1, got a sum of 0.5 in state 0.",
    ),
    (
        "row-probs-negative",
        lambda: state({0: END, 1: END}, probs={0: 1.0, 1: -0.5}),
        "probs: expected probabilities, got -0.5 for token 1 in state 0.",
    ),
    (
        "row-probs-elsewhere",
        lambda: state({0: END}, probs={0: 0.5, 1: 0.5}),
        "probs: expected only tokens that `next` allows, got 1 in state 0.",
    ),
    (
        "row-probs-and-reward",
        lambda: state({0: END}, reward={0: 2.0}, probs={0: 1.0}),
        "reward: expected none in a Row with probs, where the environment speaks, got {0: 2.0} in state 0.",
    ),
    (
        "states-n-tokens",
        lambda: from_states(0, lambda s: Row({0: END}), 0),
        "n_tokens: expected a whole number >= 1, got 0.",
    ),
    ("states-describe", lambda: from_states(0, 5, 2), "describe: expected a function, got 5."),
    (
        "states-root-end",
        lambda: from_states(END, lambda s: Row({0: END}), 2),
        "root: expected a hashable state that is not END, got None. Use a tuple for a list.",
    ),
    (
        "states-endless",
        lambda: from_states(0, lambda s: Row({0: s + 1}), 2, max_states=10),
        "describe: expected at most 10 states, got more. Raise max_states, or let the states repeat.",
    ),
    (
        "prefix-false",
        lambda: prefix_tree(lambda prefix: Row({0: False}), 2),
        "next: expected True (go on) or END, got False for token 0 in state ().",
    ),
    (
        "prefix-none",
        lambda: prefix_tree(lambda prefix: None, 2),
        "describe: expected a Row for every state, got None. State ().",
    ),
    (
        "prefix-endless",
        lambda: prefix_tree(lambda prefix: Row({0: True}), 2, max_states=10),
        "describe: expected at most 10 states, got more. Raise max_states, or let the states repeat.",
    ),
    ("turns-none", lambda: turns(), "turns: expected a list of at least one turn, got ()."),
    ("turns-not-a-turn", lambda: turns(5), "turns: expected Say(...) or Act(...), got 5 at position 0."),
    (
        "act-no-length",
        lambda: turns(Act(0, (0,))),
        "turns: expected an Act of whole length >= 1 with a list of allowed tokens, got Act(lengt"
        "h=0, allowed=(0,), stop=None) at position 0.",
    ),
    (
        "act-length-float",
        lambda: turns(Act(1.5, (0,))),
        "turns: expected an Act of whole length >= 1 with a list of allowed tokens, got Act(lengt"
        "h=1.5, allowed=(0,), stop=None) at position 0.",
    ),
    (
        "act-no-token",
        lambda: turns(Act(1, ())),
        "turns: expected an Act of whole length >= 1 with a list of allowed tokens, got Act(lengt"
        "h=1, allowed=(), stop=None) at position 0.",
    ),
    (
        "act-token-outside",
        lambda: turns(Act(1, (5,))),
        "next: expected tokens from 0 to 1, got 5 in state ((), 0, 0).",
    ),
    (
        "act-reward-nan",
        lambda: turns(Say({(0,): 1.0}), Act(1, (0, 1)), reward=lambda prefix: nan),
        "reward: expected finite numbers, got nan for token 0 in state ((0,), 1, 0).",
    ),
    ("act-reward-no-function", lambda: turns(Act(1, (0,)), reward=5), "reward: expected a function, got 5."),
    (
        "say-nothing",
        lambda: turns(Say({})),
        "turns: expected replies whose probabilities sum to 1, got a sum of 0 after ().",
    ),
    (
        "say-empty-string",
        lambda: turns(Say({(): 1.0})),
        "turns: expected replies that are tuples of at least one token, got () after ().",
    ),
    (
        "say-sum",
        lambda: turns(Say({(0,): 0.5})),
        "turns: expected replies whose probabilities sum to 1, got a sum of 0.5 after ().",
    ),
    (
        "say-negative",
        lambda: turns(Say({(0,): 1.5, (1,): -0.5})),
        "turns: expected replies of probability > 0, got -0.5 for (1,) after ().",
    ),
    (
        "say-beginning",
        lambda: turns(Say({(0,): 0.5, (0, 1): 0.5})),
        "turns: expected no reply that is the beginning of another, got (0,) and (0, 1) after ().",
    ),
    (
        "say-string",
        lambda: turns(Say({"a": 1.0})),
        "turns: expected replies that are tuples of at least one token, got 'a' after ().",
    ),
    (
        "say-number",
        lambda: turns(Say(5)),
        "turns: expected a Say whose replies are a dict {(token, ...): probability}, got 5 after ().",
    ),
    (
        "say-returns-none",
        lambda: turns(Say(lambda prefix: None)),
        "turns: expected a Say whose replies are a dict {(token, ...): probability}, got None after ().",
    ),
    ("reference-seed", lambda: random_reference(OK, -1), "seed: expected a whole number >= 0, got -1."),
    ("reference-scale", lambda: random_reference(OK, 0, scale=-1), "scale: expected a finite number >= 0, got -1."),
    ("reference-level", lambda: random_reference(OK, 0, level=inf), "level: expected a finite number >= 0, got inf."),
    (
        "environment-case",
        lambda: make("bandit"),
        "name: expected an environment, got 'bandit'. Did you mean 'Bandit'?",
    ),
    (
        "environment-near",
        lambda: make("Bandito"),
        "name: expected an environment, got 'Bandito'. Did you mean 'Bandit'?",
    ),
    (
        "environment-parameter",
        lambda: make("Needle", depth=3),
        "depth: expected a parameter of Needle: length, n_tokens, reward, seed, got 3.",
    ),
    (
        "batch-vector",
        lambda: batch(input_ids=torch.tensor([0, 1])),
        "input_ids: expected shape [B, L], got shape (2,).",
    ),
    ("batch-list", lambda: batch(input_ids=[[0, 1, 1]]), "input_ids: expected a tensor, got list."),
    ("batch-rewards-none", lambda: batch(rewards=None), "rewards: expected a tensor, got NoneType."),
    (
        "batch-mask-shape",
        lambda: batch(attention_mask=torch.tensor([[1, 1]])),
        "attention_mask: expected shape (1, 3), as input_ids, got shape (1, 2).",
    ),
    (
        "batch-mask-two",
        lambda: batch(attention_mask=torch.tensor([[1, 2, 1]])),
        "attention_mask: expected only 0 and 1, got 2.",
    ),
    (
        "batch-mask-nan",
        lambda: batch(completion_mask=torch.tensor([[0, nan, 1]])),
        "completion_mask: expected only 0 and 1, got nan.",
    ),
    (
        "batch-action-first",
        lambda: batch(completion_mask=torch.tensor([[1, 1, 1]])),
        "completion_mask: expected 0 at a row's first real token, which nothing scores, got 1 at "
        "row 0, position 0. Put a beginning-of-sequence token before it: mdp.with_prompt(token).",
    ),
    (
        "batch-action-first-left-padded",
        lambda: batch(attention_mask=torch.tensor([[0, 1, 1]])),
        "completion_mask: expected 0 at a row's first real token, which nothing scores, got 1 at "
        "row 0, position 1. Put a beginning-of-sequence token before it: mdp.with_prompt(token).",
    ),
    (
        "batch-action-in-padding",
        lambda: batch(attention_mask=torch.tensor([[1, 1, 0]])),
        "completion_mask: expected 0 in padding, got 1 at row 0, position 2.",
    ),
    (
        "batch-rewards-shape",
        lambda: batch(rewards=torch.zeros(1, 2)),
        "rewards: expected shape (1, 3), as input_ids, got shape (1, 2).",
    ),
    (
        "batch-rewards-nan",
        lambda: batch(rewards=torch.tensor([[0, nan, 0]])),
        "rewards: expected finite numbers, got nan at row 0, position 1.",
    ),
    (
        "batch-terminated-shape",
        lambda: batch(terminated=torch.tensor([True, True])),
        "terminated: expected shape (1,), got shape (2,).",
    ),
    (
        "batch-terminated-int",
        lambda: batch(terminated=torch.tensor([1])),
        "terminated: expected booleans, got dtype torch.int64.",
    ),
    (
        "batch-weights-shape",
        lambda: batch(weights=torch.ones(2)),
        "weights: expected shape (1,), as terminated, got shape (2,).",
    ),
    (
        "batch-groups-shape",
        lambda: batch(group_ids=torch.ones(2)),
        "group_ids: expected shape (1,), as terminated, got shape (2,).",
    ),
    (
        "batch-packed-terminated",
        lambda: batch(segment_ids=torch.ones(1, 3, dtype=torch.int64)),
        "terminated: expected shape (1, N) for packed rows, got shape (1,).",
    ),
    ("pad-side", lambda: pad(ROWS, "middle"), "side: expected 'left' or 'right', got 'middle'."),
    (
        "pad-width",
        lambda: pad(ROWS, width=1),
        "width: expected at least the longest row, 2, got 1. Use cut to shorten rows.",
    ),
    (
        "pad-packed",
        lambda: pad(PACKED),
        "batch: expected rows that are not packed, got packed rows. Pad before packing.",
    ),
    ("cut-nothing", lambda: cut(ROWS, 0), "length: expected at least 1 token, got 0."),
    (
        "batch-float-ids",
        lambda: replace(ROWS, input_ids=ROWS.input_ids.double()),
        "input_ids: expected integers, got dtype torch.float64.",
    ),
    (
        "batch-whole-rewards",
        lambda: replace(ROWS, rewards=ROWS.rewards.long()),
        "rewards: expected floating-point numbers, got dtype torch.int64.",
    ),
    (
        "batch-negative-weights",
        lambda: replace(ROWS, weights=torch.tensor([1.0, -1.0])),
        "weights: expected finite numbers >= 0, got -1.0 to 1.0.",
    ),
    (
        "loss-of-nothing",
        lambda: shiq_loss(None, None, ROWS, beta=1.0),  # type: ignore[arg-type]
        "policy_stats: expected TokenStats, got NoneType. TokenStats.from_logits(logits, batch) makes them.",
    ),
    (
        "unroll-for-ever",
        lambda: LOOP.unroll(10**9),
        "horizon: expected at most 500000000 entries in a table [T, S, V], got 2000000000. Take a shorter horizon.",
    ),
    (
        "solve-for-ever",
        lambda: solve(replace(LOOP, horizon=10**9), beta=1.0),
        "horizon: expected at most 500000000 entries in a table [T, S, V], got 2000000000. Take a shorter horizon.",
    ),
    (
        "cut-a-string",
        lambda: cut(ROWS, "a"),  # type: ignore[arg-type]
        "length: expected a whole number, or integers of shape (2,), got 'a'.",
    ),
    ("pack-a-fraction", lambda: pack(ROWS, 2.5), "width: expected a whole number >= 1, got 2.5."),  # type: ignore[arg-type]
    (
        "population-array",
        lambda: Population(OK, softmax_policy(OK, np.zeros((2, 2))), 1.0).loss(np.zeros((2, 2))),  # type: ignore[arg-type]
        "logits: expected a tensor of shape (2, 2), got ndarray, shape (2, 2).",
    ),
    (
        "population-n-steps",
        lambda: Population(OK, softmax_policy(OK, np.zeros((2, 2))), 1.0).loss(torch.zeros(2, 2), n_steps=0),
        "n_steps: expected a whole number >= 1, got 0.",
    ),
    (
        "stats-integers",
        lambda: TokenStats.from_logits(torch.zeros(2, 2, 2, dtype=torch.int64), ROWS),
        "logits: expected a floating-point tensor, got Tensor of torch.int64.",
    ),
    (
        "stats-vocabulary",
        lambda: TokenStats.from_logits(torch.zeros(2, 2, 1), replace(ROWS, input_ids=torch.tensor([[0, 1], [0, 1]]))),
        "input_ids: expected actions from 0 to 0, got 1 at row 0, position 1.",
    ),
    (
        "model-nan",
        lambda: TabularLM(OK, torch.tensor([[0.0, 0.0], [nan, 0.0]])),
        "logits: expected numbers where a token is allowed, got NaN at state 1, token 0 ('a').",
    ),
    (
        "model-ids",
        lambda: TabularLM(OK)(torch.zeros(3, dtype=torch.int64)),
        "input_ids: expected integers [B, L], got torch.int64, shape (3,).",
    ),
    (
        "model-mask",
        lambda: TabularLM(OK)(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 3)),
        "attention_mask: expected shape (1, 2), as input_ids, got shape (1, 3).",
    ),
    ("pack-width", lambda: pack(ROWS, 1), "width: expected at least the longest row, 2, got 1."),
    ("concatenate-none", lambda: concatenate([]), "batches: expected at least one batch, got none."),
    (
        "stats-logits-shape",
        lambda: TokenStats.from_logits(torch.zeros(2, 2), ROWS),
        "logits: expected shape (2, 2, 'V'), got shape (2, 2).",
    ),
    (
        "stats-ref-shape",
        lambda: TokenStats.from_logits(torch.zeros(2, 2, 2), ROWS, ref_logits=torch.zeros(2, 2, 3)),
        "ref_logits: expected shape (2, 2, 2), as logits, got shape (2, 2, 3).",
    ),
    (
        "stats-no-states",
        lambda: TokenStats.from_table(torch.zeros(2, 2), replace(ROWS, states=None)),
        "batch: expected one that knows its automaton states, got states=None. Fill them with tabular.with_states.",
    ),
    ("loss-beta", lambda: loss(beta=0), "beta: expected a finite number > 0, got 0."),
    ("loss-beta-bool", lambda: loss(beta=True), "beta: expected a finite number > 0, got True."),
    ("loss-beta-string", lambda: loss(beta="1"), "beta: expected a finite number > 0, got '1'."),
    ("loss-gamma", lambda: loss(gamma=nan), "gamma: expected a number in (0, 1], got nan."),
    (
        "loss-n-steps-zero",
        lambda: loss(n_steps=0),
        "n_steps: expected a whole number >= 1, or None for the whole row, got 0.",
    ),
    (
        "loss-n-steps-bool",
        lambda: loss(n_steps=True),
        "n_steps: expected a whole number >= 1, or None for the whole row, got True.",
    ),
    ("loss-reduction", lambda: loss(reduction="avg"), "reduction: expected 'mean', 'sum' or 'none', got 'avg'."),
    (
        "loss-rows",
        lambda: loss(rows=ROWS.select([0])),
        "policy_stats.token_logit: expected shape (1, 1), got shape (2, 1).",
    ),
    (
        "loss-ref-shape",
        lambda: loss(ref=replace(STATS, logsumexp=STATS.logsumexp[:1])),
        "ref_stats.logsumexp: expected shape (2, 1), got shape (1, 1).",
    ),
    (
        "loss-end-shape",
        lambda: loss(policy=replace(STATS, end_logsumexp=STATS.end_logsumexp[:1])),
        "policy_stats.end_logsumexp: expected shape (2,), as terminated, got shape (1,).",
    ),
    (
        "loss-naive-joint",
        lambda: shiq.naive_loss(STATS, STATS, ROWS, beta=1.0),
        "policy_stats: expected joint_logsumexp for the naive step, got None. Pass ref_logits= or ref_table= when making them.",
    ),
    (
        "loss-through",
        lambda: shiq.semi_gradient_loss(STATS, STATS, ROWS, beta=1.0, through="x"),
        "through: expected 'token' or 'value', got 'x'.",
    ),
    ("method-case", lambda: methods.lookup("ShiQ"), "loss: expected a method, got 'ShiQ'. Did you mean 'shiq'?"),
    (
        "method-number",
        lambda: methods.lookup(5),
        "loss: expected a method, got 5. Known: naive, easy, shifted, shiq, sequence, semi-gradient, turn-cut.",
    ),
    (
        "train-method",
        lambda: train(OK, "shiq2", beta=1.0),
        "loss: expected a method, got 'shiq2'. Did you mean 'shiq'?",
    ),
    (
        "train-name",
        lambda: train("Bandit", beta=1.0),
        "mdp: expected a TokenMDP, got 'Bandit'. shiq_lab.make(name) builds one by name, TokenMDP.load(path) reads one.",
    ),
    (
        "train-behavior-shape",
        lambda: train(OK, beta=1.0, behavior=[[0]]),
        "behavior: expected shape (2, 2), got shape (1, 1).",
    ),
    (
        "train-behavior-logits",
        lambda: train(OK, beta=1.0, behavior=[[0, 0], [0, 0]]),
        "behavior: expected rows whose exponentials sum to 1, got a sum of 2 in state 1. policies"
        ".softmax_policy(mdp, logits) makes such rows.",
    ),
    (
        "train-start-shape",
        lambda: train(OK, beta=1.0, start=[[0]]),
        "start: expected shape (2, 2), as next_state, got shape (1, 1).",
    ),
    (
        "train-start-nan",
        lambda: train(OK, beta=1.0, start=[[0, 0], [nan, 0]]),
        "start: expected finite logits of allowed tokens, got NaN or an infinity. Forbid tokens in mdp.ref_logits.",
    ),
    (
        "train-max-steps",
        lambda: train(OK, beta=1.0, max_steps=1.5),
        "max_steps: expected a whole number >= 0, got 1.5.",
    ),
    ("sampled-rate-zero", lambda: descend(learning_rate=0), "learning_rate: expected a finite number > 0, got 0."),
    (
        "sampled-rate-string",
        lambda: descend(learning_rate="a"),
        "learning_rate: expected a finite number > 0, got 'a'.",
    ),
    ("sampled-no-steps", lambda: descend(steps=0), "steps: expected a whole number >= 1, got 0."),
    ("sampled-record", lambda: descend(record_every=0), "record_every: expected a whole number >= 1, got 0."),
    ("sampled-too-few", lambda: descend([ROWS]), "batches: expected one for each of 2 steps, got 1."),
    (
        "population-horizon",
        lambda: Population(LONG, REF, 1.0),
        "mdp: expected an automaton without a horizon, got horizon 3. Use mdp.unroll().",
    ),
    (
        "population-never-ends",
        lambda: Population(PROMPTED_LOOP, STAY, 1.0),
        "behavior: expected a policy whose episodes end, got one that never ends from state 0.",
    ),
    (
        "model-no-prompt",
        lambda: TabularLM(LOOP),
        "mdp: expected an environment state at the start, got policy state 0. Add one: mdp.with_prompt(token).",
    ),
    (
        "model-horizon",
        lambda: TabularLM(LONG),
        "mdp: expected an automaton without a horizon, got horizon 3. Use mdp.unroll().",
    ),
    ("model-shape", lambda: TabularLM(OK, torch.zeros(3, 2)), "logits: expected shape (2, 2), got shape (3, 2)."),
    (
        "model-dtype",
        lambda: TabularLM(OK, torch.zeros(2, 2, dtype=torch.int64)),
        "logits: expected a floating-point table, got dtype torch.int64.",
    ),
]


@pytest.mark.parametrize(("call", "message"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
def test_a_malformed_call_says_what_is_wrong(call: Callable[[], Any], message: str) -> None:
    """The whole message, to the letter; warnings on the way to it are errors too (pyproject.toml)."""
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


def test_the_table_is_long_and_without_duplicates() -> None:
    ids = [row[0] for row in CALLS]
    assert len(ids) >= 60
    assert len(set(ids)) == len(ids)


def test_every_message_names_its_argument_and_both_sides() -> None:
    """One form: "argument: expected ..., got ...."."""
    for _, _, message in CALLS:
        argument, rest = message.split(": expected ", 1)
        assert argument.replace(".", "_").isidentifier()
        assert ", got " in rest


# ----------------------------------------------------------------------------------------------------- files
ARRAYS = {key: getattr(OK, key) for key in ("next_state", "reward", "ref_logits", "is_policy")}
META = {"format": "shiq_lab.TokenMDP/1", "start": 0, "horizon": None, "tokens": None, "name": ""}


def saved(path: Path) -> bytes:
    OK.save(path)
    return path.read_bytes()


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def meta(**fields: Any) -> Any:
    return np.frombuffer(json.dumps(META | fields).encode(), dtype=np.uint8)


class Bomb:
    """Its unpickling would raise RuntimeError("unpickled")."""

    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> None:
    raise RuntimeError("unpickled")


NO_ZIP = "no complete zip archive"
FORMAT = "its format is not 'shiq_lab.TokenMDP/1'"
FILES: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("empty", lambda good: b"", NO_ZIP),
    ("random-bytes", lambda good: bytes(np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8)), NO_ZIP),
    ("truncated-early", lambda good: good[:100], NO_ZIP),
    ("truncated-late", lambda good: good[:-20], NO_ZIP),
    ("text", lambda good: b"next_state,reward", NO_ZIP),
    ("npy", lambda good: npy(np.zeros(3)), NO_ZIP),
    ("pickle", lambda good: pickle.dumps(Bomb()), NO_ZIP),
    ("npy-of-objects", lambda good: npy(np.array([Bomb()], dtype=object)), NO_ZIP),
    ("other-npz", lambda good: npz(weights=np.zeros(3)), "it holds no 'meta'"),
    ("other-zip", lambda good: archive(readme=b"hello"), "it holds no 'meta'"),
    ("array-missing", lambda good: npz(meta=meta(), next_state=ARRAYS["next_state"]), "it holds no 'reward'"),
    ("other-format", lambda good: npz(meta=meta(format="shiq_lab.TokenMDP/2"), **ARRAYS), FORMAT),
    ("meta-a-list", lambda good: npz(meta=np.frombuffer(b"[1]", dtype=np.uint8), **ARRAYS), FORMAT),
    (
        "object-array",
        lambda good: npz(meta=meta(), **(ARRAYS | {"reward": np.array([[Bomb()] * 2] * 2, dtype=object)})),
        "Object arrays cannot be loaded when allow_pickle=False",
    ),
    ("bad-start", lambda good: npz(meta=meta(start=9), **ARRAYS), "start: expected a whole number from 0 to 1, got 9."),
    ("bad-tokens", lambda good: npz(meta=meta(tokens=5), **ARRAYS), "tokens: expected a sequence of 2 strings, got 5."),
    (
        "bad-shape",
        lambda good: npz(meta=meta(), **(ARRAYS | {"reward": np.zeros(3)})),
        "reward: expected shape (2, 2), as next_state, got shape (3,).",
    ),
]


@pytest.mark.parametrize(("damage", "reason"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_a_damaged_or_foreign_file_is_named(damage: Callable[[bytes], bytes], reason: str, tmp_path: Path) -> None:
    """No file is ever unpickled: the bombs above would raise RuntimeError."""
    path = tmp_path / "world.npz"
    path.write_bytes(damage(saved(tmp_path / "good.npz")))
    with pytest.raises(ValueError) as caught:
        TokenMDP.load(path)
    assert str(caught.value) == (
        f"path: expected a file written by TokenMDP.save, got the damaged or foreign {str(path)!r} ({reason})."
    )


def test_the_bombs_are_live() -> None:
    with pytest.raises(RuntimeError, match="unpickled"):
        pickle.loads(pickle.dumps(Bomb()))


def test_a_missing_file_is_the_operating_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        TokenMDP.load(tmp_path / "none.npz")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_damage_is_a_value_error_or_does_no_harm(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any byte changed or any end cut off: the file loads as what it was, or its path is named."""
    folder = tmp_path_factory.getbasetemp()
    good = bytearray(saved(folder / "good.npz"))
    place = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        good[place] ^= data.draw(st.integers(1, 255))
    else:
        del good[place:]
    path = folder / "damaged.npz"
    path.write_bytes(good)
    try:
        loaded = TokenMDP.load(path)
    except ValueError as error:
        assert str(error).startswith("path: expected a file written by TokenMDP.save, got the damaged or foreign ")
    else:
        assert all((getattr(loaded, key) == array).all() for key, array in ARRAYS.items())
        assert (loaded.start, loaded.horizon, loaded.tokens) == (OK.start, OK.horizon, OK.tokens)
