"""check_component: checks of what surrounds a loss. The kinds, the one entry, and where each kind's checks stand.

    masks               completion_mask, attention_mask, response_length, truncated
    returns             gae, n_step, reward_to_go, reward_placement, score_readout
    groups              group_baseline, whitening, micro_batches
    kl                  kl_estimator, kl_baseline
    batches             collator, packing
    statistics, policy  token_statistics, fused_policy_loss

A function gets, by keyword, those of its kind's arguments that it names (a collator or packer gets its rows by position); a
signature of another shape is wrapped in a lambda. shiq_lab.component_signature(kind) says what there is.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from shiq_lab.checks.components import batches, groups, kl, masks, policy, returns, statistics
from shiq_lab.checks.components.subject import Component, Kind
from shiq_lab.checks.report import Check, Report, Result
from shiq_lab.checks.runner import run_checks
from shiq_lab.errors import bad

_FILES = (masks, returns, groups, kl, batches, statistics, policy)
COMPONENT_KINDS: dict[str, Kind] = {kind.name: kind for file in _FILES for kind in file.KINDS}
COMPONENT_CHECKS: dict[str, tuple[Check, ...]] = {name: kind.checks for name, kind in COMPONENT_KINDS.items()}
PURPOSES = ("value", "loss")


def signature(kind: str) -> str:
    """What a component of this kind may name, with shapes, and what it must return."""
    return _lookup(kind).signature()


component_signature = signature  # the name that the package exports


def check_component(
    function: Callable[..., Any],
    kind: str,
    *,
    padding: tuple[str, ...] = ("right", "left"),
    multi_turn: bool = True,
    purpose: str = "value",
    name: str | None = None,
    expect_fail: Mapping[str, str] | None = None,
    strict: bool = False,
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """Checks a mask, return, advantage, baseline, estimator, collator, packer or fused path against an independent truth.

    kind         completion_mask, attention_mask, response_length, truncated; gae, n_step, reward_to_go, reward_placement,
                 score_readout; group_baseline, whitening, micro_batches; kl_estimator, kl_baseline; collator, packing;
                 token_statistics, fused_policy_loss
    function     gets, by keyword, those of its kind's arguments that it names (a collator or packer gets its rows by position).
                 print(shiq_lab.component_signature(kind)) shows all arguments with their shapes, and what must be returned
    padding      sides that it stands
    multi_turn   False where it is made for one prompt and one completion alone: checks with observation tokens are skipped
    purpose      kl_estimator: "loss" asks for the expected gradient of KL(pi || ref); "value" takes that of any estimator
    expect_fail  {check: reason}; strict: NaN and inf in masked places must not matter either

    Raises ValueError for an unknown kind, and for a function that needs an argument which the kind does not offer. Whatever
    the function does wrong when it is called is a failed check, never an exception.
    """
    found = _lookup(kind)
    if isinstance(padding, str) or not padding or not set(padding) <= {"right", "left"}:
        raise bad("padding", "a tuple of 'right', 'left' or both", repr(padding))
    if purpose not in PURPOSES:
        raise bad("purpose", " or ".join(map(repr, PURPOSES)), repr(purpose))
    component = Component(function, found, tuple(padding), bool(multi_turn), purpose)
    label = name or str(getattr(function, "__name__", type(function).__name__))
    return run_checks(
        found.checks, component, name=label, kind=kind, expect_fail=expect_fail, strict=strict, on_result=on_result
    )


def _lookup(kind: object) -> Kind:
    if isinstance(kind, str) and kind in COMPONENT_KINDS:
        return COMPONENT_KINDS[kind]
    near = difflib.get_close_matches(str(kind), COMPONENT_KINDS, n=1)
    raise bad("kind", f"one of {', '.join(COMPONENT_KINDS)}", repr(kind), f"Did you mean {near[0]!r}?" if near else "")
