"""Fused token statistics against float64 autograd through all logits at once, and bugs planted in their source."""

import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shiq_lab import fused
from shiq_lab.batch import TokenBatch
from shiq_lab.checks.components.suite import check_component
from shiq_lab.checks.distributed.parallel import masked_stats
from shiq_lab.checks.distributed.suite import check_distributed
from shiq_lab.checks.report import FAILED
from shiq_lab.fused import sharded_token_statistics, token_statistics
from shiq_lab.stats import TokenStats

torch.set_num_threads(1)
SOURCE = Path(fused.__file__).read_text()
INF = float("inf")


# ---------------------------------------------------------------------------------------------------- the second road
@dataclass(frozen=True)
class Case:
    """A random problem; `forbidden` tokens have bias -inf, `padding` rows of the head lie behind the vocabulary."""

    N: int = 7
    H: int = 5
    V: int = 13
    dtype: torch.dtype = torch.float64
    bias: bool = False
    forbidden: bool = False
    scale: float = 1.0
    soft_cap: float | None = None
    padding: int = 0
    chunk: int | None = None
    size: float = 1.0  # of hidden
    seed: int = 0

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """hidden, head, bias (as the dtype rounds them) and tokens. Large logits come last, so that m grows on the way."""
        g = torch.Generator().manual_seed(self.seed)
        make = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
        hidden, head = self.size * make(self.N, self.H), make(self.V + self.padding, self.H)
        head = head * torch.linspace(0.5, 2, len(head), dtype=torch.float64)[:, None]
        bias = make(len(head))
        allowed = torch.arange(self.V)
        if self.forbidden:
            bias[0 : self.V : 4] = -INF
            allowed = allowed[allowed % 4 != 0]
        tokens = allowed[torch.randint(len(allowed), (self.N,), generator=g)]
        used = bias.to(self.dtype) if self.bias or self.forbidden else None
        return hidden.to(self.dtype), head.to(self.dtype), used, tokens

    def upstream(self) -> Tensor:
        """g_c and g_z, float64[2, N]."""
        return torch.randn(2, self.N, generator=torch.Generator().manual_seed(self.seed + 1), dtype=torch.float64)

    def options(self) -> dict[str, Any]:
        kept = {"scale": self.scale, "soft_cap": self.soft_cap, "chunk": self.chunk}
        return kept | ({"n_tokens": self.V} if self.padding else {})


def plain(case: Case, hidden: Tensor, head: Tensor, bias: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """All logits at once: the formula of the docstring, as transformers' heads compute it."""
    x = hidden @ head[: case.V].T
    if bias is not None:
        x = x + bias[: case.V]
    x = x * case.scale
    if case.soft_cap is not None:
        x = case.soft_cap * torch.tanh(x / case.soft_cap)
    if bias is not None:
        x = x.masked_fill(bias[: case.V] == -INF, -INF)
    return x.gather(1, tokens[:, None])[:, 0], x.logsumexp(1)


def answers(function: Callable[..., Any], inputs: tuple[Any, ...], upstream: Tensor) -> dict[str, Tensor]:
    """Values and gradients of sum(g_c token_logit + g_z logsumexp)."""
    *floats, tokens = inputs
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in floats]
    taken, level = function(*leaves, tokens)
    out = {"token_logit": taken.detach(), "logsumexp": level.detach()}
    (upstream[0] * taken + upstream[1] * level).sum().backward()
    return out | {n: x.grad for n, x in zip(("hidden", "head", "bias"), leaves, strict=True) if x is not None}


