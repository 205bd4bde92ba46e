"""Does training from other policies' data reach pi*: ShiQ, and policy gradient with and without importance weights?

A reconstruction of the off-policy experiment, with the fixed points computed beside it.
OFF_POLICY, tables: Tree (depth 3, four letters, 64 strings, gamma 1, beta 1); 16,384 rows, drawn once, of one of four policies:
the reference; uniform; adversarial, softmax(-q* / (2 beta)), which avoids what pi* likes; a mixture, in every state half
reference and half adversarial. Adam (0.2, cosine) over the whole data set. A seed is another environment (rewards, reference)
and other rows.
OFF_POLICY_TINY: the same with a pretrained tiny transformer at 85 prefixes (depth 4), Adam (3e-3, cosine), and ShiQ on so few
uniform rows that some prefixes are never visited: what does the network do there? A table leaves them at the reference.

Theory. At pi* every row of a deterministic world has R_b(y) = v*, whoever wrote it, so ShiQ's residuals are 0 row by row:
pi* is its zero on any data that cover, however often each row occurs (its speed is another matter: rare rows weigh little).
The policy gradient sum mu(y) R_b(y) d ln pi(y) is v* sum_s occ_mu(s) (mu - pi*)(. | s) there, not 0 unless mu = pi*; where it
settles, mu(y) R_b(y) = l pi(y) on every string, l set by sum pi = 1. Importance weights pi(y) / mu(y) cure that in
expectation: on the listing the gradient equals the on-policy one. On n rows with frequencies m(y) it settles at
m(y) / mu(y) R_b(y) = l instead, off by the noise of the frequencies, and of n rows only (sum w)^2 / sum w^2 count, at pi*
n / sum_y pi*(y)^2 / mu(y). What plain REINFORCE lacks off-policy is a baseline: RLOO (mean of the group) has v* for it at pi*,
and pi* for its fixed point. A string never seen is lost to all of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.bellman import evaluate
from shiq_lab.envs import make
from shiq_lab.graph import Floats
from shiq_lab.learning import Table, Trace, descend, rows_of, world_of
from shiq_lab.losses.residuals import actions_of
from shiq_lab.objectives import World, fields, lookup, spoken
from shiq_lab.plotting import GREY, PALETTE, figure, style
from shiq_lab.policies import mixture, softmax_policy, uniform_policy
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study, numbers_of
from shiq_lab.studies.statistics import interval, said
from shiq_lab.tiny import pretrain, train_tiny

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEHAVIORS = ("reference", "uniform", "adversarial", "mixture")
PLAIN, WEIGHTED = "REINFORCE, KL in the reward", "REINFORCE, importance weights"
LOSSES = ("ShiQ", PLAIN, WEIGHTED, "RLOO")
LOOKS = dict(
    zip(BEHAVIORS, (("blue", "o", "-"), ("green", "s", "--"), ("vermilion", "^", "-"), ("orange", "D", "-.")), strict=True)
)
EXACT = 1e-12  # two float64 roads to sums of at most 256 terms below 10


def behavior_of(world: World, name: str) -> Floats:
    """The policy that wrote the data, float[S, V]; "own" (rows follow the policy) starts as the reference."""
    mdp = world.mdp
    dislike = np.where(mdp.allowed & mdp.is_policy[:, None], -world.solution.q() / (2 * world.beta), 0.0)
    adversarial = softmax_policy(mdp, dislike)
    tables = {
        "own": mdp.ref_log_policy,
        "reference": mdp.ref_log_policy,
        "uniform": uniform_policy(mdp),
        "adversarial": adversarial,
    }
    return tables[name] if name in tables else mixture(mdp.ref_log_policy, adversarial, 0.5)


# ---------------------------------------------------------------------------------------------------- strings, not tokens
@dataclass(frozen=True)
class Strings:
    """Every string of a world without random replies: its return and its probability under reference, pi* and behaviour.

    share: how often it occurs in the data, out of all rows; all float[N], in the order of world.rows.
    """

    returns: Floats
    reference: Floats
    best: Floats
    behavior: Floats
    share: Floats

    @classmethod
    def of(cls, world: World, behavior: Floats, rows: TokenBatch | None = None) -> "Strings":
        """The strings of a world, with what they pay."""
        listed = world.rows
        chance = {
            name: np.exp(spoken(world.mdp, listed, torch.tensor(np.array(table)), policy=True).numpy())
            for name, table in (("ref", world.mdp.ref_log_policy), ("best", world.solution.log_policy()), ("mu", behavior))
        }
        share = chance["mu"]
        if rows is not None:
            keys = {tuple(ids): i for i, ids in enumerate(_ids(listed))}
            share = np.zeros(len(listed))
            share[[keys[tuple(ids)] for ids in _ids(rows)]] = rows.weights.numpy()
        returns = (listed.rewards * listed.completion_mask).sum(1).numpy()
        return cls(returns, chance["ref"], chance["best"], chance["mu"], share)

    def kl(self, log_policy: Floats) -> float:
        """KL(pi* || pi) of whole strings, from ln pi float[N]."""
        return float((self.best * (np.log(self.best) - log_policy)).sum())

    def settled(self, beta: float, *, weighted: bool) -> Floats | None:
        """ln pi float[N] where REINFORCE settles on these data (gamma = 1); None where a string is missing or v* <= 0.

        Plain: share (R - beta ln(pi / pi_ref)) = l pi. Weighted: share / mu (R - beta ln(pi / pi_ref)) = l. Both have one
        solution with sum pi = 1 if v* > 0, which pays the multiplier l > 0; for less the plain one need not settle at all.
        """
        goal = self.returns + beta * np.log(self.reference)  # beta ln pi at l = 0
        if (self.share <= 0).any() or np.logaddexp.reduce(goal / beta) <= 0:
            return None

        def at(price: float) -> Floats:
            if weighted:
                found: Floats = (goal - price * self.behavior / self.share) / beta
                return found
            return _bisect(lambda x: goal - beta * x - price * np.exp(x) / self.share, goal / beta)

        low, high = 0.0, 1.0
        while np.logaddexp.reduce(at(high)) > 0:
            low, high = high, 2 * high
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if np.logaddexp.reduce(at(middle)) > 0 else (low, middle)
        return at((low + high) / 2)


def _ids(batch: TokenBatch) -> list[list[int]]:
    return torch.where(batch.attention_mask == 1, batch.input_ids, -1).tolist()


def _bisect(falling: Any, top: Floats) -> Floats:
    """The zeros of falling functions of x float[N], each below its `top`."""
    width = np.ones_like(top)
    while (falling(top - width) < 0).any():
        width = np.where(falling(top - width) < 0, 2 * width, width)
    low, high = top - width, top.copy()
    for _ in range(100):
        middle = (low + high) / 2
        above = falling(middle) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (low + high) / 2


def effective(world: World, rows: TokenBatch, behavior: Floats, policy: Floats) -> float:
    """The effective share of the rows, (sum w)^2 / (n sum w^2) with w = pi(y) / mu(y); equal rows count one by one."""
    log = [spoken(world.mdp, rows, torch.tensor(np.array(table)), policy=True) for table in (policy, behavior)]
    ratio = torch.exp(log[0] - log[1])
    return float((rows.weights * ratio).sum() ** 2 / (rows.weights * ratio**2).sum())


def coverage(world: World, rows: TokenBatch, strings: Strings) -> dict[str, float]:
    """What the data hold: of all strings, of pi*'s mass, of all prefixes and tokens; and what of the prefixes."""
    acted = actions_of(rows)
    before = torch.nn.functional.pad(rows.known_states()[:, :-1], (1, 0), value=world.mdp.start)[:, 1:]
    state, token = (acted.of(x.double())[acted.real].long().tolist() for x in (before, rows.input_ids[:, 1:]))
    tried, visited = set(zip(state, token, strict=True)), set(state)
    seen = strings.share > 0
    prefixes = len(world.starts) + len(world.inner)
    return {
        "strings": float(seen.mean()),
        "mass": float(strings.best[seen].sum()),
        "tokens": len(tried) / len(world.edges),
        "prefixes": len(visited) / prefixes,
    }


