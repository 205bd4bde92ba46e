"""The environments: what every one must be, and what each one means.

The first half runs over the table ENVIRONMENTS, so that a new line there is tested by itself; the second half walks
strings through each automaton and holds exact values against closed forms that came by another road.
"""

import inspect
import itertools
import math
import re
from collections import deque
from dataclasses import replace
from decimal import Decimal, getcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shiq_lab import TokenMDP, solve
from shiq_lab.builders import random_reference
from shiq_lab.envs import ENVIRONMENTS, lookup, make
from shiq_lab.envs._common import BOS, EOS, number, sparse_value, stream
from shiq_lab.envs._tool import ERROR, answer_value, call_value, make_tool
from shiq_lab.envs.addition import addition, addition_value
from shiq_lab.envs.bandit import bandit_value
from shiq_lab.envs.brackets import ballot, brackets, brackets_value
from shiq_lab.envs.chain import RUN_COST, chain, chain_values
from shiq_lab.envs.forbidden import forbidden
from shiq_lab.envs.loop import loop, loop_value, loop_values
from shiq_lab.envs.needle import needle, needle_string, needle_value
from shiq_lab.envs.parity import parity, parity_probabilities, parity_value
from shiq_lab.envs.random_tool import random_tool, tool_odds
from shiq_lab.envs.random_walk import GOAL, random_graph, random_walk, random_walk_values
from shiq_lab.envs.shaped import potential, shape, shaped
from shiq_lab.envs.star import star, star_labels, star_value
from shiq_lab.envs.tool_call import tool_call, tool_table
from shiq_lab.envs.tree import tree
from shiq_lab.graph import reaches

every_environment = pytest.mark.parametrize("name", ENVIRONMENTS)
RANDOM_WORLDS = {"RandomTool"}
MOST_STATES = 1200  # a demo trains every method on every environment

# Each backward step rounds a log-sum-exp of at most V = 22 terms: V eps beta < 5e-15 beta, and the values by eps of their
# size; at most 20 steps (the loop: a well-conditioned 4 x 4 system) add up to 1e-13 of the largest value, with room.
RELATIVE = 1e-12
ABSOLUTE = 1e-13  # times the largest |q| or beta: where v* is 1e-3 of that, its own relative error is larger
LN2 = math.log(2)


def assert_values(actual: Any, expected: Any, scale: float) -> None:
    assert np.size(expected) > 0, "nothing compared"
    np.testing.assert_allclose(actual, expected, rtol=RELATIVE, atol=ABSOLUTE * scale)


def say(mdp: TokenMDP, *words: str) -> tuple[list[float], int]:
    """Walk tokens from the root; the rewards of the policy's tokens, and the state reached (-1 = the end)."""
    state, paid = mdp.start, []
    for word in (BOS, *words):
        assert state >= 0, f"the episode was over before {word!r}"
        token = mdp.token(word)
        assert mdp.allowed[state, token], f"{word!r} is forbidden in state {state}"
        if mdp.is_policy[state]:
            paid.append(float(mdp.reward[state, token]))
        state = int(mdp.next_state[state, token])
    return paid, state


def state_after(mdp: TokenMDP, *words: str) -> int:
    return say(mdp, *words)[1]


def may(mdp: TokenMDP, *words: str) -> set[str]:
    """The tokens allowed after these words."""
    return {mdp.show(int(a)) for a in np.flatnonzero(mdp.allowed[state_after(mdp, *words)])}


def uniform(mdp: TokenMDP, seed: int = 1) -> TokenMDP:
    """The same automaton under the uniform reference, its level still another one in every state."""
    return random_reference(mdp, seed, scale=0.0)


def ref(mdp: TokenMDP) -> Any:
    """The reference's probabilities, float[S, V]."""
    return np.exp(mdp.ref_log_policy)


def fields(mdp: TokenMDP) -> list[Any]:
    return [mdp.next_state, mdp.reward, mdp.ref_logits, mdp.is_policy]


def same(a: TokenMDP, b: TokenMDP) -> bool:
    meta = (a.start, a.horizon, a.tokens, a.name) == (b.start, b.horizon, b.tokens, b.name)
    return meta and all(np.array_equal(x, y) for x, y in zip(fields(a), fields(b), strict=True))


# --------------------------------------------------------------------------------------- what every environment must be
@every_environment
def test_it_builds_and_has_a_card(name: str) -> None:
    mdp = make(name)
    assert isinstance(mdp, TokenMDP) and mdp.name == name
    card = inspect.getdoc(ENVIRONMENTS[name].builder) or ""
    heads = ["Tests ", "Actions ", "Start ", "Rewards ", "End ", "Closed form "]
    found = [line for line in card.splitlines() if line.startswith(tuple(heads))]
    assert card.startswith(f"{name}: ") and [line[:3] for line in found] == [head[:3] for head in heads]


@every_environment
def test_the_root_says_bos(name: str) -> None:
    mdp = make(name)
    assert not mdp.is_policy[mdp.start]
    assert [mdp.show(int(a)) for a in np.flatnonzero(mdp.allowed[mdp.start])] == [BOS]
    elsewhere = np.delete(mdp.allowed[:, mdp.token(BOS)], mdp.start)
    assert not elsewhere.any(), "the beginning of sequence is said once"


@every_environment
def test_token_names_are_all_there_and_differ(name: str) -> None:
    mdp = make(name)
    assert mdp.tokens is not None and len(set(mdp.tokens)) == mdp.n_tokens


@every_environment
def test_every_state_is_reachable_and_can_end(name: str) -> None:
    mdp = make(name)
    assert mdp.reachable.all()
    assert mdp.n_states <= MOST_STATES
    last = (mdp.allowed & (mdp.next_state == -1)).any(1)
    assert reaches(mdp.next_state, mdp.allowed, last).all()


