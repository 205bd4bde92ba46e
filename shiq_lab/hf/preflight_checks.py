"""What preflight asks of the trainer: batch, reference, gradients, invariance; and the list of all checks."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.checks.report import Check, Measured, Skip
from shiq_lab.checks.runner import SubjectError
from shiq_lab.checks.tolerances import DIFFERENCE, EPS, SUMS
from shiq_lab.hf import heads
from shiq_lab.hf.collator import token_batch
from shiq_lab.hf.preflight_data import check_data, check_mask, check_scale, check_tokens
from shiq_lab.hf.preflight_step import check_dtype, check_step
from shiq_lab.hf.preflight_subject import Subject, relative, reward_to_go, wrong
from shiq_lab.hf.reference import PART, read_part
from shiq_lab.hf.rows import Row, cut_row
from shiq_lab.losses import steps
from shiq_lab.losses.shiq import shiq_gradient
from shiq_lab.stats import TokenStats

COLUMNS = ("input_ids", "completion_mask", "attention_mask")
LOGITS = 3e7  # logits that GRAD holds at once, in float64 and a few copies: about 1 GB


# ----------------------------------------------------------------------------------------------------- batch, reference
def check_start(s: Subject) -> Iterator[Measured]:
    """The trainer takes these settings, this model and these rows."""
    s.rows  # noqa: B018
    if s._trainer is None:
        raise SubjectError(s.start_fault)
    s.notes.append("token statistics: fused with the head" if s.trainer.fused else "token statistics: from whole logits")
    astray = abs(len(s.trainer.train_dataset) - len(s.rows))
    yield Measured("chosen rows that the trainer does not hold", astray, 0, len(s.rows))


def check_batch(s: Subject) -> Iterator[Measured]:
    """The trainer's tensors hold the rows and nothing else: by a plain loop over tokens."""
    astray: list[str] = []
    worst, numbers, held = 0.0, 0, set()
    size = max(2, s.args.per_device_train_batch_size)
    for begin in range(0, len(s.rows), size):
        batch = token_batch(s.collated(range(len(s.rows))[begin : begin + size])).to("cpu")
        label = batch.attention_mask if batch.segment_ids is None else batch.segment_ids
        inside = [(k, int(n)) for k, line in enumerate(label) for n in line.unique() if n > 0]
        for b, n in inside:
            slot: Any = b if batch.segment_ids is None else (b, n - 1)
            i, here = int(batch.group_ids[slot]), label[b] == n
            row, numbers = s.rows[i], numbers + 4 * int(here.sum())
            held.add(i)
            found = {name: getattr(batch, name)[b][here].tolist() for name in COLUMNS}
            found["terminated"] = [bool(batch.terminated[slot])]
            astray += [f"row {s.chosen[i]}: {fault}" for fault in _row_faults(row, found)]
            if int(here.sum()) == len(row):
                off = (batch.rewards[b][here].double() - torch.tensor(row.rewards, dtype=torch.float64)).abs()
                worst = max(worst, float(off.max()) / max(map(abs, (*row.rewards, 1e-30))))
    astray += [f"row {s.chosen[i]} is missing" for i in range(len(s.rows)) if i not in held]
    hint = "The collator shifts or guesses a mask, or takes padding for text."
    yield wrong("rows that the batch changes", astray, numbers, hint)
    hint = "Rewards belong in float32."
    yield Measured("relative error of the rewards in a batch", worst, EPS["float32"], numbers, hint=hint)


def _row_faults(row: Row, found: dict[str, list[int]]) -> Iterator[str]:
    """Where a batch has something else than the row; of each column the first place."""
    wanted = {"input_ids": row.input_ids, "completion_mask": row.completion_mask, "attention_mask": [1] * len(row)}
    wanted["terminated"] = [row.terminated]
    for name, want in wanted.items():
        if found[name] != want:
            k = next((k for k, (x, y) in enumerate(zip(found[name], want, strict=False)) if x != y), len(want))
            yield f"another {name} from position {k} on, {len(found[name])} entries for {len(want)}"