# --------------------------------------------------------------------------------------------------------------- measuring
def world_at(settings: Settings, seed: int) -> World:
    """The environment of a seed."""
    return world_of(make("Tree", depth=settings["depth"], n_tokens=4, seed=seed), settings["beta"])


def marks(steps: int) -> list[int]:
    """After how many updates to measure."""
    return sorted({0, *(round(x) for x in np.geomspace(1, steps, 36))})


def cases(settings: Settings) -> list[Case]:
    """What is measured, case by case."""
    runs = [{"behavior": b, "loss": loss} for b in BEHAVIORS for loss in LOSSES]
    return [*runs, {"behavior": "own", "loss": PLAIN}, *({"behavior": b, "loss": "listing"} for b in BEHAVIORS)]


def measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """One case at one seed."""
    world = world_at(settings, seed)
    if case["loss"] == "listing":
        return listing(world, case["behavior"])
    own = case["behavior"] == "own"
    behavior = behavior_of(world, case["behavior"])
    rows = None if own else rows_of(world, behavior, settings["rows"], seed=seed)
    table, seen, at = Table(world.mdp), [], marks(settings["steps"])
    done = 0

    def model() -> Tensor:
        nonlocal done
        logits: Tensor = table()
        if done in at:
            seen.append(logits.detach().numpy())
        done += 1
        return logits

    trace = descend(
        case["loss"], world, rows, behavior, model=model, parameters=table.parameters(), steps=settings["steps"],
        learning_rate=settings["learning_rate"], schedule="cosine", record_at=at,
    )  # fmt: skip
    out: dict[str, Any] = {"at": trace.at, "kl": [m.kl for m in trace.metrics]}
    if rows is None:
        return out
    strings = Strings.of(world, behavior, rows)
    out |= coverage(world, rows, strings)
    out["effective"] = [effective(world, rows, behavior, softmax_policy(world.mdp, x)) for x in seen]
    out["predicted"] = None
    if case["loss"] in (PLAIN, WEIGHTED):
        settled = strings.settled(world.beta, weighted=case["loss"] == WEIGHTED)
        out["predicted"] = None if settled is None else strings.kl(settled)
    return out