@every_environment
def test_only_the_random_worlds_are_random(name: str) -> None:
    assert make(name).deterministic == (name not in RANDOM_WORLDS)


@every_environment
@pytest.mark.parametrize("seed", [0, 1])
def test_the_reference_has_another_level_in_every_state(name: str, seed: int) -> None:
    """Levels are uniform in [-3, 3], of standard deviation 1.7; 0.5 is out of reach for equal or small ones."""
    mdp = make(name, seed=seed)
    level = mdp.ref_logsumexp[mdp.reachable & mdp.is_policy]
    assert len(np.unique(level)) == len(level)
    assert np.abs(level).max() > 0.1
    if len(level) >= 3:
        assert level.std() > 0.5


@every_environment
def test_the_seed_is_obeyed(name: str) -> None:
    assert same(make(name, seed=3), make(name, seed=3))
    one, two = make(name, seed=3), make(name, seed=4)
    assert one.ref_logits.shape != two.ref_logits.shape or not np.array_equal(one.ref_logits, two.ref_logits)


@every_environment
def test_rewards_are_not_drawn_from_the_numbers_of_the_reference(name: str) -> None:
    """A loss that takes one for the other must not pass because both came from one generator."""
    mdp = make(name)
    edges = np.where(mdp.allowed & mdp.is_policy[:, None], 1.0, np.nan)
    rows = np.flatnonzero(mdp.is_policy & (mdp.allowed.sum(1) > 1) & (np.ptp(mdp.reward, axis=1) > 0))
    assert len(rows) > 0
    for s in rows:
        keep = ~np.isnan(edges[s])
        r, logit = mdp.reward[s, keep], mdp.ref_logits[s, keep]
        assert not np.allclose(r - r.mean(), logit - logit.mean())


@every_environment
def test_solving_it_is_well_conditioned(name: str) -> None:
    """q*/beta of order 1 to 20 at the table's beta: neither the reference itself nor a rounding problem."""
    entry = ENVIRONMENTS[name]
    mdp = entry.builder()
    solution = solve(mdp, beta=entry.beta, gamma=entry.gamma)
    edges = mdp.allowed & mdp.is_policy[:, None]
    assert 1 <= np.abs(solution.q()[edges]).max() / entry.beta <= 20
    pi, log_ref = np.exp(solution.log_policy()[edges]), mdp.ref_log_policy[edges]
    assert np.abs(pi - np.exp(log_ref)).max() > 0.1


@every_environment
def test_it_survives_the_disk(name: str, tmp_path: Path) -> None:
    mdp = make(name)
    mdp.save(tmp_path / "mdp.npz")
    assert same(mdp, TokenMDP.load(tmp_path / "mdp.npz"))


# ----------------------------------------------------------------------------------------------------- bad parameters
PARAMETERS = [
    pytest.param(name, parameter, id=f"{name}-{parameter.name}")
    for name, entry in ENVIRONMENTS.items()
    for parameter in inspect.signature(entry.builder).parameters.values()
]
JUNK = st.one_of(
    st.none(),
    st.text(max_size=3),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([10**9, -(10**9), 2**70, 10**400, np.int64(3), np.float64("nan"), np.bool_(True)]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1.5, -0.0, 1e308, 5e-324]),
    st.sampled_from([[], [1], (2,), {}, b"3", 1j, np.arange(2)]),
)


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
@given(value=JUNK)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
def test_a_bad_parameter_is_named(name: str, parameter: inspect.Parameter, value: Any) -> None:
    try:
        mdp = make(name, **{parameter.name: value})
    except ValueError as error:
        assert str(error).startswith(f"{parameter.name}: expected"), f"{parameter.name}={value!r}: {error}"
        return
    assert isinstance(mdp, TokenMDP) and mdp.reachable.all()
    kinds = (int, np.integer) if isinstance(parameter.default, int) else (int, float, np.integer, np.floating)
    assert isinstance(value, kinds) and not isinstance(value, bool), f"{parameter.name}={value!r} was let through"
    assert math.isfinite(value)


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_every_parameter_has_a_limit_that_works(name: str, parameter: inspect.Parameter) -> None:
    """The error states the largest value, and that value builds."""
    with pytest.raises(ValueError) as caught:
        make(name, **{parameter.name: 10**30})
    limit = re.search(r"<= ([\d.e+]+), got", str(caught.value))
    assert limit, str(caught.value)
    most = type(parameter.default)(limit[1])
    assert isinstance(make(name, **{parameter.name: most}), TokenMDP)
    assert isinstance(parameter.default, int) or most >= parameter.default
    if isinstance(parameter.default, int):
        with pytest.raises(ValueError, match=f"^{parameter.name}: "):
            make(name, **{parameter.name: most + 1})


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("Tree", {"depth": 8, "n_tokens": 8}, "depth: expected a tree of at most 30000 states"),
        ("Brackets", {"max_length": 7}, "max_length: expected an even number"),
        ("Chain", {"length": 3, "stops": 4}, "stops: expected a whole number >= 0 and <= 3, got 4"),
        ("Shaped", {"gamma": 0.0}, "gamma: expected a number > 0 and <= 1, got 0.0"),
        ("Loop", {"cost": 0}, "cost: expected a number > 0 and <= 1e+06, got 0"),
        ("Needle", {"reward": math.nan}, "reward: expected a number >= -1e+06 and <= 1e+06, got nan"),
        ("Bandit", {"n_arms": True}, "n_arms: expected a whole number >= 1 and <= 10000, got True"),
    ],
)
def test_messages(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make(name, **parameters)


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match="Did you mean 'RandomWalk'"):
        make("randomwlk")
    with pytest.raises(ValueError, match="Known: Bandit"):
        lookup("qqqq")
    with pytest.raises(ValueError, match=r"^lenght: expected a parameter of Needle: length, n_tokens, reward, seed"):
        make("Needle", lenght=8)


