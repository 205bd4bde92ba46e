"""How does the cost of learning grow with the horizon? A reconstruction: the paper's own sizes are unknown.

Setting. Needle (2 tokens, one string of T pays 1, beta = 1 / (T (1 + ln 2)): as many nats a token at every T, so v* at the
start stays near 1/2) and Chain (goal 2 after T steps that cost 1/T or 3/T, or 0.3 for stopping at once; beta = 0.25),
gamma = 1, T from 4 to 64. Data: on the path of pi* with probability 1 - 1/T a token; uniform up to T = 12. A table is trained
from l_ref on the exact population loss, one-step and multi-step (ShiQ). Cost: updates until max Q error is at most 1e-3
(and 0.1, for what comes early). Chance, from the seed: the reference's logits and the paying string.

Optimiser. Plain gradient descent at the constant step 1 / lambda_max, lambda_max the larger of the loss's own curvature at
l* and at l_ref: no memory, no tuning, each loss at its own best stable scale, so that the count is a property of the loss.
The same with every entry scaled by one over its visits shows what is left once rare entries take larger steps.

Theory. Near l* an error along an eigenvector falls by 1 - lambda / lambda_max an update: 1 - 1/kappa at worst. Under uniform
data Needle's last token is tried 2^-T times as often as its first, so kappa grows exponentially; near the path an exit is
tried about T^-2 times at least, so it grows like a power. One-step residuals have the Jacobian beta (I - P_pi), whose least
singular value falls like 1/T along a path of certain tokens. ShiQ's is A (I - P_pi) beta, and A, the sum over the rest of the
row, inverts I - P on the data's own path: no power of T where data and pi* agree, but where they differ the terms
e_a - pi add up over the row, lambda_max grows with them, and the step must shrink.

How updates are counted. The residuals are linear in c = beta (l - l_ref) and u = Dv, so loss and gradient need one matrix (a
Gram matrix over edges and states, found by recursion: rows of T = 64 cannot be listed). Updates are taken m at a time,
exactly on the quadratic model at the point reached; m is halved until two halves agree with the whole. Where the count
is small the same updates are also taken one by one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.bellman import solve
from shiq_lab.envs import make
from shiq_lab.errors import bad, is_real
from shiq_lab.graph import Floats, Ints, Recursion
from shiq_lab.mdp import TokenMDP
from shiq_lab.plotting import COLORS, GREY, MARKERS, figure, style
from shiq_lab.policies import on_path, uniform_policy
from shiq_lab.population import Population
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study
from shiq_lab.studies.statistics import interval, said

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSSES = {"one-step": 0.0, "ShiQ": 1.0}  # lambda of the family between them
OPTIMISERS = ("plain", "scaled by visits")
AGREE = 2e-3  # two halves of m updates and the whole: largest difference, relative to the error; seen: counts agree to 0.3 %


# ------------------------------------------------------------------------------------------------ the loss as one matrix
@dataclass(frozen=True, eq=False)
class Quadratic:
    """E over rows of sum_t rho_t^2 = (z - z*)' gram (z - z*) in a deterministic world, z = (c on E edges, u in P states).

    With rho^(lambda)_t = sum_{k>=t} (gamma lambda)^{k-t} d_k (lambda = 0 one-step, 1 ShiQ): linear in z, zero at z* = (q*, v*).
    Parameters are the logits l float[E] of the edges that the data take: c = beta (l - l_ref), u = beta (lse l - lse l_ref).
    """

    mdp: TokenMDP
    beta: float
    edges: Ints  # [E, 2]
    row: Tensor  # int[E]: which of the P states the edge leaves
    gram: Tensor  # [E + P, E + P]
    best: Tensor  # l*, float[E]
    visits: Tensor  # float[E]: how often the data take the edge

    @classmethod
    def of(cls, population: Population, trace: float) -> "Quadratic":
        """From the law of total variance, as population.py, with every residual a row of coefficients of z; trace is lambda.

        ValueError for a random world (no z* makes all residuals zero), or for lambda outside [0, 1].
        """
        mdp, gamma = population.mdp, population.gamma
        if not is_real(trace) or not 0 <= trace <= 1:
            raise bad("trace", "a number from 0 to 1", repr(trace))
        if not mdp.deterministic:
            raise bad("population", "a world that is deterministic after the first action", repr(mdp))
        S, V = mdp.next_state.shape
        live = mdp.is_policy & (population.arrivals > 0)
        taken = mdp.is_policy[:, None] & live[:, None] & (population.chance > 0)
        edges, states = np.argwhere(taken), np.flatnonzero(live)
        E, P = len(edges), len(states)
        value = np.zeros((S + 1, E + P))  # the last row: the end
        value[states, E + np.arange(P)] = 1
        follow = np.where(mdp.next_state < 0, S, mdp.next_state)
        own = np.where(mdp.allowed[..., None], -gamma * value[follow], 0.0)  # d = c - r - gamma u(next policy state)
        own[edges[:, 0], edges[:, 1], np.arange(E)] += 1
        onward = np.where(np.append(mdp.is_policy, False)[follow], gamma * trace, 1.0)  # a reply costs nothing
        mean = Recursion(mdp.next_state, population.chance * onward).solve((population.chance[..., None] * own).sum(1))
        jump = own + onward[..., None] * np.append(mean, value[-1:], 0)[follow] - mean[:, None]
        spread = Recursion(mdp.next_state, population.chance * onward**2).solve_transpose(population.starts(False))
        weight = np.append(population.starts(False), (spread[:, None] * population.chance).ravel())
        rows = np.concatenate([mean, jump.reshape(S * V, -1)])[weight > 0]
        rows *= np.sqrt(weight[weight > 0])[:, None]
        best = solve(mdp, beta=population.beta, gamma=gamma).optimal_logits()[taken]
        visits = (population.arrivals[:, None] * population.chance)[taken]
        number = np.searchsorted(states, edges[:, 0])
        parts = (torch.from_numpy(x) for x in (number, rows.T @ rows, best, visits))
        return cls(mdp, population.beta, edges, *parts)

    def at(self, table: Floats) -> Tensor:
        """A table float[S, V] at the edges, float[E]."""
        return torch.from_numpy(table[self.edges[:, 0], self.edges[:, 1]])

    def level(self, logits: Tensor) -> Tensor:
        """Log-sum-exp of every state over the edges taken, float[P]."""
        table = torch.full((len(self.gram) - len(self.best), self.mdp.n_tokens), -torch.inf, dtype=logits.dtype)
        return table.index_put((self.row, torch.from_numpy(self.edges[:, 1])), logits).logsumexp(1)

    def error(self, logits: Tensor) -> float:
        """max |q_hat - q*| = beta max |l - l*|."""
        return self.beta * float((logits - self.best).abs().max())

    def gradient(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient float[E], its part through u float[P], pi of the edges float[E])."""
        E, level = len(self.best), self.level(logits)
        pi = torch.exp(logits - level[self.row])
        z = self.beta * torch.cat([logits - self.best, level - self.level(self.best)])
        by_z = 2 * self.beta * (self.gram @ z)
        return by_z[:E] + by_z[E:][self.row] * pi, by_z[E:], pi

    def hessian(self, logits: Tensor, *, residuals: bool = True) -> Tensor:
        """The exact Hessian float[E, E]; residuals=False leaves out what vanishes with them: 2 J'GJ, the same at l*."""
        E, (_, through, pi) = len(self.best), self.gradient(logits)
        choose = torch.zeros(len(self.gram) - E, E, dtype=logits.dtype)
        choose[self.row, torch.arange(E)] = pi  # d lse / d l
        cross = self.gram[:E, E:] @ choose
        out = 2 * self.beta**2 * (self.gram[:E, :E] + cross + cross.T + choose.T @ self.gram[E:, E:] @ choose)
        return out + torch.diag(through[self.row] * pi) - (choose * through[:, None]).T @ choose if residuals else out


