"""Every loss of the fixed-point table trains the same tiny transformer: which find pi*, and whose logits are then q*?

Tree (depth 3, three letters: 13 prefixes, 27 strings; gamma 1, beta 1). A network is pretrained and frozen as the reference; a
copy is trained by each loss on the exact listing of uniform data, and by those that need it on its own rows as well. Adam
(3e-3, cosine; values of its own at 3e-2), the same updates for all. A seed is another environment and other initial weights.

Theory, from the table: on data of another policy in a deterministic world the losses called "always", "path" and
"deterministic" have pi* for their fixed point, the others have not; on their own rows "on-policy" ones have it too. Of all
these only the losses that see every level make the logits Q-values. Beside the theory: the semi-gradient through the value
fixes one number a state, and SFT on its own rows fixes nothing; both stay where they are.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from shiq_lab.envs import make
from shiq_lab.learning import rows_of
from shiq_lab.objectives import NOTHING, ONE_A_STATE, Subject, lookup, subjects
from shiq_lab.plotting import GREY, PALETTE, figure, style
from shiq_lab.policies import uniform_policy
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study
from shiq_lab.studies.statistics import interval, said
from shiq_lab.tiny import pretrain, train_tiny

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOUND, MISSED = 0.01, 0.1  # KL in nats: pi* is found; and of the range of q*: the logits are, or are not, q*
SAME = {"CoPG, pairs across prompts": "CoPG", "TBRM at l*": "TBRM"}  # one prompt; one loss, asked at another table there
PLAIN = "REINFORCE, KL in the reward"
KINDS = {"q*": "vermilion", "pi*": "blue", "neither": "black"}


def expected(loss: Subject, own: bool) -> str:
    """What theory says of a loss on uniform data, or on its own rows: "q*", "pi*" alone, or "neither"."""
    keeps = loss.theory in ("always", "path", "deterministic") or (own and loss.theory == "on-policy")
    if not keeps or loss.fixes in (NOTHING, ONE_A_STATE):
        return "neither"
    return "q*" if loss.level == "all" else "pi*"


def cases(settings: Settings) -> list[Case]:
    """Every loss of single rows on uniform data; those that keep pi* on their own rows alone, on these too."""
    singles = [s for s in subjects() if not s.twos and s.name not in SAME]
    off = [{"loss": s.name, "own": False} for s in singles]
    return [*off, *({"loss": s.name, "own": True} for s in singles if s.theory == "on-policy")]


def measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """One network by one loss: KL(pi* || pi), and how far its logits are from q*, before and after."""
    mdp = make("Tree", depth=settings["depth"], n_tokens=3, seed=seed)
    start = pretrain(mdp, beta=1.0, seed=seed, width=32, heads=2, steps=100, rows=1024)
    behavior = uniform_policy(start.world.mdp)
    rows = None if case["own"] else rows_of(start.world, behavior)
    steps = settings["steps"]
    trace, _ = train_tiny(start, case["loss"], rows, behavior, steps=steps, record_at=[steps])
    tree = start.world.mdp
    q = start.world.solution.q()[tree.allowed & tree.is_policy[:, None]]
    first, last = trace.metrics[0], trace.metrics[-1]
    spread = float(np.ptp(q))
    return {"kl": last.kl, "q_error": last.q_error / spread, "v_error": last.v_error / spread, "kl_before": first.kl}


def summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """A line for each loss and kind of data."""
    out: dict[str, Any] = {}
    for case in cases(settings):
        found = [r.numbers for r in records if r.case == case]
        name = case["loss"] + (", own rows" if case["own"] else "")
        numbers = {k: vars(interval([x[k] for x in found])) for k in ("kl", "q_error", "v_error", "kl_before")}
        out[name] = {**numbers, "expected": expected(lookup(case["loss"]), case["own"])}
    return out


def _names(summary: dict[str, Any], *kinds: str) -> dict[str, Any]:
    return {name: line for name, line in summary.items() if line["expected"] in kinds}


def claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """Theory's three kinds, each by its worst loss."""
    both, whole = _names(summary, "q*", "pi*"), _names(summary, "q*")
    only, none = _names(summary, "pi*"), _names(summary, "neither")
    worst = lambda lines, key, end: max(lines, key=lambda n: lines[n][key][end])  # noqa: E731
    best = lambda lines, key, end: min(lines, key=lambda n: lines[n][key][end])  # noqa: E731
    others = {name: line for name, line in none.items() if name != PLAIN}
    far, near = worst(both, "kl", "high"), best(others, "kl", "low")
    wrong, nearest = worst(whole, "q_error", "high"), best(only, "q_error", "low")
    show = lambda name, key: f"{name} {said(summary[name][key], '.2g')}"  # noqa: E731
    return [
        Claim(
            f"The {len(both)} losses that keep pi* on these data bring the network to it.",
            f"largest KL(pi* || pi): {show(far, 'kl')} nats",
            both[far]["kl"]["high"] <= FOUND,
        ),
        Claim(
            f"The other {len(none)} end elsewhere; nearest REINFORCE without a baseline, as 0 is the right one where v* is 0.",
            f"smallest KL: {said(none[PLAIN]['kl'])} nats (REINFORCE), {said(others[near]['kl'])} ({near})",
            none[PLAIN]["kl"]["value"] > FOUND and others[near]["kl"]["low"] > FOUND,
        ),
        Claim(
            f"The {len(whole)} that see every level make its logits Q-values at all prefixes.",
            f"largest max |q - q*| / range: {show(wrong, 'q_error')}",
            whole[wrong]["q_error"]["high"] <= MISSED / 2,
        ),
        Claim(
            f"The {len(only)} that find pi* without the inner levels leave the logits off q*.",
            f"smallest: {show(nearest, 'q_error')}",
            only[nearest]["q_error"]["low"] > MISSED,
        ),
    ]


