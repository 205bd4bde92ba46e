"""Off-policy ShiQ on tool-calling dialogues: does it rank held-out right trajectories above wrong ones better than before?

The entries, back ends and verdicts are BFCL V3's own (multi-turn, base); the trajectories are its right answers and others
made from them by one change, cut to two turns, with few functions told. SmolLM2-135M cannot do the task, so nothing here is a
benchmark score: what is measured is a ranking, on entries that were never trained on.
"""

import tempfile
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shiq_lab.hf import bfcl
from shiq_lab.hf.bfcl_dialogues import PERTURBATIONS, TRUTH, dialogues
from shiq_lab.plotting import GREY, PALETTE, figure, style
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study
from shiq_lab.studies.statistics import interval, said

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = {
    "reference": "mean log-probability, before",
    "policy": "mean log-probability, after",
    "implied": "implied return, after",
    "length": "number of tokens, for comparison",
}
ENOUGH = 5  # entries that a kind of wrong rows must occur in to be told
CHECKED = 16  # held-out rows whose log-ratios are looked at before training, too
# Each log-sum-exp, near 20, is rounded in float32 after 30 layers that sum in another order where padding differs; a row has
# some 70 policy tokens.
ROUNDING = 70 * 20 * 2.0**-23 * 30
Numbers = dict[str, Any]


def cases(settings: Settings) -> list[Case]:
    """One run."""
    return [{"loss": "ShiQ"}]


def measure(settings: Settings, case: Case, seed: int) -> Numbers:
    """Load SmolLM2, make the trajectories, train once, and score the held-out ones before and after."""
    from shiq_lab.hf import smollm

    model, tokenizer = smollm.load()
    return run(model, tokenizer, settings, seed)


