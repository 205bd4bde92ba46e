"""What most checks of a loss share: comparing two calls, saying where the worst entry sits, expected gradients."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from shiq_lab.checks.fixtures import TOKENS, Fixture, Inputs
from shiq_lab.checks.report import Measured
from shiq_lab.checks.subject import Called, Subject, arrange
from shiq_lab.checks.tolerances import SAME
from shiq_lab.graph import Floats

AXES = ("row", "position", "token")


def spot(gaps: Tensor, inputs: Inputs | None = None, axes: tuple[str, ...] = AXES) -> tuple[float, str]:
    """The largest entry and its place in words; NaN counts as the largest."""
    if not gaps.numel():
        return 0.0, ""
    flat = torch.nan_to_num(gaps, nan=torch.inf).flatten()
    at = [int(i) for i in np.unravel_index(int(flat.argmax()), gaps.shape)]
    words = []
    for axis, i in zip(axes, at, strict=True):
        words.append(f"{axis} {TOKENS[i]!r}" if axis == "token" and i < len(TOKENS) else f"{axis} {i}")
        if axis == "row" and inputs is not None:
            words[-1] += f" ({spelled(inputs, i)})"
    return float(gaps.flatten()[flat.argmax()]), ", ".join(words)


def spelled(inputs: Inputs, row: int) -> str:
    """A row's real tokens, actions in brackets: "<bos> x [a] [b] => y [c]"."""
    b = inputs.batch
    real = (b.attention_mask[row] == 1).nonzero()[:, 0].tolist()
    said = [(TOKENS[int(b.input_ids[row, i])], bool(b.completion_mask[row, i])) for i in real]
    return " ".join(f"[{token}]" if action else token for token, action in said)


def same(
    subject: Subject, got: Called, want: Called, inputs: Inputs, what: str, *, values: bool = True, scale: float = 1.0
) -> Iterator[Measured]:
    """Two calls that must agree: the gradients entry by entry, relative to the largest, and the values."""
    bound = SAME * subject.eps * inputs.size * scale
    size = max(float(want.grad.abs().max()), torch.finfo(torch.float64).tiny)
    gap, where = spot((got.grad - want.grad).abs() / size, inputs)
    yield Measured(f"{what}: gradient", gap, bound, want.grad.numel(), inputs.environment, where)
    if values:
        unit = max(abs(float(want.value)), size)
        seen = f"loss {float(got.value):.6g}, before {float(want.value):.6g}"
        gap = abs(float(got.value - want.value)) / unit
        yield Measured(f"{what}: value", gap, bound, 1, inputs.environment, detail=seen)


def proportional(got: Tensor, want: Tensor) -> tuple[Tensor, float]:
    """got - factor * want relative to the largest entry of got, and the factor that fits best."""
    factor = float((got * want).sum() / (want * want).sum().clamp(min=torch.finfo(want.dtype).tiny))
    return (got - factor * want).abs() / got.abs().max().clamp(min=torch.finfo(want.dtype).tiny), factor


def realigned(grad: Tensor, source: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """A rearranged batch's gradient put back in the old places, float[B, width, V], and what fell on new positions."""
    there = source >= 0
    index = torch.where(there, source, width)[..., None].expand_as(grad)  # new positions land in a spare column
    back = torch.zeros(len(grad), width + 1, grad.shape[2], dtype=grad.dtype).scatter(1, index, grad)
    return back[:, :width], torch.where(there[..., None], 0.0, grad)


# -------------------------------------------------------------------------------------------- expected gradients
def lengths(inputs: Inputs) -> Tensor:
    """Actions a row, at least 1."""
    return inputs.batch.completion_mask.sum(1).clamp(min=1).double()


def by_state(grad: Tensor, inputs: Inputs, case: Fixture) -> Tensor:
    """The gradient by logits added up by the state they belong to: float[S, V]."""
    states = inputs.batch.known_states()
    out = torch.zeros(case.mdp.n_states + 1, grad.shape[2], dtype=grad.dtype)
    out.index_add_(0, torch.where(states < 0, case.mdp.n_states, states).flatten(), grad.flatten(0, 1))
    return out[:-1]


def row_chances(case: Fixture, table: Floats) -> Tensor:
    """The probability of every row of the listing under softmax(table), prompts and replies included: float[B]."""
    batch = case.listing
    before = torch.nn.functional.pad(batch.known_states(), (1, 0), value=case.mdp.start)[:, :-1]
    step = torch.from_numpy(case.policy(table))[before.clamp(min=0), batch.input_ids]
    return torch.where(batch.attention_mask == 1, step, 0.0).sum(1).exp()


def couples(inputs: Inputs, chances: Tensor) -> tuple[Inputs, Tensor]:
    """All ordered couples of rows of one prompt as groups of two, and the probability of each row's couple: float[2 P]."""
    ids = inputs.batch.group_ids
    prompt = torch.zeros(int(ids.max()) + 1, dtype=chances.dtype).index_add_(0, ids, chances)
    first, second = (ids[:, None] == ids).nonzero().T
    weight = chances[first] * chances[second] / prompt[ids[first]]
    out = inputs.rows(torch.stack([first, second], 1).flatten())
    return out.change(group_ids=torch.arange(len(first)).repeat_interleave(2)), weight.repeat_interleave(2)


def row_gradients(subject: Subject, inputs: Inputs) -> Tensor:
    """The gradient by logits, float[B, L, V]. A loss that compares all rows of its batch is shown one prompt at a time."""
    if subject.traits.kind != "policy_only" or {"group_ids", "values"} & subject.names:
        return subject.call(inputs).grad
    ids = inputs.batch.group_ids
    out = torch.zeros_like(inputs.logits)
    for i in ids.unique():
        out[ids == i] = subject.call(inputs.rows((ids == i).nonzero()[:, 0])).grad
    return out


def expected_gradient(subject: Subject, case: Fixture, table: Floats, *, per_token: bool = False) -> Tensor:
    """The population gradient by the table, float[S, V]: exact chances times the gradients of the listing's rows.

    On-policy losses take the chances of softmax(table) itself, over couples where they compare rows of a group; preferences
    those of Bradley-Terry; the others the uniform policy's. per_token: each row's gradient times its length, which undoes a
    mean over a row's own tokens.
    """
    inputs = arrange(subject, case, table)
    kind = subject.traits.kind
    if kind == "preference":
        assert inputs.pair_weights is not None
        chance = inputs.pair_weights
    elif kind == "on_policy":
        chance = row_chances(case, table)[: len(inputs.batch)]
        if subject.grouped:
            inputs, chance = couples(inputs, chance)
    else:
        chance = case.listing.weights[: len(inputs.batch)]
    weight = chance * lengths(inputs) if per_token else chance
    return by_state(weight[:, None, None] * row_gradients(subject, inputs), inputs, case)
