"""check_trainer: put the exact optimum into a whole trainer; what it then still wants to change is a bug, wherever it sits.

    factory(model, ref_model, dataset, config) -> object with .step(rows) and .model

Works without transformers. model and ref_model are causal language models with a parameter `.table` float[S, V], at tables
that the suite chooses. step(rows) trains on some examples of `dataset` (their columns, and TrainerConfig: rows.py) and
may return the loss. The gradient is read from the object's `.gradient` (summed over the call's optimiser steps), else from
model.table.grad, else from the change of the table under SGD with learning rate 1. Optional: .evaluate(rows) -> the loss,
and .ratios, the importance ratios of the last step.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shiq_lab.checks.report import Check, Measured, Report, Result, Skip
from shiq_lab.checks.runner import SubjectError, run_checks
from shiq_lab.checks.tolerances import EPS
from shiq_lab.checks.trainer.rows import Example, World
from shiq_lab.checks.trainer.subject import HALF_SLACK, SLACK, Factory, TrainerSubject, trainer_traits
from shiq_lab.errors import bad

# What must change, must change by more than this share of the gradient: far above rounding, far below any option's effect.
CHANGE = 1e-3
NOTHING = 1e-12  # a gradient below this is none: rewards and logits are of the order of 1
RATIO = "the rollout's and the trainer's log-probabilities of one model differ: padding, positions or dropout"
DROPOUT = (
    "dropout is active in the pass of the policy or of the reference: call model.eval() / ref_model.eval(), "
    "or declare dropout=True"
)
FLOAT32 = (
    "float32 rounding: something is cast to float32 (rewards?); use model.table.dtype, "
    "or declare dtypes=('float32', 'bfloat16')"
)
SINGLE = (1e-9, 1e-6)  # shares of a gradient that roundings of float32, 6e-8 each, leave; those of float64 stay below
FACTORY = "a factory takes (model, ref_model, dataset, config); did you forget to call trl_dpo() or plain_loop(loss)?"


def check_fixed_point(s: TrainerSubject) -> Iterator[Measured]:
    """FP: at l* no call, or no probability-weighted set of calls, changes the table; at the reference they do."""
    for world in s.worlds:
        units = s.units(world)
        pull = max(s.gradient(world, "reference", unit).abs().max().item() for unit in units[:: max(1, len(units) // 6)])
        nothing = "" if pull > NOTHING else "nothing is trained at all"
        yield Measured("gradient at the reference", pull, NOTHING, 1, world.name, at_least=True, detail=nothing)
        if nothing:
            return
        for cell in s.cells(world, "optimum"):
            total = s.expected(world, "optimum", cell)
            what = "expected gradient at the optimum, as a share of that at the reference"
            yield _told(s, s.compare(what, world, total, None, cell.calls[0][0], scale=pull))
        for side in s.traits.padding if s.traits.kind in ("bellman", "trajectory") else ():
            total = s.gradient(world, "optimum", world.dataset, padding_side=side)
            what = f"gradient of all rows in one batch at the optimum, padded {side}, as a share of that at the reference"
            yield _told(s, s.compare(what, world, total, None, world.dataset, scale=pull))


def _told(s: TrainerSubject, found: Measured) -> Measured:
    """A share of the size of float32's roundings gets that as its hint, where the checks run in float64."""
    single = s.traits.dtypes[0] == "float64" and not found.holds and SINGLE[0] <= found.value <= SINGLE[1]
    return replace(found, hint=FLOAT32) if single else found