# ----------------------------------------------------------------------------------------------- counting the updates
@dataclass(frozen=True, eq=False)
class Descent:
    """Gradient descent l -= step / share * gradient, where share float[E] is 1 (plain) or the visits."""

    quadratic: Quadratic
    share: Tensor

    def spectrum(self, logits: Tensor, *, residuals: bool = True) -> tuple[Tensor, Tensor]:
        """Eigenvalues (rising) and vectors of the Hessian in the scaling, share^-1/2 H share^-1/2."""
        root = self.share.sqrt()
        values, vectors = torch.linalg.eigh(self.quadratic.hessian(logits, residuals=residuals) / root[:, None] / root)
        return values, vectors

    def step(self, start: Tensor) -> float:
        """1 / lambda_max, of the squares' curvature at l* or at the start, whichever is larger."""
        return 1 / max(float(self.spectrum(x, residuals=False)[0][-1]) for x in (self.quadratic.best, start))

    def condition(self) -> float:
        """lambda_max / lambda_min at l*."""
        values = self.spectrum(self.quadratic.best)[0]
        return float(values[-1] / values[0])

    def many(self, logits: Tensor, step: float, model: tuple[Tensor, Tensor], m: int) -> Tensor:
        """m updates at once, exact where the loss is the quadratic model: l - (I - (I - step H)^m) H^-1 gradient."""
        values, vectors = model
        rate = step * values
        gradient = vectors.T @ (self.quadratic.gradient(logits)[0] / self.share.sqrt())
        flat = (rate * m).abs() < 1e-9  # there the sum of the powers is m, to 1e-9
        slow = -torch.expm1(m * torch.log1p(-rate.clamp(max=0.5)))  # 1 - (1 - rate)^m without cancellation
        power = torch.where(rate < 0.5, slow, 1 - (1 - rate) ** m) / torch.where(flat, 1.0, values)
        return logits - vectors @ (torch.where(flat, step * m, power) * gradient) / self.share.sqrt()

    def count(self, start: Tensor, step: float, goals: list[float], most: int = 2000) -> list[int]:
        """Updates after which max Q error is first at most each goal (falling), taken many at a time."""
        left, found, done, m, x = list(goals), list[int](), 0, 1, start
        model, error = self.spectrum(x), self.quadratic.error
        for _ in range(most):
            half = self.many(x, step, model, m)
            there = self.spectrum(half)
            end = self.many(half, step, there, m)
            gap = self.quadratic.beta * float((self.many(x, step, model, 2 * m) - end).abs().max())
            if m > 1 and not gap <= AGREE * error(end):
                m //= 2
                continue
            while left and error(end) <= left[0]:
                early = error(half) <= left[0]
                low, high = 0, m
                while high - low > max(1, m // 1024):
                    middle = (low + high) // 2
                    y = self.many(x, step, model, middle) if early else self.many(half, step, there, middle)
                    low, high = (low, middle) if error(y) <= left[0] else (middle, high)
                found.append(done + high + (0 if early else m))
                left.pop(0)
            if not left:
                return found
            done, x, model = done + 2 * m, end, self.spectrum(end)
            m *= 2 if gap <= AGREE / 4 * error(end) or m == 1 else 1
        raise bad("goals", "within reach", repr(goals), f"Max Q error is {error(x):g} after {done} updates.")

    def one_by_one(self, start: Tensor, step: float, goal: float, most: int) -> int | None:
        """The same count by taking every update; None where `most` do not do."""
        x = start
        for done in range(most + 1):
            if self.quadratic.error(x) <= goal:
                return done
            x = x - step / self.share * self.quadratic.gradient(x)[0]
        return None


# ------------------------------------------------------------------------------------------------------------- the study
def world(environment: str, length: int, seed: int) -> tuple[TokenMDP, float]:
    """(automaton, beta) of the study at a horizon."""
    if environment == "Needle":
        return make("Needle", length=length, n_tokens=2, seed=seed), 1 / (length * (1 + float(np.log(2))))
    return make("Chain", length=length, cost=1 / length, goal=2.0, leave=0.3, seed=seed), 0.25


def cases(settings: Settings) -> list[Case]:
    """What is measured, case by case."""
    lengths = {"on path": settings["on_path"], "uniform": settings["uniform"]}
    return [
        {"data": data, "environment": name, "length": T}
        for data, all_T in lengths.items()
        for name in ("Needle", "Chain")
        for T in all_T
    ]


def measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """A loss and an optimiser: updates to each goal, condition number, tail predicted by the spectrum, the count one by one."""
    mdp, beta = world(case["environment"], case["length"], seed)
    uniform = case["data"] == "uniform"
    best = solve(mdp, beta=beta)
    behavior = uniform_policy(mdp) if uniform else on_path(mdp, best.log_policy(), 1 / case["length"])
    population = Population(mdp, behavior, beta)
    out: dict[str, Any] = {"value": best.objective}
    for name, trace in LOSSES.items():
        quadratic = Quadratic.of(population, trace)
        start = quadratic.at(mdp.ref_logits)
        for optimiser in OPTIMISERS:
            share = quadratic.visits if optimiser == OPTIMISERS[1] else torch.ones_like(quadratic.visits)
            descent = Descent(quadratic, share)
            step = descent.step(start)
            counted = descent.count(start, step, settings["goals"])
            slowest = float(np.log1p(-step * float(descent.spectrum(quadratic.best)[0][0])))
            few = counted[-1] <= settings["one_by_one"]
            singly = descent.one_by_one(start, step, settings["goals"][-1], 2 * settings["one_by_one"]) if few else None
            out[f"{name}, {optimiser}"] = {
                "updates": counted, "condition": descent.condition(), "singly": singly,
                "tail": float(np.log(settings["goals"][-1] / settings["goals"][-2])) / slowest,
            }  # fmt: skip
    return out


def slope(x: Floats, y: Floats) -> Floats:
    """Least-squares slope of y float[..., n] over x float[n]."""
    centred = x - x.mean()
    found: Floats = np.asarray(y @ centred / (centred @ centred))
    return found


def summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """Curves with intervals, growth fitted seed by seed as a power of T and as an exponential, and how good the counts are."""
    out: dict[str, Any] = {"curves": {}, "growth": {}}
    gaps, tails = [], {"Needle": list[float](), "Chain": list[float]()}
    for data in ("on path", "uniform"):
        T = np.array(settings["uniform" if data == "uniform" else "on_path"], dtype=float)
        for environment in ("Needle", "Chain"):
            mine = [r for r in records if (r.case["data"], r.case["environment"]) == (data, environment)]
            for line in (f"{name}, {optimiser}" for name in LOSSES for optimiser in OPTIMISERS):
                runs = [[r.numbers[line] for r in mine if r.seed == seed] for seed in range(settings["seeds"])]
                updates = np.array([[n["updates"] for n in seed] for seed in runs], dtype=float)  # (seeds, T, goals)
                key = f"{environment}, {data}, {line}"
                out["curves"][key] = {
                    "T": T,
                    **{f"updates to {g:g}": _curve(updates[..., i]) for i, g in enumerate(settings["goals"])},
                    "condition": _curve([[n["condition"] for n in seed] for seed in runs]),
                }
                logs = np.log(updates[..., -1])
                power, rate = slope(np.log(T), logs), slope(T, logs)
                misfit = [_misfit(np.log(T), logs), _misfit(T, logs)]
                out["growth"][key] = {"power": vars(interval(power)), "rate": vars(interval(rate)), "misfit": misfit}
                for n in (n for seed in runs for n in seed):
                    if n["singly"] is not None:
                        gaps.append(abs(n["updates"][-1] / n["singly"] - 1))
                    if line.endswith("plain") and n["tail"] >= 100:  # of fewer, a whole number says little
                        tails[environment].append((n["updates"][-1] - n["updates"][-2]) / n["tail"])
    out["counts"] = {"compared": len(gaps), "worst": max(gaps, default=None)}
    out["tail over predicted"] = {key: [min(x), max(x)] for key, x in tails.items()}
    return out


def _curve(x: Any) -> dict[str, Any]:
    """The geometric mean over seeds (interquartile) and its interval."""
    found = interval(np.log(np.asarray(x, dtype=float)))
    return {key: np.exp(getattr(found, key)) for key in ("value", "low", "high")}


def _misfit(x: Floats, logs: Floats) -> float:
    """Root mean square of what a straight line leaves of the mean curve."""
    y = logs.mean(0)
    line = y.mean() + slope(x, y) * (x - x.mean())
    return float(np.sqrt(((y - line) ** 2).mean()))


def claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """What the figure shows, each with its numbers."""
    curves, growth = summary["curves"], summary["growth"]
    early, late = (f"updates to {g:g}" for g in (settings["goals"][0], settings["goals"][-1]))

    def last(environment: str, data: str, loss: str, which: str = late) -> dict[str, float]:
        curve = curves[f"{environment}, {data}, {loss}, plain"][which]
        return {key: curve[key][-1] for key in ("value", "low", "high")}

    plain = [key for key in growth if key.endswith("plain")]
    lines = {key: growth[key] for key in growth if key.startswith("Needle, uniform")}
    powers = {key: growth[key] for key in plain if "on path" in key}
    T = max(settings["on_path"])
    out = [
        Claim(
            "On data near the path the cost is a power of T; under uniform data Needle's is an exponential, by at least the "
            "factor 2 a token, and larger steps for rare entries do not cure it.",
            "; ".join(
                [f"{key}: power {said(g['power'])}" for key, g in powers.items()]
                + [f"{key}: rate {said(g['rate'])}" for key, g in lines.items()]
            ),
            all(g["misfit"][0] < g["misfit"][1] for g in powers.values())
            and all(g["misfit"][1] < g["misfit"][0] and g["rate"]["low"] >= np.log(2) for g in lines.values()),
        ),
    ]
    chain = [last("Chain", "on path", name) for name in LOSSES]
    out.append(
        Claim(
            f"On Chain, multi-step needs fewer updates than one-step at every goal (T = {T}).",
            f"to {settings['goals'][-1]:g}: one-step {said(chain[0])}, ShiQ {said(chain[1])}",
            chain[1]["high"] < chain[0]["low"],
        )
    )
    soon = [last("Needle", "on path", name, early) for name in LOSSES]
    out.append(
        Claim(
            f"On Needle multi-step brings the error to {settings['goals'][0]:g} first (T = {T}): the reward travels at once.",
            f"one-step {said(soon[0])}, ShiQ {said(soon[1])}",
            soon[1]["high"] < soon[0]["low"],
        )
    )
    return out + _limits(settings, summary)


def _limits(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """What multi-step does not give, and how good the counts are."""
    late = f"updates to {settings['goals'][-1]:g}"
    one, multi = (summary["curves"][f"Needle, on path, {name}, plain"][late] for name in LOSSES)
    T = settings["on_path"]
    cross = [t for t, a, b in zip(T, one["high"], multi["low"], strict=True) if b > a]
    below = [t for t, a, b in zip(T, one["low"], multi["high"], strict=True) if b < a]
    tails, counts = summary["tail over predicted"], summary["counts"]
    return [
        Claim(
            f"To {settings['goals'][-1]:g} it does not stay ahead on Needle: ShiQ's smaller step is slow on tokens off the "
            "string, which are rarely taken, and from some T on one-step is cheaper.",
            f"ShiQ cheaper at T = {below}, one-step at T = {cross}",
            bool(below) and (max(T) < 24 or (bool(cross) and min(cross) > max(below))),
        ),
        Claim(
            "The spectrum at l* predicts the tail: from the last goal but one to the last, ln(ratio) kappa updates on "
            "Chain, and no more than a quarter above that on Needle, where logits are still up to 1 off at the start of it.",
            "; ".join(f"{key}: measured / predicted {low:.3f} to {high:.3f}" for key, (low, high) in tails.items()),
            tails["Needle"][1] <= 1.25 and tails["Chain"][1] <= 1.1 and tails["Chain"][0] >= 0.8,
        ),
        Claim(
            "Updates taken many at a time are as many as one by one, where that can be run.",
            f"{counts['compared']} compared, worst difference {counts['worst']:.2g}",
            counts["compared"] > 0 and counts["worst"] <= 0.02,
        ),
    ]


@style()
def draw(result: Result) -> "Figure":
    """Updates against T on logarithmic axes; under uniform data against T itself, where an exponential is a straight line."""
    page = figure(figsize=(9.6, 3.6))
    panels = page.subplots(1, 3, sharey=True)
    goals = result.settings["goals"]
    titles = [("Needle", "on path"), ("Chain", "on path"), ("", "uniform")]
    for axes, (environment, data) in zip(panels, titles, strict=True):
        for key, curve in result.summary["curves"].items():
            where, how, name, optimiser = key.split(", ")
            if optimiser != "plain" or how != data or environment not in ("", where):
                continue
            color = COLORS["shiq" if name == "ShiQ" else "shifted"]
            marker = MARKERS["shiq" if name == "ShiQ" else "shifted"]
            for goal, line in ((goals[-1], "-"), (goals[0], ":"))[: 2 if environment else 1]:
                y = curve[f"updates to {goal:g}"]
                dashed = "--" if not environment and where == "Chain" else line
                label = f"{name}, to {goal:g}" if environment == "Needle" else None
                axes.plot(curve["T"], y["value"], dashed, color=color, marker=marker, ms=4, label=label,
                          mfc="white" if goal == goals[0] and environment else color)  # fmt: skip
                axes.fill_between(curve["T"], y["low"], y["high"], color=color, alpha=0.18, lw=0)
        axes.set(yscale="log", xlabel="horizon T, tokens", title=f"{environment}, {data}" if environment else "uniform data")
        if environment:
            axes.set_xscale("log", base=2)
            ticks = [t for t in (4, 8, 16, 32, 64) if t <= max(result.settings["on_path"])]
            axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.grid(axis="y")
    for where, text in (("Needle", "Needle (solid)"), ("Chain", "Chain (dashed)")):
        curve = result.summary["curves"][f"{where}, uniform, one-step, plain"]
        x, y = curve["T"][-1], curve[f"updates to {goals[-1]:g}"]["value"][-1]
        panels[2].annotate(text, (x, y), (0, 7), textcoords="offset points", ha="right", fontsize=8, color=GREY)
    panels[0].set_ylabel("updates until max |q̂ − q*| is small")
    page.legend(loc="outside lower center", ncols=4)
    return page


HORIZON = Study(
    name="horizon",
    title="The cost of the horizon: updates against T (a reconstruction)",
    question="How do updates to learn q* grow with the horizon, one-step or multi-step, near the path and on uniform data?",
    settings={
        "seeds": 10,
        "on_path": [4, 6, 8, 12, 16, 24, 32, 48, 64],
        "uniform": [4, 6, 8, 10, 12],
        "goals": [0.1, 1e-2, 1e-3],
        "one_by_one": 500,
    },
    fast={"seeds": 2, "on_path": [4, 8, 24], "uniform": [4, 8, 12], "one_by_one": 200},
    cases=cases,
    measure=measure,
    summarise=summarise,
    claims=claims,
    draw=draw,
)