def test_numbers_at_the_borders() -> None:
    assert number("x", np.float32(0.5), 0.0, 1.0) == 0.5 and number("x", 1, above=0.0, most=1.0) == 1.0
    for value in (0.0, -1.0, 1.0000001, np.nan):
        with pytest.raises(ValueError, match=r"^x: expected a number > 0 and <= 1"):
            number("x", value, above=0.0, most=1.0)


def test_streams_differ_from_each_other_and_from_the_reference() -> None:
    draws = [stream(5).normal(), stream(5, 2).normal(), stream(6).normal(), np.random.default_rng(5).normal()]
    assert len(set(draws)) == 4 and stream(5).normal() == draws[0]


# -------------------------------------------------------------------------------------------------------------- Bandit
def test_bandit_is_one_log_sum_exp() -> None:
    mdp, beta = make("Bandit"), 0.5
    arm, n = state_after(mdp), 8
    terms = [math.exp(mdp.ref_logits[arm, a]) for a in range(n)]
    v = beta * math.log(sum(w * math.exp(mdp.reward[arm, a] / beta) for a, w in enumerate(terms)) / sum(terms))
    assert_values(solve(mdp, beta=beta).objective, v, 1.0)
    assert_values(bandit_value(ref(mdp)[arm, :n], mdp.reward[arm, :n], beta), v, 1.0)
    assert np.array_equal(solve(mdp, beta=beta).q()[arm, :n], mdp.reward[arm, :n])


# ---------------------------------------------------------------------------------------------------------------- Tree
@pytest.mark.parametrize(("depth", "n_tokens", "states"), [(5, 4, 341), (4, 4, 85), (3, 2, 7), (3, 1, 3), (1, 8, 1)])
def test_tree_has_one_state_a_prefix(depth: int, n_tokens: int, states: int) -> None:
    mdp = tree(depth, n_tokens)
    assert (mdp.reachable & mdp.is_policy).sum() == states
    into = np.bincount(mdp.next_state[mdp.allowed & (mdp.next_state >= 0)], minlength=mdp.n_states)
    assert (np.delete(into, mdp.start) == 1).all() and into[mdp.start] == 0, "no two strings meet again"
    assert len(np.unique(mdp.reward[mdp.allowed & mdp.is_policy[:, None]])) == states * n_tokens


def test_tree_against_recursion_over_strings() -> None:
    """Plain Python: v(prefix) = beta ln sum_a pi_ref exp((r + gamma v(prefix a))/beta), every prefix walked from the root."""
    mdp, beta, gamma = tree(3, 2), 0.5, 0.9
    solution = solve(mdp, beta=beta, gamma=gamma)

    def value(*prefix: str) -> float:
        here = state_after(mdp, *prefix)
        weights = {a: math.exp(mdp.ref_logits[here, mdp.token(a)]) for a in "ab"}
        total = 0.0
        for a, weight in weights.items():
            paid, after = say(mdp, *prefix, a)
            assert (after == -1) == (len(prefix) == 2)
            later = 0.0 if after == -1 else value(*prefix, a)
            total += weight / sum(weights.values()) * math.exp((paid[-1] + gamma * later) / beta)
        assert_values(solution.v()[here], beta * math.log(total), 5.0)
        return beta * math.log(total)

    assert_values(solution.objective, value(), 5.0)


def test_tree_against_the_list_of_its_strings() -> None:
    """gamma = 1: v* = beta ln sum_y pi_ref(y) exp(R(y)/beta)."""
    mdp, beta = tree(3, 3), 0.7
    total = []
    for word in itertools.product("abc", repeat=3):
        steps = [(state_after(mdp, *word[:i]), mdp.token(a)) for i, a in enumerate(word)]
        total.append(math.exp(sum(mdp.ref_log_policy[e] for e in steps)) * math.exp(sum(say(mdp, *word)[0]) / beta))
    assert_values(solve(mdp, beta=beta).objective, beta * math.log(math.fsum(total)), 5.0)


# -------------------------------------------------------------------------------------------------------------- Needle
def test_needle_pays_for_one_string() -> None:
    mdp, word = needle(), [f"t{a}" for a in needle_string()]
    assert say(mdp, *word) == ([0.0] * 11 + [1.0], -1)
    for i in range(12):
        wrong = [*word[:i], f"t{(int(word[i][1:]) + 1) % 4}", *word[i + 1 :]]
        assert say(mdp, *wrong) == ([0.0] * 12, -1)
    assert (mdp.reachable & mdp.is_policy).sum() == 12 + 11


def test_needle_state_by_state() -> None:
    entry = ENVIRONMENTS["Needle"]
    mdp, string = entry.builder(), needle_string()
    v = solve(mdp, beta=entry.beta).v()
    p, on = 1.0, [state_after(mdp, *(f"t{a}" for a in string[:i])) for i in range(12)]
    for s, a in reversed(list(zip(on, string, strict=True))):
        p *= ref(mdp)[s, a]
        assert_values(v[s], needle_value(p, 1.0, entry.beta), 1.0)
    off = np.setdiff1d(np.flatnonzero(mdp.is_policy), on)
    assert len(off) == 11 and np.abs(v[off]).max() <= ABSOLUTE


def test_needle_in_fractions() -> None:
    """Uniform over 4 tokens, exp(R/beta) = 2^20: v* = ln(1 + (2^20 - 1)/4^12) / ln 2 with beta = 1/ln 2."""
    exact = 1 + Fraction(2**20 - 1, 4**12)
    beta = 1 / LN2
    expected = beta * (math.log(exact.numerator) - math.log(exact.denominator))
    assert_values(solve(uniform(needle(reward=20.0)), beta=beta).objective, expected, 20.0)
    assert_values(needle_value(4.0**-12, 20.0, beta), expected, 20.0)