def bounds(case: Case, truth: dict[str, Tensor]) -> dict[str, float]:
    """How far rounding can bring each answer from the truth.

    d, the error of a logit of at most S = scale (|h| |W| + |b|): a dot product of H terms and 8 operations, and tanh adds eps
    cap. A sum of V terms errs relatively by V eps, so ln of it by that and d. p_v errs by 2 d and the sum's error, relatively;
    the slope 1 - tanh^2 by 2 d / cap + 4 eps; a gradient is a sum of at most V (head: N) such terms. Half precision rounds the
    gradient once more, and nothing else.
    """
    hidden, head, bias, _ = (None if x is None else x.double() for x in case.inputs())
    assert hidden is not None and head is not None
    eps = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    finite = torch.zeros(1) if bias is None else bias[bias.isfinite()].abs()
    size = case.scale * float((hidden.abs() @ head.abs().T).max() + finite.max())
    d = eps * ((case.H + 8) * size + 8 + (case.soft_cap or 0.0))
    level = d + eps * (case.V + 8 + float(truth["logsumexp"].abs().max()))
    relative = 2 * d + eps * (case.V + case.N + 16) + (2 * d / case.soft_cap if case.soft_cap else 0.0) + 2 * level
    rough = torch.finfo(case.dtype).eps if case.dtype in (torch.bfloat16, torch.float16) else 0.0
    g = case.scale * float(case.upstream().abs().max())
    parts = {
        "hidden": 2 * g * float(head.abs().max()),
        "head": 2 * g * case.N * float(hidden.abs().max()),
        "bias": 2 * g * case.N,
    }
    rounded = {name: rough * float(truth[name].abs().max()) for name in parts if name in truth}
    return {"token_logit": d, "logsumexp": level} | {n: relative * parts[n] + rounded[n] for n in rounded}


def misses(function: Callable[..., Any], case: Case) -> list[str]:
    """What of the answers is farther from the truth than rounding can bring it; every comparison of this file is this one."""
    inputs = case.inputs()
    wide = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    truth = answers(lambda *a: plain(case, *a), wide, case.upstream())
    call = lambda h, w, b, t: function(h, w, t, bias=b, **case.options())  # noqa: E731
    got = answers(call, inputs, case.upstream())
    limit = bounds(case, truth)
    found = []
    for name, wanted in truth.items():
        if name in ("hidden", "head", "bias") and got[name].dtype != case.dtype:
            found.append(f"{name}: {got[name].dtype}")
        gap = (got[name].double() - wanted).abs()
        worst = float(torch.nan_to_num(gap, nan=INF).max())
        if not worst <= limit[name]:
            found.append(f"{name}: off by {worst:.3g}, allowed {limit[name]:.3g}")
    return found