def run(model: Any, tokenizer: Any, settings: Settings, seed: int) -> Numbers:
    """The same with any model of the transformers library and its tokenizer."""
    from transformers import PrinterCallback

    from shiq_lab.hf.adapters import on_last_layers
    from shiq_lab.hf.trainer import ShiQTrainer

    (train, _), (held, about) = data(tokenizer, settings, seed)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(seed)
        model = on_last_layers(model, settings["layers"], settings["rank"])
        trainer = ShiQTrainer(model, config(settings, seed, folder), train, held, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        before, _ = scores(trainer, range(min(CHECKED, len(held))))
        trainer.train()
        after, held_loss = scores(trainer, range(len(held)))
    return {
        "rows": [{**a, **b} for a, b in zip(about, after, strict=True)],
        "train_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], "held_loss": held_loss,
        "largest_before": max(abs(row[key]) for row in before for key in ("implied", "dv")),
        "train_entries": len({row.group for row in train}), "train_rows": len(train),
        "train_tokens": sum(map(len, train)), "longest": max(map(len, [*train, *held])),
    }  # fmt: skip


def data(tokenizer: Any, settings: Settings, seed: int) -> list[tuple[list[Any], list[Numbers]]]:
    """(rows, what they are) for training and held out: entries whose trajectories are all short, split by a hash."""
    from shiq_lab.hf.formats import to_rows

    found = [entry.narrowed(settings["functions"]) for entry in bfcl.entries(max_turns=settings["turns"])]
    examples = dialogues(found, seed=seed, reply_characters=settings["reply_characters"])
    rows = to_rows(examples, tokenizer=tokenizer, vocabulary=len(tokenizer))
    long = {example["entry"] for example, row in zip(examples, rows, strict=True) if len(row) > settings["tokens"]}
    short = [entry for entry in found if entry.id not in long]
    parts = bfcl.split(short, train=settings["train"], held_out=settings["held_out"], seed=seed)
    out = []
    for part in parts:
        ids = {entry.id for entry in part}
        both = [(row, example) for row, example in zip(rows, examples, strict=True) if example["entry"] in ids]
        about = [{key: example[key] for key in ("entry", "kind", "right", "rewards")} for _, example in both]
        out.append(([row for row, _ in both], about))
    return out


def config(settings: Settings, seed: int, folder: str) -> Any:
    """The trainer's settings."""
    from shiq_lab.hf.config import ShiQConfig

    return ShiQConfig(
        output_dir=folder, beta=settings["beta"], num_train_epochs=settings["epochs"], learning_rate=settings["rate"],
        per_device_train_batch_size=settings["batch"] // 2, gradient_accumulation_steps=2, per_device_eval_batch_size=4,
        lr_scheduler_type="cosine", warmup_steps=settings["warmup"], optim="adamw_torch", weight_decay=0.0,
        save_strategy="no", logging_steps=1, report_to=[], disable_tqdm=True, seed=seed, use_cpu=True,
    )  # fmt: skip


@torch.no_grad()
def scores(trainer: Any, places: Sequence[int]) -> tuple[list[Numbers], list[float]]:
    """Of held-out rows, in order: what SCORES names, and Dv at the first action; and the loss a row, before and now.

    Implied return: beta times the sum of log-ratios over the policy's tokens. The model before training is the reference, so
    its loss needs the reference's statistics alone.
    """
    from shiq_lab.hf.collator import token_batch

    model, held, args = trainer.model.eval(), trainer.eval_dataset, trainer.args
    order = sorted(places, key=lambda i: -len(held.rows[i]))  # alike in length: little padding
    found: dict[int, Numbers] = {}
    losses = np.zeros(2)
    for start in range(0, len(order), 4):
        some = order[start : start + 4]
        inputs = trainer.collate([held[i] for i in some])
        batch = token_batch(inputs)
        policy, ref = trainer.both_statistics(model, batch, inputs)
        losses += [float(args.method.loss(x, ref, batch, reduction="sum", **args.loss_options)) for x in (ref, policy)]
        ours, its = (stats.token_logit - stats.logsumexp for stats in (policy, ref))  # 0 off the policy's tokens
        acts = batch.completion_mask[:, 1:] == 1
        dv = args.beta * (policy.logsumexp - ref.logsumexp).gather(1, acts.int().argmax(1, keepdim=True))[:, 0]
        count = acts.sum(1)
        columns = its.sum(1) / count, ours.sum(1) / count, args.beta * (ours - its).sum(1), count, dv
        for i, *values in zip(some, *(column.tolist() for column in columns), strict=True):
            found[i] = dict(zip((*SCORES, "dv"), values, strict=True))
    return [found[i] for i in places], (losses / len(order)).tolist()


# ------------------------------------------------------------------------------------------------------------ summing up
def auc(rows: list[Numbers], score: str, kind: str | None = None) -> float | None:
    """P(a right row scores above a wrong one) within an entry, ties a half; of one kind of wrong rows; None without a pair."""
    right = np.array([row[score] for row in rows if row["right"]])
    wrong = np.array([row[score] for row in rows if not row["right"] and kind in (None, row["kind"])])
    if not (len(right) and len(wrong)):
        return None
    gap = right[:, None] - wrong[None]
    return float(np.mean((gap > 0) + 0.5 * (gap == 0)))


def by_entry(rows: list[Numbers]) -> list[list[Numbers]]:
    """The rows of each entry; they stand together."""
    return [list(part) for _, part in groupby(rows, key=lambda row: row["entry"])]


def summarise(settings: Settings, records: list[Record]) -> Numbers:
    """AUCs, each the mean over held-out entries with a bootstrap interval over them; what changed; counts."""
    entries = [part for record in records for part in by_entry(record.numbers["rows"])]
    rows = [row for part in entries for row in part]
    ranked = [part for part in entries if auc(part, "implied") is not None]
    whole = {score: np.array([auc(part, score) for part in ranked]) for score in SCORES}
    kinds: Numbers = {}
    for kind in PERTURBATIONS:
        with_kind = [part for part in ranked if auc(part, "implied", kind) is not None]
        if len(with_kind) >= ENOUGH:
            kinds[kind] = {s: _mean([auc(part, s, kind) for part in with_kind]) for s in SCORES}
    runs = [record.numbers for record in records]
    return {
        "auc": {score: _mean(values) for score, values in whole.items()},
        "gain": {score: _mean(whole[score] - whole["reference"]) for score in ("policy", "implied")},
        "over length": _mean(whole["implied"] - whole["length"]),
        "kinds": kinds,
        "gap": _mean([_gap(part) for part in ranked]),
        "dv": _mean([part[0]["dv"] for part in entries]),
        "dv_spread": max(np.ptp([row["dv"] for row in part]) for part in entries),
        "held_entries": len(ranked) // len(records), "held_rows": len(rows), "held_right": sum(row["right"] for row in rows),
        "unlike_truth": sum(row["right"] for row in rows if row["kind"] != TRUTH),
        "truths": sum(row["kind"] == TRUTH for row in rows),
        "right_truths": sum(row["right"] for row in rows if row["kind"] == TRUTH),
        "largest_before": max(n["largest_before"] for n in runs),
        "held_loss": np.mean([n["held_loss"] for n in runs], axis=0),
        "train_loss": np.mean([n["train_loss"] for n in runs], axis=0),
        "train_entries": min(n["train_entries"] for n in runs), "train_rows": runs[0]["train_rows"],
        "longest": max(n["longest"] for n in runs),
    }  # fmt: skip


def _mean(values: Any) -> Numbers:
    return vars(interval(values, np.mean))


def _gap(rows: list[Numbers]) -> float:
    """Implied return of an entry's right rows less that of its wrong ones."""
    sides = [[row["implied"] for row in rows if row["right"] is side] for side in (True, False)]
    return float(np.mean(sides[0]) - np.mean(sides[1]))


def outcome(change: Numbers, what: str) -> str:
    """The sentence that the interval of a change allows: better, worse, or a null result."""
    if change["low"] > 0:
        return f"{what.capitalize()} ranks better"
    if change["high"] < 0:
        return f"{what.capitalize()} ranks worse"
    return f"Null result: {what} ranks neither better nor worse beyond the interval"


def claims(settings: Settings, summary: Numbers) -> list[Claim]:
    """What came out, whichever way; and what must hold for it to mean anything."""
    known, gain = summary["auc"], summary["gain"]
    before, after = summary["held_loss"]
    told = "; ".join(f"{text} {said(known[score])}" for score, text in SCORES.items())
    return [
        Claim(
            f"{outcome(gain['implied'], 'the implied return after training')} than the reference's mean log-probability, "
            "before, on held-out entries, right against wrong within an entry.",
            f"AUC: {told}; change {said(gain['implied'])}",
            summary["held_entries"] > 0,
        ),
        Claim(
            f"{outcome(gain['policy'], 'the mean log-probability after training')} than before.",
            f"change of the AUC {said(gain['policy'])}",
            summary["held_entries"] > 0,
        ),
        Claim(
            f"{outcome(summary['over length'], 'the implied return')} than the number of tokens alone.",
            f"difference of the AUC {said(summary['over length'])}; by what is wrong: "
            + "; ".join(f"{kind} {said(x['implied'])}" for kind, x in summary["kinds"].items()),
            summary["held_entries"] > 0,
        ),
        Claim(
            f"On held-out entries the ShiQ loss {'falls' if after < before else 'does not fall'}, and the implied return of "
            f"right rows is {'above' if summary['gap']['low'] > 0 else 'not clearly above'} that of wrong ones.",
            f"loss a row {before:.3g} before, {after:.3g} after; right less wrong {said(summary['gap'])}, a right turn pays 1",
            bool(np.isfinite([before, after]).all()),
        ),
        Claim(
            "Before training every log-ratio and Dv is 0: the implied return ranks nothing, so what stands before is the "
            "reference's own probability. After it Dv at the first token is one number an entry, as its rows share the prompt.",
            f"largest before {summary['largest_before']:.1e}; Dv after {said(summary['dv'])}, largest spread within an entry "
            f"{summary['dv_spread']:.1e}",
            max(summary["largest_before"], summary["dv_spread"]) <= ROUNDING,
        ),
        Claim(
            "The official checker calls every answer of the benchmark right, and "
            f"{summary['unlike_truth']} of {summary['held_rows'] - summary['truths']} changed ones; the entries are as many as "
            "asked, in training and held out.",
            f"{summary['train_entries']} entries, {summary['train_rows']} rows; held out {summary['held_entries']} entries, "
            f"{summary['held_rows']} rows, {summary['held_right']} right; at most {summary['longest']} tokens a row",
            summary["right_truths"] == summary["truths"]
            and (summary["train_entries"], summary["held_entries"]) == (settings["train"], settings["held_out"]),
        ),
    ]


@style()
def draw(result: Result) -> "Figure":
    """The loss a step; AUCs by score, whole and by what is wrong; implied returns of right and wrong rows."""
    summary, colors = result.summary, dict(zip(SCORES, ("sky", "blue", "vermilion", "black"), strict=True))
    page = figure(figsize=(9.6, 3.5))
    left, middle, right = page.subplots(1, 3, width_ratios=(1, 1.6, 1))
    loss = np.array(summary["train_loss"])
    left.plot(np.arange(1, len(loss) + 1), loss, ".", color=PALETTE["sky"], ms=3)
    width = max(1, len(loss) // 10)
    left.plot(
        np.arange(len(loss) - width + 1) + (width + 1) / 2,
        np.convolve(loss, np.ones(width) / width, "valid"),
        color=PALETTE["blue"],
    )
    left.plot([0, len(loss)], summary["held_loss"], "D", color=PALETTE["vermilion"], label="held out")
    left.set(xlabel="updates", ylabel="ShiQ loss a row", yscale="log")
    left.legend()
    groups = {"all": summary["auc"], **summary["kinds"]}
    for i, (score, text) in enumerate(SCORES.items()):
        shown = [group[score] for group in groups.values()]
        x = np.arange(len(groups)) + (i - 1.5) * 0.18
        y = np.array([[s["value"], s["low"], s["high"]] for s in shown]).T
        middle.errorbar(x, y[0], np.abs(y[1:] - y[0]), fmt="o", ms=4, color=PALETTE[colors[score]], label=text)
    middle.axhline(0.5, color=GREY, lw=0.8, ls=":")
    middle.set_xticks(range(len(groups)), [name.replace(" ", "\n") for name in groups], fontsize=8)
    middle.set(ylabel="AUC within an entry", ylim=(-0.03, 1.03))
    rows = [row for record in result.records for row in record.numbers["rows"]]
    low, high = np.quantile([row["implied"] for row in rows], [0.01, 0.99])
    bins = np.linspace(low, high, 25)
    for side, color, text in ((True, "blue", "right"), (False, "vermilion", "wrong")):
        right.hist(
            [row["implied"] for row in rows if row["right"] is side], list(bins), color=PALETTE[color], alpha=0.6, label=text
        )
    right.set(xlabel="implied return, held out", ylabel="rows")
    right.legend()
    page.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return page


BFCL = Study(
    name="bfcl",
    title="Off-policy ShiQ on BFCL V3 trajectories: right above wrong, held out?",
    question="Does off-policy ShiQ rank held-out right trajectories above wrong ones better than the model did before?",
    settings={
        "seeds": 1, "train": 72, "held_out": 40, "turns": 2, "functions": 8, "reply_characters": 120, "tokens": 400,
        "beta": 0.25, "layers": 10, "rank": 16, "rate": 1e-3, "batch": 8, "warmup": 5, "epochs": 1,
    },
    fast={"train": 8, "held_out": 6, "turns": 1, "tokens": 170, "layers": 4, "warmup": 1},
    cases=cases,
    measure=measure,
    summarise=summarise,
    claims=claims,
    draw=draw,
)  # fmt: skip