def test_sparse_value_has_its_limits() -> None:
    assert sparse_value(1.0, 0.75, 0.1) == pytest.approx(0.75, rel=1e-15)
    assert sparse_value(0.25, 1.0, 1e9) == pytest.approx(0.25, rel=1e-8)  # error p (1 - p) R^2 / 2 beta = 1e-10
    assert sparse_value(0.0, 1.0, 0.1) == 0.0


# --------------------------------------------------------------------------------------------------------------- Chain
def test_chain_pays_at_its_end_or_at_once() -> None:
    mdp = chain(length=5, cost=0.5, goal=7.0, leave=2.0)
    assert say(mdp, *["walk"] * 5) == ([-0.5] * 4 + [6.5], -1)
    assert say(mdp, *["walk"] * 4, "run") == ([-0.5] * 4 + [5.5], -1)
    assert say(mdp, "stop") == ([2.0], -1)
    assert [("stop" in may(mdp, *["run"] * i)) for i in range(5)] == [True, False, False, False, False]
    assert all("stop" in may(chain(length=5, stops=5), *["walk"] * i) for i in range(5))


@pytest.mark.parametrize("stops", [0, 1, 4, 12])
@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
def test_chain_values_for_any_discount(stops: int, gamma: float) -> None:
    mdp, beta = chain(stops=stops), 0.4
    states = [state_after(mdp, *["walk"] * i) for i in range(12)]
    closed = chain_values(ref(mdp)[states, :3], 0.2, 5.0, 0.3, beta, gamma)
    assert_values(solve(mdp, beta=beta, gamma=gamma).v()[states], closed, 4.0)


def test_chain_in_fifty_digits() -> None:
    """Uniform reference: v_1 = c (1 - g^11)/(1 - g) + g^10 goal, c = beta ln((x + x^3)/2) with x = exp(-cost/beta), and
    v_0 = beta ln((exp(leave/beta) + (x + x^3) exp(g v_1/beta)) / 3)."""
    getcontext().prec = 50
    beta, g, cost, goal, leave = map(Decimal, ("0.4", "0.95", "0.2", "5", "0.3"))
    assert RUN_COST == 3
    pair = (-cost / beta).exp() + (-3 * cost / beta).exp()
    v1 = beta * (pair / 2).ln() * (1 - g**11) / (1 - g) + g**10 * goal
    v0 = beta * (((leave / beta).exp() + pair * (g * v1 / beta).exp()) / 3).ln()
    mdp = uniform(chain())
    v = solve(mdp, beta=0.4, gamma=0.95).v()
    assert_values(v[[state_after(mdp), state_after(mdp, "run")]], [float(v0), float(v1)], 4.0)


# ------------------------------------------------------------------------------------------------------------ Brackets
def balanced(word: str) -> bool:
    while "()" in word:
        word = word.replace("()", "")
    return not word


def test_brackets_pay_for_balanced_words_only() -> None:
    mdp, paying = brackets(max_length=6, reward=2.0), 0
    for n in range(7):
        for word in itertools.product("()", repeat=n):
            paid, end = say(mdp, *word, EOS)
            right = balanced("".join(word))
            paying += right
            assert (paid, end) == ([0.0] * n + [float(n) if right else 0.0], -1), word
    assert paying == sum(ballot(n) for n in range(0, 7, 2))
    assert may(mdp, *"((()))") == {EOS} and may(mdp, *"((()") == {"(", ")", EOS}


def test_ballot_numbers() -> None:
    assert [ballot(2 * n) for n in range(7)] == [1, 1, 2, 5, 14, 42, 132]  # Catalan
    for m, depth in itertools.product(range(9), range(9)):
        words = ("(" * depth + "".join(w) for w in itertools.product("()", repeat=m))
        assert ballot(m, depth) == sum(balanced(w) for w in words)