def check_reference(s: Subject) -> Iterator[Measured]:
    """Before the first step l = l_ref: ln pi / pi_ref = 0, Dv = 0, rho_t = -(reward-to-go) and the loss is its square (F4)."""
    yield s.worst("ln pi / pi_ref, in nats", {i: ((x[0] - x[1] - x[2] + x[3]).abs(), 2 * s.noise) for i, x in s.base.items()})
    yield s.worst("Dv / beta, in nats", {i: ((x[1] - x[3]).abs(), s.noise) for i, x in s.base.items()})
    yield from _cached(s)
    if s.args.method.step is not steps.shifted:
        s.notes.append(f"rho at l_ref is minus the reward-to-go only for shifted logits, not for {s.args.loss}")
        return
    to_go = {
        i: torch.tensor(reward_to_go(row, s.args.gamma, s.args.steps_ahead), dtype=torch.float64)
        for i, row in enumerate(s.rows)
    }
    yield s.worst("rho + reward-to-go", {i: ((x[4] + to_go[i]).abs(), s.rho_bound(i)) for i, x in s.base.items()})
    yield _loss_value(s)


def _loss_value(s: Subject) -> Measured:
    """The trainer's loss on the few rows against the mean of the squares of their rewards-to-go."""
    form, total, weight, bound = s.args.method.form, 0.0, 0.0, 0.0
    for i in s.few:
        row = s.rows[i]
        G = reward_to_go(row, s.args.gamma, s.args.steps_ahead, cut_turns=form == "turns")
        G = G[:1] if form == "first" else G
        total += row.weight * sum(g * g for g in G)
        bound += row.weight * sum(2 * abs(g) * s.rho_bound(i) + s.rho_bound(i) ** 2 for g in G)
        weight += row.weight if s.args.reduction == "row" else sum(row.completion_mask)
    with torch.no_grad(), s.arithmetic():
        found = float(s.trainer.compute_loss(s.trainer.model, s.collated(s.few)))
    s.trainer.sums.clear()
    value = abs(found - total / weight) if weight else math.nan
    bound = (bound + EPS["float32"] * SUMS * total) / weight if weight else 0.0
    detail, hint = f"{found:.6g} for {total / weight if weight else math.nan:.6g}", "gamma, n_steps, weights or the reduction."
    return Measured("the loss against the mean square of the rewards-to-go", value, bound, len(s.few), detail=detail, hint=hint)


