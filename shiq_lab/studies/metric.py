"""Which metric should weigh one-step residuals? The family between one-step and ShiQ, on the paper's kinds of worlds.

Setting. rho^(lambda)_t = sum_{k>=t} (gamma lambda)^{k-t} d_k: the loss is d' A'A d with A_tk = (gamma lambda)^{k-t} (F2);
lambda = 0 is the one-step loss with metric I, lambda = 1 is ShiQ. Tree (3 tokens, depth 3, gamma 0.9), Chain (length 8,
gamma 0.95), Needle (2 tokens, length 6), ToolCall (2 functions, 2 arguments, 3 values), each under uniform data, the
reference's and pi*'s own; beside them the long Needle and Chain of horizon.py on data near the path. Tables, exact
population losses, plain gradient descent from l_ref. Chance, from the seed: rewards, tools, strings and the reference.

Theory. The zero is the same for every lambda (A is invertible, F8), so the metric changes the speed alone. At l* the Hessian
is 2 E[J' A'A J], J the Jacobian of the one-step residuals; gradient descent contracts by 1 - 1/kappa at the step
1 / lambda_max and by (kappa - 1) / (kappa + 1) at the step 2 / (lambda_max + lambda_min), kappa its condition number. A carries
rewards back, which one-step lacks; but it also adds up, over the row, how far the tokens taken are from what pi would take,
which makes lambda_max grow with the row. So on long rows of other data neither end need be best.

Roads. The Hessian by autograd on listed rows, by the closed form of A'A between Jacobians of d on the same rows, and by
recursion (horizon.Quadratic); rates by the spectrum against those of descent on the loss itself near l*.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.envs import make
from shiq_lab.graph import Floats
from shiq_lab.learning import rows_of, world_of
from shiq_lab.losses.residuals import Actions, Reduction, discounted_sum, reduce
from shiq_lab.losses.shiq import residuals_of, shifted_loss, shiq_loss
from shiq_lab.losses.steps import shifted
from shiq_lab.objectives import World
from shiq_lab.plotting import GREY, PALETTE, figure, style
from shiq_lab.policies import on_path, uniform_policy
from shiq_lab.population import Population
from shiq_lab.stats import TokenStats
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study
from shiq_lab.studies.horizon import Descent, Quadratic
from shiq_lab.studies.horizon import world as long_world
from shiq_lab.studies.statistics import interval, said

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEHAVIORS, NEAR = ("uniform", "reference", "pi*"), "near the path"
NEARBY = 1e-7  # from l*: curvature changes 1/kappa by about NEARBY * kappa of itself
SLOWEST = 1e-5  # 1/kappa below it is not compared: that change would be more than 1 %
WORLDS: dict[str, tuple[dict[str, int], float, float]] = {  # parameters, beta, gamma
    "Tree": ({"depth": 3, "n_tokens": 3}, 0.5, 0.9),
    "Chain": ({"length": 8}, 0.4, 0.95),
    "Needle": ({"length": 6, "n_tokens": 2}, 0.1, 1.0),
    "ToolCall": ({"n_functions": 2, "n_arguments": 2, "n_values": 3}, 0.2, 1.0),
}


# ------------------------------------------------------------------------------------------------------------ the family
def trace_residuals(
    stats: TokenStats, ref: TokenStats, batch: TokenBatch, *, beta: float, gamma: float, trace: float
) -> tuple[Tensor, Actions]:
    """rho^(lambda) float[B, T], lambda = trace: one-step residuals, then summed with gamma lambda."""
    d, actions = residuals_of(shifted, stats, ref, batch, beta, gamma, 1)
    return discounted_sum(d, gamma * trace, actions.segment), actions


def trace_loss(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, *, beta: float, gamma: float = 1.0, trace: float,
    reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """sum_t (rho^(lambda)_t)^2: shifted_loss at trace = 0, shiq_loss at trace = 1."""
    rho, actions = trace_residuals(policy_stats, ref_stats, batch, beta=beta, gamma=gamma, trace=trace)
    return reduce(rho**2, batch, actions, reduction)


def metric(length: int, gamma: float, trace: float) -> Tensor:
    """A'A of `length` tokens in closed form: sum_{t <= min(j, k)} (gamma lambda)^{j + k - 2 t}."""
    g, least = gamma * trace, np.minimum(*np.indices((length, length)))
    apart = np.abs(np.subtract(*np.indices((length, length))))
    with np.errstate(invalid="ignore"):
        terms = (1 - g ** (2 * (least + 1))) / (1 - g**2) if g < 1 else least + 1.0
    return torch.from_numpy(g**apart * terms)