@style()
def draw(result: Result) -> "Figure":
    """KL against Q error, a point a loss, told apart by what theory expects."""
    page = figure(figsize=(8, 7.4))
    left, right = page.subplots(1, 2, sharey=True)
    lines = sorted(result.summary.items(), key=lambda item: (list(KINDS).index(item[1]["expected"]), item[0]))
    names = [name for name, _ in lines]
    for axes, key, bound, text in (
        (left, "kl", FOUND, "KL(π* ‖ π), nats"), (right, "q_error", MISSED, "max |q̂ − q*| / range of q*"),
    ):  # fmt: skip
        for y, (_, line) in enumerate(lines):
            x = {k: max(line[key][k], 1e-9) for k in ("value", "low", "high")}
            color = PALETTE[KINDS[line["expected"]]]
            marker = {"q*": "o", "pi*": "s", "neither": "X"}[line["expected"]]
            axes.plot([x["low"], x["high"]], [y, y], color=color, lw=1.2)
            axes.plot(x["value"], y, marker, color=color, ms=5)
        axes.axvline(bound, color=GREY, lw=0.8, ls=":")
        axes.set(xscale="log", xlabel=text, ylim=(len(names) - 0.4, -0.6))
        axes.grid(axis="x")
    left.set_yticks(range(len(names)), names, fontsize=7.5)
    words = {"q*": "theory: finds q*", "pi*": "theory: finds π* alone", "neither": "theory: neither"}
    for kind, color in KINDS.items():
        left.plot([], [], {"q*": "o", "pi*": "s", "neither": "X"}[kind], color=PALETTE[color], label=words[kind])
    page.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return page


EVERY_LOSS = Study(
    name="every-loss",
    title="Every loss trains the same tiny transformer",
    question="Which losses bring a network to pi*, and whose logits are then Q-values?",
    settings={"seeds": 10, "depth": 3, "steps": 300},
    fast={"seeds": 1, "depth": 2, "steps": 250},
    cases=cases,
    measure=measure,
    summarise=summarise,
    claims=claims,
    draw=draw,
)
