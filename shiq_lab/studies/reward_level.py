"""Does it matter whether the reward is paid token by token or whole on the last token? Not a reconstruction.

A tree of all strings of `depth` letters out of `n_tokens`, a standard normal reward on every token (rounded to 2^-10, so that
returns add up without rounding), random reference logits; gamma = 1. It is paid twice: token by token, and the same return
whole on the last token. Rows are all strings with their chances under the uniform policy, for REINFORCE under the policy as
it stands; a table starts at the reference and follows plain gradient descent of one constant step (and Adam, to compare).
The seed draws rewards and reference.

Theory. Paying late is shaping by Phi(s) = -(what was paid on the way to s) (F7), which every prefix knows:

    pi* is the same,  v*_late(s) = v*_token(s) + paid(s),  q*_late(s, a) = q*_token(s, a) + paid(s)

Losses of whole rows see R(y) alone, so they take the same path either way, and what `sequence only` leaves inside is then as
far from another truth: gradient descent keeps the sum of l - l_ref over the tokens of every inner state (F5), so it ends with
q_hat = q* - mean_a q* there. One-step residuals are zero where neither a reward nor a changed value stands, so a reward paid at
the end moves back one token an update; ShiQ hands it to every token at once. But at their optima the two forms of a loss have
the same Jacobian (it depends on pi* alone), so late in training both converge at one rate: what differs is where they start.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shiq_lab.bellman import evaluate
from shiq_lab.enumeration import unfold
from shiq_lab.envs.tree import tree
from shiq_lab.graph import Floats
from shiq_lab.learning import Trace, descend, rows_of, world_of
from shiq_lab.losses import methods
from shiq_lab.mdp import TokenMDP
from shiq_lab.objectives import World
from shiq_lab.plotting import COLORS, GREY, MARKERS, PALETTE, figure, style
from shiq_lab.policies import uniform_policy
from shiq_lab.population import Population
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study
from shiq_lab.studies.statistics import interval
from shiq_lab.training import hessian_condition

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ONE, SHIQ, FIRST, DRO, REINFORCE = (
    "shifted, one step", "ShiQ", "sequence only", "DRO-V", "REINFORCE, KL in the reward"
)  # fmt: skip
METHOD = {ONE: "shifted", SHIQ: "shiq"}
LEVELS = ("token", "late")
GRAIN = 1024  # rewards are whole multiples of 1 / GRAIN: sums of a few of them are exact in float64


def paid_before(mdp: TokenMDP) -> Floats:
    """What was paid on the way to each state of a prefix tree (parents come before children), float[S]."""
    paid = np.zeros(mdp.n_states + 1)  # the last: the end
    for state in range(mdp.n_states):
        tokens = np.flatnonzero(mdp.allowed[state])
        reward = mdp.reward[state, tokens] if mdp.is_policy[state] else 0.0
        paid[mdp.next_state[state, tokens]] = paid[state] + reward
    return paid[:-1]


def paid_late(mdp: TokenMDP) -> TokenMDP:
    """The same prefix tree, every string's return paid whole on its last token (gamma = 1)."""
    whole = paid_before(mdp)[:, None] + mdp.reward
    return replace(mdp, reward=np.where(mdp.allowed & mdp.is_policy[:, None] & (mdp.next_state < 0), whole, 0.0))


def worlds(settings: Settings, seed: int) -> dict[str, World]:
    """The tree paid token by token, and paid late."""
    mdp, _ = unfold(tree(settings["depth"], settings["n_tokens"], seed))
    mdp = replace(mdp, reward=np.round(mdp.reward * GRAIN) / GRAIN)
    return {name: world_of(m, settings["beta"]) for name, m in zip(LEVELS, (mdp, paid_late(mdp)), strict=True)}


def cases(settings: Settings) -> list[Case]:
    """What is measured, case by case."""
    return [{"loss": loss} for loss in (ONE, SHIQ, FIRST, DRO, REINFORCE)]


def measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """Train under both payments; compare the tables, the truths, and how far each stays from its own."""
    both = worlds(settings, seed)
    traces = {level: _train(settings, case, world, settings["steps"]) for level, world in both.items()}
    out: dict[str, Any] = {level: _numbers(settings, traces[level], both[level]) for level in LEVELS}
    out["apart"] = _distance(*(traces[level].logits for level in LEVELS))
    out["truth"] = truth(both)
    out["moved"] = {level: moved(settings, case, world) for level, world in both.items()}
    if case["loss"] in METHOD:
        out["condition"] = {level: condition(case["loss"], world) for level, world in both.items()}
    if case["loss"] == FIRST:
        out["predicted"] = {level: inner_error(world) for level, world in both.items()}
        out["bound"] = max(_policy_bound(world, out[level]["kl"][-1]) for level, world in both.items())
    return out