def listing(world: World, name: str) -> dict[str, float]:
    """The limit of many rows, every string with its exact chance: gradients at pi* and elsewhere, by two roads."""
    mdp, behavior = world.mdp, behavior_of(world, name)
    best = world.solution.log_policy()
    strings = Strings.of(world, behavior)
    tables = torch.stack([torch.tensor(world.solution.optimal_logits()), torch.tensor(mdp.ref_logits), world.elsewhere])
    policies = torch.stack([torch.tensor(softmax_policy(mdp, t.numpy())) for t in tables])
    same = torch.tensor(np.array(behavior)).expand_as(tables)
    none = torch.zeros(tables.shape[:2], dtype=torch.float64)
    plain, weighted, shiq, rloo = (
        fields(lookup(loss), world, tables, none, same)[0] for loss in (PLAIN, WEIGHTED, "ShiQ", "RLOO")
    )
    on_policy = fields(lookup(PLAIN), world, tables, none, policies)[0]
    visits = evaluate(mdp, behavior, beta=world.beta).occupancy  # (S, V), gamma = 1
    use = mdp.allowed & mdp.is_policy[:, None]
    here = np.where(use, visits, 0.0)
    formula = -world.solution.objective * np.where(
        use, here - here.sum(1, keepdims=True) * np.exp(np.where(use, best, 0.0)), 0.0
    )
    return {
        "weighted_gap": float((weighted - on_policy).abs().max() / on_policy.abs().max()),
        "plain_at_best": float(plain[0].abs().max()),
        "formula_gap": float(np.abs(plain[0].numpy() - formula).max()),
        "shiq_at_best": float(shiq[0].abs().max()),
        "rloo_at_best": float(rloo[0].abs().max()),
        "weighted_at_best": float(weighted[0].abs().max()),
        "effective_start": 1 / float((strings.reference**2 / strings.behavior).sum()),
        "effective_best": 1 / float((strings.best**2 / strings.behavior).sum()),
        "v_star": float(world.solution.objective),
    }


