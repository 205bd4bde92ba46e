"""Token statistics from hidden states and a head, never holding the logits of all tokens over the whole vocabulary.

With logits x_v = f(h W_v + b_v), softmax p and slope f', one sweep over the vocabulary finds for every token

    token_logit = x_a,   logsumexp = ln sum_v exp x_v,   E = sum_v p_v f'_v W_v,

and with g_c, g_z the upstream gradients of the two numbers

    d/d h = g_c f'_a W_a + g_z E,     d/d W_v = sum over tokens of (g_c [v = a] + g_z p_v) f'_v h,

so a frozen head (LoRA) needs no second sweep and a trained one needs one recomputation: 4 N H V operations against 8 N H V.
Each tile of logits is float32 (float64 for float64 inputs) and so is every sum, whatever the inputs are: tiles rounded to
bfloat16 bias training.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from shiq_lab.errors import bad, is_real, is_whole

ROWS = 1024  # tokens a tile; more of them share one reading of the head, and fewer would not fill a matrix product
CACHE = 3 * 2**17  # logits a tile on a CPU: 1.5 MiB of float32, so that the passes over a tile stay near the cache


@dataclass(frozen=True)
class Layout:
    """What the sweeps must know beside the tensors: f, the rows of the head held here, and the size of a tile."""

    scale: float
    soft_cap: float | None
    first: int  # number of the token in row 0 of this head
    columns: int  # rows of this head that are tokens; the others are padding of the vocabulary
    rows: int  # tokens a tile
    width: int  # vocabulary a tile
    group: Any = None
    sharded: bool = False
    gradient: bool = True

    def tiles(self) -> Iterator[slice]:
        """The vocabulary in slices."""
        return (slice(j, min(j + self.width, self.columns)) for j in range(0, self.columns, self.width))

    def blocks(self, tokens: int) -> Iterator[slice]:
        """The tokens in slices."""
        return (slice(i, min(i + self.rows, tokens)) for i in range(0, tokens, self.rows))


def token_statistics(
    hidden: Tensor,
    head: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    soft_cap: float | None = None,
    n_tokens: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(token_logit, logsumexp) float[N] of the logits of hidden float[N, H] and head float[V, H] at tokens int[N].

        logits = soft_cap tanh(scale (hidden head^T + bias) / soft_cap)          (soft_cap None: no tanh)

    in float64 where an input is float64, else in float32; gradients by hidden, head and bias have the inputs' dtypes, are
    rounded once and can be taken once (no second derivative). Autocast has no effect inside. bias = -inf forbids a token, with
    a soft cap too: no mass; a row with all tokens forbidden has logsumexp -inf, of gradient 0. n_tokens: head
    rows from there on are padding of the vocabulary. chunk: the number of logits held at once, by default 1.5 MiB of them on a
    CPU; elsewhere all temporaries stay below hidden, head, their gradients and N V / 50 bytes. E takes float32[N, H].

    Order as in transformers: Gemma 2 and 3 cap the head's output (final_logit_softcapping = soft_cap), Cohere multiplies it
    by logit_scale = scale, Granite divides it by logits_scaling = 1 / scale. Frozen head, no bias, chunk >= N V: the closed
    form at the top of this file in one tile. Raises ValueError for shapes that do not fit and tokens outside. Source: F3.
    """
    _check(hidden, head, tokens, bias, scale, soft_cap, chunk)
    if not len(head):
        raise bad("head", "at least one row", f"shape {tuple(head.shape)}")
    columns = _columns(n_tokens, len(head))
    outside = (tokens < 0) | (tokens >= columns)
    if outside.any():
        place = int(outside.nonzero()[0])
        raise bad("tokens", f"ids from 0 to {columns - 1}", f"{int(tokens[place])} at place {place}")
    layout = _layout(hidden, head, columns, scale, soft_cap, chunk)
    return _run(hidden, head, bias, tokens, layout)