# ------------------------------------------------------------------------------------------------------------- measuring
class Listed:
    """Exact rows of a behaviour, with logits of the edges as the parameter: what autograd differentiates."""

    def __init__(self, world: World, behavior: Floats, edges: Any) -> None:
        self.world, self.rows = world, rows_of(world, behavior)
        self.ref = torch.tensor(np.array(world.mdp.ref_logits))
        self.edges = (torch.from_numpy(edges[:, 0]), torch.from_numpy(edges[:, 1]))

    def stats(self, logits: Tensor) -> tuple[TokenStats, TokenStats, TokenBatch]:
        """The two numbers a token of a table of logits."""
        table = self.ref.index_put(self.edges, logits)
        return TokenStats.from_table(table, self.rows), TokenStats.from_table(self.ref, self.rows), self.rows

    def loss(self, logits: Tensor, trace: float) -> Tensor:
        """The expected loss of the metric lambda."""
        return trace_loss(*self.stats(logits), beta=self.world.beta, gamma=self.world.gamma, trace=trace)

    def hessian(self, logits: Tensor, trace: float) -> Tensor:
        """By differentiating the loss twice."""
        found: Tensor = torch.autograd.functional.hessian(lambda x: self.loss(x, trace), logits)
        return found

    def products(self, logits: Tensor, trace: float) -> Tensor:
        """2 J' (w A'A) J: the closed-form metric between the one-step residuals' Jacobian; the Hessian where they vanish."""

        x = logits.clone().requires_grad_()
        d, _ = trace_residuals(*self.stats(x), beta=self.world.beta, gamma=self.world.gamma, trace=0.0)  # (B, T)
        dummy = torch.zeros_like(d, requires_grad=True)
        (pulled,) = torch.autograd.grad(d, x, dummy, create_graph=True)  # J' dummy, linear in dummy: its rows are J's columns
        columns = [torch.autograd.grad(pulled, dummy, unit, retain_graph=True)[0] for unit in torch.eye(len(x), dtype=x.dtype)]
        jacobian = torch.stack(columns, -1)  # (B, T, E)
        between = metric(jacobian.shape[1], self.world.gamma, trace)
        share = self.rows.weights / self.rows.weights.sum()
        return 2 * torch.einsum("b,bje,jk,bkf->ef", share, jacobian, between, jacobian)


def behavior_of(world: World, name: str) -> Floats:
    """A behaviour's table by name."""
    tables = {"uniform": uniform_policy(world.mdp), "reference": world.mdp.ref_log_policy, "pi*": world.solution.log_policy()}
    return tables[name]


def contraction(descent: Descent, step: float, direction: Tensor, updates: int) -> float:
    """The factor an update by which gradient descent on the loss itself shrinks the error, from beside l*."""
    quadratic = descent.quadratic
    x = quadratic.best + direction
    for _ in range(updates):
        x = x - step * quadratic.gradient(x)[0]
    return float(((x - quadratic.best).norm() / direction.norm()) ** (1 / updates))


def cases(settings: Settings) -> list[Case]:
    """What is measured, case by case."""
    short = [{"environment": name, "behavior": behavior} for name in settings["environments"] for behavior in BEHAVIORS]
    return short + [{"environment": name, "behavior": NEAR} for name in ("Needle", "Chain")]


def _setting(settings: Settings, case: Case, seed: int) -> tuple[World, Floats]:
    """(world, behaviour) of a case; the long horizons are those of horizon.py."""
    if case["behavior"] == NEAR:
        T = settings["long"]
        world = world_of(*long_world(case["environment"], T, seed))
        return world, on_path(world.mdp, world.solution.log_policy(), 1 / T)
    parameters, beta, gamma = WORLDS[case["environment"]]
    world = world_of(make(case["environment"], **parameters, seed=seed), beta, gamma)
    return world, behavior_of(world, case["behavior"])


def measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """Over lambda: condition number, updates from l_ref; at the ends and the best lambda the rates, predicted and measured."""
    world, behavior = _setting(settings, case, seed)
    population = Population(world.mdp, behavior, world.beta, world.gamma)
    q = world.solution.q()[world.mdp.allowed & world.mdp.is_policy[:, None]]
    descents, out = [], dict[str, Any](condition=[], updates=[])
    for trace in settings["traces"]:
        quadratic = Quadratic.of(population, trace)
        descent = Descent(quadratic, torch.ones_like(quadratic.visits))
        start = quadratic.at(world.mdp.ref_logits)
        descents.append(descent)
        out["condition"].append(descent.condition())
        out["updates"].append(descent.count(start, descent.step(start), [settings["goal"] * float(np.ptp(q))])[0])
    asked = sorted({0, int(np.argmin(out["condition"])), len(descents) - 1})
    out["rates"] = [_rates(descents[i]) for i in asked]
    if seed or case["behavior"] == NEAR:  # near the path there are too many rows to list
        return {**out, "roads": None, "ends": None}
    listed = Listed(world, behavior, quadratic.edges)
    out["roads"] = max(_roads(listed, descents[i].quadratic, settings["traces"][i]) for i in asked)
    out["ends"] = _ends(listed, quadratic.best, seed)
    return out