# --------------------------------------------------------------------------------------------------------------- summing up
def run_of(many: list[dict[str, Any]]) -> dict[str, Any]:
    """A curve with its interval, and its ends."""
    out: dict[str, Any] = {"at": many[0]["at"], "kl": vars(interval([x["kl"] for x in many]))}
    out["end"] = vars(interval([x["kl"][-1] for x in many]))
    covered = [x for x in many if x.get("strings", 0.0) == 1]
    out["covered"] = len(covered)
    out["end_covered"] = vars(interval([x["kl"][-1] for x in covered])) if covered else None
    out["worst_covered"] = max((x["kl"][-1] for x in covered), default=None)
    if "effective" in many[0]:
        out["effective"] = vars(interval([x["effective"] for x in many]))
    known = [x for x in many if x.get("predicted") is not None]
    if known:
        out["known"] = len(known)
        out["predicted"] = vars(interval([x["predicted"] for x in known]))
        out["settled"] = vars(interval([x["kl"][-1] for x in known]))
        out["prediction_gap"] = vars(interval([abs(x["kl"][-1] / x["predicted"] - 1) for x in known]))
    return out


def summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """What the figure and the claims need, with intervals over the seeds."""
    out: dict[str, Any] = {"own": run_of(numbers_of(records, behavior="own"))}
    far, near = ([x["kl"][-1] for x in numbers_of(records, behavior=b, loss=WEIGHTED)] for b in ("adversarial", "reference"))
    out["farther"] = vars(interval([a / b for a, b in zip(far, near, strict=True)]))
    for b in BEHAVIORS:
        out[b] = {loss: run_of(numbers_of(records, behavior=b, loss=loss)) for loss in LOSSES}
        many = numbers_of(records, behavior=b, loss="ShiQ")
        out[b]["coverage"] = {k: vars(interval([x[k] for x in many])) for k in ("strings", "mass", "tokens", "prefixes")}
        limits = numbers_of(records, behavior=b, loss="listing")
        out[b]["listing"] = {k: vars(interval([x[k] for x in limits])) for k in limits[0]}
        for name, most in (("weighted_gap", max), ("formula_gap", max), ("shiq_at_best", max), ("plain_at_best", min)):
            out[b]["listing"][f"{most.__name__}_{name}"] = most(x[name] for x in limits)
    return out


# ------------------------------------------------------------------------------------------------------------------- claims
def each(text: Any) -> str:
    """One phrase a behaviour."""
    return "; ".join(f"{b} {text(b)}" for b in BEHAVIORS)


def claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """What the figure shows, each with its numbers."""
    s, limit = summary, {b: summary[b]["listing"] for b in BEHAVIORS}
    goal = settings["goal"]

    def shiq(b: str) -> str:
        c, run = s[b]["coverage"], s[b]["ShiQ"]
        return (
            f"{said(run['end'])} nats ({c['strings']['value']:.1%} of the strings seen; all of them in {run['covered']} seeds)"
        )

    done = [s[b]["ShiQ"]["worst_covered"] for b in BEHAVIORS]
    predicted = [s[b][loss] for b in BEHAVIORS for loss in (PLAIN, WEIGHTED) if "predicted" in s[b][loss]]
    plain = [s[b][PLAIN] for b in BEHAVIORS]
    shares = {b: limit[b]["effective_best"]["value"] for b in BEHAVIORS}
    return [
        Claim(
            f"ShiQ reaches pi* from each of the four data sets: KL at the end at most {goal:g} wherever all strings occur.",
            each(shiq),
            all(x is not None and x <= goal for x in done),
        ),
        Claim(
            "REINFORCE without weights settles elsewhere, off by a KL that the data predict.",
            each(lambda b: f"{said(s[b][PLAIN]['settled'])}, predicted {said(s[b][PLAIN]['predicted'])}"),
            min(x["settled"]["low"] for x in plain) > goal and all(x["prediction_gap"]["high"] <= 0.1 for x in plain),
        ),
        Claim(
            "At pi* its expected gradient is v* sum occ_mu (mu - pi*), not 0; ShiQ's is 0.",
            f"gap between the two roads {max(x['max_formula_gap'] for x in limit.values()):.0e}; "
            + each(lambda b: f"{said(limit[b]['plain_at_best'])}, ShiQ {limit[b]['max_shiq_at_best']:.0e}"),
            all(
                x["max_formula_gap"] <= EXACT and x["max_shiq_at_best"] <= EXACT and x["min_plain_at_best"] > 1e-3
                for x in limit.values()
            ),
        ),
        Claim(
            "Importance weights cure it in the limit of many rows: the weighted gradient is the on-policy one, to rounding.",
            "largest relative difference " + each(lambda b: f"{limit[b]['max_weighted_gap']:.0e}"),
            all(x["max_weighted_gap"] <= EXACT for x in limit.values()),
        ),
        Claim(
            f"On {settings['rows']:,} rows it settles off pi* by the noise of their frequencies, as predicted; ShiQ does not.",
            each(lambda b: f"{said(s[b][WEIGHTED]['end'])} nats, ShiQ {said(s[b]['ShiQ']['end'])}")
            + f"; predicted to {max(x['prediction_gap']['value'] for x in predicted):.1%} where all strings occur",
            all(s[b][WEIGHTED]["end"]["low"] > s[b]["ShiQ"]["end"]["high"] for b in BEHAVIORS),
        ),
        Claim(
            "The fewer rows count at pi*, the farther off; their effective share falls as the policy leaves the data.",
            each(lambda b: f"{limit[b]['effective_start']['value']:.2g} at the reference, {shares[b]:.2g} at pi*")
            + f"; KL from adversarial over KL from reference data, paired: {said(s['farther'])}",
            s["farther"]["low"] > 1
            and all(limit[b]["effective_best"]["high"] < limit[b]["effective_start"]["low"] for b in BEHAVIORS)
            and min(shares, key=lambda b: shares[b]) == "adversarial",
        ),
        Claim(
            "What plain REINFORCE lacks off-policy is a baseline: RLOO, unweighted, reaches pi* as well.",
            each(lambda b: said(s[b]["RLOO"]["end"])),
            all(s[b]["RLOO"]["worst_covered"] is not None and s[b]["RLOO"]["worst_covered"] <= goal for b in BEHAVIORS)
            and all(limit[b]["rloo_at_best"]["high"] <= EXACT for b in BEHAVIORS),
        ),
    ]


# ------------------------------------------------------------------------------------------------------------------ drawing
def curve(axes: "Axes", run: dict[str, Any], name: str | None, label: str, floor: float, **more: Any) -> None:
    """KL against updates with its interval; name: whose colours, None for the on-policy reference."""
    color, marker, line = LOOKS[name] if name else ("black", "", ":")
    at = np.maximum(run["at"], 0.7)
    value, low, high = (np.maximum(run["kl"][k], floor) for k in ("value", "low", "high"))
    look = {"color": PALETTE[color], "marker": marker, "ls": line, "markevery": 0.13, **more}
    axes.fill_between(at, low, high, color=PALETTE[color], alpha=0.16, lw=0)
    axes.plot(at, value, label=label, **look)