def check_convergence(s: TrainerSubject) -> Iterator[Measured]:
    """CV: from a perturbed optimum the expected gradient points away from the optimum, and a step goes against it.

    Near the optimum l* the gradient is H (l - l*) with H >= 0, so its product with l - l* is positive unless it is 0.
    """
    for world in s.worlds:
        cells = s.cells(world, "perturbed")
        cells = cells if s.traits.kind == "on_policy" else cells[:: max(1, len(cells) // 8)]
        total = torch.stack([s.expected(world, "perturbed", cell) for cell in cells]).sum(0)
        allowed = torch.tensor(world.mdp.allowed)
        zeroed = lambda which: torch.where(allowed, world.table(which), 0.0)  # noqa: B023, E731
        away = zeroed("perturbed") - zeroed("optimum")
        size = total.norm().item() * away.norm().item()
        cosine = (total * away).sum().item() / size if size > 0 else float("nan")
        what = "cosine between the expected step and the way to the optimum"
        yield Measured(what, cosine, s.rounding(world), int((total != 0).sum()), world.name, at_least=True)
        yield _moved(s, world)


def _moved(s: TrainerSubject, world: World) -> Measured:
    """Whether a call of step with a learning rate of 1 changes the table by minus its gradient."""
    rows = s.some(world, 2)
    gradient = s.gradient(world, "perturbed", rows)
    trainer = s.build(world, "perturbed", lr=1.0)[0]
    before = trainer.model.table.detach().double().cpu().clone()
    s.step(trainer, rows)
    change = trainer.model.table.detach().double().cpu() - before
    change = torch.where(torch.tensor(world.mdp.allowed), change, 0.0)
    if not s.traits.plain_sgd:
        against = -(change * gradient).sum().item() / max((change.norm() * gradient.norm()).item(), NOTHING)
        what = "cosine between a step and minus the gradient of its rows"
        return Measured(what, against, s.rounding(world), change.numel(), world.name, at_least=True)
    # The new table is rounded once more: a rounding of the largest logit against a change of the gradient's size.
    coarse = EPS[s.traits.dtypes[0]] * world.largest / max(gradient.abs().max().item(), NOTHING)
    what = "change of the table in a step of plain SGD with learning rate 1, against minus its gradient"
    said = _multiple(change, -gradient) if change.abs().max() > 0 else "the table did not move"
    return s.compare(what, world, change, -gradient, rows, tolerance=s.rounding(world) + coarse, detail=said)


def check_batches(s: TrainerSubject) -> Iterator[Measured]:
    """BS: how rows are split into micro-batches, accumulated and ordered does not matter."""
    if not s.traits.accumulation:
        raise Skip("the trainer declares that it does not follow batch_size and accumulation")
    for world in s.worlds:
        rows = s.some(world, 4)
        unit = s.config(world).unit
        count = len(rows) // unit
        whole = s.gradient(world, "perturbed", rows)
        for size in (1, 2):
            split = s.gradient(world, "perturbed", rows, batch_size=size, accumulation=count // size)
            what = f"gradient of {count // size} accumulated micro-batches of {size}, against one of {count}"
            yield s.compare(what, world, split, whole, rows, detail=_multiple(split, whole))
        groups = [rows[i : i + unit] for i in range(0, len(rows), unit)]
        turned = s.gradient(world, "perturbed", [row for group in groups[::-1] for row in group])
        yield s.compare("gradient of the same rows in reverse order", world, turned, whole, rows)
        if s.traits.windows and hasattr(s.cached(world, "perturbed")[0], "gradient"):
            half = len(rows) // 2
            setting = {"batch_size": 1, "accumulation": count // 2}
            alone = sum(s.gradient(world, "perturbed", part, **setting) for part in (rows[:half], rows[half:]))
            both = s.gradient(world, "perturbed", rows, **setting)
            what = "gradient of two optimiser steps in one call, against the sum of the two alone"
            yield s.compare(what, world, both, torch.as_tensor(alone), rows, detail=_multiple(both, torch.as_tensor(alone)))


def _multiple(found: Tensor, wanted: Tensor) -> str:
    """ "it is 0.5 times the other" where one is a multiple of the other; where not, nothing."""
    if not wanted.abs().max() > 0:
        return ""
    ratio = (found * wanted).sum() / (wanted * wanted).sum()
    rest = (found - ratio * wanted).abs().max() / wanted.abs().max()
    return f"it is {ratio.item():.4g} times the other" if rest < CHANGE and abs(ratio - 1) > CHANGE else ""


def check_padding(s: TrainerSubject) -> Iterator[Measured]:
    """PAD: the side, the width and the id of the padding do not matter."""
    first = s.traits.padding[0]
    for world in s.worlds:
        rows = s.some(world, 4)
        whole = s.gradient(world, "perturbed", rows)
        for side in s.traits.padding[1:]:
            found = s.gradient(world, "perturbed", rows, padding_side=side)
            yield s.compare(f"gradient with padding on the {side}, against the {first}", world, found, whole, rows)
        for side in s.traits.padding if s.traits.pad_widths else ():
            for name, changes in (("to a multiple of 8", {"pad_to_multiple_of": 8}), ("with another id", {"pad_id": 0})):
                found = s.gradient(world, "perturbed", rows, padding_side=side, **changes)
                what = f"gradient padded {side} {name}, against the shortest padding, {first}, with the end token"
                yield s.compare(what, world, found, whole, rows)
        if len(s.traits.padding) == 1 and not s.traits.pad_widths:
            raise Skip(f"the trainer declares one kind of padding alone, on the {first}")


def check_dtypes(s: TrainerSubject) -> Iterator[Measured]:
    """DT: coarser dtypes run and give the same gradient, from tables that were rounded alike beforehand."""
    finest = s.traits.dtypes[0]
    if len(s.traits.dtypes) < 2:
        raise Skip(f"the trainer declares {finest} alone")
    for world in s.worlds:
        rows = s.some(world, 4)
        for dtype in s.traits.dtypes[1:]:
            exact = s.gradient(world, "perturbed", rows, coarse=dtype)
            found = s.gradient(world, "perturbed", rows, coarse=dtype, dtype=dtype)
            few = HALF_SLACK / SLACK if dtype in ("bfloat16", "float16") else 1.0
            bound = few * s.rounding(world, dtype)
            yield s.compare(f"gradient in {dtype}, against {finest}", world, found, exact, rows, tolerance=bound)


def check_initial(s: TrainerSubject) -> Iterator[Measured]:
    """IN: at model = reference no reward means no gradient, swapped labels turn it round, and ratios are 1."""
    for world in s.worlds:
        yield from (_swapped if s.traits.kind == "preference" else _unpaid)(s, world)
        rows = s.some(world, 4)
        trainer = s.cached(world, "perturbed")[0]
        s.gradient(world, "perturbed", rows)
        ratios = getattr(trainer, "ratios", None)
        if ratios is not None:
            off = (ratios.detach().double() - 1).abs()
            what = "largest |importance ratio - 1| before anything has changed"
            where = f"ratio {int(off.argmax())} of the batch"
            said = f"rows: {world.text(rows)}"
            yield Measured(what, off.max().item(), s.rounding(world), off.numel(), world.name, where, detail=said, hint=RATIO)


def _unpaid(s: TrainerSubject, world: World) -> Iterator[Measured]:
    """At model = reference without rewards the reference is the optimum: no gradient."""
    scale = max(s.gradient(world, "reference", unit).abs().max().item() for unit in s.units(world)[:4])
    empty = world.without_rewards()
    units = s.units(empty)
    for unit in units[:: max(1, len(units) // 8)]:
        found = s.gradient(empty, "reference", unit)
        what = "gradient at model = reference without rewards, as a share of that with rewards"
        yield s.compare(what, empty, found, None, unit, scale=scale, tolerance=s.rounding(world))


def _swapped(s: TrainerSubject, world: World) -> Iterator[Measured]:
    """At model = reference both labels of a pair are alike: equal losses, opposite gradients."""
    for cell in s.cells(world, "reference")[::4]:
        (one, _), (other, _) = cell.calls
        (g, loss), (h, swapped) = (s.run(world, "reference", unit) for unit in (one, other))
        what = "sum of the gradients of both labels of a pair at model = reference"
        yield s.compare(what, world, g + h, None, one, scale=g.abs().max().item())
        if loss is not None and swapped is not None:
            what = "difference of the losses of both labels of a pair at model = reference"
            said = f"{loss:.6g} and {swapped:.6g}; rows: {world.text(one)}"
            bound = s.rounding(world) * max(1.0, abs(loss))
            yield Measured(what, abs(loss - swapped), bound, 1, world.name, detail=said)


def check_purity(s: TrainerSubject) -> Iterator[Measured]:
    """PU: the same call twice gives the same, dropout is off, the reference model and the rows stay as they were."""
    world = s.worlds[0]
    rows = s.some(world, 4)
    first, second = (s.gradient(world, "perturbed", rows) for _ in range(2))
    # A trainer may shuffle its rows, so sums may be taken in another order: not exactly equal.
    yield s.compare("gradient of the same call again", world, second, first, rows)
    if not s.traits.dropout:
        for _ in range(2):
            found = s.gradient(world, "perturbed", rows, dropout=0.5)
            what = "gradient of a model with dropout 0.5, against the same model without"
            yield s.compare(what, world, found, first, rows, hint=DROPOUT)
    trainer, _, ref_model = s.build(world, "perturbed", lr=1.0)
    frozen = ref_model.table.detach().clone()
    given = copy.deepcopy(rows)
    s.guarded("step(rows)", lambda: trainer.step(given))
    moved = (ref_model.table.detach() - frozen).abs()
    where = s.place(world, moved)
    what = "change of the reference model in a step"
    yield Measured(what, moved.max().item(), 0.0, moved.numel(), world.name, where, hint="the reference is trained along")
    touched = sum(a != b for a, b in zip(given, rows, strict=True))
    yield Measured("number of rows that a step changed", touched, 0.0, len(rows), world.name)


def check_evaluation(s: TrainerSubject) -> Iterator[Measured]:
    """EV: evaluation measures the loss that training minimises, at the same parameters and rows, and changes nothing."""
    world = s.worlds[0]
    trainer = s.cached(world, "perturbed")[0]
    if not hasattr(trainer, "evaluate"):
        raise Skip("the trainer has no evaluate(rows)")
    if s.traits.kind == "on_policy":
        raise Skip("an on-policy trainer's loss depends on what it generates")
    rows = s.some(world, 4)
    gradient, loss = s.run(world, "perturbed", rows)
    if loss is None:
        raise Skip("step(rows) returns no loss to compare with")
    size = max(abs(loss), gradient.abs().max().item())
    for when in ("", ", again"):
        found = float(s.guarded("evaluate(rows)", lambda: trainer.evaluate(copy.deepcopy(rows))))
        what = f"evaluated loss against the training loss of the same rows{when}, as a share of it"
        said = f"{found:.6g} and {loss:.6g}; rows: {world.text(rows)}"
        share = abs(found - loss) / size if size > 0 else float("nan")
        yield Measured(what, share, s.rounding(world), 1, world.name, detail=said)
    again = s.gradient(world, "perturbed", rows)
    yield s.compare("gradient after an evaluation, against before", world, again, gradient, rows)


def check_packing(s: TrainerSubject) -> Iterator[Measured]:
    """PK: several rows in one give the gradient of the rows apart."""
    if not s.traits.packing:
        raise Skip("the trainer declares no packing")
    for world in s.worlds:
        rows = s.some(world, 4)
        apart, packed = (s.gradient(world, "perturbed", rows, packing=p) for p in (False, True))
        yield s.compare("gradient of packed rows, against the rows apart", world, packed, apart, rows)


def check_options(s: TrainerSubject) -> Iterator[Measured]:
    """CF: every declared option changes the gradient, and settings that may not change it do not, under every option."""
    if not s.traits.options and not s.traits.same:
        raise Skip("no options were declared")
    world = s.worlds[0]
    rows = s.some(world, 4)
    base = s.gradient(world, "perturbed", rows)
    yield from _same(s, world, rows, base, {})
    for name, value in s.traits.options.items():
        found = s.gradient(world, "perturbed", rows, options={name: value})
        changed = (found - base).abs().max().item() / max(base.abs().max().item(), NOTHING)
        what = f"change of the gradient under {name}={value!r}"
        hint = f"the option {name} is not passed on"
        yield Measured(what, changed, CHANGE, found.numel(), world.name, at_least=True, hint=hint)
        yield from _same(s, world, rows, found, {name: value})


def _same(
    s: TrainerSubject, world: World, rows: Sequence[Example], wanted: Tensor, chosen: Mapping[str, Any]
) -> Iterator[Measured]:
    """Settings that may not matter, under the chosen options."""
    under = "".join(f" and {name}={value!r}" for name, value in chosen.items())
    for name, value in s.traits.same.items():
        found = s.gradient(world, "perturbed", rows, options={**chosen, name: value})
        yield s.compare(f"gradient with {name}={value!r}{under}, against without {name}", world, found, wanted, rows)


TRAINER_CHECKS = (
    Check("FP", "the optimum is a fixed point", check_fixed_point,
          "the trainer's loss has another optimum: masks, shift, end token, padding, reference, beta, or the reward's place"),
    Check("CV", "a step moves toward the optimum", check_convergence,
          "a sign, a detached term, a loss that is not the one intended, or an optimiser step that does not happen"),
    Check("BS", "batch splits, accumulation and order do not matter", check_batches,
          "means over micro-batches of unequal size, a denominator from another window, or rows that see each other"),
    Check("PAD", "padding does not matter", check_padding,
          "padding is attended, scored or counted, or positions count it; masks made from ids where padding is the end token"),
    Check("DT", "coarser dtypes give the same", check_dtypes,
          "sums or log-softmax in half precision, an infinity in a mask, or a cast on the way"),
    Check("IN", "nothing pulls at model = reference", check_initial,
          "the reference is not the model that was given: adapter off, other weights, dropout, other padding or positions"),
    Check("PU", "calls repeat, dropout is off, the reference stays", check_purity,
          "dropout in one of the passes, random state, or state kept between calls"),
    Check("EV", "evaluation measures what training minimises", check_evaluation,
          "evaluation takes the reference from another model, or other masks, options or reductions"),
    Check("PK", "packing does not matter", check_packing,
          "attention, positions or labels cross from one packed row into the next"),
    Check("CF", "options are passed on", check_options,
          "the faster path ignores the option"),
)  # fmt: skip


def check_trainer(
    factory: Factory,
    *,
    kind: str | None = None,
    name: str | None = None,
    expect_fail: Mapping[str, str] | None = None,
    strict: bool = False,
    checks: Sequence[str] | None = None,
    on_result: Callable[[Result], None] | None = None,
    **traits: Any,
) -> Report:
    """Whether a whole trainer keeps the exact optimum where it is, and nothing else about it matters.

        from shiq_lab.checks.trainer.loop import plain_loop
        from shiq_lab.hf.factories import trl_dpo, trl_rloo                     # need the extra hf
        check_trainer(plain_loop(loss, kind="bellman"))
        check_trainer(trl_dpo())

    factory      factory(model, ref_model, dataset, config) -> an object with .step(rows) and .model, for each setting anew
    model, ref_model
                 causal language models, model(input_ids, attention_mask).logits, whose parameter .table float[S, V] is at
                 values that the suite chooses
    dataset, rows
                 lists of dicts: prompt_ids, completion_ids, completion_mask, rewards, reward, terminated, group; for
                 kind="preference" prompt_ids, chosen_ids, rejected_ids, chosen_reward, rejected_reward, group; always index
                 (the place in dataset) and weight (a probability). completion_mask and rewards: an entry a completion token
    config       shiq_lab.checks.trainer.rows.TrainerConfig: kind, beta, gamma, lr (plain SGD's), batch_size, accumulation,
                 padding_side, pad_to_multiple_of, pad_id, group_size, packing, dtype, options
    .step(rows)  trains on these rows; it may return the loss. The gradient is read from .gradient (summed over the call's
                 optimiser steps), else .model.table.grad, else the change of the table at learning rate 1
    optional     .evaluate(rows) -> the loss; .ratios, the importance ratios of the last step
    kind, traits bellman, trajectory, policy_only, on_policy or preference, and the fields of
                 shiq_lab.checks.trainer.subject.TrainerTraits; by default what factory.trainer_traits declares
    checks       names of TRAINER_CHECKS to run alone: FP, CV, BS, PAD, DT, IN, PU, EV, PK, CF
    expect_fail  {check: the reason why it must fail}; strict: warnings are failures; on_result(result): after each check

    Raises ValueError for arguments and traits that do not exist, SubjectError for a factory that makes no trainer at all.
    What the trainer raises later is a failed check.
    """
    if not callable(factory):
        raise bad("factory", "a function (model, ref_model, dataset, config)", repr(factory))
    known = [check.name for check in TRAINER_CHECKS]
    for code in checks or ():
        if code not in known:
            raise bad("checks", f"names of checks ({', '.join(known)})", repr(code))
    chosen = [check for check in TRAINER_CHECKS if checks is None or check.name in checks]
    found = trainer_traits(factory, kind=kind, **traits)
    label = str(name or getattr(factory, "__name__", type(factory).__name__))
    subject = TrainerSubject(factory, found)
    with torch.random.fork_rng(devices=[]):  # trainers seed the global state; dropout and shuffling are to repeat
        torch.manual_seed(0)
        _buildable(subject)
        return run_checks(
            chosen, subject, name=label, kind=found.kind, expect_fail=expect_fail, strict=strict, on_result=on_result
        )


def _buildable(subject: TrainerSubject) -> None:
    """One trainer, kept for the checks: a wrong factory is said once, not by every check."""
    try:
        subject.cached(subject.worlds[0], "reference")
    except SubjectError as error:
        raise SubjectError(f"{error}: {FACTORY}") from error.__cause__