ALL = Case(N=9, H=5, V=23, bias=True, forbidden=True, scale=0.7, soft_cap=3.0, padding=3, chunk=30)
OPTIONS = {
    "plain": Case(),
    "bias": Case(bias=True),
    "forbidden": Case(forbidden=True),
    "scale": Case(scale=0.25),
    "scale up": Case(bias=True, scale=3.0),
    "cap": Case(soft_cap=2.0),
    "padding": Case(padding=3),
    "all": ALL,
    "all, one tile": replace(ALL, chunk=None),
    "float32": replace(ALL, dtype=torch.float32),
    "bfloat16": replace(ALL, dtype=torch.bfloat16),
    "bfloat16, long": Case(N=33, H=64, V=101, dtype=torch.bfloat16, chunk=64),
    "float16": Case(N=33, H=16, V=101, dtype=torch.float16, bias=True, chunk=500),
    "1e4": Case(size=3e3, chunk=8),
    "1e4, float32": Case(size=3e3, forbidden=True, dtype=torch.float32, chunk=8),
    "1e4, cap": Case(size=3e3, soft_cap=30.0, chunk=8),
    "one of all": Case(N=1, H=1, V=1),
    "one token": Case(N=1, H=3, V=17, chunk=4),
    "1,100 tokens": Case(N=1100, H=2, V=5),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_are_those_of_all_logits_at_once(name: str) -> None:
    assert misses(token_statistics, OPTIONS[name]) == []


def test_large_logits_are_large() -> None:
    hidden, head, *_ = OPTIONS["1e4"].inputs()
    assert (hidden @ head.T).abs().max() > 1e4


ANY = st.builds(
    Case,
    N=st.integers(1, 20),
    H=st.integers(1, 9),
    V=st.integers(2, 40),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    forbidden=st.booleans(),
    scale=st.sampled_from([1.0, 0.3, 2.0]),
    soft_cap=st.sampled_from([None, 0.5, 20.0]),
    padding=st.integers(0, 3),
    chunk=st.one_of(st.none(), st.integers(1, 90)),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ANY)
def test_any_size_and_any_options(case: Case) -> None:
    assert misses(token_statistics, case) == []


@pytest.mark.parametrize("chunk", [1, 2, 7, 23, 64, 10**6])
def test_the_tile_does_not_matter(chunk: int) -> None:
    assert misses(token_statistics, replace(ALL, chunk=chunk)) == []


@pytest.mark.parametrize("case", [Case(N=3, H=2, V=5, bias=True, scale=0.7, soft_cap=1.5, chunk=4), Case(N=2, H=3, V=4)])
def test_gradcheck(case: Case) -> None:
    """Finite differences: the road that shares nothing with a formula."""
    *floats, tokens = case.inputs()
    leaves = [x.requires_grad_() for x in floats if x is not None]
    assert torch.autograd.gradcheck(
        lambda h, w, b=None: token_statistics(h, w, tokens, bias=b, **case.options()), tuple(leaves)
    )


def test_the_component_check_passes() -> None:
    def fit(*, hidden: Tensor, head: Tensor, bias: Tensor, labels: Tensor, logit_scale: float = 1.0,
            soft_cap: float | None = None, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        found = token_statistics(
            hidden.flatten(0, 1), head, labels.flatten(), bias=bias, scale=logit_scale, soft_cap=soft_cap, chunk=chunk_size
        )
        return found[0].view(labels.shape), found[1].view(labels.shape)

    report = check_component(fit, "token_statistics")
    assert report.passed and all(r.status == "passed" for r in report.results), [
        r.message for r in report.results if r.status == FAILED
    ]


# ------------------------------------------------------------------------------------------------ what is not computed
@dataclass
class Calls:
    tiles: int = 0
    means: int = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Tiles of logits and sums E that are computed."""
    count, logits, sweep = Calls(), fused.logits, fused.sweep

    def counted(*arguments: Any) -> Any:
        count.tiles += 1
        return logits(*arguments)

    def swept(*arguments: Any) -> Any:
        found = sweep(*arguments)
        count.means += found[3] is not None
        return found

    monkeypatch.setattr(fused, "logits", counted)
    monkeypatch.setattr(fused, "sweep", swept)
    return count


@pytest.mark.parametrize(("train_hidden", "train_head", "sweeps"), [(1, 0, 1), (0, 1, 2), (1, 1, 2), (0, 0, 1)])
def test_only_what_is_asked_for(calls: Calls, train_hidden: int, train_head: int, sweeps: int) -> None:
    """A frozen head costs one sweep, a trained one two; a frozen hidden no E; the gradients are those of all trained."""
    case = Case(N=4, V=20, chunk=20)
    hidden, head, _, tokens = case.inputs()
    want = answers(lambda h, w, b, t: plain(case, h, w, b, t), case.inputs(), case.upstream())
    hidden.requires_grad_(bool(train_hidden)), head.requires_grad_(bool(train_head))
    taken, level = token_statistics(hidden, head, tokens, chunk=20)
    loss = (case.upstream()[0] * taken + case.upstream()[1] * level).sum()
    assert loss.requires_grad == bool(train_hidden or train_head)
    if loss.requires_grad:
        loss.backward()
    assert calls == Calls(4 * sweeps, train_hidden)  # 4 tiles of 4 x 5 cover 4 x 20
    limit = bounds(case, want)
    for name, x, train in (("hidden", hidden, train_hidden), ("head", head, train_head)):
        assert (x.grad is not None) == bool(train)
        assert x.grad is None or (x.grad - want[name]).abs().max() <= limit[name]


def test_without_gradient_there_is_no_sum_of_the_head(calls: Calls) -> None:
    hidden, head, _, tokens = Case().inputs()
    with torch.no_grad():
        taken, level = token_statistics(hidden.requires_grad_(), head, tokens)
    assert calls.means == 0 and not taken.requires_grad and not level.requires_grad


def test_one_output_alone_has_its_own_gradient() -> None:
    case = Case(bias=True, soft_cap=2.0)
    inputs, ones = case.inputs(), torch.ones(case.N, dtype=torch.float64)
    for i in range(2):
        upstream = torch.stack([ones * (i == 0), ones * (i == 1)])
        want = answers(lambda *a: plain(case, *a), inputs, upstream)
        leaves = [x.clone().requires_grad_() for x in inputs[:3] if x is not None]
        token_statistics(leaves[0], leaves[1], inputs[3], bias=leaves[2], soft_cap=2.0)[i].sum().backward()
        for name, x in zip(("hidden", "head", "bias"), leaves, strict=True):
            assert x.grad is not None and (x.grad - want[name]).abs().max() <= bounds(case, want)[name]


def test_there_is_no_second_derivative() -> None:
    hidden, head, _, tokens = Case().inputs()
    hidden.requires_grad_()
    (slope,) = torch.autograd.grad(token_statistics(hidden, head, tokens)[1].square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


# ----------------------------------------------------------------------------------------------------- forms of input
def test_strided_inputs_give_the_same_numbers() -> None:
    hidden, head, bias, tokens = Case(bias=True).inputs()
    assert bias is not None
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in (hidden.T, head.T)], bias.repeat_interleave(2)[::2]
    (across, over), bias2 = strided
    assert not across.T.is_contiguous() and not bias2.is_contiguous()
    one = answers(lambda h, w, b, t: token_statistics(h, w, t, bias=b), (hidden, head, bias, tokens), Case().upstream())
    two = answers(
        lambda h, w, b, t: token_statistics(h.T, w.T, t, bias=b),
        (across, over, bias2, tokens.repeat_interleave(2)[::2]),
        Case().upstream(),
    )
    two |= {"hidden": two["hidden"].T, "head": two["head"].T}
    limit = bounds(Case(bias=True), one)
    assert all((one[k] - two[k]).abs().max() <= limit[k] for k in one)


def test_no_tokens() -> None:
    _, head, _, _ = Case().inputs()
    hidden = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    taken, level = token_statistics(hidden, head.requires_grad_(), torch.zeros(0, dtype=torch.int64))
    assert taken.shape == level.shape == (0,)
    (taken.sum() + level.sum()).backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 5)
    assert head.grad is not None and head.grad.shape == head.shape and not head.grad.any()


def test_dtypes() -> None:
    """float64 for float64, else float32; a mixed pair is computed in the wider, and each gradient has its input's dtype."""
    hidden, head, _, tokens = Case(dtype=torch.bfloat16).inputs()
    for left, right in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float16, torch.bfloat16)):
        h, w = hidden.to(left, copy=True).requires_grad_(), head.to(right, copy=True).requires_grad_()
        taken, level = token_statistics(h, w, tokens)
        assert taken.dtype == level.dtype == (torch.float64 if right == torch.float64 else torch.float32)
        level.sum().backward()
        assert h.grad is not None and w.grad is not None and (h.grad.dtype, w.grad.dtype) == (left, right)