def _rates(descent: Descent) -> dict[str, Any]:
    """[predicted, measured] contraction at both steps, along what each is slowest in: the flattest direction, and for the
    longer step the steepest one too."""
    values, vectors = descent.spectrum(descent.quadratic.best)
    low, high = float(values[0]), float(values[-1])
    updates = max(4, min(60, int(high / low)))  # few where they are large, so that rounding stays small beside what is left
    flat, both = vectors[:, 0] * NEARBY, (vectors[:, 0] + vectors[:, -1]) * NEARBY
    return {
        "plain": [1 - low / high, contraction(descent, 1 / high, flat, updates)],
        "optimal": [(high - low) / (high + low), contraction(descent, 2 / (high + low), both, updates)],
    }


def _roads(listed: Listed, quadratic: Quadratic, trace: float) -> float:
    """Largest difference of the three Hessians at l*, relative to the largest entry."""
    best = quadratic.best
    three = [quadratic.hessian(best), listed.hessian(best, trace), listed.products(best, trace)]
    return float(max((h - three[0]).abs().max() for h in three[1:]) / three[0].abs().max())


def _ends(listed: Listed, best: Tensor, seed: int) -> float:
    """How far the family's ends are from shifted_loss and shiq_loss at a random table, relative."""
    x = best + torch.from_numpy(np.random.default_rng(seed).normal(size=len(best)))
    options: dict[str, Any] = {"beta": listed.world.beta, "gamma": listed.world.gamma}
    known = [float(loss(*listed.stats(x), **options)) for loss in (shifted_loss, shiq_loss)]
    return max(abs(float(listed.loss(x, trace)) / value - 1) for trace, value in zip((0.0, 1.0), known, strict=True))


# ------------------------------------------------------------------------------------------------------------ summing up
def summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """A case a line: curves over lambda, the best lambda, and by how much it and ShiQ win, seed by seed."""
    traces = np.array(settings["traces"])
    out: dict[str, Any] = {"traces": traces, "lines": {}}
    gaps: dict[str, list[float]] = {"plain": [], "optimal": []}
    for case in cases(settings):
        mine = [r.numbers for r in records if r.case == case]
        line: dict[str, Any] = {}
        for what in ("condition", "updates"):
            many = np.array([n[what] for n in mine], dtype=float)  # (seeds, traces)
            line[what] = _curve(many)
            line[f"{what} relative"] = _curve(many / many[:, :1])
            line[f"{what}: best lambda"] = vars(interval(traces[many.argmin(1)]))
            line[f"{what}: one-step over best"] = _curve(many[:, 0] / many.min(1))
            line[f"{what}: ShiQ over best"] = _curve(many[:, -1] / many.min(1))
            line[f"{what}: one-step over ShiQ"] = _curve(many[:, 0] / many[:, -1])
        out["lines"][f"{case['environment']}, {case['behavior']}"] = line
        for name, found in (pair for n in mine for rates in n["rates"] for pair in rates.items()):
            predicted, seen = (1 - x for x in found)  # what an update takes away
            if predicted >= SLOWEST:
                gaps[name].append(abs(seen / predicted - 1))
    out["rates"] = {name: {"compared": len(x), "worst": max(x)} for name, x in gaps.items()}
    for key in ("roads", "ends"):
        out[key] = max(r.numbers[key] for r in records if r.numbers[key] is not None)
    return out


def _curve(x: Any) -> dict[str, Any]:
    """The geometric mean over seeds (interquartile) and its interval."""
    found = interval(np.log(np.asarray(x, dtype=float)))
    return {key: np.exp(getattr(found, key)) for key in ("value", "low", "high")}


def claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """What the figure shows, each with its numbers."""
    lines = summary["lines"]
    short = {key: x for key, x in lines.items() if not key.endswith(NEAR)}
    needle = lines[f"Needle, {NEAR}"]
    ratio, over, rates = "condition: one-step over ShiQ", "condition: ShiQ over best", summary["rates"]
    inside = {key: x for key, x in short.items() if x[over]["low"] > 1.01}
    return [
        Claim(
            "Three roads to the Hessian at l* agree, and the ends of the family are shifted_loss and shiq_loss.",
            f"largest relative differences {summary['roads']:.1e} and {summary['ends']:.1e}",
            summary["roads"] <= 1e-11 and summary["ends"] <= 1e-13,  # rounding, of sums over some hundred rows
        ),
        Claim(
            "Near l* gradient descent takes away at an update what the spectrum predicts, 1/kappa at the step 1/lambda_max and "
            "2/(kappa + 1) at the step 2/(lambda_max + lambda_min).",
            "; ".join(
                f"{name}: {x['compared']} compared, worst relative difference {x['worst']:.1e}" for name, x in rates.items()
            ),
            all(x["compared"] > 0 and x["worst"] <= 1e-2 for x in rates.values()),
        ),
        Claim(
            "On short rows ShiQ is better conditioned than one-step in every world under every behaviour.",
            "; ".join(f"{key}: {said(x[ratio])} times" for key, x in short.items()),
            all(x[ratio]["low"] > 1 for x in short.values()),
        ),
        Claim(
            "ShiQ is not the best of the family everywhere: in some worlds a lambda below 1 is, by little on short rows.",
            "; ".join(f"{key}: lambda {said(x['condition: best lambda'])}, {said(x[over])} times" for key, x in inside.items()),
            bool(inside) and all(x[over]["value"] <= 2.5 for x in short.values()),
        ),
        *_long(settings, needle),
    ]


def _long(settings: Settings, needle: dict[str, Any]) -> list[Claim]:
    """Where both ends are poor."""
    parts = [f"condition: {name} over best" for name in ("one-step", "ShiQ")]
    counts = [f"updates: {name} over best" for name in ("one-step", "ShiQ")]
    best = needle["condition: best lambda"]
    says = [f"{key} {said(needle[key])}" for key in (*parts, *counts)]
    return [
        Claim(
            f"On a long needle (T = {settings['long']}, near the path) the best lambda lies well inside and beats both ends.",
            f"lambda {said(best)}; " + "; ".join(says),
            best["high"] < 1 and best["low"] > 0 and all(needle[key]["low"] > 1.2 for key in (*parts, *counts)),
        )
    ]


@style()
def draw(result: Result) -> "Figure":
    """Condition number (solid) and updates from l_ref (dotted) over lambda, relative to one-step; a panel a behaviour."""
    page = figure(figsize=(9.6, 3.7))
    panels = page.subplots(1, 3, sharey=True)
    shapes = dict(zip(WORLDS, (("blue", "s"), ("orange", "D"), ("green", "^"), ("vermilion", "o")), strict=True))
    titles = {"uniform": "uniform data", "pi*": "π*'s own data", NEAR: f"near the path, T = {result.settings['long']}"}
    x = result.summary["traces"]
    shown: dict[str, Any] = {}
    for axes, (behavior, title) in zip(panels, titles.items(), strict=True):
        for key, line in result.summary["lines"].items():
            name, data = key.split(", ")
            if data != behavior:
                continue
            color, marker = PALETTE[shapes[name][0]], shapes[name][1]
            for what, dash in (("condition", "-"), ("updates", ":")):
                y = line[f"{what} relative"]
                drawn = axes.plot(x, y["value"], dash, color=color, marker=marker, ms=4, mfc=color if dash == "-" else "white")
                axes.fill_between(x, y["low"], y["high"], color=color, alpha=0.13, lw=0)
                shown.setdefault(f"{name}, condition number" if what == "condition" else f"{name}, updates", drawn[0])
        axes.axhline(1, color=GREY, lw=0.8)
        axes.set(yscale="log", title=title, xlabel="λ (0: one-step, 1: ShiQ)")
        axes.grid(axis="y")
    panels[0].set_ylabel("relative to one-step")
    page.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4)
    return page


METRIC = Study(
    name="metric",
    title="The metric between one-step and ShiQ: condition numbers and speed",
    question="Which lambda from one-step (0) to ShiQ (1) makes gradient descent fastest, and does the spectrum say how fast?",
    settings={
        "seeds": 10,
        "environments": list(WORLDS),
        "traces": [0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0],
        "goal": 1e-3,
        "long": 24,
    },
    fast={"seeds": 2, "environments": ["Tree", "Chain"], "traces": [0.0, 0.3, 0.6, 0.9, 1.0], "long": 16},
    cases=cases,
    measure=measure,
    summarise=summarise,
    claims=claims,
    draw=draw,
)
