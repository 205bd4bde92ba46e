"""What a loss may declare of itself, so that a legitimate choice is not called a bug."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from shiq_lab.errors import bad

KINDS = ("bellman", "trajectory", "policy_only", "on_policy", "preference")
REDUCTIONS = ("sum", "row mean", "token mean", "mean of row means")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Traits:
    """Declared with `@declare(...)` or passed to check_loss. None = by kind, or inferred.

    kind                  bellman (q* and v* everywhere), trajectory (policy, and the level at the start), policy_only,
                          on_policy, preference
    semi_gradient         part of the loss is detached on purpose: finite differences are not compared
                          (None: only on_policy losses are)
    reduction             "sum", "row mean", "token mean" or "mean of row means"; a row is a pair or a group where the loss
                          needs several (None: inferred and printed)
    readout               "shifted": the optimum is l* = l_ref + q*/beta; "log_policy": it is ln pi* + v*/beta, the unshifted
                          losses' (easy sampling, TBRM)
    discounted            follows gamma < 1 (None: bellman and trajectory do)
    cut_rows              bootstraps rows that did not terminate (None: bellman losses do)
    packing               reads packed rows (None: if it names segment_ids)
    per_token_reward      reads a reward on every action; False: only the sum, which then stands on a row's last action
    multi_turn            stands observation tokens between actions
    padding               sides that it stands: ("right", "left")
    empty_completions     stands rows without any action
    pad_ids_out_of_range  stands ids such as -100 in padding
    random_world          its optimum stays where it is when the environment's replies are random
    trains_values         sends gradient into `values` (a joint critic loss)
    dtypes                what it stands besides float64
    """

    kind: str = "bellman"
    semi_gradient: bool | None = None
    reduction: str | None = None
    readout: str = "shifted"
    discounted: bool | None = None
    cut_rows: bool | None = None
    packing: bool | None = None
    per_token_reward: bool = True
    multi_turn: bool = True
    padding: tuple[str, ...] = ("right", "left")
    empty_completions: bool = True
    pad_ids_out_of_range: bool = False
    random_world: bool = False
    trains_values: bool = False
    dtypes: tuple[str, ...] = ("float32",)

    def __post_init__(self) -> None:
        choices = {"kind": KINDS, "reduction": (*REDUCTIONS, None), "readout": ("shifted", "log_policy")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise bad(name, f"one of {', '.join(map(str, allowed))}", repr(getattr(self, name)))
        for name, allowed in (("padding", ("right", "left")), ("dtypes", ("float64", "float32", "bfloat16", "float16"))):
            given = getattr(self, name)
            if not isinstance(given, (tuple, list)) or not given or not set(given) <= set(allowed):
                raise bad(name, f"some of {', '.join(map(repr, allowed))}", repr(given), f"For instance ({allowed[0]!r},).")

    def filled(self) -> "Traits":
        """The same with every None that the kind decides put in."""
        by_kind: dict[str, Any] = {
            "semi_gradient": self.kind == "on_policy",
            "discounted": self.kind in ("bellman", "trajectory"),
            "cut_rows": self.kind == "bellman",
        }
        return replace(self, **{k: v for k, v in by_kind.items() if getattr(self, k) is None})


def signature_of(loss: Callable[..., Any]) -> inspect.Signature:
    """The signature that a call really has: of a torch module, whose own is (*args, **kwargs), that of its forward."""
    inner = inspect.unwrap(loss)
    forward = getattr(inner, "forward", None)
    is_module = callable(forward) and hasattr(inner, "named_parameters") and not inspect.isclass(inner)
    return inspect.signature(forward if is_module else loss)  # type: ignore[arg-type]


def declare(*stray: Any, **traits: Any) -> Callable[[F], F]:
    """Decorator: `@declare(kind="trajectory", semi_gradient=True)` on a loss. Returns the same function."""
    if stray:
        raise bad("declare", "traits as keywords, @declare(kind=...)", repr(stray[0])[:60], "Call it: @declare(...).")
    check_names(traits)
    Traits(**traits)  # a wrong value is named here, where it stands

    def mark(loss: F) -> F:
        loss.shiq_lab_traits = traits  # type: ignore[attr-defined]
        return loss

    return mark


def check_names(traits: dict[str, Any]) -> None:
    """ValueError for a trait that does not exist, with the nearest one."""
    known = [f.name for f in fields(Traits)]
    for name in traits:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise bad("traits", f"one of {', '.join(known)}", repr(name), f"Did you mean {near[0]!r}?" if near else "")


def traits_of(loss: Callable[..., Any], **overrides: Any) -> Traits:
    """What the loss declares, with the overrides that are not None put on top, and the kind's own choices filled in."""
    check_names(overrides)
    declared = dict(getattr(loss, "shiq_lab_traits", {}))
    declared.update({k: v for k, v in overrides.items() if v is not None})
    return Traits(**declared).filled()