def frame(axes: "Axes", title: str, steps: int, ylim: tuple[float, float]) -> None:
    """One panel, empty: axes, scales and title."""
    ticks = [0.7, *(t for t in (1, 10, 100, 1000) if 1 < t <= steps)]
    axes.set(xscale="log", yscale="log", xlabel="updates", ylim=ylim)
    axes.set_xticks(ticks, ["0", *(f"{t:,.0f}" for t in ticks[1:])])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set_title(title, fontsize=10)


@style()
def draw(result: Result) -> "Figure":
    """The figure."""
    page = figure(figsize=(9, 3.7))
    panels = page.subplots(1, 3, sharey=True)
    titles = ("ShiQ", "REINFORCE, unweighted", "REINFORCE, importance weights")
    floor, summary = 1e-6, result.summary
    for axes, loss, title in zip(panels, (LOSSES[0], PLAIN, WEIGHTED), titles, strict=True):
        for b in BEHAVIORS:
            curve(axes, summary[b][loss], b, f"{b} data", floor)
            if "predicted" in summary[b][loss]:
                axes.plot(
                    [1.25 * result.settings["steps"]], [summary[b][loss]["predicted"]["value"]], marker="_", ms=9, mew=2,
                    color=PALETTE[LOOKS[b][0]], clip_on=False,
                )  # fmt: skip
        curve(axes, summary["own"], None, "on-policy REINFORCE", floor)
        frame(axes, title, result.settings["steps"], (floor / 1.5, 10))
    panels[0].set_ylabel("KL(π* ‖ π), nats")
    panels[1].text(0.03, 0.04, "bars on the right:\nwhere theory says\nit settles", transform=panels[1].transAxes, color=GREY)
    page.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, columnspacing=1.2)
    return page