def test_brackets_through_catalan_numbers() -> None:
    """beta = 1/ln 2 and one reward a pair: a word of n pairs weighs 2^n, so z = exp(v*/beta) is a fraction."""
    mdp, beta, full = uniform(brackets(max_length=10)), 1 / LN2, 10
    v = solve(mdp, beta=beta).v()
    z = 1 + sum(ballot(2 * n) * Fraction(2**n - 1, 3 ** (2 * n + (2 * n < full))) for n in range(6))
    assert_values(v[mdp.start], beta * (math.log(z.numerator) - math.log(z.denominator)), 5.0)
    for said in range(full + 1):
        for depth in range(said % 2, said + 1, 2):
            word = "(" * depth + "()" * ((said - depth) // 2)
            assert_values(v[state_after(mdp, *word)], brackets_value(full, 1.0, beta, said, depth), 5.0)


# -------------------------------------------------------------------------------------------------------------- Parity
def test_parity_pays_for_an_even_number_of_ones() -> None:
    mdp = parity(prompt_length=2, length=3, reward=4.0)
    for bits in itertools.product("01", repeat=5):
        even = bits.count("1") % 2 == 0
        assert say(mdp, *bits) == ([0.0, 0.0, 4.0 if even else 0.0], -1), bits
    assert (parity().is_policy).sum() == 16


def test_parity_state_by_state() -> None:
    mdp, beta = parity(), 0.25
    v, half = solve(mdp, beta=beta).v(), ["0"] * 4
    states = np.array([[state_after(mdp, *half[:3], b, *"00000000"[:i]) for b in "01"] for i in range(8)])
    closed = [parity_value(p, 1.0, beta) for p in parity_probabilities(ref(mdp)[states, 1]).ravel()]
    assert_values(v[states].ravel(), closed, 1.0)
    assert_values(v[mdp.start], v[states[0]].mean(), 1.0)  # both prompts are equally likely


def test_parity_in_fractions() -> None:
    """Uniform reference, exp(R/beta) = 2^5: v* = beta ln((1 + 2^5)/2) in every policy state, so at the root."""
    mdp, beta = uniform(parity(reward=5.0)), 1 / LN2
    v = solve(mdp, beta=beta).v()
    assert_values(v[mdp.reachable], math.log(33 / 2) / LN2, 5.0)


# ------------------------------------------------------------------------------------------------------------ Addition
@pytest.mark.parametrize(
    ("prompt", "answer", "paid"),
    [
        ("12+34=", "46", [0.1, 0.1, 1.0]),
        ("99+99=", "198", [0.1, 0.1, 0.1, 1.0]),
        ("10+10=", "20", [0.1, 0.1, 1.0]),
        ("12+34=", "47", [0.1, 0.0, 0.0]),
        ("12+34=", "36", [0.0, 0.0, 0.0]),
        ("12+34=", "4", [0.1, 0.0]),
        ("12+34=", "", [0.0]),
        ("12+34=", "460", [0.1, 0.1, 0.0, 0.0]),
        ("99+99=", "19", [0.1, 0.1, 0.0]),
        ("99+99=", "199", [0.1, 0.1, 0.0, 0.0]),
    ],
)
def test_addition_checks_sums(prompt: str, answer: str, paid: list[float]) -> None:
    assert say(addition(), *prompt, *answer, EOS) == (paid, -1)


def test_addition_asks_every_sum_and_takes_no_fourth_digit() -> None:
    mdp = addition()
    for a, b in itertools.product(range(10, 100, 7), range(10, 100, 11)):
        assert sum(say(mdp, *f"{a}+{b}=", *str(a + b), EOS)[0]) == pytest.approx(1 + 0.1 * len(str(a + b)))
    assert may(mdp) == set("123456789") and may(mdp, "1") == set("0123456789")
    assert may(mdp, *"12+34=999") == {EOS} and len(may(mdp, *"12+34=99")) == 11
    small = addition(digits=1)
    assert may(small) == set("0123456789") and sum(say(small, *"0+0=0", EOS)[0]) == pytest.approx(1.1)


@pytest.mark.parametrize("digits", [1, 2])
def test_an_answer_may_end_with_its_last_digit(digits: int) -> None:
    """The forced end token folded into the digit before it: the same v*, and no state without a choice."""
    plain, folded = addition(digits=digits), addition(digits=digits, last_ends=1)
    assert solve(folded, beta=0.2).objective == pytest.approx(solve(plain, beta=0.2).objective, abs=1e-14)
    assert (folded.allowed.sum(1)[folded.is_policy] == 11).all() and (plain.allowed.sum(1)[plain.is_policy] == 1).any()
    assert say(addition(last_ends=1), *"99+99=", *"198") == ([0.1, 0.1, 1.1], -1)
    assert say(addition(last_ends=1), *"99+99=", *"199") == ([0.1, 0.1, 0.0], -1)


def test_addition_prompts_are_uniform() -> None:
    """The chance of reaching sum s is the number of pairs that make it, of 90^2."""
    mdp, mass = addition(), np.zeros(843)
    mass[mdp.start] = 1.0
    for _ in "^12+34=":
        flow = np.zeros(843)
        np.add.at(flow, mdp.next_state[mdp.allowed], (mass[:, None] * ref(mdp))[mdp.allowed])
        mass = flow
    for total in range(20, 199):
        a = max(10, total - 99)
        pairs = sum(1 for x in range(10, 100) if 10 <= total - x <= 99)
        assert mass[state_after(mdp, *f"{a}+{total - a}=")] == pytest.approx(pairs / 8100, rel=1e-12)


def test_addition_in_fractions() -> None:
    """Uniform over 11 tokens, exp(credit/beta) = 2, exp(reward/beta) = 8, as fractions; the root averages the prompts."""
    mdp, beta = uniform(addition(reward=3.0, credit=1.0)), 1 / LN2
    v = solve(mdp, beta=beta).v()
    two = (10 + 2 * (10 + 2 * Fraction(10 + 8, 11)) / 11) / Fraction(11)
    three = (10 + 2 * (10 + 2 * (10 + Fraction(2 * 8)) / 11) / 11) / Fraction(11)
    value = {n: beta * math.log(z) for n, z in ((2, two), (3, three))}
    for n, prompt in ((2, "12+34="), (3, "99+34=")):
        assert_values(v[state_after(mdp, *prompt)], value[n], 6.0)
        assert_values(addition_value(n, 3, 3.0, 1.0, beta), value[n], 6.0)
    long = sum(a + b >= 100 for a in range(10, 100) for b in range(10, 100)) / 8100
    assert_values(v[mdp.start], (1 - long) * value[2] + long * value[3], 6.0)


# ---------------------------------------------------------------------------------------------------------------- Loop
def test_loop_goes_round() -> None:
    mdp = loop(n_states=4, cost=0.5)
    assert state_after(mdp, *["right"] * 4) == state_after(mdp) == state_after(mdp, "left", "right")
    assert say(mdp, "left", "right", "right")[0] == [-0.5, -1.0, -1.0]
    assert state_after(mdp, *["left"] * 1000, "stop") == -1
    assert len({state_after(mdp, *["right"] * i) for i in range(4)}) == 4


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_loop_is_finite_with_a_margin(seed: int, beta: float) -> None:
    """math.md: v* is finite only if the spectral radius of diag(pi_ref exp(r/beta)) x successor is below 1."""
    mdp, n = loop(seed=seed), 4
    weight = ref(mdp) * np.exp(mdp.reward / beta)
    M = np.zeros((n, n))
    for s, a in itertools.product(range(n), (0, 1)):
        M[s, mdp.next_state[s, a]] += weight[s, a]
    assert np.abs(np.linalg.eigvals(M)).max() < min(0.99, math.exp(-0.2 / beta))


@pytest.mark.parametrize("n_states", [1, 2, 3, 4])
def test_loop_through_a_linear_system(n_states: int) -> None:
    mdp, beta = loop(n_states), 0.25
    ring = [state_after(mdp, *["right"] * i) for i in range(n_states)]
    closed = loop_values(ref(mdp)[ring, :3], mdp.reward[ring, :3], beta)
    assert_values(solve(mdp, beta=beta).v()[ring], closed, 5.0)


def test_loop_of_one_state() -> None:
    """v = beta ln(p_stop e^{r_stop/beta} / (1 - p_go e^{r_go/beta})); left and right go with x = e^{-cost/beta} and x^2."""
    beta = 1 / LN2
    mdp = uniform(loop(1, cost=1.0))
    stop = float(mdp.reward[0, 2])
    exact = Fraction(1, 3) / (1 - Fraction(1, 3) * (Fraction(1, 2) + Fraction(1, 4)))  # z without e^{stop/beta}
    assert_values(solve(mdp, beta=beta).objective, stop + beta * math.log(exact), 2.0)
    assert_values(loop_value(1 / 3, stop, 2 / 3, beta * math.log(3 / 8), beta), stop + beta * math.log(exact), 2.0)


def test_loop_in_fractions() -> None:
    """Three states, uniform reference, steps worth 1/2 and 1/4, stops worth 1, 2 and 8: z solved by Cramer's rule."""
    beta = 1 / LN2
    mdp = uniform(loop(3, cost=1.0))
    ring = [state_after(mdp, *["right"] * i) for i in range(3)]
    reward = mdp.reward.copy()
    reward[ring, 2] = [0.0, 1.0, 3.0]
    left, right, stop = Fraction(1, 6), Fraction(1, 12), [Fraction(k, 3) for k in (1, 2, 8)]
    A = [
        [Fraction(i == j) - (left if j == (i - 1) % 3 else right if j == (i + 1) % 3 else 0) for j in range(3)]
        for i in range(3)
    ]

    def det(m: list[list[Fraction]]) -> Fraction:
        return sum(
            (m[0][i] * (m[1][(i + 1) % 3] * m[2][(i + 2) % 3] - m[1][(i + 2) % 3] * m[2][(i + 1) % 3]) for i in range(3)),
            Fraction(),
        )

    z = [det([[stop[i] if j == k else A[i][j] for j in range(3)] for i in range(3)]) / det(A) for k in range(3)]
    v = solve(replace(mdp, reward=reward), beta=beta).v()
    assert_values(v[ring], [beta * math.log(x) for x in z], 4.0)


# --------------------------------------------------------------------------------------------- ToolCall and RandomTool
def test_tool_call_pays_for_quoting_the_reply() -> None:
    mdp, table, tool = tool_call(), tool_table(), make_tool(3, 3, 4, 0)
    assert len(np.unique(table)) == 5, "four values and the error, by what was said"
    for f, x in itertools.product(range(3), range(3)):
        call, y, cost = (f"f{f}", f"x{x}"), int(table[f, x]), -float(tool.price[f, x])
        if y == ERROR:
            assert may(mdp, *call) == {"error"}
            assert say(mdp, *call, "error", "y0", EOS) == ([0.0, cost, 0.0, 0.0], -1)
            continue
        assert may(mdp, *call) == {"=>"} and may(mdp, *call, "=>") == {f"y{y}"}
        reply, other = (*call, "=>", f"y{y}"), f"y{(y + 1) % 4}"
        assert say(mdp, *reply, f"y{y}", EOS) == ([0.0, cost, 0.0, float(tool.worth[y])], -1)
        for answer in ((other, EOS), (f"y{y}", other), (f"y{y}", f"y{y}"), (EOS,)):
            assert say(mdp, *reply, *answer) == ([0.0, cost, *[0.0] * len(answer)], -1)


def test_random_tool_replies_with_its_odds() -> None:
    mdp, odds = random_tool(), tool_odds()
    assert_values(odds.sum(-1), 1.0, 1.0)
    for f, x in itertools.product(range(3), range(3)):
        here, arrow = state_after(mdp, f"f{f}", f"x{x}"), state_after(mdp, f"f{f}", f"x{x}", "=>")
        assert not mdp.is_policy[here] and not mdp.is_policy[arrow]
        assert_values(ref(mdp)[here, mdp.token("error")], odds[f, x, 4], 1.0)
        for y in range(4):
            chance = ref(mdp)[here, mdp.token("=>")] * ref(mdp)[arrow, mdp.token(f"y{y}")]
            assert_values(chance, odds[f, x, y], 1.0)


@pytest.mark.parametrize("gamma", [0.7, 1.0])
@pytest.mark.parametrize("name", ["ToolCall", "RandomTool"])
def test_tools_through_nested_log_sum_exps(name: str, gamma: float) -> None:
    mdp, beta, tool = make(name), 0.2, make_tool(3, 3, 4, 0)
    odds = tool_odds() if name == "RandomTool" else (tool_table()[..., None] == [0, 1, 2, 3, ERROR]).astype(float)
    p, after, argument = ref(mdp), np.zeros((3, 3)), np.zeros((3, 3))
    for f, x, y in itertools.product(range(3), range(3), range(4)):
        argument[f, x] = p[state_after(mdp, f"f{f}"), mdp.token(f"x{x}")]
        if odds[f, x, y] > 0:
            reply = (f"f{f}", f"x{x}", "=>", f"y{y}")
            quote = p[state_after(mdp, *reply), mdp.token(f"y{y}")]
            end = p[state_after(mdp, *reply, f"y{y}"), mdp.token(EOS)]
            after[f, x] += odds[f, x, y] * answer_value(quote, end, tool.worth[y], beta, gamma)
    root = p[state_after(mdp), :3]
    assert_values(solve(mdp, beta=beta, gamma=gamma).objective, call_value(root, argument, tool.price, after, beta, gamma), 2.0)


# ---------------------------------------------------------------------------------------------------------------- Star
def test_star_pays_for_the_arm_that_was_asked() -> None:
    mdp, label = star(), star_labels()
    assert sorted(label.ravel()) == list(range(20)) and list(label.ravel()) != list(range(20))
    for goal, arm in itertools.product(range(4), range(4)):
        walk = [f"n{n}" for n in label[arm]]
        assert say(mdp, f"n{label[goal, -1]}", *walk) == ([0.0] * 4 + [1.0 if arm == goal else 0.0], -1)
    right = [f"n{n}" for n in label[2]]
    assert sum(say(mdp, f"n{label[2, -1]}", f"n{label[1, 0]}", *right[1:])[0]) == 0.0, "lost is lost"
    assert may(mdp) == {f"n{n}" for n in label[:, -1]}


def test_star_is_a_needle_for_every_prompt() -> None:
    mdp, label, beta = star(), star_labels(), 0.125
    v, p = solve(mdp, beta=beta).v(), []
    for arm in label:
        words = [f"n{arm[-1]}", *(f"n{n}" for n in arm)]
        states = [state_after(mdp, *words[:i]) for i in range(1, 6)]
        p.append(np.prod(ref(mdp)[states, arm]))
        assert_values(v[states[0]], needle_value(p[-1], 1.0, beta), 1.0)
    assert_values(v[mdp.start], star_value(np.array(p), 1.0, beta), 1.0)
    exact = math.log(1 + Fraction(2**12 - 1, 4**5)) / LN2
    assert_values(solve(uniform(star(reward=12.0)), beta=1 / LN2).objective, exact, 12.0)


# ---------------------------------------------------------------------------------------------------------- RandomWalk
def distances(graph: list[tuple[int, ...]]) -> dict[int, int]:
    """Breadth-first search backwards from the goal."""
    distance, queue = {GOAL: 0}, deque([GOAL])
    while queue:
        here = queue.popleft()
        for node, after in enumerate(graph):
            if here in after and node not in distance:
                distance[node] = distance[here] + 1
                queue.append(node)
    return distance


def shortest(graph: list[tuple[int, ...]], node: int) -> list[int]:
    distance, path = distances(graph), []
    while node != GOAL:
        node = min(graph[node], key=distance.__getitem__)
        path.append(node)
    return path


def test_random_walk_pays_the_length_of_the_way() -> None:
    mdp, graph = random_walk(), random_graph()
    far = distances(graph)
    assert len(graph) == 21 and len(far) == 21 and 3 <= max(far.values()) <= 10 and mdp.horizon == 10
    for node in range(1, 21):
        path = shortest(graph, node)
        assert len(path) == far[node]
        assert say(mdp, f"n{node}", *(f"n{n}" for n in path)) == ([-1.0] * far[node], -1)
        assert may(mdp, f"n{node}") == {f"n{n}" for n in graph[node]} and node not in graph[node]
    assert may(mdp) == {f"n{n}" for n in range(1, 21)}


@pytest.mark.parametrize("seed", range(5))
def test_random_walk_finds_the_shortest_way(seed: int) -> None:
    """-distance + beta ln pi_ref(path) <= v* <= -distance, for one shortest path: beta -> 0 is breadth-first search."""
    mdp, graph, beta = random_walk(seed=seed), random_graph(seed=seed), 1e-3
    v, far = solve(mdp, beta=beta).v(), distances(graph)
    for node in range(1, 21):
        path = shortest(graph, node)
        states = [state_after(mdp, f"n{n}") for n in [node, *path[:-1]]]
        cost = beta * mdp.ref_log_policy[states, path].sum()
        assert -far[node] + cost - RELATIVE <= v[states[0]] <= -far[node] + RELATIVE


def test_random_walk_as_a_matrix_power() -> None:
    mdp, beta = random_walk(), 1.0
    states = [state_after(mdp, f"n{n}") for n in range(1, 21)]
    P = np.zeros((21, 21))
    P[1:] = ref(mdp)[states, :21]
    closed, solution = random_walk_values(P, 10, beta), solve(mdp, beta=beta)
    for t in range(10):
        assert_values(solution.v(t)[states], closed[t, 1:], 10.0)
    assert np.abs(solution.v(0)[states] - solution.v(8)[states]).max() > 1, "the optimum must depend on t"


def test_random_walk_in_fractions() -> None:
    """Uniform reference, a step worth 1/2: z_t(n) = mean of z_{t+1} over successors / 2, z = 1 at the goal and at the end."""
    mdp, graph, beta = uniform(random_walk()), random_graph(), 1 / LN2
    z = [Fraction(1)] * 21
    solution = solve(mdp, beta=beta)
    for t in reversed(range(10)):
        z = [Fraction(1), *(sum(z[m] for m in graph[n]) / Fraction(2 * len(graph[n])) for n in range(1, 21))]
        for n in range(1, 21):
            log_z = math.log(z[n].numerator) - math.log(z[n].denominator)
            assert_values(solution.v(t)[state_after(mdp, f"n{n}")], beta * log_z, 10.0)


# ----------------------------------------------------------------------------------------------------------- Forbidden
def test_forbidden_has_holes_and_padding() -> None:
    mdp = forbidden()
    policy = mdp.allowed[mdp.is_policy]  # (states, V)
    assert mdp.tokens is not None and mdp.tokens[-3:] == ("<pad0>", "<pad1>", "<pad2>")
    assert not mdp.allowed[:, -3:].any(), "padding is forbidden everywhere"
    assert 0.2 < policy[:, :6].mean() < 0.8
    assert policy.any(0)[:6].all() and len(np.unique(policy, axis=0)) > 5, "in other places in every state"
    assert any((forbidden(seed=s).allowed[forbidden(seed=s).is_policy].sum(1) == 1).any() for s in range(3))
    finite = mdp.ref_logits[mdp.allowed]
    assert np.isfinite(finite).all() and np.isneginf(mdp.ref_logits[~mdp.allowed]).all()


def test_forbidden_padding_changes_nothing() -> None:
    mdp = forbidden()
    cut = replace(
        mdp,
        next_state=mdp.next_state[:, :-3],
        reward=mdp.reward[:, :-3],
        ref_logits=mdp.ref_logits[:, :-3],
        tokens=(mdp.tokens or ())[:-3],
    )
    whole, part = solve(mdp, beta=0.5, gamma=0.95), solve(cut, beta=0.5, gamma=0.95)
    assert_values(part.v(), whole.v(), 5.0)
    assert np.isneginf(whole.q()[:, -3:]).all()


@pytest.mark.parametrize("seed", range(3))
def test_forbidden_against_recursion_over_allowed_tokens(seed: int) -> None:
    mdp, beta, gamma = forbidden(seed=seed), 0.5, 0.95

    def value(s: int) -> float:
        """Terms of allowed tokens alone, in plain Python."""
        if s == -1:
            return 0.0
        weights = {a: math.exp(x) for a, x in enumerate(mdp.ref_logits[s].tolist()) if x != -math.inf}
        terms = (w * math.exp((mdp.reward[s, a] + gamma * value(int(mdp.next_state[s, a]))) / beta) for a, w in weights.items())
        return beta * math.log(math.fsum(terms) / math.fsum(weights.values()))

    v = solve(mdp, beta=beta, gamma=gamma).v()
    for s in np.flatnonzero(mdp.is_policy):
        assert_values(v[s], value(int(s)), 5.0)


# -------------------------------------------------------------------------------------------------------------- Shaped
def assert_shaping_is_invisible(plain: TokenMDP, twin: TokenMDP, phi: Any, beta: float, gamma: float) -> None:
    """math.md, F7: pi* unchanged, v* lower by Phi."""
    a, b = solve(plain, beta=beta, gamma=gamma), solve(twin, beta=beta, gamma=gamma)
    assert np.abs(phi[plain.is_policy]).max() > 0.5 and not np.allclose(plain.reward, twin.reward)
    scale = float(np.abs(phi).max() + np.abs(a.v()).max() + 5)
    assert_values(b.v(), a.v() - phi, scale)
    # log pi* = ln pi_ref + (q - v)/beta, so its error is that of q over beta.
    assert_values(b.log_policy()[plain.allowed], a.log_policy()[plain.allowed], 10 * scale / beta)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 7])
