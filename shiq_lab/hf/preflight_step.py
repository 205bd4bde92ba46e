"""What preflight asks of the arithmetic and of one step: rounding against a finer dtype, the slope of the loss, the update."""

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from shiq_lab.checks.report import Measured, Skip
from shiq_lab.hf.preflight_subject import Subject, reward_to_go, wrong

DRIFT = 0.1  # of the largest return: more rounding than that, and the rewards are no longer what is trained on
MOVED = 0.5  # of the weights: a step that most of them round away is lost
WIDEST = 1.5e9  # weights of a float32 model that DT still takes to float64
FALL = 0.03  # share of the loss by which STEP moves it to and fro,
NEAR = 0.3  # or less, so that residuals move by at most this many nats: logits are far from linear beyond
REMAINDER = 0.05  # of the slope, at such a step: the third order, FALL^2 times a curvature ratio; seen: 3e-3


def check_dtype(s: Subject) -> Iterator[Measured]:
    """The run's arithmetic against a finer one, float32 or float64: two numbers a token, and rho beside the rewards."""
    noise, bounds = s.noise, {i: s.rho_bound(i) for i in range(len(s.rows))}
    with _finer(s) as finer:
        seen = s.look(s.few)
    coarse = str(s.dtype).removeprefix("torch.")
    two = {i: ((x[:2] - s.base[i][:2]).abs().amax(0), noise) for i, x in seen.items()}
    rho = {i: ((x[4] - s.base[i][4]).abs(), bounds[i]) for i, x in seen.items()}
    yield s.worst(f"drift of a token's two numbers, {coarse} against {finer}", two)
    yield s.worst(f"drift of rho, {coarse} against {finer}", rho)
    paid = max(abs(g) for row in s.rows for g in reward_to_go(row, s.args.gamma, s.args.steps_ahead))
    drift = max(float((x[4] - s.base[i][4]).abs().max()) for i, x in seen.items())
    hint = "Rounding, times beta and the tokens of a row, is as large as what is paid: a finer dtype, or a smaller beta."
    share = drift / paid if paid else math.inf
    yield Measured("drift of rho in units of the largest return", share, DRIFT, len(seen), warn_only=True, hint=hint)


@contextlib.contextmanager
def _finer(s: Subject) -> Iterator[str]:
    """The model in the next finer arithmetic, and back: weights go to a wider dtype and return without loss."""
    weights = next(p for p in s.model.parameters() if p.is_floating_point()).dtype
    if weights == torch.float64:
        raise Skip("float64 is the finest arithmetic here")
    if s.dtype != weights:  # autocast
        s.amp = False
        try:
            yield "float32"
        finally:
            s.amp = True
        return
    to = torch.float64 if weights == torch.float32 else torch.float32
    tensors = [x for x in (*s.model.parameters(), *s.model.buffers()) if x.is_floating_point()]
    if to == torch.float64 and sum(x.numel() for x in tensors) > WIDEST:
        raise Skip(f"more than {WIDEST:.1e} weights: float64 would take {8 * sum(x.numel() for x in tensors) / 2**30:.0f} GiB")
    before = [x.dtype for x in tensors]
    try:
        for x in tensors:
            x.data = x.data.to(to)
        yield str(to).removeprefix("torch.")
    finally:
        for x, dtype in zip(tensors, before, strict=True):
            x.data = x.data.to(dtype)


def check_step(s: Subject) -> Iterator[Measured]:
    """One optimiser step as configured: the loss falls along its gradient as predicted, and only what is trained changes."""
    model, slack = s.trainer.model, s.slack(s.few)
    kept = {name: p.detach().clone() for name, p in s.trainable().items()}
    frozen = _digests(model)
    try:
        inputs = s.collated(s.few)
        model.zero_grad(set_to_none=True)
        with s.arithmetic():
            loss = s.trainer.compute_loss(model, inputs)
            loss.backward()
        live = {name: p for name, p in s.trainable().items() if p.grad is not None and bool(p.grad.any())}
        broken = sum(int((~p.grad.isfinite()).sum()) for p in live.values() if p.grad is not None)
        yield Measured("entries of the gradient that are not finite", broken, 0, len(live))
        yield from _slope(s, inputs, float(loss.detach()), live, kept, slack)
        yield from _one_step(s, live, kept)
        moved = [name for name, digest in _digests(model).items() if frozen[name] != digest]
        yield wrong("frozen weights that the step changed", moved, max(1, len(frozen)))
    finally:
        with torch.no_grad():
            for name, p in s.trainable().items():
                p.copy_(kept[name])
        model.zero_grad(set_to_none=True)
        s.trainer.optimizer = None
        s.trainer.sums.clear()


def _digests(model: nn.Module) -> dict[str, tuple[float, float]]:
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return {name: (float(p.sum(dtype=torch.float64)), float(p.abs().sum(dtype=torch.float64))) for name, p in frozen.items()}


def _slope(
    s: Subject,
    inputs: dict[str, Tensor],
    loss: float,
    live: Mapping[str, nn.Parameter],
    kept: Mapping[str, Tensor],
    slack: float,
) -> Iterator[Measured]:
    """loss(w - e g) - loss(w + e g) = -2 e |g|^2 + O(e^3), e such that the loss moves by a share of FALL or less."""
    fine = (torch.float32, torch.float64)
    if s.args.method.form in ("semi", "turns"):
        s.notes.append(f"{s.args.loss} stops gradients on purpose: its value need not fall along them")
        return
    if s.dtype not in fine or any(p.dtype not in fine for p in live.values()):
        s.notes.append("half precision rounds a small step away: the slope of the loss is not measured")
        return
    square = sum(float(p.grad.square().sum(dtype=torch.float64)) for p in live.values() if p.grad is not None)
    size = torch.cat([s.base[i][4] for i in s.few]).square().mean().sqrt().item()
    share = min(FALL, NEAR * s.args.beta / size)
    step, found = share * loss / square, []
    with torch.no_grad():
        for sign in (-1, 1):
            for name, p in live.items():
                p.copy_(kept[name] + sign * step * p.grad)  # type: ignore[operator]
            with s.arithmetic():
                found.append(float(s.trainer.compute_loss(s.trainer.model, inputs)))
        for name, p in live.items():
            p.copy_(kept[name])
    down, up = found
    value, detail = abs((up - down) / (2 * share * loss) - 1), f"loss {down:.6g}, {loss:.6g}, {up:.6g} ahead, here, behind"
    hint = "The gradient is not that of the loss: something detached, a hook, an unused adapter."
    what = "fall of the loss along its gradient over the prediction, less 1"
    yield Measured(what, value, REMAINDER + slack / share, 1, detail=detail, hint=hint)


def _one_step(s: Subject, live: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> Iterator[Measured]:
    optimizer = s.trainer.create_optimizer()
    if s.args.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(live.values(), s.args.max_grad_norm)
    moving = {name: p.grad != 0 for name, p in live.items() if p.grad is not None}
    optimizer.step()
    changed = sum(int((live[name].detach() != kept[name])[where].sum()) for name, where in moving.items())
    total = sum(int(where.sum()) for where in moving.values())
    finite = sum(int((~p.detach().isfinite()).sum()) for p in live.values())
    yield Measured("weights that are not finite after the step", finite, 0, total)
    hint = "The learning rate is 0, or below the rounding of the weights: train float32 weights with bf16: true, or LoRA."
    what, share = "share of the weights with a gradient that the step changes", changed / max(1, total)
    yield Measured(what, share, MOVED, total, at_least=True, hint=hint)
