"""A real language model against the exact truth: SmolLM2-135M in four words, trained by ShiQ, DPO and DRO-V.

After each of four prompts ("The film was", ...) the policy says three words out of not, very, good, bad; every other logit is
-inf for model and reference alike (hf/restricted.py). The reference is the model itself: its raw logits at all 84 prefixes.
So q*, v* and pi* are exact, for a network of 134.5 million weights that was not made for it. ShiQTrainer trains LoRA on all 256
strings, each as often as any other, whatever the model would say. The losses share data, their order, updates, adapter and
step size; DPO gets every pair of a batch's strings of one prompt with Bradley and Terry's exact chance of either order, DRO-V
a value a prompt. The seed draws the adapter's first weights and the order of the data.

What it does not show: anything of free generation over 49,152 tokens, of long answers, of strings that were not trained on, or
of the weights as they were published (the model comes out of a 4-bit file).
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from shiq_lab.batch import TokenBatch
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.graph import Floats
from shiq_lab.learning import world_of
from shiq_lab.losses.consistency import dro_loss, reference_value
from shiq_lab.losses.methods import METHODS
from shiq_lab.losses.preference import dpo_pairs_loss
from shiq_lab.objectives import World
from shiq_lab.plotting import GREY, PALETTE, figure, style
from shiq_lab.policies import softmax_policy
from shiq_lab.stats import TokenStats
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study, numbers_of
from shiq_lab.training import measure as distance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from shiq_lab.hf.restricted import Restricted

PROMPTS = ("The film was", "This soup is", "Her new book is", "Your idea is")
WORDS = (" not", " very", " good", " bad")
DEPTH, BETA = 3, 1.0
KL_FALLS, Q_FALLS = 20, 5  # what is asked of ShiQ; of the others' KL less, as they start slower
OTHERS_FALL = 5
ROUNDING = 64 * 2.0**-23  # of the largest logit: each of the 60 sublayers rounds the residual stream once in float32
VALUE_RATE = 10.0  # DRO-V's values are ten times their parameter, so that they move ten times as fast
LISTED = 1e-12  # rounding of float64 sums over 256 strings


def praise(said: tuple[str, ...]) -> float:
    """-1/2 for a word said twice in a row; the whole string: 1 for good, -1 for bad at its end, turned by each not, doubled by
    each very before it."""
    paid = -0.5 if said[-2:-1] == said[-1:] else 0.0
    if len(said) < DEPTH:
        return paid
    value = {" good": 1.0, " bad": -1.0}.get(said[-1], 0.0)
    for word in said[:-1]:
        value *= {" not": -1.0, " very": 2.0}.get(word, 1.0)
    return paid + value


# -------------------------------------------------------------------------------------------------------------- measuring
def cases(settings: Settings) -> list[Case]:
    """The losses."""
    return [{"loss": name} for name in settings["losses"]]


def measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """SmolLM2, its exact tree, a training run, and the distance from the truth at every prefix along the way."""
    from shiq_lab.hf import smollm
    from shiq_lab.hf.restricted import Restricted

    model, tokenizer = smollm.load()
    problem = Restricted.of(tokenizer, PROMPTS, WORDS, depth=DEPTH, reward=praise)
    return train(problem, model, case["loss"], settings, seed)


def train(problem: "Restricted", model: nn.Module, loss: str, settings: Settings, seed: int) -> dict[str, Any]:
    """Train a model of the transformers library on every string of a problem; settings: those of the study."""
    from transformers import PrinterCallback

    world = world_of(problem.mdp(model), BETA)
    one_by_one = problem.one_by_one(model)
    watch = Watch(problem, world)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(seed)
        trainer = trainer_of(problem, adapted(model, settings), loss, settings, seed, folder)
        marks = {round(settings["updates"] * i / settings["marks"]) for i in range(settings["marks"])}
        trainer.add_callback(watch.callback(marks))
        trainer.remove_callback(PrinterCallback)
        apart = columns_apart(world, trainer.train_dataset.reference)
        trainer.train()
    watch.look(settings["updates"], trainer.model)
    mdp, truth = world.mdp, world.solution
    edges, listed = mdp.allowed & mdp.is_policy[:, None], enumerate_trajectories(mdp)
    value = float((listed.weights * reference_value(listed, beta=BETA, population=True)).sum())
    return {
        **watch.curves, "q": truth.q()[edges], "q_hat": watch.q_hat[edges],
        "prefixes": int(mdp.is_policy.sum()), "strings": len(listed), "logit": np.abs(mdp.ref_logits[edges]).max(),
        "level": np.ptp(mdp.ref_logsumexp[mdp.is_policy]), "columns": apart, "listing": abs(value - truth.objective),
        "rows": np.abs(mdp.ref_logits[edges] - one_by_one[edges]).max(),
    }  # fmt: skip


def adapted(model: nn.Module, settings: Settings) -> nn.Module:
    """The model with LoRA on every linear map of its last layers; rank None: as it is, so that every weight is trained."""
    if settings["rank"] is None:
        return model
    from shiq_lab.hf.adapters import on_last_layers

    return on_last_layers(model, settings["layers"], settings["rank"])


def trainer_of(problem: "Restricted", model: nn.Module, loss: str, settings: Settings, seed: int, folder: str) -> Any:
    """ShiQTrainer on every string; for the relatives with their loss in the place of ShiQ's, and nothing else."""
    from shiq_lab.hf.config import ShiQConfig
    from shiq_lab.hf.trainer import ShiQTrainer

    values = nn.Parameter(torch.zeros(len(problem.prompt_ids)))
    if loss == "DRO-V":  # a value a prompt, among the model's own weights: the trainer finds it and clears its gradient
        model.register_parameter("values", values)

    def dro(stats: TokenStats, ref: TokenStats, batch: TokenBatch, **options: Any) -> Tensor:
        return dro_loss(stats, ref, batch, values=VALUE_RATE * values[batch.group_ids], **options)

    losses: dict[str, Callable[..., Tensor]] = {"ShiQ": METHODS["shiq"].loss, "DPO": dpo_pairs_loss, "DRO-V": dro}

    class Config(ShiQConfig):
        method = property(lambda self: replace(METHODS["shiq"], loss=losses[loss]))

    args = Config(
        output_dir=folder, seed=seed, beta=BETA, allowed_tokens=list(problem.word_ids), max_steps=settings["updates"],
        per_device_train_batch_size=settings["batch"], learning_rate=settings["rate"], lr_scheduler_type="cosine",
        warmup_steps=settings["updates"] // 20, optim="adamw_torch", adam_beta2=0.99, max_grad_norm=0.0, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    return ShiQTrainer(model, args, problem.rows())


def columns_apart(world: World, reference: Any) -> float:
    """Largest difference between the trainer's reference columns, string by string, and the tree's logits along it."""
    stats = TokenStats.from_table(torch.tensor(world.mdp.ref_logits), enumerate_trajectories(world.mdp))
    worst = 0.0
    for i, row in enumerate(reference):
        for name in ("token_logit", "logsumexp"):
            column = getattr(row, name)
            worst = max(worst, float(np.abs(getattr(stats, name)[i, : len(column)].numpy() - column).max()))
    return worst


@dataclass(eq=False)
class Watch:
    """The distance of a model in training from the truth.

    q_error, v_error, kl  as training.Metrics has them
    advantage_error       max |beta ln(pi / pi*)|: what is left of the Q error when every prefix's level is given
    """

    problem: "Restricted"
    world: World
    curves: dict[str, list[float]] = field(
        default_factory=lambda: {key: [] for key in ("at", "q_error", "v_error", "kl", "advantage_error")}
    )
    q_hat: Floats = field(default_factory=lambda: np.zeros(0))

    def look(self, at: int, model: nn.Module) -> None:
        """Measure the model after `at` updates."""
        mdp, truth, table = self.world.mdp, self.world.solution, self.problem.table(model)
        edges = mdp.allowed & mdp.is_policy[:, None]
        found = distance(truth, table, METHODS["shiq"])
        apart = np.abs(softmax_policy(mdp, table)[edges] - truth.log_policy()[edges]).max()
        self.q_hat = BETA * np.where(edges, np.where(edges, table, 0.0) - np.where(edges, mdp.ref_logits, 0.0), 0.0)
        values = (at, found.q_error, found.v_error, found.kl, BETA * float(apart))
        for curve, value in zip(self.curves.values(), values, strict=True):
            curve.append(value)

    def callback(self, marks: set[int]) -> Any:
        """Looks after so many updates."""
        from transformers import TrainerCallback

        class Look(TrainerCallback):
            def on_step_begin(inner, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
                if state.global_step in marks:
                    self.look(state.global_step, model)

        return Look()


# ------------------------------------------------------------------------------------------------------------- summing up
def summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """Curves of every loss, seed by seed; how far each metric fell, the worst seed; the roads to the truth, all runs."""
    out: dict[str, Any] = {"at": records[0].numbers["at"], "losses": {}}
    for name in settings["losses"]:
        mine = numbers_of(records, loss=name)
        line: dict[str, Any] = {}
        for key in ("q_error", "v_error", "kl", "advantage_error"):
            curves = np.array([n[key] for n in mine])  # (seeds, marks)
            falls = curves[:, 0] / curves[:, -1]
            line[key] = {"curves": curves, "end": curves[:, -1], "least_fall": falls.min(), "largest_fall": falls.max()}
        out["losses"][name] = line
    numbers = [r.numbers for r in records]
    out["roads"] = {key: max(n[key] for n in numbers) for key in ("rows", "columns", "listing", "logit")}
    out["level"] = min(n["level"] for n in numbers)
    out["size"] = {key: numbers[0][key] for key in ("prefixes", "strings")}
    return out


def claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """That the truth is one, that ShiQ's logits become it, and that the others' do not, though their policies do."""
    roads, size, lines = summary["roads"], summary["size"], summary["losses"]
    bound = ROUNDING * roads["logit"]
    found = [
        Claim(
            "The reference's logits are the same by three roads (all prefixes in few rows, each prefix alone, the trainer's "
            "own columns along every string), and J(pi*) is what listing every string gives.",
            f"{size['prefixes']} prefixes, {size['strings']} strings: {roads['rows']:.1e} and {roads['columns']:.1e} apart "
            f"(float32's rounding: {bound:.1e}), J by {roads['listing']:.1e}",
            max(roads["rows"], roads["columns"]) <= bound and roads["listing"] <= LISTED,
        )
    ]
    if "ShiQ" in lines:
        found.append(_shiq(lines["ShiQ"]))
    others = {name: line for name, line in lines.items() if name != "ShiQ"}
    if others:
        found += _others(others)
    return found


def _shiq(line: dict[str, Any]) -> Claim:
    kl, q = line["kl"], line["q_error"]
    return Claim(
        f"ShiQ makes a real model's logits Q-values: KL(pi* || pi) falls by {KL_FALLS} x, the max Q error by {Q_FALLS} x.",
        f"worst seed: KL by {kl['least_fall']:.0f} x, to {max(kl['end']):.1e} nats; max Q error by {q['least_fall']:.1f} x, to "
        f"{max(q['end']):.2f}",
        kl["least_fall"] >= KL_FALLS and q["least_fall"] >= Q_FALLS,
    )


def _others(lines: dict[str, Any]) -> list[Claim]:
    fallen, wrong = {}, {}
    for name, line in lines.items():
        kl, q, level = line["kl"], line["q_error"], line["v_error"]
        fallen[name] = f"{name} by {kl['least_fall']:.0f} x, to {max(kl['end']):.1e} nats"
        wrong[name] = f"{name} from {q['curves'][0][0]:.2f} to {min(q['end']):.2f}, Dv {min(level['end']):.2f} off"
    return [
        Claim(
            f"The others come nearer to pi* from the same strings: KL falls by {OTHERS_FALL} x.",
            "worst seed: " + "; ".join(fallen.values()),
            all(line["kl"]["least_fall"] >= OTHERS_FALL for line in lines.values()),
        ),
        Claim(
            "But they find no Q-values: neither the max Q error falls by 2 x, nor that of the levels, Dv: they see none.",
            "best seed: " + "; ".join(wrong.values()),
            all(line[key]["largest_fall"] < 2 for line in lines.values() for key in ("q_error", "v_error")),
        ),
    ]


COLORS = {"ShiQ": PALETTE["vermilion"], "DPO": PALETTE["blue"], "DRO-V": PALETTE["green"]}
MARKERS = {"ShiQ": "o", "DPO": "s", "DRO-V": "^"}


@style()
def draw(result: Result) -> "Figure":
    """KL and max Q error over the updates, every seed; and what the logits of seed 0 say at the end against q*."""
    from matplotlib.ticker import LogLocator, NullFormatter

    page = figure(figsize=(9.6, 3.5))
    panels = page.subplots(1, 3)
    at = result.summary["at"]
    for name, line in result.summary["losses"].items():
        for axes, key in zip(panels, ("kl", "q_error"), strict=False):
            for i, curve in enumerate(line[key]["curves"]):
                options: dict[str, Any] = {"label": name} if i == 0 else {"alpha": 0.5, "lw": 1}
                axes.plot(at, curve, color=COLORS[name], marker=MARKERS[name], ms=3.5, **options)
        first = next(r.numbers for r in result.records if r.case["loss"] == name and r.seed == 0)
        panels[2].plot(first["q"], first["q_hat"], MARKERS[name], color=COLORS[name], ms=3, mew=0, alpha=0.7,
                       zorder=3 if name == "ShiQ" else 2)  # fmt: skip
    for axes, key, least, text in zip(
        panels, ("kl", "q_error"), (KL_FALLS, Q_FALLS), ("KL(π* ‖ π), nats", "max |q̂ − q*|, in units of reward"), strict=False
    ):
        asked = next(iter(result.summary["losses"].values()))[key]["curves"][0][0] / least
        axes.axhline(asked, color=GREY, lw=1, ls=":")
        axes.annotate(f"1/{least} of the start", (0, asked), (2, 3), textcoords="offset points", color=GREY, fontsize=8)
        axes.set(yscale="log", xlabel="updates", ylabel=text)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    q = result.records[0].numbers["q"]
    panels[2].axline((0, 0), slope=1, color=GREY, lw=1, zorder=0)
    panels[2].set(xlabel="q*", ylabel="q̂ = β (l − l_ref) at the end", xlim=(min(q) - 0.3, max(q) + 0.3))
    page.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return page


REAL_LM = Study(
    name="real-lm",
    title="A real model's logits become Q-values",
    question="SmolLM2-135M, restricted to four words for three steps: whose loss makes its logits q* at every prefix?",
    settings={
        "seeds": 2, "losses": ["ShiQ", "DPO", "DRO-V"], "updates": 240, "batch": 16, "rate": 3e-3, "rank": 16, "layers": 10,
        "marks": 12,
    },
    fast={"seeds": 1, "losses": ["ShiQ"], "updates": 40, "marks": 4},
    cases=cases,
    measure=measure,
    summarise=summarise,
    claims=claims,
    draw=draw,
)  # fmt: skip
