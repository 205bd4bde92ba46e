"""Component checks of returns and advantages: GAE, n-step targets, reward-to-go, where a reward is put and read, whitening.

Truths are double sums over a row's list of actions, and conditional expectations over every string of a small dialogue with
the exact values of `bellman.evaluate`: with V = v_pi,

    E[ GAE_t | s_t, a_t ] = q(s_t, a_t) - v(s_t) for any lambda,    E[ n-step_t | s_t ] = v(s_t),    E[ to-go_t | s_t, a_t ] = q
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch, cut
from shiq_lab.bellman import Evaluation, evaluate
from shiq_lab.builders import Act, Say, from_turns, random_reference
from shiq_lab.checks.components.masks import EXACT, Made, only
from shiq_lab.checks.components.rows import Rows, build_cases, no_turns, strata
from shiq_lab.checks.components.subject import EPS, PURE, Case, Component, Kind, as_tensor, check_cases, compare, exact
from shiq_lab.checks.report import Check, Measured
from shiq_lab.checks.runner import SubjectError
from shiq_lab.enumeration import enumerate_trajectories

# A row has at most 10 actions: sums of 10 x 10 discounted terms round less than 256 eps of the largest number in sight.
ROUNDING = 256 * EPS
GARBAGE = 1e3
POISONS = (("garbage of size 1000", GARBAGE, False), ("NaN", math.nan, True), ("inf", math.inf, True))
DISCOUNTS = ((0.9, 0.8), (1.0, 1.0), (0.95, 0.0))
Truth = Callable[[list[float], list[float], float | None], list[float]]

NUMBERS = {
    "mask": "{0, 1}[B, L]; 1 = chosen by the policy (the same as completion_mask)",
    "values": "float[B, L]; at an action: the value of the state in which it was taken; elsewhere anything",
    "next_value": "float[B]; the value of the state after the last action: for cut rows alone, elsewhere anything",
    "rewards": "float[B, L]; at an action: its reward; elsewhere anything",
    "gamma": "discount an action; environment tokens in between cost nothing",
    "lam": "lambda of GAE",
    "n": "how many rewards before the bootstrap",
}
MASKS = ("completion_mask", "attention_mask", "terminated", "truncated")


def numbers(*names: str) -> dict[str, str]:
    """What these arguments are, for `component_signature`."""
    return {name: NUMBERS[name] for name in names}


# --------------------------------------------------------------------------------------------------------- truths
def gae_truth(rewards: list[float], values: list[float], after: float | None, gamma: float, lam: float) -> list[float]:
    """sum_{j>=k} (gamma lambda)^{j-k} [ r_j + gamma V_{j+1} - V_j ], V after the last action = `after` (None: 0)."""
    v = [*values, after or 0.0]
    delta = [r + gamma * v[j + 1] - v[j] for j, r in enumerate(rewards)]
    return [math.fsum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(delta))) for k in range(len(delta))]


def n_step_truth(rewards: list[float], values: list[float], after: float | None, gamma: float, n: int) -> list[float]:
    """sum_{j<n} gamma^j r_{k+j} + gamma^n V_{k+n}; rows that end or are cut sooner stop there."""
    v = [*values, after or 0.0]
    ends = [min(k + n, len(rewards)) for k in range(len(rewards))]
    return [
        math.fsum([*(gamma ** (j - k) * rewards[j] for j in range(k, end)), gamma ** (end - k) * v[end]])
        for k, end in enumerate(ends)
    ]


def to_go_truth(rewards: list[float], values: list[float], after: float | None, gamma: float) -> list[float]:
    """sum_{j>=k} gamma^{j-k} r_j."""
    return [math.fsum(gamma ** (j - k) * rewards[j] for j in range(k, len(rewards))) for k in range(len(rewards))]


def _fill(rows: Rows, truth: Truth, rewards: Tensor, values: Tensor, next_value: Tensor) -> Tensor:
    expected = torch.zeros(rewards.shape, dtype=torch.float64)
    for b, places in enumerate(rows.actions):
        take = lambda x, b=b, places=places: [x[b, i].item() for i in places]  # noqa: E731
        after = None if rows.talks[b].terminated else next_value[b].item()
        for i, x in zip(places, truth(take(rewards), take(values), after), strict=True):
            expected[b, i] = x
    return expected


# ---------------------------------------------------------------------------------------------------------- cases
def _bootstraps(kind: str, component: Component) -> bool:
    """Can the function know what follows a cut row? Where it cannot, only rows that ended are compared, and a note says so."""
    if kind == "reward_to_go" or component.takes("next_value"):
        return True
    note = "it names no next_value, so that cut rows cannot bootstrap: rows that ended alone are compared"
    if note not in component.notes:
        component.notes.append(note)
    return False


def _settings(kind: str) -> Iterator[tuple[dict[str, Any], Truth]]:
    """(settings, truth) of a kind."""
    for gamma, lam in DISCOUNTS:
        if kind == "gae":
            yield {"gamma": gamma, "lam": lam}, partial(gae_truth, gamma=gamma, lam=lam)
    for gamma, n in ((0.9, 1), (0.95, 2), (1.0, 3), (0.9, 100)):
        if kind == "n_step":
            yield {"gamma": gamma, "n": n}, partial(n_step_truth, gamma=gamma, n=n)
    for gamma in (1.0, 0.9):
        if kind == "reward_to_go":
            yield {"gamma": gamma}, partial(to_go_truth, gamma=gamma)


def _returns(kind: str, component: Component, rows: Rows) -> Made:
    rewards, values, next_value = rows.random(1), rows.random(2), rows.random(3).sum(1) + 5.0
    live = rows.completion_mask == 1
    if not _bootstraps(kind, component):
        live = live & rows.terminated[:, None]
    scale = 1 + max(float(x.abs().max()) for x in (rewards, values, next_value))
    for settings, truth in _settings(kind):
        arguments = {"rewards": rewards, "values": values, "next_value": next_value, "mask": rows.completion_mask, **settings}
        yield arguments, _fill(rows, truth, rewards, values, next_value), live, ROUNDING * scale


def _poisoned(kind: str, component: Component) -> Iterator[Case]:
    """Everything that is to be ignored holds garbage: values, rewards off actions, and the bootstrap of ended rows."""
    for code, name, rows in strata(component):
        if code not in ("OR", "PAD", "MT"):
            continue
        off = rows.completion_mask == 0
        for label, poison, soft in POISONS:
            for arguments, expected, live, tolerance in _returns(kind, component, rows):
                for target in ("values", "rewards", "next_value"):
                    if not component.takes(target):
                        continue
                    where = rows.terminated if target == "next_value" else off
                    spoilt = {**rows.common(), **arguments, target: torch.where(where, poison, arguments[target])}
                    place = f"{name}, {label} in {target} {'of ended rows' if target == 'next_value' else 'off actions'}"
                    # a running sum over garbage of size 1000 may lose that much of its precision
                    yield Case("MI", place, spoilt, expected, GARBAGE * tolerance, live, warn_only=soft, read=_advantages)


def _advantages(got: Any) -> Any:
    """A pair (advantages, returns) counts by its first."""
    return got[0] if isinstance(got, (tuple, list)) and len(got) == 2 and isinstance(got[0], Tensor) else got


def _return_cases(kind: str, component: Component) -> list[Case]:
    cases = [replace(c, read=_advantages) for c in build_cases(component, partial(_returns, kind, component))]
    return [*cases, *_poisoned(kind, component)]


# ------------------------------------------------------------------------------------------------ exact dialogues
@lru_cache(1)
def dialogue() -> tuple[TokenBatch, Evaluation]:
    """Every string of a dialogue with random prompts and random replies under its reference, and that policy's exact v and q.

    The policy's KL to the reference is 0, so that v and q are plain expected returns at gamma = 0.9.
    """
    rng = np.random.default_rng(11)
    paid: dict[tuple[int, ...], float] = {}

    def reward(prefix: tuple[int, ...]) -> float:
        return paid.setdefault(prefix, float(rng.normal()))

    turns = (Say({(0,): 0.3, (1, 0): 0.7}), Act(2, (0, 1)), Say({(2,): 0.6, (0, 1): 0.4}), Act(2, (0, 2)))
    mdp = random_reference(from_turns(turns, reward, 3), 5)
    return enumerate_trajectories(mdp), evaluate(mdp, mdp.ref_log_policy, beta=1.0, gamma=0.9)


def _before(batch: TokenBatch) -> Tensor:
    """The state in which each token was said, int[B, L]."""
    return torch.nn.functional.pad(batch.known_states(), (1, 0))[:, :-1]


EXTRAS: dict[str, tuple[dict[str, Any], ...]] = {
    "gae": ({"lam": 1.0}, {"lam": 0.7}),
    "n_step": ({"n": 1}, {"n": 3}),
    "reward_to_go": ({},),
}


def _exact_call(rows: TokenBatch, state: Tensor, v: Tensor) -> dict[str, Any]:
    """The arguments, with the exact value of the state in which each action was taken."""
    last = rows.known_states().gather(1, rows.last_index()[:, None])[:, 0]
    names = ("input_ids", "attention_mask", "completion_mask", "terminated", "rewards")
    return {
        **{name: getattr(rows, name) for name in names},
        "mask": rows.completion_mask,
        "truncated": ~rows.terminated,
        "values": torch.where(rows.completion_mask == 1, v[state], 0.0),
        "next_value": torch.where(rows.terminated, 0.0, v[last]),
        "gamma": 0.9,
    }


def run_exact(kind: str, component: Component) -> Iterator[Measured]:
    """Conditional means over every string, whole rows and rows cut in the second policy turn, against exact v and q."""
    batch, solved = dialogue()
    v, q = torch.tensor(solved.v), torch.tensor(solved.q)
    table = {"gae": (q - v[:, None]).reshape(-1), "n_step": v, "reward_to_go": q.reshape(-1)}[kind]
    # means of some dozens of strings: their rounding is that of a few returns
    tolerance = 4 * ROUNDING * (1 + float(q[q.isfinite()].abs().max()))
    whole = kind == "reward_to_go" or not _bootstraps(kind, component)
    halves = [] if whole else [("the same, cut before the last action", cut(batch, _last_action(batch)))]
    for place, rows in [("every string of a random dialogue", batch), *halves]:
        state, acts = _before(rows).clamp(min=0), rows.completion_mask == 1
        pair = state if kind == "n_step" else state * q.shape[1] + rows.input_ids
        keys = pair[acts].unique()
        weight = rows.weights[:, None].expand(acts.shape)
        for extra in EXTRAS[kind]:
            got = as_tensor(_advantages(component.call({**_exact_call(rows, state, v), **extra}, place)), place)
            if got.shape != acts.shape:
                raise SubjectError(f"{place}: it returned shape {tuple(got.shape)}, expected {tuple(acts.shape)}")
            mean = torch.stack([(weight * got)[here].sum() / weight[here].sum() for here in (acts & (pair == k) for k in keys)])
            what = "conditional mean" + "".join(f", {name} {x}" for name, x in extra.items())
            yield compare(mean, table[keys], tolerance, place, what=what, axes=("state",))


def _last_action(batch: TokenBatch) -> Tensor:
    """int[B]: the column of the last action, so that the row is cut in front of it; every row has four."""
    place = torch.arange(batch.input_ids.shape[1])
    return torch.where(batch.completion_mask == 1, place, 0).amax(1)


def _checks(kind: str, noun: str) -> tuple[Check, ...]:
    means = Check(
        "EG", f"the {noun}'s conditional mean is exact v, q or q - v", partial(run_exact, kind), "Wrong in expectation."
    )
    ends = check_cases("TE", "0 after ended rows, the bootstrap after cut ones", "Cut and ended rows are treated alike.")
    return (
        check_cases("OR", f"the {noun} against a double sum", "A wrong recursion, discount, or credit a step early or late."),
        ends,
        check_cases("PAD", "the same on either padding side, any width", "Padding enters the recursion."),
        check_cases(
            "MT", "credit crosses observation tokens undiscounted", "Observation tokens cost a step, or cut the credit."
        ),
        check_cases("MI", "what stands off actions does not matter", "V or r of padding, observations or ended rows is read."),
        check_cases("BS", "the same for a row alone and in another order", "Rows leak into each other."),
        means,
        PURE,
    )


def _skips(component: Component) -> dict[str, str]:
    return {**no_turns(component), **({} if component.multi_turn else {"EG": "declared: multi_turn=False"})}


def _bootstrap_skips(component: Component) -> dict[str, str]:
    """Those of `_skips`; and TE, which is about ended against cut rows, where the function cannot tell these apart."""
    if any(map(component.takes, ("terminated", "truncated", "next_value"))):
        return _skips(component)
    reason = "names neither terminated, truncated nor next_value: cut rows were not asked about"
    return {**_skips(component), "TE": reason}


GAE = Kind(
    "gae",
    {**only(*MASKS), **numbers("mask", "values", "next_value", "rewards", "gamma", "lam")},
    "float[B, L] advantages, or (advantages, returns); read at actions alone",
    partial(_return_cases, "gae"),
    _checks("gae", "advantage"),
    skips=_bootstrap_skips,
)
N_STEP = Kind(
    "n_step",
    {**only(*MASKS), **numbers("mask", "values", "next_value", "rewards", "gamma", "n")},
    "float[B, L] n-step targets; read at actions alone",
    partial(_return_cases, "n_step"),
    _checks("n_step", "target"),
    skips=_bootstrap_skips,
)
TO_GO = Kind(
    "reward_to_go",
    {**only(*MASKS), **numbers("mask", "rewards", "gamma")},
    "float[B, L] discounted sums of the rewards from here on, no bootstrap; read at actions alone",
    partial(_return_cases, "reward_to_go"),
    _checks("reward_to_go", "return"),
    skips=_skips,
)


# ------------------------------------------------------------------------------------------- placement and read-out
def _placement(rows: Rows) -> Made:
    scores = torch.from_numpy(np.random.default_rng(7).normal(size=len(rows.talks)))
    expected = torch.zeros(len(rows.talks), rows.width, dtype=torch.float64)
    for b, places in enumerate(rows.actions):
        if places:
            expected[b, places[-1]] = scores[b]
    live = torch.tensor([bool(places) for places in rows.actions])[:, None].expand(expected.shape)
    yield {"scores": scores, "mask": rows.completion_mask}, expected, live, EXACT


PLACEMENT = Kind(
    "reward_placement",
    {
        **only(
            "input_ids", "attention_mask", "completion_mask", "lengths", "terminated", "truncated", "pad_id", "eos_id", "side"
        ),
        "mask": NUMBERS["mask"],
        "scores": "float[B]; one reward a row",
    },
    "float[B, L]: the row's reward on its last action and 0 elsewhere (rows without any action are not compared)",
    lambda component: build_cases(component, _placement, trailing=True),
    (
        check_cases("OR", "each row's reward on its last action", "The reward sits a token off, or in the last column."),
        check_cases(
            "TE", "the same for ended and cut rows with pad = EOS", "The reward is put on an EOS that is padding, or missing."
        ),
        check_cases("PAD", "the same on either padding side, any width", "An index counted from the left in left-padded rows."),
        check_cases("MT", "the last action, not an inner EOS nor a reply", "The first EOS or the last real token is taken."),
        check_cases("BS", "the same for a row alone and in another order", "One row's index is used for another."),
        PURE,
    ),
    skips=no_turns,
)


def _readout(rows: Rows) -> Made:
    scores = torch.from_numpy(np.random.default_rng(8).normal(size=(len(rows.talks), rows.width)))
    expected = exact([scores[b, i].item() for b, i in enumerate(rows.last_real)])
    yield {"scores": scores}, expected, None, EXACT


READOUT = Kind(
    "score_readout",
    {
        **only("input_ids", "attention_mask", "lengths", "terminated", "pad_id", "eos_id", "side"),
        "scores": "float[B, L]; a reward model's output at every position",
    },
    "float[B]: the score at the row's last real token",
    lambda component: build_cases(component, _readout, axes=("row",)),
    (
        check_cases("OR", "the score at the last real token", "A token early or late, or the last column."),
        check_cases("TE", "the same for ended and cut rows with pad = EOS", "The end is looked for by `ids == pad_id`."),
        check_cases("PAD", "the same on either padding side, any width", "A right-padding index is used on left-padded rows."),
        check_cases("MT", "an inner EOS is no end", "The first EOS is taken for the last token."),
        check_cases("BS", "the same for a row alone and in another order", "One row's index is used for another."),
        PURE,
    ),
    skips=no_turns,
)
KINDS = (GAE, N_STEP, TO_GO, PLACEMENT, READOUT)