def test_shaped_is_a_twin_of_tree(gamma: float, seed: int) -> None:
    plain, twin = tree(4, 4, seed), shaped(4, 4, gamma, seed)
    assert np.array_equal(plain.ref_logits, twin.ref_logits) and np.array_equal(plain.next_state, twin.next_state)
    assert_shaping_is_invisible(plain, twin, potential(plain, seed), 0.5, gamma)


def test_shaped_rewards_along_a_string_telescope() -> None:
    """sum_t gamma^t (gamma Phi(s_{t+1}) - Phi(s_t)) = -Phi(s_0), as Phi(end) = 0."""
    plain, twin, gamma = tree(), shaped(), 0.9
    phi = potential(plain)
    for word in ("aaaaa", "abcda", "dbcac"):
        gain = np.subtract(say(twin, *word)[0], say(plain, *word)[0])
        assert_values(gain @ gamma ** np.arange(5), -phi[state_after(plain)], 5.0)


def test_the_gamma_of_shaped_is_the_one_it_is_solved_at() -> None:
    assert inspect.signature(shaped).parameters["gamma"].default == ENVIRONMENTS["Shaped"].gamma


@pytest.mark.parametrize("name", ["RandomTool", "Addition", "Loop"])
def test_shaping_works_through_environment_states_and_loops(name: str) -> None:
    entry = ENVIRONMENTS[name]
    plain = entry.builder()
    phi = potential(plain, seed=5)
    assert_shaping_is_invisible(plain, shape(plain, phi, entry.gamma), phi, entry.beta, entry.gamma)