def _train(settings: Settings, case: Case, world: World, steps: int) -> Trace:
    behavior = uniform_policy(world.mdp)
    rows = None if case["loss"] == REINFORCE else rows_of(world, behavior)
    marks = np.unique(np.round(np.geomspace(1, steps, settings["marks"]))).astype(int).tolist()
    return descend(
        case["loss"], world, rows, behavior, steps=steps, learning_rate=settings["learning_rate"],
        optimizer="sgd", record_at=marks,
    )  # fmt: skip


def _numbers(settings: Settings, trace: Trace, world: World) -> dict[str, Any]:
    """The Q error is told in units of the range of q* (of one payment's own q*)."""
    q = world.solution.q()[world.mdp.allowed & world.mdp.is_policy[:, None]]
    scale = float(np.ptp(q))
    return {
        "at": trace.at,
        "q": [m.q_error / scale for m in trace.metrics],
        "kl": [m.kl for m in trace.metrics],
        "q_error": trace.metrics[-1].q_error,
        "to_q": trace.updates_to(settings["q_goal"] * scale),
        "to_kl": trace.updates_to(settings["kl_goal"], "kl"),
    }


def _distance(first: Floats, second: Floats) -> float:
    finite = np.isfinite(first)
    return float(np.abs(first[finite] - second[finite]).max())


def truth(both: dict[str, World]) -> dict[str, float]:
    """How far the two truths are from what shaping says, and how far apart: largest differences over policy states."""
    token, late = (both[level].solution for level in LEVELS)
    mdp, paid = token.mdp, paid_before(token.mdp)
    rows = mdp.is_policy & mdp.reachable
    edges = mdp.allowed & rows[:, None]
    largest = lambda x, where: float(np.abs(np.where(where, x, 0.0)).max())  # noqa: E731
    with np.errstate(invalid="ignore"):
        change = late.q() - token.q()
        policy = np.exp(late.log_policy()) - np.exp(token.log_policy())
    return {
        "scale": late.scale + token.scale,
        "policy": largest(policy, edges),
        "v": largest(late.v() - token.v() - paid, rows),
        "q": largest(change - paid[:, None], edges),
        "q_change": largest(change, edges),
    }


def moved(settings: Settings, case: Case, world: World) -> list[int]:
    """After 1, 2, ..., depth updates: how many tokens back from the end a logit has left the reference."""
    mdp = world.mdp
    place = np.zeros(mdp.n_states + 1, dtype=int)  # letters said before the state
    for state in range(mdp.n_states):
        place[mdp.next_state[state, mdp.allowed[state]]] = place[state] + mdp.is_policy[state]
    out = []
    for steps in range(1, settings["depth"] + 1):
        logits = _train({**settings, "marks": 1}, case, world, steps).logits
        changed = (np.where(mdp.allowed, logits != mdp.ref_logits, False) & mdp.is_policy[:, None]).any(1)
        out.append(int(settings["depth"] - place[:-1][changed].min()))
    return out


def condition(loss: str, world: World) -> float:
    """The condition number of the loss's Hessian at its optimum l*, on the rows that are trained on."""
    population = Population(world.mdp, uniform_policy(world.mdp), world.beta, world.gamma)
    best = torch.tensor(np.where(world.mdp.allowed, world.solution.optimal_logits(), 0.0))
    return hessian_condition(population, methods.lookup(METHOD[loss]), best)


def inner_error(world: World) -> float:
    """What gradient descent on `sequence only` leaves: max over inner states of |mean_a q*(s, a)|."""
    mdp, q = world.mdp, world.solution.q()
    count = mdp.allowed.sum(1)
    mean = np.where(mdp.allowed, q, 0.0).sum(1) / np.where(count > 0, count, 1)
    return float(np.abs(mean[world.inner.numpy()]).max())


def _policy_bound(world: World, kl: float) -> float:
    """How far a policy of that KL can put beta ln pi, less its mean over the tokens: KL >= occupancy d^2 / 2 (d small)."""
    edges = world.mdp.allowed & (world.mdp.is_policy & world.mdp.reachable)[:, None]
    best = evaluate(world.mdp, world.solution.log_policy(), beta=world.beta, gamma=world.gamma)
    return float(2 * world.beta * np.sqrt(2 * kl / best.occupancy[edges].min())) + 1e-12 * world.solution.scale


