"""Adapters: losses in the signature of a training stack, made into losses of the contract.

A stack's loss takes log-probs, advantages and masks rather than logits. Each adapter computes these from the contract's tensors
in the plainest way, so that what is tested is the stack's own function; to test the stack's way of making them too, write the
adapter by hand (`examples/` shows a TRL-, a verl- and a torchtune-like one) or use the component checks.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.checks.traits import check_names, signature_of
from shiq_lab.errors import bad
from shiq_lab.stats import TokenStats

Loss = Callable[..., Tensor]


def token_logprobs(logits: Tensor, input_ids: Tensor) -> Tensor:
    """ln pi(input_ids[:, i] | what stands before), float[B, L]; 0 in the first column, which nothing scores."""
    logp = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(logp, (1, 0))


def from_stats(loss: Loss, *, grouped: bool = False, **traits: Any) -> Loss:
    """loss(policy_stats, ref_stats, batch, *, beta, gamma) -> scalar, in the form of shiq_lab's own losses.

    Packing is supported: the contract's segment_ids and position_ids go into the batch. Of gamma, values and behavior_logprobs
    (float[B, L], as in the contract) it gets what it names. grouped: it compares the rows of a group.
    """
    named = _named(loss)

    def adapted(
        *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
        rewards: Tensor, terminated: Tensor, beta: float, gamma: float, weights: Tensor, group_ids: Tensor | None = None,
        segment_ids: Tensor | None = None, position_ids: Tensor | None = None, values: Tensor | None = None,
        behavior_logprobs: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        batch = TokenBatch(
            input_ids=input_ids, attention_mask=attention_mask, completion_mask=completion_mask, rewards=rewards,
            terminated=terminated, weights=weights, group_ids=group_ids,  # type: ignore[arg-type]
            segment_ids=segment_ids, position_ids=position_ids,
        )  # fmt: skip
        stats, ref = (TokenStats.from_logits(x, batch) for x in (logits, ref_logits))
        given = {"gamma": gamma, "values": values, "behavior_logprobs": behavior_logprobs}
        return loss(stats, ref, batch, beta=beta, **{k: v for k, v in given.items() if k in named})

    drop = {"values", "behavior_logprobs"} - named
    if not grouped:
        drop |= {"group_ids"}
    return _signed(adapted, loss, traits, drop)


def from_logprobs(loss: Loss, names: Mapping[str, str] | None = None, **traits: Any) -> Loss:
    """A loss of per-token log-probs over the whole row, as TRL- and torchtune-like functions take them.

    It is called with what its signature names among
      logprobs, ref_logprobs, old_logprobs    float[B, L]    0 in the first column
      completion_mask, attention_mask         {0, 1}[B, L]
      rewards float[B, L], scores float[B] (a row's sum), terminated bool[B], group_ids int[B], values float[B, L], beta, gamma
    `names` says which of the loss's arguments means which of these: {"per_token_logps": "logprobs"}. Masked log-probs hold
    what the logits give there. Traits are declared as keywords.
    """
    return _from_numbers(loss, names, traits, response=False)


def from_response_logprobs(loss: Loss, names: Mapping[str, str] | None = None, **traits: Any) -> Loss:
    """A loss of right-padded *responses*, as verl- and OpenRLHF-like functions take them.

    As `from_logprobs`, with `completion_mask` also known as `response_mask` (observation tokens inside a response are 0), and
    every float[B, L] cut to the response, float[B, R]: column 0 is the row's first action, R the longest response.
    """
    return _from_numbers(loss, names, traits, response=True)


def _from_numbers(loss: Loss, names: Mapping[str, str] | None, traits: dict[str, Any], *, response: bool) -> Loss:
    names = dict(names or {})
    if not callable(loss):
        raise bad("loss", "a function", repr(loss)[:80])
    parameters = signature_of(loss).parameters
    wanted = {argument: names.get(argument, argument) for argument in parameters}
    needs = set(wanted.values())
    known = {
        "logprobs", "ref_logprobs", "old_logprobs", "completion_mask", "response_mask", "attention_mask", "rewards", "scores",
        "terminated", "group_ids", "values", "beta", "gamma",
    }  # fmt: skip
    for argument in names:
        if argument not in parameters:
            raise bad("names", f"arguments of the loss: {', '.join(parameters)}", repr(argument))
    for argument, parameter in parameters.items():
        if wanted[argument] not in known and (parameter.default is parameter.empty or argument in names):
            got = repr(names[argument]) if argument in names else "none"
            raise bad("names", f"a meaning for {argument!r} among {', '.join(sorted(known))}", got)

    def adapted(
        *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
        rewards: Tensor, terminated: Tensor, beta: float, gamma: float, group_ids: Tensor | None = None,
        behavior_logprobs: Tensor | None = None, values: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        paid = torch.where(completion_mask == 1, rewards, 0.0)
        given: dict[str, Any] = {
            "logprobs": token_logprobs(logits, input_ids), "ref_logprobs": token_logprobs(ref_logits, input_ids),
            "old_logprobs": behavior_logprobs, "completion_mask": completion_mask, "attention_mask": attention_mask,
            "response_mask": completion_mask, "rewards": rewards, "scores": paid.sum(1), "terminated": terminated,
            "group_ids": group_ids, "values": values, "beta": beta, "gamma": gamma,
        }  # fmt: skip
        if response:
            take = _responses(completion_mask)
            given = {k: take(v) if isinstance(v, Tensor) and v.ndim == 2 else v for k, v in given.items()}
        return loss(**{argument: given[name] for argument, name in wanted.items() if name in given})

    contract = {"group_ids": "group_ids", "old_logprobs": "behavior_logprobs", "values": "values"}
    return _signed(adapted, loss, traits, {contract[k] for k in contract.keys() - needs})


def _responses(completion_mask: Tensor) -> Callable[[Tensor], Tensor]:
    """What cuts float[B, L] to [B, R] from each row's first action to the longest row's last; 0 behind the last action."""
    L = completion_mask.shape[1]
    position = torch.arange(L, device=completion_mask.device)
    first = torch.where(completion_mask == 1, position, L).amin(1)
    last = torch.where(completion_mask == 1, position, -1).amax(1)
    width = int((last - first + 1).clamp(min=0).max()) if len(first) else 0
    index = first[:, None] + torch.arange(width, device=position.device)
    inside = index <= last[:, None]
    return lambda x: torch.where(inside, x.gather(1, index.clamp(max=L - 1)), torch.zeros((), dtype=x.dtype, device=x.device))


def _named(loss: Loss) -> set[str]:
    """The arguments of a loss of statistics; a ValueError where it needs others than this adapter has."""
    if not callable(loss):
        raise bad("loss", "a function", repr(loss)[:80])
    parameters = list(signature_of(loss).parameters.values())
    known = {"beta", "gamma", "values", "behavior_logprobs"}
    other = [p.name for p in parameters[3:] if p.default is p.empty and p.name not in known]
    variadic = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    if not variadic and (len(parameters) < 3 or other or any(p.kind == p.KEYWORD_ONLY for p in parameters[:3])):
        expected = "loss(policy_stats, ref_stats, batch, *, beta, gamma, values, behavior_logprobs)"
        raise bad("loss", expected, f"arguments {', '.join(p.name for p in parameters)}", "from_logprobs takes log-probs.")
    return {p.name for p in parameters} | ({"gamma"} if variadic else set())


def _signed(adapted: Loss, loss: Loss, traits: dict[str, Any], drop: set[str]) -> Loss:
    """The adapted function without the arguments that the loss does not want, and with its declared traits."""
    check_names(traits)
    signature = inspect.signature(adapted)
    kept = [p for name, p in signature.parameters.items() if name not in drop]

    @wraps(adapted)
    def call(**arguments: Any) -> Tensor:
        return adapted(**{k: v for k, v in arguments.items() if k not in drop})

    call.__name__ = call.__qualname__ = getattr(loss, "__name__", "loss")
    call.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    call.shiq_lab_traits = {**getattr(loss, "shiq_lab_traits", {}), **traits}  # type: ignore[attr-defined]
    return call
