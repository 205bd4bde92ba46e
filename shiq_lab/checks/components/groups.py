"""Component checks of what is taken over many rows: group baselines, whitening, splitting into micro-batches."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.checks.components.masks import Made, only
from shiq_lab.checks.components.returns import GARBAGE, NUMBERS, POISONS
from shiq_lab.checks.components.rows import Rows, build_cases, no_turns, strata
from shiq_lab.checks.components.subject import EPS, PURE, Case, Component, Kind, as_tensor, check_cases, compare, exact
from shiq_lab.checks.report import Check, Measured
from shiq_lab.checks.runner import SubjectError

# means and variances of at most 60 numbers of size 1 to 10, divided by deviations of at least 0.1
ROUNDING = 1e4 * EPS


# ------------------------------------------------------------------------------------------------- group baseline
@dataclass(frozen=True)
class Form:
    """A way to turn a group's rewards into advantages: (r - baseline) / (deviation + eps)."""

    leave_one_out: bool = False
    correction: int | None = None  # of the variance: 1 over G - 1, 0 over G; None = no division
    eps: float = 0.0

    def __str__(self) -> str:
        baseline = "leave-one-out mean" if self.leave_one_out else "mean"
        spread = f" / (std with correction {self.correction} + {self.eps:g})" if self.correction is not None else ""
        return f"r - {baseline}{spread}"

    def of(self, rewards: list[float]) -> list[float]:
        """The advantages of one group; a group of one has none."""
        n = len(rewards)
        if n == 1:
            return [0.0]
        mean = math.fsum(rewards) / n
        base = [(math.fsum(rewards) - r) / (n - 1) if self.leave_one_out else mean for r in rewards]
        deviation = 1.0
        if self.correction is not None:
            deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (n - self.correction)) + self.eps
        return [(r - b) / deviation if r != b else 0.0 for r, b in zip(rewards, base, strict=True)]


FORMS = (
    Form(),
    Form(leave_one_out=True),
    *(Form(loo, c, eps) for loo in (False, True) for c in (0, 1) for eps in (0.0, 1e-8, 1e-6, 1e-5, 1e-4)),
)
SAMPLE = (0.3, -1.2, 2.0, 0.4)


def infer_form(component: Component) -> Form:
    """The form that fits one group of four best; printed in the notes, and used everywhere else."""
    if "form" not in component.seen:
        got = as_tensor(component.call(_groups_call([0] * 4, list(SAMPLE)), "one group of four"), "one group of four")
        if got.shape != (4,):
            raise SubjectError(f"one group of four: it returned shape {tuple(got.shape)}, expected (4,)")
        apart = [max(abs(x - y) for x, y in zip(got.tolist(), form.of(list(SAMPLE)), strict=True)) for form in FORMS]
        apart = [math.inf if math.isnan(x) else x for x in apart]
        best = min(range(len(FORMS)), key=lambda i: apart[i])
        component.seen["form"] = FORMS[best]
        component.notes.append(f"group baseline: {FORMS[best]}")
    form: Form = component.seen["form"]
    return form


def _groups_call(groups: list[int], rewards: list[float], keep: list[bool] | None = None) -> dict[str, Any]:
    """The arguments of a call. All groups have the same prompt tokens: tokens are no identity."""
    sizes = {groups.count(g) for g in groups}
    return {
        "rewards": exact(rewards),
        "group_ids": torch.tensor(groups),
        "prompt_ids": torch.tensor([[1, 5, 7]] * len(groups)),
        "group_size": sizes.pop() if len(sizes) == 1 else None,
        "keep": torch.tensor([True] * len(groups) if keep is None else keep),
    }


def group_truth(form: Form, groups: list[int], rewards: list[float], keep: list[bool]) -> list[float]:
    """Plain loops: every kept row against the kept rows of its group."""
    out = [0.0] * len(groups)
    for g in set(groups):
        members = [i for i, other in enumerate(groups) if other == g and keep[i]]
        for i, x in zip(members, form.of([rewards[i] for i in members]) if members else [], strict=True):
            out[i] = x
    return out