# -------------------------------------------------------------------------------------------------------- summing up
def summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """What the figure and the claims need, with intervals over the seeds."""
    out: dict[str, Any] = {"truth": _largest([r.numbers["truth"] for r in records]), "runs": {}}
    for case in cases(settings):
        found = [r.numbers for r in records if r.case == case]
        run: dict[str, Any] = {level: _curves([x[level] for x in found]) for level in LEVELS}
        run["apart"] = max(x["apart"] for x in found)
        for what in ("to_q", "to_kl"):
            ratio = [np.log(x["late"][what] / x["token"][what]) for x in found if x["late"][what] and x["token"][what]]
            run[f"late_over_token_{what}"] = _exp(interval(ratio)) if len(ratio) == len(found) else None
        run["moved"] = {level: [list(x) for x in sorted({tuple(x["moved"][level]) for x in found})] for level in LEVELS}
        if "condition" in found[0]:
            run["condition"] = {level: interval([x["condition"][level] for x in found]).__dict__ for level in LEVELS}
            run["condition_differs"] = max(abs(x["condition"]["late"] / x["condition"]["token"] - 1) for x in found)
        if "predicted" in found[0]:
            run["predicted"] = {level: interval([x["predicted"][level] for x in found]).__dict__ for level in LEVELS}
            gaps = [abs(x[level]["q_error"] - x["predicted"][level]) for x in found for level in LEVELS]
            run["bound"] = max(x["bound"] for x in found)
            run["missed_prediction"], run["kl_left"] = max(gaps), max(x[level]["kl"][-1] for x in found for level in LEVELS)
            run["least_error"] = min(x[level]["q_error"] for x in found for level in LEVELS)
        out["runs"][case["loss"]] = run
    one, many = ([x.numbers for x in records if x.case == {"loss": loss}] for loss in (ONE, SHIQ))
    out["one_over_shiq"] = {
        level: _exp(interval([np.log(a[level]["to_q"] / b[level]["to_q"]) for a, b in zip(one, many, strict=True)]))
        if all(x[level]["to_q"] for x in one + many) else None
        for level in LEVELS
    }  # fmt: skip
    return out


def _largest(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: max(x[key] for x in found) for key in found[0]}


def _exp(found: Any) -> dict[str, float]:
    """An interval of logarithms as one of ratios."""
    return {key: float(np.exp(getattr(found, key))) for key in ("value", "low", "high")}