OFF_POLICY = Study(
    name="off-policy",
    title="Off-policy data on tables: ShiQ against policy gradient (a reconstruction)",
    question="Does training from other policies' data reach pi*?",
    settings={
        "seeds": 10, "depth": 3, "beta": 1.0, "rows": 16384, "steps": 600, "learning_rate": 0.2, "goal": 0.01
    },
    fast={"seeds": 1, "depth": 2, "rows": 8192},
    cases=cases,
    measure=measure,
    summarise=summarise,
    claims=claims,
    draw=draw,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the tiny version
TINY_GRADIENTS = ("reference", "adversarial")  # the data that policy gradients are tried on


def cases_tiny(settings: Settings) -> list[Case]:
    """What is measured on the network, case by case."""
    return [{"depth": settings["depth"]}]


def local_kl(world: World, logits: Floats, states: list[int]) -> list[float]:
    """KL(pi*(.|s) || pi(.|s)) at these states, in nats."""
    allowed = world.mdp.allowed
    best, own = (np.where(allowed, x, 0.0) for x in (world.solution.log_policy(), softmax_policy(world.mdp, logits)))
    gap = np.where(allowed, np.exp(best) * (best - own), 0.0).sum(1)
    return [float(gap[s]) for s in states]


def unvisited_of(world: World, rows: TokenBatch) -> list[int]:
    """Policy states of which no row shows an action."""
    acted = actions_of(rows)
    before = torch.nn.functional.pad(rows.known_states()[:, :-1], (1, 0), value=world.mdp.start)[:, 1:]
    visited = set(acted.of(before.double())[acted.real].long().tolist())
    return [s for s in sorted([*world.starts.tolist(), *world.inner.tolist()]) if s not in visited]


def measure_tiny(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """All runs from one pretrained network; the last on few uniform rows, compared at prefixes that no row shows."""
    mdp = make("Tree", depth=case["depth"], n_tokens=4, seed=seed)
    start = pretrain(mdp, beta=settings["beta"], seed=seed, steps=settings["pretraining"])
    world, steps = start.world, settings["steps"]

    def trained(loss: str, name: str, n: int) -> tuple[dict[str, Any], Trace, TokenBatch]:
        behavior = behavior_of(world, name)
        rows = rows_of(world, behavior, n, seed=seed)
        trace, _ = train_tiny(start, loss, None if name == "own" else rows, behavior, steps=steps, record_at=marks(steps)[::2])
        found: dict[str, Any] = {"at": trace.at, "kl": [m.kl for m in trace.metrics], "predicted": None}
        found["q_error"] = [m.q_error for m in trace.metrics]
        if name != "own":
            strings = Strings.of(world, behavior, rows)
            found |= coverage(world, rows, strings)
            ends = [world.mdp.ref_log_policy, softmax_policy(world.mdp, trace.logits)]
            found["effective"] = [effective(world, rows, behavior, policy) for policy in ends]
            if loss != "ShiQ" and (settled := strings.settled(world.beta, weighted=loss == WEIGHTED)) is not None:
                found["predicted"] = strings.kl(settled)
        return found, trace, rows

    out = {f"ShiQ, {b}": trained("ShiQ", b, settings["rows"])[0] for b in BEHAVIORS}
    out |= {f"{loss}, {b}": trained(loss, b, settings["rows"])[0] for b in TINY_GRADIENTS for loss in (PLAIN, WEIGHTED)}
    out["own"] = trained(PLAIN, "own", 1)[0]
    out["few"], trace, rows = trained("ShiQ", "uniform", settings["few"])
    unseen = unvisited_of(world, rows)
    everywhere = sorted([*world.starts.tolist(), *world.inner.tolist()])
    for name, states in (("unvisited", unseen), ("visited", [s for s in everywhere if s not in unseen])):
        before, after = (local_kl(world, np.array(x), states) for x in (world.mdp.ref_logits, trace.logits))
        out[name] = {"n": len(states), "before": before, "after": after}
    return out


def summarise_tiny(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """The same for the network."""
    many = [r.numbers for r in records]
    runs = [key for key in many[0] if key not in ("visited", "unvisited")]
    out: dict[str, Any] = {key: run_of([x[key] for x in many]) for key in runs}
    for key in runs:
        out[key]["q_end"] = vars(interval([x[key]["q_error"][-1] for x in many]))
        if "strings" in many[0][key]:
            out[key]["coverage"] = {
                k: vars(interval([x[key][k] for x in many])) for k in ("strings", "mass", "tokens", "prefixes")
            }
    for name in ("visited", "unvisited"):
        found = [x[name] for x in many if x[name]["n"]]
        before, after = (np.array([np.mean(x[k]) for x in found]) for k in ("before", "after"))
        out[name] = {"n": sum(x["n"] for x in found), "before": vars(interval(before)), "after": vars(interval(after))}
        out[name]["ratio"] = vars(interval(after / before))
    return out


def claims_tiny(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """What the figure of the network shows."""
    s, goal = summary, settings["goal"]
    shiq = {b: s[f"ShiQ, {b}"] for b in BEHAVIORS}
    plain, weighted = ({b: s[f"{loss}, {b}"] for b in TINY_GRADIENTS} for loss in (PLAIN, WEIGHTED))
    away, near = s["unvisited"], s["visited"]

    def seen(b: str) -> str:
        return f"{said(shiq[b]['end'])} nats ({shiq[b]['coverage']['strings']['value']:.1%} of the strings seen)"

    return [
        Claim(
            f"ShiQ trains the network to KL(pi* || pi) <= {goal:g} on reference, uniform and mixed data alike.",
            each(seen),
            all(shiq[b]["end"]["high"] <= goal for b in ("reference", "uniform", "mixture")),
        ),
        Claim(
            "REINFORCE without weights settles elsewhere on the same rows.",
            "; ".join(f"{b} {said(plain[b]['end'])} nats against {said(shiq[b]['end'])}" for b in TINY_GRADIENTS),
            all(plain[b]["end"]["low"] > max(goal, shiq[b]["end"]["high"]) for b in TINY_GRADIENTS),
        ),
        Claim(
            "With importance weights it comes closer than without; on adversarial data the weights' noise keeps it off.",
            "; ".join(
                f"{b} {said(weighted[b]['end'])} nats, effective share of the rows {weighted[b]['effective']['value'][1]:.2g}"
                for b in TINY_GRADIENTS
            )
            + f"; on-policy {said(s['own']['end'])}",
            weighted["adversarial"]["end"]["low"] > s["own"]["end"]["high"]
            and weighted["reference"]["end"]["high"] < plain["reference"]["end"]["low"],
        ),
        Claim(
            f"At prefixes that none of {settings['few']} uniform rows shows, where a table stays at the reference, the network"
            " moves, and away from pi* (rewards of different prefixes have nothing in common).",
            f"mean KL there {said(away['before'])} before, {said(away['after'])} after, over {away['n']} prefixes; at visited"
            f" ones {said(near['before'])} and {said(near['after'])}",
            away["ratio"]["low"] > 1,
        ),
    ]


@style()
def draw_tiny(result: Result) -> "Figure":
    """The figure of the network."""
    page = figure(figsize=(9, 3.7))
    left, middle, right = page.subplots(1, 3)
    summary, steps, floor = result.summary, result.settings["steps"], 1e-5
    for b in BEHAVIORS:
        curve(left, summary[f"ShiQ, {b}"], b, f"{b} data", floor)
    for axes in (left, middle):
        curve(axes, summary["own"], None, "on-policy REINFORCE", floor)
    for b in TINY_GRADIENTS:
        curve(middle, summary[f"{PLAIN}, {b}"], b, b, floor)
        curve(middle, summary[f"{WEIGHTED}, {b}"], b, b, floor, ls=":", mfc="white")
    frame(left, "ShiQ", steps, (floor / 1.5, 10))
    frame(middle, "REINFORCE, hollow: weighted", steps, (floor / 1.5, 10))
    left.set_ylabel("KL(π* ‖ π), nats")
    for i, name in enumerate(("visited", "unvisited")):
        for shift, key, color, label in (
            (-0.2, "before", GREY, "reference = a table"),
            (0.2, "after", PALETTE["vermilion"], "network"),
        ):
            x = summary[name][key]
            around = [[x["value"] - x["low"]], [x["high"] - x["value"]]]
            label = "reference" if name == "visited" and key == "before" else label
            right.bar(i + shift, x["value"], 0.36, yerr=around, color=color, capsize=3)
            right.text(i + shift, x["high"], f" {label}", rotation=90, ha="center", va="bottom", fontsize=8)
    right.set_xticks([0, 1], ["visited", "never visited"])
    right.margins(y=0.5)
    right.set(ylabel="mean KL at a prefix, nats")
    right.set_title(f"ShiQ on {result.settings['few']} rows: prefixes", fontsize=10)
    page.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, columnspacing=1.2)
    return page


OFF_POLICY_TINY = Study(
    name="off-policy-tiny",
    title="Off-policy data and a tiny transformer: ShiQ against policy gradient (a reconstruction)",
    question="Does a network trained from other policies' data reach pi*, also at prefixes that it never saw?",
    settings={"seeds": 10, "depth": 4, "beta": 1.0, "rows": 16384, "few": 64, "steps": 300, "pretraining": 200, "goal": 0.01},
    fast={"seeds": 2, "depth": 2, "rows": 512, "few": 6, "steps": 40, "pretraining": 20},
    cases=cases_tiny,
    measure=measure_tiny,
    summarise=summarise_tiny,
    claims=claims_tiny,
    draw=draw_tiny,
)