def sharded_token_statistics(
    hidden: Tensor,
    head_shard: Tensor,
    tokens: Tensor,
    *,
    first: int,
    group: Any,
    bias: Tensor | None = None,
    scale: float = 1.0,
    soft_cap: float | None = None,
    n_tokens: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """token_statistics of a head in shards: this rank holds its rows first to first + len(head_shard) - 1 (and their bias).

    hidden and tokens are the same on all ranks, and so is the answer. Every rank goes on with one and the same loss, as after
    checks.distributed.parallel.SumOverRanks, and calls backward: hidden gets the whole gradient on every rank (summed over
    ranks in the backward), a shard that of its own rows; nothing is left to average. Communicated: float[N] four times and,
    where hidden needs a gradient, float[N, H] once. Shards may be of unequal lengths, or empty. n_tokens counts the whole
    vocabulary. Raises ValueError, on all ranks alike, where a token is in no shard or in two.
    """
    _check(hidden, head_shard, tokens, bias, scale, soft_cap, chunk)
    if not is_whole(first) or first < 0:
        raise bad("first", "a whole number >= 0", repr(first))
    whole = first + len(head_shard)
    columns = min(max(_columns(n_tokens, None) - first, 0), len(head_shard)) if n_tokens is not None else whole - first
    layout = _layout(hidden, head_shard, columns, scale, soft_cap, chunk)
    return _run(hidden, head_shard, bias, tokens, replace(layout, first=first, group=group, sharded=True))


def _run(hidden: Tensor, head: Tensor, bias: Tensor | None, tokens: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    layout = replace(layout, gradient=torch.is_grad_enabled() and hidden.requires_grad)
    token_logit, logsumexp = _Statistics.apply(hidden, head, bias, tokens, layout)
    return token_logit, logsumexp


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, tokens: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            taken, top, total, mean = sweep(hidden, head, bias, tokens, layout)
            if layout.sharded:
                taken, top, total, mean = _over_ranks(taken, top, total, mean, tokens, layout)
            level = top + total.log()
            if mean is not None:
                mean /= torch.where(total == 0, 1.0, total)[:, None]
        ctx.save_for_backward(hidden, head, bias, tokens, taken, level, mean)
        ctx.layout = layout
        return taken, level

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_taken: Tensor, by_level: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, bias, tokens, taken, level, mean = ctx.saved_tensors
        by_hidden = by_head = by_bias = None
        with torch.autocast(hidden.device.type, enabled=False):
            own = by_taken * _slope_of(taken, ctx.layout)  # (N,)
            if ctx.needs_input_grad[0]:
                by_hidden = hidden_gradient(head, tokens, mean, own, by_level, ctx.layout).to(hidden.dtype)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                wanted = ctx.needs_input_grad[1:3]
                by_head, by_bias = head_gradients(hidden, head, bias, tokens, level, own, by_level, ctx.layout, *wanted)
        return by_hidden, by_head, by_bias, None, None


def sweep(
    hidden: Tensor, head: Tensor, bias: Tensor | None, tokens: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(taken logit, largest logit m, sum_v exp(x_v - m), sum_v exp(x_v - m) f'_v W_v or None), over the rows held here.

    A tile with a larger logit than all before it makes m larger, and what has been summed so far shrinks by exp(old m - m).
    """
    wide, factor = dtypes(hidden, head)
    N, H = hidden.shape
    taken = torch.zeros(N, dtype=wide, device=hidden.device)
    top = torch.full_like(taken, -math.inf)
    total = torch.zeros_like(taken)
    mean = torch.zeros(N, H, dtype=wide, device=hidden.device) if layout.gradient else None
    buffer = taken.new_empty(layout.rows * layout.width)
    for here in layout.blocks(N):
        rows = hidden[here].to(factor)
        for tile in layout.tiles():
            part = head[tile].to(factor)
            x, slope = logits(rows, part, None if bias is None else bias[tile], layout, buffer)
            taken[here] += _pick(x, tokens[here] - layout.first - tile.start)
            old = top[here]
            new = torch.maximum(old, x.amax(1))
            shift = torch.where(new == -math.inf, 0.0, new)  # all forbidden so far: exp(-inf - 0), not exp(-inf + inf)
            shrink = (old - shift).exp_()
            weight = x.sub_(shift[:, None]).exp_()
            total[here] = total[here] * shrink + weight.sum(1)
            top[here] = new
            if mean is not None:
                weight = weight if slope is None else weight.mul_(slope)
                add_product(mean[here].mul_(shrink[:, None]), weight.to(factor), part)
    if mean is not None and layout.scale != 1:
        mean *= layout.scale
    return taken, top, total, mean


def dtypes(hidden: Tensor, head: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(of logits and sums, of the factors of a matrix product).

    CUDA multiplies half-precision factors exactly and sums them in float32, so there alone they stay as they are. A weight
    p_v is then rounded once, as in flash attention: E errs by at most eps / 2 sum_v p_v |W_v|, like the gradient it is for.
    """
    wide = torch.float64 if torch.float64 in (hidden.dtype, head.dtype) else torch.float32
    stays = hidden.is_cuda and hidden.dtype == head.dtype and hidden.dtype in (torch.float16, torch.bfloat16)
    return wide, hidden.dtype if stays else wide


def add_product(out: Tensor, a: Tensor, b: Tensor, *, keep: bool = True) -> None:
    """out = keep out + a b, summed in the dtype of out; keep=False never reads out."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=int(keep))
    else:  # torch >= 2.8
        torch.addmm(out, a, b, beta=int(keep), out_dtype=out.dtype, out=out)


def logits(rows: Tensor, part: Tensor, bias: Tensor | None, layout: Layout, buffer: Tensor) -> tuple[Tensor, Tensor | None]:
    """(final logits, tanh's slope or None without a cap) of a tile, [n, v]; the derivative by h W is scale times the slope."""
    x = buffer[: len(rows) * len(part)].view(len(rows), len(part))
    add_product(x, rows, part.T, keep=False)
    if bias is not None:
        x += bias
    if layout.scale != 1:
        x *= layout.scale
    if layout.soft_cap is None:
        return x, None
    bend = x.div_(layout.soft_cap).tanh()
    torch.mul(bend, layout.soft_cap, out=x)
    if bias is not None:  # the cap alone would let a forbidden token in again, at -soft_cap
        x.masked_fill_(bias == -math.inf, -math.inf)
    return x, bend.square_().neg_().add_(1.0)


def hidden_gradient(head: Tensor, tokens: Tensor, mean: Tensor, own: Tensor, by_level: Tensor, layout: Layout) -> Tensor:
    """own W_a + by_level E, float[N, H], `own` being by_taken f'_a."""
    out = mean * by_level[:, None]
    row = tokens - layout.first
    held = (row >= 0) & (row < layout.columns)
    if layout.columns:
        for here in layout.blocks(len(tokens)):
            chosen = head[row[here].clamp(0, layout.columns - 1)].to(out.dtype)
            out[here].addcmul_(chosen, torch.where(held[here], own[here], 0.0)[:, None])
    if layout.sharded:
        dist.all_reduce(out, group=layout.group)
    return out


def head_gradients(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    level: Tensor,
    own: Tensor,
    by_level: Tensor,
    layout: Layout,
    want_head: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by head and bias: each tile of logits is computed again, and summed over all tokens before it is rounded."""
    wide, factor = dtypes(hidden, head)
    by_head = torch.empty_like(head, memory_format=torch.contiguous_format) if want_head else None
    by_bias = torch.zeros_like(bias, dtype=wide) if want_bias and bias is not None else None
    if by_head is not None:
        by_head[layout.columns if len(hidden) else 0 :] = 0  # padding, which no tile reaches
    level = torch.where(level == -math.inf, 0.0, level)
    buffer = level.new_empty(layout.rows * layout.width)
    for tile in layout.tiles():
        part = head[tile].to(factor)
        sums = None
        if by_head is not None:
            sums = by_head[tile] if by_head.dtype == wide else torch.empty_like(by_head[tile], dtype=wide)
        for here in layout.blocks(len(hidden)):
            rows = hidden[here].to(factor)
            x, slope = logits(rows, part, None if bias is None else bias[tile], layout, buffer)
            weight = x.sub_(level[here, None]).exp_().mul_((layout.scale * by_level[here])[:, None])
            weight = weight if slope is None else weight.mul_(slope)
            _add(weight, tokens[here] - layout.first - tile.start, own[here])
            if sums is not None:
                add_product(sums, weight.T.to(factor), rows, keep=here.start > 0)
            if by_bias is not None:
                by_bias[tile] += weight.sum(0)
        if by_head is not None and sums is not None and by_head.dtype != wide and len(hidden):
            by_head[tile] = sums
    return by_head, None if by_bias is None or bias is None else by_bias.to(bias.dtype)


def _over_ranks(
    taken: Tensor, top: Tensor, total: Tensor, mean: Tensor | None, tokens: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What `sweep` would find in the whole head; `mean` stays this rank's share, under the common largest logit."""
    largest = top.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=layout.group)
    shrink = (top - torch.where(largest == -math.inf, 0.0, largest)).exp()
    held = (tokens >= layout.first) & (tokens < layout.first + layout.columns)
    sums = torch.stack([taken, total * shrink, held.to(taken.dtype)])  # (3, N)
    dist.all_reduce(sums, group=layout.group)
    wrong = sums[2] != 1
    if wrong.any():
        place = int(wrong.nonzero()[0])
        received = f"{int(tokens[place])} at place {place}, which {int(sums[2, place])} of them hold"
        raise bad("tokens", "ids that exactly one shard holds", received)
    return sums[0], largest, sums[1], None if mean is None else mean.mul_(shrink[:, None])


# ------------------------------------------------------------------------------------------------------------- small parts
def _pick(x: Tensor, column: Tensor) -> Tensor:
    """x at a column a row, 0 where the column is not in this tile."""
    inside = (column >= 0) & (column < x.shape[1])
    return torch.where(inside, x.gather(1, column.clamp(0, x.shape[1] - 1)[:, None])[:, 0], 0.0)


def _add(x: Tensor, column: Tensor, value: Tensor) -> None:
    """Add a value a row at its column, where that is in this tile. The transpose of _pick."""
    inside = (column >= 0) & (column < x.shape[1])
    x.scatter_add_(1, column.clamp(0, x.shape[1] - 1)[:, None], torch.where(inside, value, 0.0)[:, None])


def _slope_of(x: Tensor, layout: Layout) -> Tensor:
    """f' where the final logit is x; a forbidden token has none under a cap."""
    if layout.soft_cap is None:
        return torch.full_like(x, layout.scale)
    return layout.scale * (1 - (x / layout.soft_cap).clamp(-1.0, 1.0).square())


def _layout(hidden: Tensor, head: Tensor, columns: int, scale: float, soft_cap: float | None, chunk: int | None) -> Layout:
    if chunk is None:
        chunk = CACHE
        if hidden.device.type != "cpu":  # 16 bytes a logit: the tile, its slopes and what torch makes of them in passing
            chunk = max(CACHE, (len(hidden) * columns // 50 + head.numel() * head.element_size()) // 16)
    rows = max(1, min(len(hidden), ROWS, chunk))
    width = max(1, min(columns, chunk // rows))
    return Layout(float(scale), None if soft_cap is None else float(soft_cap), 0, columns, rows, width)


def _columns(n_tokens: int | None, length: int | None) -> int:
    if n_tokens is None and length is not None:
        return length
    most = math.inf if length is None else length
    if not is_whole(n_tokens) or not 1 <= n_tokens <= most:  # type: ignore[operator]
        expected = "a whole number >= 1" if length is None else f"a whole number from 1 to {length}, the rows of the head"
        raise bad("n_tokens", expected, repr(n_tokens))
    return int(n_tokens)  # type: ignore[arg-type]


def _check(
    hidden: Tensor, head: Tensor, tokens: Tensor, bias: Tensor | None, scale: float, soft_cap: float | None, chunk: int | None
) -> None:
    for name, x, shape in (("hidden", hidden, "[N, H]"), ("head", head, "[V, H]")):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 2:
            raise bad(name, f"a floating-point tensor {shape}", _kind(x))
    if hidden.shape[1] != head.shape[1]:
        raise bad("head", f"shape [V, {hidden.shape[1]}], as wide as hidden", f"shape {tuple(head.shape)}")
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int32, torch.int64) or tokens.shape != hidden.shape[:1]:
        raise bad("tokens", f"an int64 tensor [{len(hidden)}]", _kind(tokens))
    if bias is not None and (not isinstance(bias, Tensor) or not bias.is_floating_point() or bias.shape != head.shape[:1]):
        raise bad("bias", f"None or a floating-point tensor [{len(head)}]", _kind(bias))
    if not is_real(scale) or not 0 < scale < math.inf:
        raise bad("scale", "a finite number > 0", repr(scale))
    if soft_cap is not None and (not is_real(soft_cap) or not 0 < soft_cap < math.inf):
        raise bad("soft_cap", "None or a finite number > 0", repr(soft_cap))
    if chunk is not None and (not is_whole(chunk) or chunk < 1):
        raise bad("chunk", "None or a whole number >= 1", repr(chunk))


def _kind(x: object) -> str:
    return f"{str(x.dtype)[6:]} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