def _curves(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Logarithms are averaged, since errors fall by factors."""
    out: dict[str, Any] = {"at": found[0]["at"]}
    for what in ("q", "kl"):
        band = interval(np.log(np.maximum([x[what] for x in found], 1e-20)))
        out[what] = {key: np.exp(getattr(band, key)).tolist() for key in ("value", "low", "high")}
    for what in ("to_q", "to_kl"):
        known = [x[what] for x in found if x[what] is not None]
        out[what] = {**interval(known).__dict__, "of": len(found)} if known else None
    return out


def claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """What the figure shows, each with its numbers."""
    truth, runs = summary["truth"], summary["runs"]
    rounding = 1e-13 * truth["scale"]  # a sweep of `depth` backups, a few eps of the largest value each
    off = max(truth["policy"], truth["v"], truth["q"])
    blind = {loss: runs[loss]["apart"] for loss in (FIRST, DRO, REINFORCE)}
    first, one, many = (runs[loss] for loss in (FIRST, ONE, SHIQ))
    depth = settings["depth"]
    fronts = {name: (run["moved"]["token"], run["moved"]["late"]) for name, run in (("one", one), ("shiq", many))}
    at_once, crawl = [[depth] * depth], [list(range(1, depth + 1))]
    differs = max(one["condition_differs"], many["condition_differs"])
    ratios = summary["one_over_shiq"]
    slower = {loss: runs[loss]["late_over_token_to_kl"] for loss in (ONE, SHIQ, FIRST)}
    return [
        Claim(
            "Paying the return at the end changes q* and v* by what was paid so far, and pi* not at all.",
            f"largest deviation {off:.1e}; q* itself changes by up to {truth['q_change']:.2g}",
            off <= rounding and truth["q_change"] > 0.1,
        ),
        Claim(
            "Losses that see whole rows take the same path: DRO-V and REINFORCE bit for bit, sequence only to rounding.",
            f"largest difference of the tables: {blind[DRO]:.0e}, {blind[REINFORCE]:.0e}, {blind[FIRST]:.1e}",
            blind[DRO] == 0 and blind[REINFORCE] == 0 and blind[FIRST] <= 1e-11,
        ),
        Claim(
            "So sequence only cannot know either q*: it has pi*, and misses q* inside by max |mean_a q*(s, a)|, as predicted.",
            f"KL left at most {first['kl_left']:.0e}; Q error at least {first['least_error']:.2g}, off its prediction by at "
            f"most {first['missed_prediction']:.0e} (what that KL allows: {first['bound']:.0e})",
            first["missed_prediction"] <= first["bound"] and first["bound"] < 0.1 < first["least_error"],
        ),
        Claim(
            f"A reward paid at the end moves back one token an update under the one-step loss, all {depth} at once under ShiQ.",
            f"tokens reached after 1, 2, ... updates: {fronts['one'][1]} and {fronts['shiq'][1]}; paid token by token "
            f"{fronts['one'][0]} and {fronts['shiq'][0]}",
            fronts["one"] == (at_once, crawl) and fronts["shiq"] == (at_once, at_once),
        ),
        Claim(
            "At the optimum each loss is equally well conditioned under both payments; ShiQ better than the one-step loss.",
            f"condition {one['condition']['token']['value']:.3g} (one step) and {many['condition']['token']['value']:.3g} "
            f"(ShiQ), the same under both to {differs:.0e}",
            differs <= 1e-6 and many["condition"]["token"]["high"] < one["condition"]["token"]["low"],
        ),
        Claim(
            f"To a Q error of {settings['q_goal']:g} of its range one step needs more updates than ShiQ under either payment.",
            "; ".join(f"{level}: {_ratio(ratios[level])} times as many" for level in LEVELS),
            all(ratios[level] is not None and ratios[level]["low"] > 1 for level in LEVELS),
        ),
        Claim(
            f"To a KL of {settings['kl_goal']:g} late payment costs the one-step loss updates: the reward has to travel.",
            f"late over token: {_ratio(slower[ONE])}; ShiQ {_ratio(slower[SHIQ])}; sequence only {_ratio(slower[FIRST])}",
            slower[ONE] is not None and slower[ONE]["low"] > 1 and slower[FIRST] == {"value": 1.0, "low": 1.0, "high": 1.0},
        ),
    ]


def _ratio(found: dict[str, float] | None) -> str:
    return "not all arrived" if found is None else f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


# ------------------------------------------------------------------------------------------------------------ drawing
LOOKS = {
    ONE: (COLORS["shifted"], MARKERS["shifted"]), SHIQ: (COLORS["shiq"], MARKERS["shiq"]),
    FIRST: (COLORS["sequence"], MARKERS["sequence"]), DRO: (PALETTE["blue"], "D"), REINFORCE: (PALETTE["black"], "v"),
}  # fmt: skip
SHORT = {ONE: "one step", SHIQ: "ShiQ", FIRST: "sequence only", DRO: "DRO-V", REINFORCE: "REINFORCE"}


@style()
def draw(result: Result) -> "Figure":
    """Q error and KL against updates: solid = paid token by token, dashed = paid at the end."""
    runs = result.summary["runs"]
    page = figure(figsize=(9, 4.2))
    left, right = page.subplots(1, 2)
    for axes, what, label in (
        (left, "q", "max |q̂ − q*| / range of q*"), (right, "kl", "KL(π* ‖ π) along an episode (nats)")
    ):  # fmt: skip
        for loss, (color, marker) in LOOKS.items():
            for level, dash in zip(LEVELS, ("-", "--"), strict=True):
                curve = runs[loss][level]
                at, band = curve["at"][1:], {key: x[1:] for key, x in curve[what].items()}
                name = SHORT[loss] if level == "token" else None
                axes.plot(at, band["value"], dash, color=color, marker=marker, markevery=6, label=name)
                axes.fill_between(at, band["low"], band["high"], color=color, alpha=0.15, lw=0)
        axes.set(xscale="log", yscale="log", xlabel="updates of gradient descent", ylabel=label)
        axes.grid(axis="y")
    left.set_title("The truth differs, and what is missed")
    right.set_title("The optimal policy is the same")
    right.set_ylim(1e-10, None)
    handles, labels = left.get_legend_handles_labels()
    for dash, name in (("-", "paid token by token"), ("--", "paid at the end")):
        handles += left.plot([], [], dash, color=GREY)
        labels.append(name)
    page.legend(handles, labels, loc="outside lower center", ncols=4)
    return page


REWARD_LEVEL = Study(
    name="reward-level",
    title="Reward on every token, or the whole return on the last",
    question="Does it matter to a loss whether the same return is paid token by token or at the end?",
    settings={
        "seeds": 10, "depth": 4, "n_tokens": 2, "beta": 1.0, "steps": 600, "learning_rate": 0.3, "marks": 40,
        "q_goal": 0.1, "kl_goal": 1e-2,
    },
    fast={"seeds": 2, "depth": 3, "steps": 250},
    cases=cases,
    measure=measure,
    summarise=summarise,
    claims=claims,
    draw=draw,
)  # fmt: skip