def test_autocast_changes_nothing() -> None:
    case = replace(OPTIONS["float32"], chunk=50)

    def cast(*arguments: Any, **options: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return token_statistics(*arguments, **options)

    assert misses(cast, case) == []


def test_padding_and_forbidden_tokens_have_no_gradient() -> None:
    bias = ALL.inputs()[2]
    assert bias is not None
    found = answers(lambda h, w, b, t: token_statistics(h, w, t, bias=b, **ALL.options()), ALL.inputs(), ALL.upstream())
    dead = torch.cat([bias[: ALL.V] == -INF, torch.ones(ALL.padding, dtype=torch.bool)])
    assert not found["head"][dead].any() and not found["bias"][dead].any()
    assert found["head"][~dead].any(1).all()


def test_a_row_that_may_say_nothing() -> None:
    """logsumexp -inf, a taken logit of -inf, and a gradient without NaN."""
    hidden, head, _, tokens = Case().inputs()
    hidden.requires_grad_(), head.requires_grad_()
    taken, level = token_statistics(hidden, head, tokens, bias=torch.full((13,), -INF, dtype=torch.float64), chunk=5)
    assert (level == -INF).all() and (taken == -INF).all()
    level.sum().backward()
    assert hidden.grad is not None and head.grad is not None and not hidden.grad.any() and not head.grad.any()


def test_products_of_half_factors_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where half-precision factors stay as they are, values are those of float32, and a weight is rounded once more.

    The product itself, exact factors and float32 sums, is played here by float32; only CUDA has it.
    """

    def product(out: Tensor, a: Tensor, b: Tensor, *, keep: bool = True) -> None:
        assert a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
        out.addmm_(a.float(), b.float(), beta=int(keep))

    monkeypatch.setattr(fused, "dtypes", lambda hidden, head: (torch.float32, torch.bfloat16))
    monkeypatch.setattr(fused, "add_product", product)
    for case in (OPTIONS["bfloat16"], OPTIONS["bfloat16, long"]):
        inputs = case.inputs()
        wide = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
        truth = answers(lambda *a, c=case: plain(c, *a), wide, case.upstream())
        call = lambda h, w, b, t, c=case: token_statistics(h, w, t, bias=b, **c.options())  # noqa: E731
        got, limit = answers(call, inputs, case.upstream()), bounds(case, truth)
        weight = 2.0**-9 * case.scale * float(case.upstream().abs().max())  # half a step of bfloat16, times each weight
        limit["hidden"] += weight * float(wide[1].abs().max())  # the p_v sum to 1
        limit["head"] += 2 * weight * float(wide[0].abs().sum(0).max())  # one weight a token, at most |g_c| + |g_z|
        assert all((got[k].double() - truth[k]).abs().max() <= limit[k] for k in truth)


def test_on_a_cpu_every_factor_is_wide() -> None:
    half = torch.zeros(1, 1, dtype=torch.bfloat16)
    assert fused.dtypes(half, half) == (torch.float32, torch.float32)
    assert fused.dtypes(half, half.double()) == (torch.float64, torch.float64)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"tokens": torch.tensor([0, 13])}, "tokens: expected ids from 0 to 12, got 13 at place 1."),
    ({"tokens": torch.tensor([-1, 0])}, "tokens: expected ids from 0 to 12, got -1 at place 0."),
    ({"tokens": torch.tensor([0, 9]), "n_tokens": 9}, "tokens: expected ids from 0 to 8, got 9 at place 1."),
    ({"tokens": torch.tensor([0.0, 1.0])}, "tokens: expected an int64 tensor [2], got float32 [2]."),
    ({"tokens": torch.tensor([0])}, "tokens: expected an int64 tensor [2], got int64 [1]."),
    ({"hidden": torch.zeros(2, 3, 5)}, "hidden: expected a floating-point tensor [N, H], got float32 [2, 3, 5]."),
    ({"head": [1.0]}, "head: expected a floating-point tensor [V, H], got list."),
    ({"head": torch.zeros(13, 4)}, "head: expected shape [V, 5], as wide as hidden, got shape (13, 4)."),
    ({"head": torch.zeros(0, 5)}, "head: expected at least one row, got shape (0, 5)."),
    ({"bias": torch.zeros(12)}, "bias: expected None or a floating-point tensor [13], got float32 [12]."),
    ({"scale": 0.0}, "scale: expected a finite number > 0, got 0.0."),
    ({"soft_cap": -1.0}, "soft_cap: expected None or a finite number > 0, got -1.0."),
    ({"n_tokens": 14}, "n_tokens: expected a whole number from 1 to 13, the rows of the head, got 14."),
    ({"chunk": 0}, "chunk: expected None or a whole number >= 1, got 0."),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[m.split(",")[0] + f" {i}" for i, (_, m) in enumerate(ERRORS)])
def test_errors(change: dict[str, Any], message: str) -> None:
    right = {"hidden": torch.zeros(2, 5), "head": torch.zeros(13, 5), "tokens": torch.tensor([0, 1])}
    with pytest.raises(ValueError) as raised:
        token_statistics(**(right | change))
    assert str(raised.value) == message


# ------------------------------------------------------------------------------------------------------------- memory
class Largest(TorchDispatchMode):
    """The largest storage that any operation makes, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def test_no_tensor_is_larger_than_a_tile_or_an_input() -> None:
    """At N V = 2.6 million logits (10 MB) nothing exceeds the tile of 1.5 MiB; with all logits at once, something is 10 MB."""
    case = Case(N=256, H=8, V=10_000, dtype=torch.float32, soft_cap=30.0, bias=True)
    inputs = case.inputs()
    with Largest() as seen:
        answers(lambda h, w, b, t: token_statistics(h, w, t, bias=b, soft_cap=30.0), inputs, case.upstream())
    assert seen.bytes == 4 * fused.CACHE
    with Largest() as seen:
        answers(lambda *a: plain(case, *a), inputs, case.upstream())
    assert seen.bytes == 4 * case.N * case.V


MEASURE = """
import ctypes, sys, torch
from pathlib import Path
from shiq_lab.fused import token_statistics
torch.set_num_threads(1)
def ours(h, w, a): return token_statistics(h, w, a)
def whole(h, w, a):
    x = h @ w.T
    return x.gather(1, a[:, None])[:, 0], x.logsumexp(1)
def peak(): return next(1024 * int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
def step(f, N, H, V):
    h, w = torch.ones(N, H, requires_grad=True), torch.full((V, H), 0.01, requires_grad=True)
    a = torch.zeros(N, dtype=torch.int64)
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # free pages that are still held would hide what is taken next
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = peak()
    sum(x.sum() for x in f(h, w, a)).backward()
    return peak() - before
f = {"ours": ours, "whole": whole}[sys.argv[1]]
step(f, 1024, 64, 600)  # code and buffers of the matrix library
print(step(f, *map(int, sys.argv[2:])))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc")
def test_peak_memory_of_a_process() -> None:
    """Above the inputs: at most hidden, head, their gradients and N V / 50 bytes; all logits at once hold two times N V."""
    N, H, V = 1024, 64, 40_000
    peak = {}
    for name in ("ours", "whole"):
        command = [sys.executable, "-c", MEASURE, name, str(N), str(H), str(V)]
        peak[name] = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    inputs = 4 * (N + V) * H
    assert inputs <= peak["ours"] <= 2 * inputs + N * V // 50  # the gradients must be there, or nothing was measured
    assert peak["whole"] >= 2 * 4 * N * V


def test_the_default_tile() -> None:
    """On a CPU 3 2^17 logits; elsewhere 16 bytes a logit fill N V / 50 bytes and the head's own size, and no more."""
    cpu, meta = torch.zeros(4096, 576), torch.zeros(4096, 576, device="meta", dtype=torch.bfloat16)
    head = torch.zeros(128_256, 576, device="meta", dtype=torch.bfloat16)
    layout = fused._layout(cpu, head, len(head), 1.0, None, None)
    assert (layout.rows, layout.width) == (1024, 384)
    layout = fused._layout(meta, head, len(head), 1.0, None, None)
    held = 16 * layout.rows * layout.width
    assert 0.9 < held / (4096 * 128_256 // 50 + 2 * head.numel()) <= 1


# ------------------------------------------------------------------------------------------------------- planted bugs
def planted(*edits: tuple[str, str]) -> Any:
    """The module fused with each `old` of its source, which must stand there once, replaced by `new`."""
    source = SOURCE
    for old, new in edits:
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in fused.py"
        source = source.replace(old, new)
    module = types.ModuleType("fused_with_a_bug")
    exec(compile(source, "<fused with a bug>", "exec"), module.__dict__)
    return module


BUGS = {
    "E is not shrunk": ("mean[here].mul_(shrink[:, None])", "mean[here]"),
    "the sum is not shrunk": ("total[here] * shrink + weight", "total[here] + weight"),
    "E without the slope": ("weight = weight if slope is None else weight.mul_(slope)\n                add", "add"),
    "head without the slope": ("weight = weight if slope is None else weight.mul_(slope)\n            _add", "_add"),
    "taken token without the slope": ("(x / layout.soft_cap).clamp(-1.0, 1.0)", "(0 * x)"),
    "E without the scale": ("mean *= layout.scale", "mean *= 1"),
    "head without the scale": ("(layout.scale * by_level[here])", "by_level[here]"),
    "scale before bias": ("        x += bias\n", "        x += bias / layout.scale\n"),
    "tiles in bfloat16": ("keep=False)\n", "keep=False)\n    x.copy_(x.bfloat16())\n"),
    "E in bfloat16": ("weight.to(factor), part)", "weight.to(factor), part); mean[here] = mean[here].bfloat16()"),
    "weights in bfloat16": ("weight.to(factor), part)", "weight.bfloat16().to(factor), part)"),
    "sums over tokens overwritten": ("keep=here.start > 0", "keep=False"),
    "the last tile is left out": ("range(0, self.columns, self.width)", "range(0, self.columns - self.width, self.width)"),
    "padding has mass": ("_layout(hidden, head, columns, scale", "_layout(hidden, head, len(head), scale"),
    "padding's gradient is left as it was": ("if len(hidden) else 0 :] = 0", "if len(hidden) else 0 :] = 1"),
    "no term of the taken token in hidden": ("torch.where(held[here], own[here], 0.0)[:, None]", "0 * own[here][:, None]"),
    "no term of the taken token in head": ("_add(weight, tokens[here] - layout.first - tile.start, own[here])", "pass"),
    "upstream gradients exchanged": ("mean, own, by_level, ctx.layout).to", "mean, by_level, own, ctx.layout).to"),
    "a cap lets forbidden tokens in": ("x.masked_fill_(bias == -math.inf, -math.inf)", "pass"),
    "-inf minus -inf": ("shift = torch.where(new == -math.inf, 0.0, new)", "shift = new"),
    "exp without the largest logit": ("new = torch.maximum(old, x.amax(1))", "new = torch.zeros_like(old)"),
}  # fmt: skip
CASES = {**OPTIONS, "nothing allowed so far": Case(forbidden=True, chunk=1)}  # m is -inf after the first tile


@pytest.mark.parametrize("name", CASES)
def test_the_source_without_a_bug_passes(name: str) -> None:
    assert misses(planted().token_statistics, CASES[name]) == []


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str) -> None:
    function = planted(BUGS[bug]).token_statistics
    assert any(misses(function, case) for case in CASES.values()), f"nothing sees it: {bug}"


# ----------------------------------------------------------------------------------------------- vocabulary in shards
SHARDED = replace(ALL, V=24, padding=4)
CUTS = {1: (0, 28), 2: (0, 11, 28), 3: (0, 9, 25, 28)}  # the third rank of three holds padding alone
RANK_BUGS = {
    "hidden's gradient is not summed": ("dist.all_reduce(out, group=layout.group)", "pass"),
    "each rank keeps its own largest logit": ("dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=layout.group)", "pass"),
    "E under the own largest logit": ("mean.mul_(shrink[:, None])\n\n\n# --", "mean\n\n\n# --"),
    "every rank's first token is 0": ("first=first, group", "first=0, group"),
}


def on_ranks(size: int, rank: int, module: Any = fused) -> Callable[..., Any]:
    """token_statistics from this rank's shard; the shard's gradient lands in its rows of the whole head's."""

    def function(hidden: Tensor, head: Tensor, tokens: Tensor, *, bias: Tensor | None, **options: Any) -> Any:
        first, last = CUTS[size][rank : rank + 2]
        part = None if bias is None else bias[first:last]
        return module.sharded_token_statistics(
            hidden, head[first:last], tokens, first=first, group=dist.group.WORLD, bias=part, **options
        )

    return function


def rank_misses(case: Case, size: int, rank: int, module: Any) -> list[str]:
    """`misses`, where only the own shard of head and bias has a gradient: the others' rows are taken from the truth."""
    wide = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in case.inputs())
    truth = answers(lambda *a: plain(case, *a), wide, case.upstream())
    call = lambda h, w, b, t: on_ranks(size, rank, module)(h, w, t, bias=b, **case.options())  # noqa: E731
    got, limit = answers(call, case.inputs(), case.upstream()), bounds(case, truth)
    own = slice(*CUTS[size][rank : rank + 2])
    cut = lambda name, x: x[own] if name in ("head", "bias") else x  # noqa: E731
    gaps = {k: (cut(k, got[k]).double() - cut(k, truth[k])).abs() for k in truth}
    return [f"{k}: {float(x.max()):.3g} > {limit[k]:.3g}" for k, x in gaps.items() if not (x <= limit[k]).all()]