# (name, group ids, rows kept, does it need group_ids)
LAYOUTS: tuple[tuple[str, list[int], list[bool] | None, bool], ...] = (
    ("one group", [0] * 4, None, False),
    ("three groups of four", [0] * 4 + [1] * 4 + [2] * 4, None, False),
    ("as many groups as members", [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4, None, False),
    ("interleaved groups", [0, 1, 2] * 4, None, True),
    ("unequal groups", [0, 0, 1, 1, 1, 2, 2, 2, 2, 2], None, True),
    ("unequal groups of 12 rows in all", [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2], None, True),
    ("ids that are neither sorted nor dense", [1007, 3, 1007, 42, 3, 42, 42], None, True),
    ("a group of one", [0, 0, 0, 1, 2, 2, 2], None, True),
    ("dropped rows", [0] * 4 + [1] * 4 + [2] * 4, [True, False, True, True] + [True] * 4 + [False, True, False, True], False),
    ("four dropped rows, one group whole", [0] * 4 + [1] * 4 + [2] * 4, [False, True, True, False] * 2 + [True] * 4, False),
)


def run_groups(component: Component, only_names: tuple[str, ...] = (), identical: bool = False) -> Iterator[Measured]:
    """Advantages of many layouts against plain loops."""
    form = infer_form(component)
    rng = np.random.default_rng(3)
    for name, groups, keep, needs_ids in LAYOUTS:
        if (needs_ids and not component.takes("group_ids")) or (keep is not None and not component.takes("keep")):
            continue
        # groups differ in level and spread, so that no other group's numbers can pass for one's own
        rewards = [float(rng.normal() * (1 + g % 5) + 3 * (g % 7)) for g in groups]
        if identical:
            rewards = [[1.0, 0.1, 1 / 3][g % 3] for g in groups]
        kept = [True] * len(groups) if keep is None else keep
        expected = exact(group_truth(form, groups, rewards, kept))
        arguments = _groups_call(groups, rewards, keep)
        live = torch.tensor(kept)
        got = as_tensor(component.call(arguments, name), name)
        if got.shape == (sum(kept),) != live.shape:  # an answer for the kept rows alone
            got = torch.zeros(len(kept), dtype=torch.float64).masked_scatter(live, got)
        if got.shape == live.shape:
            lonely = torch.tensor([groups.count(g) == 1 for g in groups])
            own = exact(rewards)
            # a group of one has no baseline: 0 and the reward itself are both in use
            expected = torch.where(lonely & (got == own), own, expected)
        tolerance = _same_rewards(form) if identical else ROUNDING * 10
        yield compare(got, expected, tolerance, name, live=live, axes=("row",))


def _same_rewards(form: Form) -> float:
    """What a mean of at most five equal numbers of size <= 1 may round to, over the least deviation it is divided by."""
    return 8 * EPS / (form.eps if form.correction is not None and form.eps else 1.0)


def run_group_batches(component: Component) -> Iterator[Measured]:
    """Any order of whole groups, and every group alone, give the same advantages."""
    form = infer_form(component)
    rng = np.random.default_rng(4)
    groups = [0] * 4 + [1] * 4 + [2] * 4
    rewards = [float(x) for x in rng.normal(size=12) * 3]
    expected = group_truth(form, groups, rewards, [True] * 12)
    for order in itertools.permutations(range(3)):
        rows = [4 * g + i for g in order for i in range(4)]
        name = f"groups in order {order}"
        got = component.call(_groups_call([groups[i] for i in rows], [rewards[i] for i in rows]), name)
        yield compare(got, exact([expected[i] for i in rows]), ROUNDING * 10, name, axes=("row",))
    for g in range(3):
        got = component.call(_groups_call([g] * 4, rewards[4 * g : 4 * g + 4]), f"group {g} alone")
        truth = exact(expected[4 * g : 4 * g + 4])
        yield compare(got, truth, ROUNDING * 10, f"group {g} alone", axes=("row",))


def _group_cases(component: Component) -> list[Case]:
    """For the purity check alone: GR compares with the inferred form."""
    return [Case("PU", "two groups", _groups_call([0] * 4 + [1] * 4, [*SAMPLE, *SAMPLE[::-1]]), torch.zeros(8), 0.0)]


GROUPS = Kind(
    "group_baseline",
    {
        "rewards": "float[B]",
        "group_ids": "int[B]; rows of one prompt share an id; any integers, in any order",
        "prompt_ids": "int[B, P]; different groups may hold the same tokens",
        "group_size": "int; for functions that name no group_ids: groups are contiguous and of this size (None: unequal)",
        "keep": "bool[B]; dropped rows enter no baseline; the answer is for all rows or for the kept ones",
    },
    "float[B] advantages: r - (mean or leave-one-out mean), divided by a deviation or not; the form is inferred",
    _group_cases,
    (
        Check(
            "GR", "each row against the rows of its own group", run_groups, "Groups are merged, misaligned, or all one batch."
        ),
        Check(
            "IN",
            "identical rewards give 0",
            partial(run_groups, identical=True),
            "0 / 0, or a baseline over other groups.",
        ),
        Check("BS", "the same in any order of groups, and for a group alone", run_group_batches, "A baseline over the batch."),
        PURE,
    ),
)


# ------------------------------------------------------------------------------------------------------ whitening
def _whiten(xs: list[float], correction: int, eps: float, inside: bool, shift: bool) -> list[float]:
    mean = math.fsum(xs) / len(xs)
    variance = math.fsum((x - mean) ** 2 for x in xs) / (len(xs) - correction)
    scale = math.sqrt(variance + eps) if inside else math.sqrt(variance) + eps
    return [(x - mean) / scale + (0.0 if shift else mean) for x in xs]


WHITE_FORMS = tuple((c, eps, inside) for c in (0, 1) for eps in (0.0, 1e-8, 1e-6, 1e-5, 1e-4) for inside in (True, False))


def infer_whitening(component: Component) -> tuple[int, float, bool]:
    """Correction and eps of the variance, from one row without padding."""
    if "white" not in component.seen:
        xs = [0.5, -1.0, 2.5, 0.0, 1.0]
        ones = torch.ones(1, 5, dtype=torch.int64)
        call = {"x": exact([xs]), "mask": ones, "completion_mask": ones, "shift_mean": True}
        got = as_tensor(component.call(call, "one row without padding"), "one row without padding").reshape(-1).tolist()
        if len(got) != 5:
            raise SubjectError(f"one row without padding: it returned {len(got)} numbers, expected 5")
        gap = lambda f: max(abs(a - b) for a, b in zip(got, _whiten(xs, f[0], f[1], f[2], True), strict=True))  # noqa: E731
        best = min(WHITE_FORMS, key=lambda f: gap(f) if math.isfinite(gap(f)) else math.inf)
        component.seen["white"] = best
        component.notes.append(
            f"whitening: variance with correction {best[0]}, eps {best[1]:g} {'inside' if best[2] else 'after'} the root"
        )
    found: tuple[int, float, bool] = component.seen["white"]
    return found


def _white_of(component: Component, rows: Rows, shift: bool) -> tuple[dict[str, Any], Tensor, Tensor]:
    # off actions the numbers are of the same size as on them: whoever averages over padding is off by order 1
    x = rows.random(9, off_actions=1.0) * 2 + 3
    places = [(b, i) for b, row in enumerate(rows.actions) for i in row]
    out = torch.zeros_like(x)
    correction, eps, inside = infer_whitening(component)
    if len(places) > 1:
        for (b, i), y in zip(places, _whiten([x[p].item() for p in places], correction, eps, inside, shift), strict=True):
            out[b, i] = y
    live = (rows.completion_mask == 1) & (len(places) > 1)
    return {"x": x, "mask": rows.completion_mask, "shift_mean": shift}, out, live


def _white_cases(component: Component) -> list[Case]:
    def build(rows: Rows) -> Made:
        for shift in (True, False) if component.takes("shift_mean") else (True,):
            arguments, out, live = _white_of(component, rows, shift)
            yield arguments, out, live, ROUNDING

    cases = [c for c in build_cases(component, build) if "alone" not in c.environment]
    for code, name, rows in strata(component):
        if code in ("PAD", "MT"):
            for label, poison, soft in POISONS:
                arguments, out, live = _white_of(component, rows, True)
                arguments["x"] = torch.where(rows.completion_mask == 0, poison, arguments["x"])
                case = {**rows.common(), **arguments}
                cases.append(Case("MI", f"{name}, {label} off actions", case, out, GARBAGE * ROUNDING, live, warn_only=soft))
    return cases


WHITENING = Kind(
    "whitening",
    {
        **only("attention_mask", "completion_mask"),
        "x": "float[B, L]; off the mask anything",
        "mask": NUMBERS["mask"],
        "shift_mean": "bool; False adds the mean back",
    },
    "float[B, L]: (x - masked mean) / masked deviation over the whole batch; correction and eps are inferred; read on the mask",
    _white_cases,
    (
        check_cases("OR", "masked mean and masked variance", "The mean or the variance is taken over padding too."),
        check_cases("TE", "the same for ended and cut rows", "The mean or the variance is taken over padding too."),
        check_cases("PAD", "the same on either padding side, any width", "The number of columns enters a mean."),
        check_cases("MT", "observation tokens do not count", "The mask has holes; a span or a prefix was assumed."),
        check_cases("MI", "what stands off the mask does not matter", "Masked numbers enter the mean or the variance."),
        check_cases("BS", "the same in another order", "The statistics are taken row by row."),
        PURE,
    ),
    skips=no_turns,
)


# -------------------------------------------------------------------------------------------------- micro batches
def _stamped(B: int, L: int) -> dict[str, Tensor]:
    """Tensors of many shapes whose every entry is its row's number."""
    number = torch.arange(B)
    wide = number[:, None].expand(B, L).clone()
    return {
        "input_ids": wide,
        "completion_mask": wide.clone(),
        "old_logprobs": wide.double(),
        "advantages": wide.double(),
        "rewards": number.double(),
        "group_ids": number.clone(),
    }


def run_alignment(component: Component) -> Iterator[Measured]:
    """Every row comes back once, and all its tensors say so."""
    for B, size, lengths in (
        (7, 2, [3, 9, 1, 4, 8, 2, 6]),
        (6, 3, [1, 2, 3, 4, 5, 6]),
        (6, 6, [6, 5, 4, 3, 2, 1]),
        (1, 4, [2]),
    ):
        for seed in (0, 1):
            place = f"{B} rows, size {size}, seed {seed}"
            arguments = {"rows": _stamped(B, 9), "size": size, "lengths": torch.tensor(lengths), "seed": seed}
            parts = component.call(arguments, place)
            parts = [parts] if isinstance(parts, dict) else parts
            if not isinstance(parts, (list, tuple)):
                raise SubjectError(f"{place}: expected a dict or a list of dicts, got {type(parts).__name__}")
            yield from _aligned(list(parts), B, place)


def _aligned(parts: list[Any], B: int, place: str) -> Iterator[Measured]:
    names = list(_stamped(1, 1))
    for part in parts:
        if not isinstance(part, dict) or set(names) - set(part):
            raise SubjectError(f"{place}: expected micro-batches that are dicts of {', '.join(names)}")
    tensors = {name: [as_tensor(part[name], place) for part in parts] for name in names}
    if any(x.ndim == 0 or (len(x) and not x.numel()) for those in tensors.values() for x in those):
        raise SubjectError(f"{place}: expected tensors [B, ...] with something in every row")
    found = {name: [row.reshape(-1) for x in those for row in x] for name, those in tensors.items()}
    rows = found["input_ids"]
    seen = torch.tensor([sum(int(x[0]) == b for x in rows) for b in range(B)])
    yield compare(seen, torch.ones(B), 0.0, place, what="times that a row comes back, off from once", axes=("row",))
    for name, those in found.items() if rows else ():
        if len(those) != len(rows):
            raise SubjectError(f"{place}: {len(those)} rows of {name}, but {len(rows)} of input_ids")
        apart = [float((x - r[0]).abs().max()) for x, r in zip(those, rows, strict=True)]
        worst = max(range(len(apart)), key=lambda i: apart[i])
        yield Measured(
            f"rows between {name} and input_ids",
            apart[worst],
            0.0,
            len(apart),
            place,
            f"row {worst} of what came back",
            detail=f"{name} of row {int(those[worst][0])} with ids of row {int(rows[worst][0])}" if apart[worst] else "",
        )


def _micro_cases(component: Component) -> list[Case]:
    arguments = {"rows": _stamped(5, 4), "size": 2, "lengths": torch.tensor([4, 1, 3, 2, 4]), "seed": 0}
    return [Case("PU", "5 rows", arguments, torch.zeros(1), 0.0)]


MICRO_BATCHES = Kind(
    "micro_batches",
    {
        "rows": "dict of tensors [B, ...]: " + ", ".join(_stamped(1, 1)),
        "size": "int; rows a micro-batch",
        "lengths": "int[B]; tokens of each row, for balancing",
        "seed": "int; for shuffling",
    },
    "a dict, or a list of dicts, with the same names: all rows once, in any order, their tensors together",
    _micro_cases,
    (
        Check(
            "BS", "every row comes back once, all its tensors together", run_alignment, "One tensor was permuted, another not."
        ),
        PURE,
    ),
)
KINDS = (GROUPS, WHITENING, MICRO_BATCHES)