def test_shape_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"^mdp: expected an automaton without a horizon"):
        shape(random_walk(), np.zeros(22), 1.0)
    with pytest.raises(ValueError, match=re.escape("phi: expected shape (342,)")):
        shape(tree(), np.zeros(3), 1.0)


def test_forbidden_may_end_sooner() -> None:
    mdp = forbidden()
    ends = (mdp.next_state < 0) & mdp.allowed
    may_go_on = (mdp.next_state >= 0) & mdp.allowed
    assert (ends.any(1) & may_go_on.any(1)).any(), "a state where one token ends the episode and another does not"


def test_the_potential_is_not_made_of_trees_rewards() -> None:
    """Another stream: a Phi drawn from the rewards' own numbers would repeat them."""
    plain = tree()
    assert not np.isin(potential(plain)[plain.is_policy], plain.reward).any()


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_random_walk_has_at_most_so_many_ways_from_a_node(degree: int) -> None:
    graph = random_graph(21, degree, 0)
    assert graph[GOAL] == () and max(map(len, graph)) == degree and min(map(len, graph[1:])) >= 1


def test_chain_is_solved_where_its_discount_counts() -> None:
    """Its card says that it tests discounting."""
    assert ENVIRONMENTS["Chain"].gamma < 1


def test_the_seed_reaches_the_odds_of_the_replies() -> None:
    first, again, other = (tool_odds(seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.isclose(first, other).any()
