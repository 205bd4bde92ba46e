"""Token statistics of any causal language model: fused with its head where that is possible, from its logits elsewhere.

A model of the transformers library gets a forward that also answers "the two numbers at these positions". They are made inside
the model's own forward, so wrappers (DDP, FSDP, PEFT, autocast) see an ordinary call and gather what they have to gather.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import bad, is_whole
from shiq_lab.stats import TokenStats, columns, scored

PROBE = 64  # tokens of a row that check_fused looks at


@dataclass
class TokenColumns(ModelOutput):
    """pair complex[B, L]: token_logit + i logsumexp at the positions asked for, 0 elsewhere.

    One complex tensor, as FSDP2 with bf16 rounds whatever floating-point numbers leave the model: 20 would be known to 0.06.
    """

    pair: Tensor | None = None


def core(model: Any) -> Any:
    """The model under the wrappers: of DDP and torch.compile, and of PEFT's adapters."""
    for name in ("module", "_orig_mod"):
        while isinstance(getattr(model, name, None), nn.Module):
            model = getattr(model, name)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(inner: Any) -> nn.Module | None:
    """The layer that makes logits, where a model of the transformers library names it."""
    return inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None


def head_options(config: Any) -> dict[str, Any]:
    """What a head does besides the matrix product: Cohere's logit_scale, Granite's logits_scaling, Gemma's soft cap."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return {"scale": scale, "soft_cap": getattr(config, "final_logit_softcapping", None)}


def why_not(model: nn.Module) -> str:
    """Why the head cannot be fused; "" where it can. The first batch still compares both roads (`check_fused`)."""
    inner = core(model)
    head = head_of(inner)
    if head is None or not hasattr(inner, "base_model"):
        return f"{type(inner).__name__} has no backbone and head of the transformers library"
    if inner.base_model is inner:
        return f"{type(inner).__name__} names no backbone (base_model_prefix)"
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, not a plain linear layer (an adapter on the head?)"
    return ""


def answer_columns(model: nn.Module) -> None:
    """Teach a model's forward to return TokenColumns when it is called with `where` and `taken`; else it stays as it was."""
    inner = core(model)
    if not hasattr(inner, "_forward_with_logits"):
        inner._forward_with_logits = inner.forward
        inner.forward = MethodType(_answer, inner)  # bound, so that a deep copy answers with its own weights


def _answer(
    self: Any, *args: Any, where: Tensor | None = None, taken: Tensor | None = None, among: Tensor | None = None, **kw: Any
) -> Any:
    if where is None:
        return self._forward_with_logits(*args, **kw)
    hidden = self.base_model(*args, **{**kw, "use_cache": False}).last_hidden_state
    head = self.get_output_embeddings()
    if not hasattr(head, "_forward_with_logits"):
        head._forward_with_logits = head.forward
        head.forward = MethodType(_head_columns, head)
    # An ordinary call of the head, as it may be a group of its own under FSDP, which gathers its weight just then.
    return TokenColumns(pair=head(hidden, where, taken, among, head_options(self.config)))


