"""PAD, BS, PK, SC, SH, CS, VP: what must not change a loss, and what must."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from shiq_lab.batch import pack
from shiq_lab.checks.comparing import AXES, by_state, expected_gradient, proportional, realigned, same, spot
from shiq_lab.checks.fixed_point import ways
from shiq_lab.checks.fixtures import EOS, LOW, A, Fixture, Inputs, fixture, fixtures
from shiq_lab.checks.report import Measured, Skip
from shiq_lab.checks.subject import Called, Subject, arrange
from shiq_lab.checks.tolerances import SAME
from shiq_lab.graph import Floats
from shiq_lab.mdp import TokenMDP

MATTERS = 1e-3  # share of the usual gradient by which something that carries information must move it; seen: 1e-1


def mixed(subject: Subject, seed: int = 1, gamma_at: int = -1) -> tuple[Fixture, Inputs]:
    """The richest batch that the loss stands: unequal lengths, two turns, cut and ended rows, at random parameters."""
    case = fixture("two turns" if subject.traits.multi_turn else "one turn", subject.gammas[gamma_at])
    batch = case.cut_rows() if subject.traits.cut_rows else case.listing
    if subject.traits.kind == "preference":
        batch = batch.select(case.some(14))
    return case, arrange(subject, case, case.perturbed(seed), batch)


# ------------------------------------------------------------------------------------------------------ padding
def padding(subject: Subject) -> Iterator[Measured]:
    """PAD: the side, the width and the ids of padding change nothing; pad == eos included."""
    _, inputs = mixed(subject)
    want = subject.call(inputs)
    for side in subject.traits.padding:
        for extra in (0, 3):
            pads = [("eos", EOS), ("an action's id", A)] + ([("-100", -100)] if subject.traits.pad_ids_out_of_range else [])
            for label, pad_id in pads:
                source = sides(inputs, side, extra)
                got = subject.call(inputs.rearranged(source, pad_id=pad_id))
                back, fallen = realigned(got.grad, source, inputs.logits.shape[1])
                what = f"padded on the {side}, {extra} columns wider, pad id {label}"
                yield from same(subject, replace(got, grad=back), want, inputs, what)
                worst, where = spot(fallen.abs())
                yield Measured(f"{what}: gradient in padding", worst, 0.0, fallen.numel() + 1, inputs.environment, where)


def sides(inputs: Inputs, side: str, extra: int) -> Tensor:
    """The source of every position when rows stand at the left or right edge of a batch `extra` columns wider."""
    mask = inputs.batch.attention_mask == 1
    B, L = mask.shape
    real = mask.sum(1, keepdim=True)
    slot = torch.arange(L + extra).expand(B, L + extra) - (0 if side == "right" else L + extra - real)
    order = torch.argsort(~mask, dim=1, stable=True)
    inside = (slot >= 0) & (slot < real)
    return torch.where(inside, order.gather(1, slot.clamp(0, L - 1)), -1)


# ------------------------------------------------------------------------------------------- rows and reduction
def units(subject: Subject, inputs: Inputs) -> list[list[int]]:
    """The rows that belong together: a pair, a prompt's group where the loss compares rows, else each row alone."""
    B = len(inputs.batch)
    if inputs.reverse is not None:
        return [[k, B // 2 + k] for k in range(B // 2)]
    if subject.traits.kind in ("policy_only", "on_policy") and (
        subject.grouped or (subject.traits.kind == "policy_only" and "values" not in subject.names)
    ):
        ids = inputs.batch.group_ids
        return [(ids == i).nonzero()[:, 0].tolist() for i in ids.unique()]
    return [[k] for k in range(B)]


def batches(subject: Subject) -> Iterator[Measured]:
    """BS: the order of rows changes nothing, and a batch is a fixed combination of its rows (pairs, groups) alone."""
    _, inputs = mixed(subject)
    parts = units(subject, inputs)
    if subject.traits.kind == "policy_only" and not {"group_ids", "values"} & subject.names:
        parts = parts[:1]  # a loss that compares all rows of its batch: one prompt at a time
    parts = [parts[i] for i in np.unique(np.linspace(0, len(parts) - 1, 12).round().astype(int))]
    if subject.traits.kind == "preference":
        inputs = inputs.rows([chosen for chosen, _ in parts] + [rejected for _, rejected in parts])
        local = [[k, k + len(parts)] for k in range(len(parts))]
    else:
        ends = np.cumsum([len(part) for part in parts]).tolist()
        inputs = inputs.rows([row for part in parts for row in part])
        local = [list(range(end - len(part), end)) for part, end in zip(parts, ends, strict=True)]
    yield from reordered(subject, inputs, local)
    if subject.grouped:
        renamed = inputs.change(group_ids=5 + 7 * (inputs.batch.group_ids.max() - inputs.batch.group_ids))
        yield from same(subject, subject.call(renamed), subject.call(inputs), inputs, "groups under other ids")
    if "weights" in subject.names and not subject.grouped:
        yield _weighted(subject, inputs)
    if len(local) > 1:
        whole = subject.call(inputs)
        single = [trimmed(subject, inputs.rows(part)) for part in local]
        yield _reduction(subject, inputs, whole, single, local)


def _weighted(subject: Subject, inputs: Inputs) -> Measured:
    """With weights, every row's gradient is its own times its weight, up to one factor."""
    count = len(inputs.batch) // 2 if subject.traits.kind == "preference" else len(inputs.batch)
    w = torch.from_numpy(np.random.default_rng(4).uniform(0.5, 1.5, count))
    w = torch.cat([w, w]) if subject.traits.kind == "preference" else w
    gaps, factor = proportional(subject.call(inputs.change(weights=w)).grad, w[:, None, None] * subject.call(inputs).grad)
    gap, where = spot(gaps if factor > 0 else torch.full_like(gaps, torch.inf), inputs)
    bound = SAME * subject.eps * inputs.size
    hint = "`weights` are taken and not used, or not linearly."
    return Measured("rows weighted by `weights`", gap, bound, gaps.numel(), inputs.environment, where, hint=hint)


def trimmed(subject: Subject, inputs: Inputs) -> Called:
    """The call on rows without the columns that are padding in all of them; the gradient is put back in its old width."""
    B, L = inputs.batch.input_ids.shape
    width = int(inputs.batch.attention_mask.sum(1).max())
    out = subject.call(inputs.rearranged(torch.arange(width).expand(B, width)))
    return replace(out, grad=torch.nn.functional.pad(out.grad, (0, 0, 0, L - width)))


def reordered(subject: Subject, inputs: Inputs, local: list[list[int]]) -> Iterator[Measured]:
    """The same rows in another order (pairs stay pairs): gradients move with their rows."""
    shuffled = np.random.default_rng(0).permutation(len(local)).tolist()
    if subject.traits.kind == "preference":
        order = [local[k][0] for k in shuffled] + [local[k][1] for k in shuffled]
    elif subject.grouped:
        order = np.random.default_rng(0).permutation(len(inputs.batch)).tolist()  # groups need not be contiguous
    else:
        order = [i for k in shuffled for i in reversed(local[k])]
    want = subject.call(inputs)
    got = subject.call(inputs.rows(order))
    back = torch.zeros_like(got.grad)
    back[torch.tensor(order)] = got.grad
    yield from same(subject, replace(got, grad=back), want, inputs, "rows in another order")


def _reduction(subject: Subject, inputs: Inputs, whole: Called, single: list[Called], local: list[list[int]]) -> Measured:
    """Which reduction makes the batch out of its parts; a failure if none does."""
    tokens = inputs.batch.completion_mask.sum(1).double()
    per = lambda x: torch.stack([x[part].sum() for part in local])  # noqa: E731
    share = lambda x: x / x.sum().clamp(min=1)  # noqa: E731
    rows = per(torch.ones_like(tokens))
    weights = {
        "sum": torch.ones_like(rows),
        "row mean": share(rows),
        "row mean of rows with actions": share(per((tokens > 0).double())),
        "token mean": share(per(tokens)),
        "mean over groups": share(torch.ones_like(rows)),
        "mean over pairs in groups": share(rows * (rows - 1)),
        "sum over pairs, of all rows squared": (rows / rows.sum()) ** 2,
    }
    allowed = {
        "mean of row means": ("row mean", "row mean of rows with actions", "mean over groups", "mean over pairs in groups"),
        "row mean": ("row mean", "row mean of rows with actions", "mean over groups", "mean over pairs in groups"),
    }
    declared = subject.traits.reduction
    names = allowed.get(declared, (declared,)) if declared else tuple(weights)
    bound = SAME * subject.eps * inputs.size
    found: dict[str, float] = {}
    for name in names:
        w = weights[name]
        grad = torch.zeros_like(whole.grad)
        for factor, part, call in zip(w, local, single, strict=True):
            grad[torch.tensor(part)] = factor * call.grad
        value = float((w * torch.stack([c.value for c in single])).sum())
        size = float(whole.grad.abs().max().clamp(min=1e-300))
        unit = max(abs(float(whole.value)), size)
        found[name] = max(float((grad - whole.grad).abs().max()) / size, abs(value - float(whole.value)) / unit)
    best = min(found, key=lambda name: found[name])
    if found[best] <= bound:
        said = "declared" if declared else "inferred"
        label = {"row mean": "mean over rows (of each row's sum or mean)"}.get(best, best)
        subject.notes.append(f"reduction, {said}: {declared or label}")
    hint = "A mean over the padded length, or rows that influence each other. Declare `reduction` if it is meant."
    what = f"batch against its parts, reduction {best!r}" + ("" if declared else " (the nearest of sum, row and token means)")
    return Measured(what, found[best], bound, whole.grad.numel(), inputs.environment, hint="" if declared else hint)


def packing(subject: Subject) -> Iterator[Measured]:
    """PK: rows packed into one with segment_ids give the gradient of the rows alone, up to the reduction's factor."""
    if subject.traits.packing is False:
        raise Skip("declared: packing=False")
    if "segment_ids" not in subject.names:
        raise Skip("the loss does not name segment_ids")
    if subject.traits.kind == "preference":
        raise Skip("pairs are halves of a batch and cannot be packed")
    case, inputs = mixed(subject)
    table = case.perturbed(1)
    packed = arrange(
        replace(subject, traits=replace(subject.traits, empty_completions=True)), case, table, pack(inputs.batch, 20)
    )
    want = by_state(subject.call(inputs).grad, inputs, case)
    got = by_state(subject.call(packed).grad, packed, case)
    gaps, factor = proportional(got, want)
    gap, where = spot(gaps if factor > 0 else torch.full_like(gaps, torch.inf), axes=("state", "token"))
    seen = f"best factor {factor:.3g}"
    yield Measured(
        "packed against unpacked gradient", gap, SAME * subject.eps * packed.size, got.numel(), case.name, where, detail=seen
    )


# ----------------------------------------------------------------------------------------------- scale and shape
def scaling(subject: Subject) -> Iterator[Measured]:
    """SC: rewards and beta times 3 change nothing but the size (F6); without rewards, beta times 2 is log-ratios times 2."""
    if subject.traits.kind == "preference":
        yield _doubled_ratios(subject)
        return
    case, inputs = mixed(subject)
    table = case.perturbed(1)
    bound = SAME * subject.eps * inputs.size
    for c in (3.0, 64.0, 1 / 64):  # far enough to meet a clip; powers of two round nothing
        axes: tuple[str, ...] = AXES
        if subject.traits.kind == "on_policy":  # a baseline may stay as it is: it has no part in the expectation
            small = fixture("small" if subject.traits.multi_turn else "one turn", subject.gammas[-1])
            more = Fixture(small.name, replace(small.mdp, reward=c * small.mdp.reward), c * small.beta, small.gamma)
            table = small.perturbed(1)
            got, want = (expected_gradient(subject, f, table) for f in (more, small))
            rows, axes = None, ("state", "token")
        else:
            more_ = inputs.change(rewards=c * inputs.batch.rewards, values=c * inputs.values, beta=c * inputs.beta)
            got, want, rows = subject.call(more_).grad, subject.call(inputs).grad, inputs
        gaps, factor = proportional(got, want)
        gap, where = spot(gaps if factor > 0 else torch.full_like(gaps, torch.inf), rows, axes)
        what = f"rewards and beta times {c:g}: direction of the gradient"
        yield Measured(what, gap, bound, gaps.numel(), inputs.environment, where, detail=f"best factor {factor:.4g}")


def _doubled_ratios(subject: Subject) -> Measured:
    """loss(2 beta, x) against loss(beta, 2 x) for every pair, x the log-ratios; equal up to one factor."""
    case = fixture("small" if subject.traits.multi_turn else "one turn")
    inputs = arrange(subject, case, case.perturbed(3, size=0.1))
    ids = torch.nn.functional.pad(inputs.batch.input_ids, (0, 1))[:, 1:, None]
    ref, here = inputs.ref_logits.log_softmax(-1), inputs.logits.log_softmax(-1)
    ratio = (here - ref).gather(-1, ids)
    p = ref.gather(-1, ids).exp()
    wanted = (p * (2 * ratio).exp()).clamp(max=1 - 1e-9)
    rest = torch.log1p(-wanted) - torch.log1p(-p.clamp(max=1 - 1e-12))
    doubled = torch.where(p > 1 - 1e-9, ref, (ref + rest).scatter(-1, ids, wanted.log()))
    twice = inputs.change(logits=doubled.clamp(min=LOW))
    chosen = range(0, len(inputs.batch) // 2, max(1, len(inputs.batch) // 24))
    half = len(inputs.batch) // 2
    a = torch.tensor([subject.value(inputs.rows([k, half + k]).change(beta=2 * inputs.beta)) for k in chosen])
    b = torch.tensor([subject.value(twice.rows([k, half + k])) for k in chosen])
    gaps, factor = proportional(a.double(), b.double())
    gap, where = spot(gaps, axes=("pair",))
    detail = f"best factor {factor:.4g}"
    # exp and log of the construction lose a few digits to 1 - p
    return Measured(
        "beta times 2 against log-ratios times 2", gap, 1e3 * SAME * subject.eps, len(a), case.name, where, detail=detail
    )


def shaping(subject: Subject) -> Iterator[Measured]:
    """SH: rewards plus gamma Phi(s') - Phi(s) change nothing, once the level of the logits (or of `values`) moves with Phi."""
    kind = subject.traits.kind
    if kind == "preference":
        raise Skip("preferences carry no rewards")
    if not subject.traits.per_token_reward:
        raise Skip("declared: per_token_reward=False")
    for case in fixtures(("two turns" if subject.traits.multi_turn and not subject.grouped else "one turn",), subject.gammas):
        phi, shaped = potential(case, free_start=kind in ("bellman", "trajectory"))
        table = case.perturbed(1)
        twin = Fixture(f"{case.name}, shaped", shaped, case.beta, case.gamma)
        if kind == "on_policy":
            yield _shaped_expectation(subject, case, twin, table)
            continue
        batch = case.cut_rows() if subject.traits.cut_rows else case.listing
        inputs = arrange(subject, case, table, batch)
        before = torch.nn.functional.pad(inputs.batch.known_states(), (1, 0), value=-1)[:, :-1]
        acted = (inputs.batch.completion_mask == 1) & (before >= 0)
        paid = torch.where(acted, torch.tensor(shaped.reward)[before.clamp(min=0), inputs.batch.input_ids], 0.0)
        level = torch.from_numpy(phi)[before.clamp(min=0)]
        moved = inputs.change(rewards=paid, values=torch.where(acted, inputs.values - level, inputs.values))
        if kind in ("bellman", "trajectory"):
            states = inputs.batch.known_states()
            lift = torch.where(states >= 0, torch.from_numpy(phi)[states.clamp(min=0)], 0.0) / case.beta
            moved = moved.change(logits=inputs.logits - lift[..., None])
        yield from same(subject, subject.call(moved), subject.call(inputs), inputs, "potential-based shaping")


def potential(case: Fixture, *, free_start: bool) -> tuple[Floats, TokenMDP]:
    """Phi float[S] and the shaped automaton; Phi of an environment state is its successors' mean, of the first actions 0."""
    mdp = case.mdp
    phi = np.random.default_rng(8).normal(size=mdp.n_states + 1)
    phi[-1] = 0.0
    first = {int(s) for s in _after_prompt(case)}
    chance = np.where(mdp.allowed, np.exp(mdp.ref_log_policy), 0.0)
    for s in range(mdp.n_states - 1, -1, -1):  # successors come later: prefix trees are numbered breadth first
        if not mdp.is_policy[s]:
            phi[s] = float((chance[s] * phi[mdp.next_state[s]]).sum())
        elif not free_start and s in first:
            phi[s] = 0.0
    reward = np.where(mdp.allowed & mdp.is_policy[:, None], mdp.reward + case.gamma * phi[mdp.next_state] - phi[:-1, None], 0.0)
    return phi[:-1], replace(mdp, reward=reward)


def _after_prompt(case: Fixture) -> Tensor:
    batch = case.listing
    first = (batch.completion_mask == 1).long().argmax(1)
    return batch.known_states()[torch.arange(len(batch)), first - 1].unique()


def _shaped_expectation(subject: Subject, case: Fixture, twin: Fixture, table: Floats) -> Measured:
    """On-policy: the expected gradient keeps its direction and its size."""
    found = []
    for per in ways(subject):
        got, want = (expected_gradient(subject, c, table, per_token=per) for c in (twin, case))
        size = float(want.abs().max().clamp(min=1e-300))
        found.append(spot((got - want).abs() / size, axes=("state", "token")))
    gap, where = min(found)
    bound = SAME * subject.eps * twin.inputs(table).size
    return Measured("potential-based shaping: expected gradient", gap, bound, twin.mdp.reward.size, twin.name, where)


# ------------------------------------------------------------------------------------------- levels, vocabulary
def constant_shift(subject: Subject) -> Iterator[Measured]:
    """CS: a constant added to model and reference changes nothing; to the model alone, what the kind says (F5)."""
    case, inputs = mixed(subject)
    shift = torch.sin(1.0 + torch.arange(inputs.logits.shape[0] * inputs.logits.shape[1])).reshape(inputs.logits.shape[:2])
    states = inputs.batch.known_states()
    level = 2.0 * torch.sin(1.0 + states)[..., None] if shift.numel() else shift[..., None]
    want = subject.call(inputs)
    shifted = subject.traits.readout == "shifted"
    both = inputs.change(ref_logits=inputs.ref_logits + level, logits=inputs.logits + (level if shifted else 0.0))
    what = "a constant added to model and reference" if shifted else "a constant added to the reference"
    yield from same(subject, subject.call(both), want, inputs, what)
    kind = subject.traits.kind
    if kind in ("policy_only", "on_policy", "preference"):
        alone = subject.call(inputs.change(logits=inputs.logits + level))
        yield from same(subject, alone, want, inputs, "a constant added to the model alone")
        return
    chosen = inputs.batch.completion_mask == 1
    nth = chosen.cumsum(1)
    counted = 1 if kind == "trajectory" else 2
    at = torch.nn.functional.pad(chosen & (nth == counted), (0, 1))[:, 1:]  # where the first (second) action is scored
    alone = subject.call(inputs.change(logits=inputs.logits + torch.where(at, 1.0, 0.0)[..., None]))
    moved = (alone.grad - want.grad).abs().max() / want.grad.abs().max()
    what = f"a constant added to the model before action {counted}: change of the gradient"
    hint = "The level of the logits does not enter, so v* is not learned."
    yield Measured(what, float(moved), MATTERS, want.grad.numel(), case.name, at_least=True, hint=hint)


def vocabulary(subject: Subject) -> Iterator[Measured]:
    """VP: columns that nobody may say, at -inf or at the least finite number in both models, change nothing."""
    _, inputs = mixed(subject)
    want = subject.call(inputs)
    V = inputs.logits.shape[2]
    wider = lambda x, low: torch.nn.functional.pad(x, (0, 3), value=low)  # noqa: E731
    for low, label in ((-torch.inf, "-inf"), (LOW, f"{LOW:g}")):
        got = subject.call(inputs.change(logits=wider(inputs.logits, low), ref_logits=wider(inputs.ref_logits, low)))
        what = f"3 more columns at {label}"
        yield from same(subject, replace(got, grad=got.grad[..., :V]), want, inputs, what)
        worst, where = spot(got.grad[..., V:].abs())
        yield Measured(f"{what}: gradient there", worst, 0.0, got.grad[..., V:].numel(), inputs.environment, where)
    hidden = lambda x: torch.where(x <= LOW / 2, -torch.inf, x)  # noqa: E731
    got = subject.call(inputs.change(logits=hidden(inputs.logits), ref_logits=hidden(inputs.ref_logits)))
    yield from same(subject, got, want, inputs, "forbidden tokens at -inf")