def _cached(s: Subject) -> Iterator[Measured]:
    """The run's own cache of reference statistics, if there is one, against those made now."""
    name = s.job.config.trainer.get("reference_cache")
    if name is None or s.args.reference != "cache":
        return
    with s.settings(reference_cache=str(s.job.config.folder / name)):
        folder: Path | None = s.trainer.cache_folder(s.all_rows)
    assert folder is not None
    found = {}
    for i, number in enumerate(s.chosen):
        part = read_part(folder / f"{number // PART:06d}", s.all_rows[number // PART * PART :][:PART])
        if part is not None:
            old, at = part[number % PART], [k - 1 for k, own in enumerate(s.rows[i].completion_mask) if own]
            now = s.trainer.train_dataset[i]["reference"]
            off = [np.abs(getattr(old, k)[at] - getattr(now, k)[at]) for k in ("token_logit", "logsumexp")]
            found[i] = (torch.tensor(np.maximum(*off), dtype=torch.float64), s.noise)
    if found:
        hint = "Statistics of another run lie in trainer.reference_cache: remove that folder."
        yield replace(s.worst("reference statistics in the cache against those made now", found), hint=hint)


# -------------------------------------------------------------------------------------------------------------- gradients
def check_gradient(s: Subject) -> Iterator[Measured]:
    """Autograd on the logits equals the closed form (F3) for this loss; the fused head has the gradient of whole logits."""
    yield from _on_logits(s)
    numbers = s.few[:2]
    if not s.trainer.fused or not any(bool(s.base[i][4].any()) for i in numbers):
        return
    inputs = s.collated(numbers)
    batch = token_batch(inputs)

    def backward(fused: bool) -> None:
        _, ref = s.trainer.both_statistics(s.trainer.model, batch, inputs)
        stats = heads.statistics(s.trainer.model, batch, fused=fused, among=s.trainer.among)
        s.args.method.loss(stats, ref, batch, **s.args.loss_options).backward()

    both = [s.gradient(lambda fused=fused: backward(fused)) for fused in (True, False)]  # type: ignore[misc]
    hint = "The head does more than a matrix product: set fused: false."
    yield Measured(
        "weights' gradient, fused against whole logits, relative", relative(*both), s.slack(numbers), len(both[0]), hint=hint
    )


def _on_logits(s: Subject) -> Iterator[Measured]:
    """In float64, on the model's logits and a reference away from them, so that every part of the gradient is there."""
    numbers, rows = _affordable(s)
    with s.settings(packing=None), torch.no_grad(), s.arithmetic():
        batch = token_batch(s.collated(numbers, rows))
        logits = heads.logits_of(s.trainer.model, batch, s.trainer.among).double()
    seed = torch.Generator().manual_seed(s.args.seed)
    noise = torch.randn(logits.shape, generator=seed, dtype=torch.float64).to(logits.device)
    naive = {"ref_logits": logits} if s.args.loss == "naive" else {}
    ref, options = TokenStats.from_logits(logits, batch), s.args.loss_options

    def loss(x: Tensor) -> Tensor:
        return s.args.method.loss(TokenStats.from_logits(x, batch, **naive), ref, batch, reduction="sum", **options)

    moved = (logits + 0.1 * noise).requires_grad_()
    (found,) = torch.autograd.grad(loss(moved), moved)
    with torch.no_grad():
        if s.args.loss in ("shiq", "shifted"):
            want = _closed_form(moved, ref, batch, s)
            size = float(want.abs().max())
            tolerance = SUMS * EPS["float64"] * max(map(len, rows.values())) * max(size, s.args.beta * s.largest)
            value = float((found - want).abs().max())
            yield Measured(
                "gradient by the logits against the closed form F3", value, tolerance, found.numel(), hint="gamma or the loss."
            )
        elif s.args.method.form == "square" or s.args.method.form == "first":
            step = EPS["float64"] ** (1 / 3)
            slope = float((found * noise).sum())
            differ = float((loss(moved + step * noise) - loss(moved - step * noise)) / (2 * step))
            tolerance = DIFFERENCE * EPS["float64"] ** (2 / 3) * max(1.0, abs(slope), float(found.abs().sum()))
            yield Measured("slope of the loss against central differences", abs(slope - differ), tolerance, 1)
        else:
            s.notes.append(f"{s.args.loss} stops gradients on purpose: neither F3 nor differences say what its gradient is")


def _affordable(s: Subject) -> tuple[list[int], dict[int, Row]]:
    """The shortest rows whose logits fit, one of them cut in two where it can be, so that it bootstraps."""
    fit = max(2, int(LOGITS / s.vocabulary))
    numbers = [i for k, i in enumerate(s.few) if k == 0 or (k + 1) * len(s.rows[i]) <= fit]
    rows = {i: s.rows[i] for i in numbers}
    for i in numbers[-1:]:
        own = [k for k, acts in enumerate(s.rows[i].completion_mask) if acts]
        rows[i] = cut_row(s.rows[i], min(fit, own[-1])) or s.rows[i]
    return numbers, rows


def _closed_form(logits: Tensor, ref: TokenStats, batch: Any, s: Subject) -> Tensor:
    """F3 on the logits: what shiq_gradient says of the two numbers, times their own derivatives e_a and pi."""
    stats = TokenStats.from_logits(logits, batch)
    by = shiq_gradient(stats, ref, batch, beta=s.args.beta, gamma=s.args.gamma, n_steps=s.args.steps_ahead)
    weights, pi = batch.weights[:, None], logits.softmax(-1)
    level = torch.zeros(logits.shape[:2], dtype=logits.dtype, device=logits.device)
    level[:, :-1] = by.logsumexp * weights
    level.scatter_add_(1, batch.last_index()[:, None], by.end_logsumexp[:, None] * weights)
    want = level[..., None] * pi
    taken = torch.where(batch.completion_mask == 1, batch.input_ids, 0)[:, 1:, None]
    want[:, :-1].scatter_add_(2, taken, (by.token_logit * weights)[..., None].to(want.dtype))
    return want


def check_split(s: Subject) -> Iterator[Measured]:
    """An optimiser step over all rows has the gradient of the same rows in unequal micro-batches, by the trainer's own step."""
    if len(s.few) < 2:
        raise Skip("one row cannot be split")
    s.slack(s.few)

    def backward(parts: Sequence[Sequence[int]]) -> None:
        batches = iter([s.trainer.collate([s.trainer.train_dataset[i] for i in part]) for part in parts])
        samples, total = s.trainer.get_batch_samples(batches, len(parts), s.args.device)
        s.trainer.current_gradient_accumulation_steps = len(parts)
        for sample in samples:
            s.trainer.training_step(s.trainer.model, sample, total)

    whole, split = (s.gradient(lambda parts=parts: backward(parts)) for parts in ([s.few], [s.few[:1], s.few[1:]]))  # type: ignore[misc]
    hint = "The loss of a micro-batch is divided by its own size, or not at all: both change with the accumulation."
    yield Measured(
        "weights' gradient, split in micro-batches, relative", relative(split, whole), s.slack(s.few), len(whole), hint=hint
    )


# ------------------------------------------------------------------------------------------------------------- invariance
def check_padding(s: Subject) -> Iterator[Measured]:
    """Padding on either side, of another width, changes nothing."""
    longest = max(map(len, s.rows))
    for side in ("right", "left"):
        seen = s.look(packing=None, padding_side=side, pad_to_multiple_of=longest + 3)
        yield from s.compare(f"padded on the {side} to {longest + 3} tokens", seen)


def check_packing(s: Subject) -> Iterator[Measured]:
    """Rows in one packed row do not see each other."""
    if s.args.packing is None:
        raise Skip("packing is not set")
    yield from s.compare("one row a sequence", s.look(packing=None))


def check_order(s: Subject) -> Iterator[Measured]:
    """The rows in reverse, so with other neighbours, have the same statistics."""
    if len(s.rows) < 2:
        raise Skip("there is one row")
    yield from s.compare("in reverse", s.look(list(reversed(range(len(s.rows))))))


def check_poison(s: Subject) -> Iterator[Measured]:
    """What must be ignored is: ids in padding, rewards and reference numbers off the actions; nor does it reach a gradient."""
    ids = s.random_ids(64)

    def poison(inputs: dict[str, Tensor]) -> None:
        width = inputs["input_ids"].shape[1]
        padding, acts = inputs["attention_mask"] == 0, inputs["completion_mask"] == 1
        fill = torch.tensor((ids * width)[:width], device=padding.device)
        inputs["input_ids"] = torch.where(padding, fill, inputs["input_ids"])
        inputs["rewards"] = torch.where(acts, inputs["rewards"], math.nan)
        for name in ("ref_token_logit", "ref_logsumexp"):
            if name in inputs:
                inputs[name] = torch.where(acts[:, 1:], inputs[name], 1e9)
        if "ref_end_logsumexp" in inputs:
            inputs["ref_end_logsumexp"] = torch.where(inputs["terminated"], 1e9, inputs["ref_end_logsumexp"])

    wide: dict[str, Any] = {"packing": None, "pad_to_multiple_of": max(map(len, s.rows)) + 3}
    yield from s.compare("padding, off-action rewards and reference poisoned", s.look(change=poison, **wide))
    with s.settings(**wide), s.arithmetic():
        clean = s.collated(s.few)
        bad = dict(clean)
        poison(bad)
        with torch.no_grad():
            stats, _ = s.trainer.both_statistics(s.trainer.model, token_batch(clean), clean)
        found = [_by_statistics(s, stats, inputs) for inputs in (clean, bad)]
    differ = int((~((found[0] - found[1]).abs() <= 0)).sum())
    yield Measured("loss, and gradients by the two numbers, that poison changes", differ, 0, found[0].numel())


def _by_statistics(s: Subject, stats: TokenStats, inputs: dict[str, Tensor]) -> Tensor:
    """The loss and its gradient by the policy's two numbers a token, flat."""
    batch = token_batch(inputs)
    live = [x.detach().clone().requires_grad_() for x in (stats.token_logit, stats.logsumexp)]
    policy = replace(stats, token_logit=live[0], logsumexp=live[1])
    ref = s.trainer.both_statistics(s.trainer.model, batch, inputs)[1] if "ref_token_logit" in inputs else stats.detach()
    loss = s.args.method.loss(policy, ref, batch, reduction="sum", **s.args.loss_options)
    found = torch.autograd.grad(loss, live, allow_unused=True)
    flat = [torch.zeros_like(x).flatten() if g is None else g.flatten() for g, x in zip(found, live, strict=True)]
    return torch.cat([loss.detach()[None], *flat])


def check_causal(s: Subject) -> Iterator[Measured]:
    """What the model says of a token does not depend on later tokens: those behind the middle action are changed."""
    rows, kept = {}, {}
    for i, row in enumerate(s.rows):
        own = [k for k, acts in enumerate(row.completion_mask) if acts]
        kept[i] = len(own) // 2 + 1 if len(own) > 1 else 1
        ids = row.input_ids[: own[kept[i] - 1] + 1]
        mask, rewards = [*row.completion_mask, 0, 0, 0], [*row.rewards, 0.0, 0.0, 0.0]
        rows[i] = replace(row, input_ids=ids + s.random_ids(len(mask) - len(ids)), completion_mask=mask, rewards=rewards)
    seen = s.look(rows=rows, packing=None)
    found = {i: ((seen[i][:2, :n] - s.base[i][:2, :n]).abs().amax(0), s.noise) for i, n in kept.items()}
    yield s.worst("change of a token's two numbers by later tokens", found)


def refused(run: Callable[[Any], Iterator[Measured]]) -> Callable[[Any], Iterator[Measured]]:
    """The same check; what the package itself refuses with a ValueError is its finding, not its breakdown."""

    @wraps(run)
    def check(s: Subject) -> Iterator[Measured]:
        try:
            yield from run(s)
        except ValueError as error:
            raise SubjectError(str(error)) from None

    return check


_ALL = [
    Check("DATA", "rows can be made, differ in reward and keep it", check_data, "The columns are described in hf/formats.py."),
    Check("MASK", "the policy's tokens are its answers, end tokens included", check_mask, "The template or the mask."),
    Check("START", "the trainer takes settings, model and rows", check_start, "The setting that the message names."),
    Check("TOKENS", "tokenizer, template and model belong together", check_tokens, "The tokenizer of another model."),
    Check("BATCH", "the batch holds the rows and nothing else", check_batch, "The collator."),
    Check("REF", "at l = l_ref: ratio 0, Dv 0, rho = -reward-to-go", check_reference,
          "A reference that is another model, a stale cache, dropout, an adapter that does not start at 0, another dtype."),
    Check("GRAD", "autograd is the closed form; fused is whole", check_gradient, "The loss, or what the head does."),
    Check("PAD", "padding changes nothing", check_padding, "The attention does not get the mask, or positions count padding."),
    Check("PACK", "packed is unpacked", check_packing, "The model's attention does not keep packed rows apart: unset packing."),
    Check("ORDER", "the order of rows changes nothing", check_order, "Rows of a batch see each other."),
    Check("BS", "micro-batches change nothing", check_split, "The loss is averaged a micro-batch."),
    Check("POISON", "what must be ignored is ignored", check_poison, "A mask is multiplied where it should select."),
    Check("CAUSAL", "later tokens do not matter", check_causal, "An attention in both directions, or a wrong mask."),
    Check("DT", "rounding stays within its bound", check_dtype, "A part of the model is coarser than configured."),
    Check("STEP", "one step trains what it should", check_step, "The optimiser's settings."),
    Check("SCALE", "rewards, beta, learning rate are learnable", check_scale, "The units of the reward."),
]  # fmt: skip
CHECKS = [replace(check, run=refused(check.run)) for check in _ALL]