def _head_columns(
    self: Any, hidden: Tensor, where: Tensor | None = None, taken: Tensor | None = None, among: Tensor | None = None,
    options: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    if where is None or taken is None:
        return self._forward_with_logits(hidden)
    weight, bias = _whole(self.weight), None if getattr(self, "bias", None) is None else _whole(self.bias)
    if torch.is_autocast_enabled(hidden.device.type):  # as the head's own product would be computed
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if among is not None:
        weight, bias = weight[among], None if bias is None else bias[among]
        taken = torch.searchsorted(among, taken).clamp(max=len(among) - 1)
    return torch.complex(*columns(hidden, weight, where, taken, bias=bias, **(options or {})))


def _whole(weight: Tensor) -> Tensor:
    """A parameter in shards (tensor parallel) put together; inside FSDP's own forward it already is."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def model_inputs(model: nn.Module, batch: TokenBatch) -> dict[str, Any]:
    """What a model's forward takes of a batch. Positions are counted from the mask: padding on the left must not shift them."""
    inner = core(model)
    takes = inspect.signature(getattr(inner, "_forward_with_logits", inner.forward)).parameters
    found: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if "use_cache" in takes:  # transformers looks for packed segments only where there is no cache
        found["use_cache"] = False
    if batch.segment_ids is None:
        if "position_ids" in takes:
            found["position_ids"] = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    elif "segment_ids" in takes:
        found["segment_ids"] = batch.segment_ids
    elif "position_ids" in takes:  # transformers keeps segments apart by the positions, where there is no mask
        assert batch.position_ids is not None
        found["position_ids"] = batch.position_ids
        del found["attention_mask"]
    else:
        raise bad("packing", "a model that takes segment_ids or position_ids", type(inner).__name__, "Do not pack.")
    return found


def logits_of(model: nn.Module, batch: TokenBatch, among: Tensor | None = None) -> Tensor:
    """The model's logits float[B, L, V]; -inf outside `among`."""
    logits = model(**model_inputs(model, batch)).logits
    if among is None:
        return logits
    open_ = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    open_[among] = True
    return torch.where(open_, logits, -torch.inf)


def statistics(model: nn.Module, batch: TokenBatch, *, fused: bool, among: Tensor | None = None) -> TokenStats:
    """The two numbers a token of a model on a batch; `among` restricts the vocabulary to these ids (sorted, int[k])."""
    if not fused:
        return TokenStats.from_logits(logits_of(model, batch, among), batch)
    where, taken = scored(batch)
    found = model(**model_inputs(model, batch), where=where, taken=taken, among=among)
    return TokenStats.from_columns(found.pair.real, found.pair.imag, batch)


def check_fused(model: nn.Module, batch: TokenBatch) -> float:
    """The largest relative difference between the fused road and the model's own logits; ValueError past its rounding.

    A head that does more than this file knows of (another scale, a second projection) would train another model in silence.
    Asked of the beginnings of two rows, every token of them: as many logits as even a large vocabulary allows.
    """
    ids, real = batch.input_ids[:2, :PROBE], batch.attention_mask[:2, :PROBE]
    every = real * (real.cumsum(1) > 1)
    few = TokenBatch(ids, real, every, torch.zeros(ids.shape, device=ids.device), torch.ones_like(ids[:, 0]) == 1)
    with torch.no_grad():
        both = [statistics(model, few, fused=fused) for fused in (True, False)]
    pairs = [(a.double(), b.double()) for a, b in zip(*((s.token_logit, s.logsumexp) for s in both), strict=True)]
    size = max(1.0, *(b.abs().max().item() for _, b in pairs))
    worst = max((a - b).abs().max().item() for a, b in pairs) / size
    dtype = next(model.parameters()).dtype
    half = torch.is_autocast_enabled(batch.input_ids.device.type) or dtype in (torch.bfloat16, torch.float16)
    # Half: a head rounds its logits at most four times (product, scale or bias, tanh, cap), by 2^-9 each; twice that for sums
    # in parts. A cap of 30 bends a logit of 12 by 5 %. Else: sums of H terms in another order.
    bound = 8 * 2.0**-9 if half else 64 * torch.finfo(dtype).eps
    if not worst <= bound:
        found = f"a relative difference of {worst:.3g} (bound {bound:.1g})"
        raise bad("fused", "statistics equal to those of the model's own logits", found, "Set fused: false.")
    return worst


def check_packed(model: nn.Module, batch: TokenBatch, *, fused: bool, among: Tensor | None = None) -> float:
    """How far later segments' numbers move, relative to the largest, when every row's first segment says something else.

    Masked attention multiplies what it must not see by 0, so nothing moves; a recurrent layer (Mamba and its hybrids) carries
    its state over from segment to segment, and attention told of its segments in another way may leak too: a ValueError.
    """
    if batch.segment_ids is None:
        return 0.0
    silenced = torch.where(batch.segment_ids == 1, batch.input_ids[:, :1], batch.input_ids)
    with torch.no_grad():
        both = [statistics(model, b, fused=fused, among=among) for b in (batch, replace(batch, input_ids=silenced))]
    later = batch.segment_ids[:, 1:] > 1
    a, b = (s.logsumexp[later].double() for s in both)
    size = max(1.0, a.abs().max().item()) if len(a) else 1.0
    worst = (a - b).abs().max().item() / size if len(a) else 0.0
    bound = 4 * torch.finfo(next(model.parameters()).dtype).eps  # tokens of a mixture of experts are summed in another order
    if not worst <= bound:
        found = f"numbers that move by {worst:.2g} with the segment before (bound {bound:.1g})"
        raise bad("packing", "a model that keeps packed segments apart", found, "Set packing: null.")
    return worst


def allowed_tokens(ids: Sequence[int] | None, vocabulary: int) -> Tensor | None:
    """Sorted int[k] of the ids that a policy may say; ValueError for ids outside the vocabulary, twice, or fewer than two."""
    if ids is None:
        return None
    if not isinstance(ids, Sequence) or not all(is_whole(i) for i in ids):
        raise bad("allowed_tokens", "a list of token ids", repr(ids)[:80])
    found = sorted(ids)
    if len(found) < 2 or len(set(found)) < len(found) or found[0] < 0 or found[-1] >= vocabulary:
        raise bad("allowed_tokens", f"at least two different ids from 0 to {vocabulary - 1}", repr(list(ids))[:80])
    return torch.tensor(found)