def rank_main(rank: int, size: int, store: str) -> None:
    """One process: the right function must have no misses, every bug some (over the ranks), and errors come on all alike."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for case in (SHARDED, replace(SHARDED, dtype=torch.bfloat16), replace(SHARDED, size=3e3, soft_cap=None)):
        assert rank_misses(case, size, rank, fused) == []
    for bug, edit in RANK_BUGS.items():
        try:
            seen = bool(rank_misses(SHARDED, size, rank, planted(edit)))
        except ValueError:
            seen = True
        flag = torch.tensor([float(seen)])
        dist.all_reduce(flag)
        assert flag > 0, f"nothing sees it: {bug}"
    hidden, head, _, tokens = SHARDED.inputs()
    first, last = CUTS[size][rank : rank + 2]
    with pytest.raises(ValueError) as raised:
        sharded_token_statistics(hidden, head[first:last], tokens.fill_(24), first=first, group=None, n_tokens=24)
    assert str(raised.value) == "tokens: expected ids that exactly one shard holds, got 24 at place 0, which 0 of them hold."
    none = sharded_token_statistics(hidden[:0], head[first:last], tokens[:0], first=first, group=None)
    assert [x.shape for x in none] == [(0,), (0,)]
    dist.destroy_process_group()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_shard_is_the_whole(alone: None) -> None:
    assert misses(on_ranks(1, 0), SHARDED) == []
    hidden, head, _, tokens = SHARDED.inputs()
    with pytest.raises(ValueError) as raised:
        sharded_token_statistics(hidden, head, tokens, first=-1, group=None)
    assert str(raised.value) == "first: expected a whole number >= 0, got -1."


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_shards_equal_the_whole(size: int, tmp_path: Path) -> None:
    """Every rank asserts in rank_main; what one of them raises, spawn raises here."""
    torch.multiprocessing.spawn(rank_main, (size, str(tmp_path / "store")), nprocs=size)


def vocabulary_in_shards(hidden: Tensor, head: Tensor, batch: TokenBatch, group: Any) -> TokenStats:
    """TokenStats for check_distributed; a last column scores what no token follows."""
    tokens = torch.nn.functional.pad(batch.input_ids[:, 1:], (0, 1))
    first = dist.get_rank(group) * head.shape[1]
    taken, level = sharded_token_statistics(hidden.flatten(0, 1), head.T, tokens.flatten(), first=first, group=group)
    return masked_stats(taken.view(tokens.shape)[:, :-1], level.view(tokens.shape), batch)


@pytest.mark.slow
def test_the_check_of_two_processes_passes() -> None:
    report = check_distributed(vocabulary_in_shards, kind="vocab")
    assert report.passed, [r.message for r in report.results if r.status == FAILED]
