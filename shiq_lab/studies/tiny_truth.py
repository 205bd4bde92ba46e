"""The tiny transformer trained by ShiQ off-policy, against the exact truth at every prefix, on every deterministic environment.

Each environment's prefixes are unfolded; a small network is pretrained on samples of the environment and frozen as the
reference of that tree; a copy is trained by ShiQ on rows of a behaviour that never looks at the model. Then its logits are
read out as Q-values at all prefixes and allowed tokens. Bandit has one prefix where the policy speaks, whatever its size.
The seed draws the network's first weights, its pretraining data and the rows; the environments are the same.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shiq_lab import envs
from shiq_lab.learning import rows_of
from shiq_lab.plotting import GREY, PALETTE, figure, style
from shiq_lab.policies import mixture, uniform_policy
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study
from shiq_lab.tiny import pretrain, train_tiny

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Q_WITHIN, KL_WITHIN = 0.05, 1e-3  # of the range of q*; nats along an episode of pi*


@dataclass(frozen=True)
class Size:
    """An environment at 100 to 400 prefixes (Addition: 1,100, of 100 prompts), and what it takes: rows, updates."""

    parameters: dict[str, Any]
    steps: int = 1200
    rows: int = 20_000
    horizon: int | None = None
    mixed: bool = False  # half uniform, half the reference; else uniform


SIZES: dict[str, Size] = {
    "Bandit": Size({"n_arms": 128}, steps=400),
    "Tree": Size({"depth": 5, "n_tokens": 3}),
    "Needle": Size({"length": 5, "n_tokens": 3}, steps=600),
    "Chain": Size({"length": 7}, steps=2000),
    "Brackets": Size({"max_length": 6}, steps=600),
    "Parity": Size({"prompt_length": 2, "length": 5}, steps=2000),
    "Addition": Size({"digits": 1, "last_ends": 1}, steps=1500, rows=200_000),
    "Loop": Size({}, horizon=7, steps=1500),
    "ToolCall": Size({"n_functions": 5, "n_arguments": 4}, steps=600, mixed=True),
    "Star": Size({"arms": 3, "length": 5}, steps=1000),
    "RandomWalk": Size({"n_nodes": 8, "horizon": 5}, mixed=True),
    "Forbidden": Size({}),
    "Shaped": Size({"depth": 5, "n_tokens": 3}),
}


def cases(settings: Settings) -> list[Case]:
    """The environments."""
    chosen = settings["environments"] or list(SIZES)
    return [{"environment": name} for name in chosen]


def measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """Pretrain, solve the tree, train, and compare at every prefix."""
    name = case["environment"]
    size, environment = SIZES[name], envs.lookup(name)
    mdp = environment.builder(**size.parameters)
    if size.horizon is not None:
        mdp = replace(mdp, horizon=size.horizon)
    start = pretrain(mdp, beta=environment.beta, gamma=environment.gamma, seed=seed)
    tree = start.world.mdp
    speaks, edges = tree.is_policy, tree.allowed & tree.is_policy[:, None]
    behavior = uniform_policy(tree)
    if size.mixed:
        behavior = mixture(behavior, tree.ref_log_policy, 0.5)
    rows = rows_of(start.world, behavior, size.rows, seed=seed)
    tried = np.zeros(edges.shape, dtype=bool)
    acted = (rows.completion_mask[:, 1:] == 1).numpy()
    tried[rows.known_states()[:, :-1].numpy()[acted], rows.input_ids[:, 1:].numpy()[acted]] = True
    trace, _ = train_tiny(start, "ShiQ", rows, behavior, steps=size.steps)
    q = start.world.solution.q()[edges]
    first, last = trace.metrics[0], trace.metrics[-1]
    return {
        "prefixes": int(speaks.sum()), "edges": int(edges.sum()), "untried": int((edges & ~tried).sum()),
        "level_spread": float(tree.ref_logsumexp[speaks].std()), "level_mean": float(tree.ref_logsumexp[speaks].mean()),
        "cross_entropy": start.cross_entropy, "q_range": float(q.max() - q.min()), "steps": size.steps,
        "at": trace.at, "q_curve": [m.q_error for m in trace.metrics], "kl_curve": [m.kl for m in trace.metrics],
        "q_before": first.q_error, "q_error": last.q_error, "v_error": last.v_error, "kl_before": first.kl, "kl": last.kl,
        "gap": last.gap,
    }  # fmt: skip


def summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """The worst seed of every environment."""
    out: dict[str, Any] = {}
    for record in records:
        n = record.numbers
        line = out.setdefault(
            record.case["environment"], {"q_relative": 0.0, "kl": 0.0, "q_relative_before": 0.0, "kl_before": 0.0}
        )
        for key, value in (
            ("q_relative", n["q_error"] / n["q_range"]), ("q_relative_before", n["q_before"] / n["q_range"]),
            ("kl", n["kl"]), ("kl_before", n["kl_before"]),
        ):  # fmt: skip
            line[key] = max(line[key], value)
        line.update({key: n[key] for key in ("prefixes", "edges", "untried", "steps", "q_range")})
        line["level_spread"] = min(line.get("level_spread", np.inf), n["level_spread"])
        line["holds"] = line["q_relative"] <= Q_WITHIN and line["kl"] <= KL_WITHIN
    return out


def claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """The acceptance of the tiny transformer, and that there was something to learn."""
    lines = list(summary.values())
    q, kl = (max(line[key] for line in lines) for key in ("q_relative", "kl"))
    before = min(line["q_relative_before"] for line in lines)
    spreads = [line["level_spread"] for line in lines if line["prefixes"] > 1]  # of one prefix there is none
    said = [
        ("At every prefix and allowed token the logits are q* within 5 % of its range.", f"{q:.1%}", q <= Q_WITHIN),
        ("The policy is pi*: KL(pi* || pi) along an episode is at most 1e-3 nats.", f"{kl:.1e}", kl <= KL_WITHIN),
        ("The pretrained logits are no Q-values: half the range off somewhere.", f"{before:.0%}", before >= 0.5),
    ]
    if spreads:
        measured = f"standard deviation at least {min(spreads):.3f}, of several prefixes"
        said.append(("Their levels differ from prefix to prefix.", measured, min(spreads) >= 0.05))
    return [Claim(*parts) for parts in said]


@style()
def draw(result: Result) -> "Figure":
    """Two panels over training: max Q error as a share of the range of q*, and KL, a line an environment."""
    page = figure(figsize=(7.4, 3.4))
    left, right = page.subplots(1, 2)
    names = list(result.summary)
    markers = "osD^vX*P<>hdp"
    colors = [PALETTE[key] for key in ("blue", "vermilion", "green", "orange", "sky", "pink", "black")]
    for i, name in enumerate(names):
        record = next(r for r in result.records if r.case["environment"] == name)
        n = record.numbers
        options: dict[str, Any] = {
            "color": colors[i % len(colors)], "marker": markers[i % len(markers)], "ls": "-" if i < len(colors) else "--",
            "lw": 1.1, "ms": 3.5, "markevery": 4, "label": name,
        }  # fmt: skip
        share = np.array(n["at"]) / n["steps"]
        left.plot(share, np.array(n["q_curve"]) / n["q_range"], **options)
        right.plot(share, np.maximum(n["kl_curve"], 1e-14), **options)
    for axes, bound, text in ((left, Q_WITHIN, "max |q̂ − q*| / range of q*"), (right, KL_WITHIN, "KL(π* ‖ π), nats")):
        axes.axhline(bound, color=GREY, lw=1, ls=":")
        axes.annotate("asked", (1, bound), (0, 2), textcoords="offset points", color=GREY, fontsize=8, ha="right")
        axes.set(yscale="log", xlabel="share of the updates", ylabel=text)
    page.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return page


TINY = Study(
    name="tiny",
    title="A tiny transformer's logits become Q-values",
    question="Do a network's logits become q* at every prefix, when ShiQ trains it on data it never chose? (The worst seed.)",
    settings={"seeds": 1, "environments": None},
    fast={"environments": ["Needle", "Brackets", "ToolCall"]},
    cases=cases,
    measure=measure,
    summarise=summarise,
    claims=claims,
    draw=draw,
)
