"""check_rollout: the six checks of a sampler and a trainer, and the one entry. The protocols stand in protocol.py."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from shiq_lab.checks.report import Check, Measured, Report, Result
from shiq_lab.checks.rollout.probabilities import frequencies_agree, log_probs_agree, weights_arrive
from shiq_lab.checks.rollout.protocol import Ids, Sampler, Setting, Trainer
from shiq_lab.checks.rollout.subject import Pair
from shiq_lab.checks.rollout.training_rows import logprobs_are_aligned, sampled_ids_are_trained, turns_are_prefixes
from shiq_lab.checks.runner import SubjectError, run_checks
from shiq_lab.errors import at_least, bad, is_real, is_whole

SETTINGS = (Setting(), Setting(0.7), Setting(1.0, 0.8), Setting(1.5, 0.6))
DTYPES = {"float64": torch.float64, "float32": torch.float32}  # half precision needs a tolerance: see Pair.allowance
ROLLOUT_CHECKS = (
    Check(
        "LP",
        "returned log-probs are the trainer's, at every temperature and top_p",
        log_probs_agree,
        "The sampler's log-probs are after temperature and top_p (renormalised over the kept tokens) and the trainer's are "
        "not, or the other way round; or the two models differ. Ratios are then not 1 on fresh data, and the gradient is "
        "scaled by the kept mass.",
    ),
    Check(
        "FQ",
        "tokens are drawn as often as their log-probs say",
        frequencies_agree,
        "Log-probs are of other settings or other weights than those that drew the tokens (raw logits returned, a processor "
        "applied after them, a cache of an older policy).",
    ),
    Check(
        "TP",
        "each turn continues the one before, id by id",
        turns_are_prefixes,
        "The history was decoded and encoded again between turns: another split into tokens, so the model was never in the "
        "state that training will put it in. Keep ids, append ids.",
    ),
    Check(
        "ID",
        "the ids trained on are the ids sampled",
        sampled_ids_are_trained,
        "Text was tokenised again for training: a merge across the boundary of prompt and completion, a beginning-of-"
        "sequence token put before the completion, or a mask counted on other ids than those in the row.",
    ),
    Check(
        "AL",
        "old log-probs stand on the tokens that they belong to",
        logprobs_are_aligned,
        "The sampler's log-probs were laid on ids of another length and padded with 0, or shifted by one; every importance "
        "ratio behind that place is wrong.",
    ),
    Check(
        "WS",
        "after a synchronisation the sampler has the trainer's weights",
        weights_arrive,
        "The sampler still runs on older weights: no synchronisation, one that is done once, one that copies into a copy, "
        "or a prefix cache that outlives it.",
    ),
)


def check_rollout(
    sampler: Sampler,
    trainer: Trainer,
    prompts: Sequence[Ids],
    *,
    n: int = 1000,
    settings: Sequence[tuple[float, float]] = SETTINGS,
    seed: int = 0,
    dtype: str = "float32",
    tolerance: float | None = None,
    logprobs_of: str = "sampled",
    name: str = "",
    expect_fail: Mapping[str, str] | None = None,
    strict: bool = False,
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """Six checks of a sampler and a trainer: LP, FQ, TP, ID, AL, WS of ROLLOUT_CHECKS.

    Two objects of yours, adapters of a dozen lines around an engine and whatever holds the weights:

        from shiq_lab.checks.rollout.protocol import Rollout, TrainingRow, Turn

    sampler      .generate(prompts, *, n, temperature, top_p, seed) -> n x Rollout(turns) a prompt, the first prompt's first;
                     Turn(context, completion, logprobs): one call of the model; the ids that it was given (everything before
                     this turn included), the ids that it sampled, and the log-probability of each when it was drawn
                 .synchronise(): takes over the trainer's weights
    trainer      .logprobs(rows, *, temperature, top_p) -> for each list of ids as many numbers as ids; entry i is what the
                     loss calls ln pi(row[i] | row[:i])
                 .training_rows(rollouts) -> TrainingRow(rollout, input_ids, completion_mask, old_logprobs=None): the rows
                     that the loss would get; `rollout` is the number of the episode in the given list
                 .update(): one training step, which must move the weights
    prompts      lists of ids that end where the policy speaks
    n            rollouts a prompt and setting; FQ needs a few hundred
    settings     (temperature, top_p) pairs; the first is used where one is enough
    dtype        the coarser dtype of the two stacks: what rounding is allowed (see Pair.allowance)
    tolerance    in nats, instead: for stacks whose logits differ by more than rounding
    logprobs_of  "sampled": returned log-probs are of the distribution drawn from. "full vocabulary": before top_p; then
                 FQ leaves settings with top_p < 1 out, and the trainer's must ignore top_p too
    expect_fail  {check: the reason why it must fail}; strict: warnings are failures; on_result(result): after each check
    Raises ValueError for arguments that are none of these; whatever sampler and trainer do wrong is in the report.
    """
    n, seed = at_least("n", n, 1), at_least("seed", seed, 0)
    if not prompts or any(len(p) == 0 or not all(is_whole(x) for x in p) for p in prompts):
        raise bad("prompts", "at least one list of at least one token id", repr(prompts)[:100])
    if dtype not in DTYPES:
        raise bad("dtype", f"one of {', '.join(DTYPES)}", repr(dtype), "For half precision give a tolerance in nats.")
    if tolerance is not None and (not is_real(tolerance) or not 0 <= tolerance < math.inf):
        raise bad("tolerance", "a finite number of nats >= 0", repr(tolerance))
    if logprobs_of not in ("sampled", "full vocabulary"):
        raise bad("logprobs_of", "'sampled' or 'full vocabulary'", repr(logprobs_of))
    _check_methods("sampler", sampler, ("generate", "synchronise"))
    _check_methods("trainer", trainer, ("logprobs", "training_rows", "update"))
    eps, chosen = torch.finfo(DTYPES[dtype]).eps, _settings(settings)
    options: dict[str, Any] = {"expect_fail": expect_fail, "strict": strict, "on_result": on_result}
    name = name or f"{type(sampler).__name__} and {type(trainer).__name__}"
    try:
        pair = Pair(sampler, trainer, prompts, chosen, n, seed, tolerance, eps, logprobs_of)
    except SubjectError as error:
        verdict = str(error)

        def refuse(_: Any) -> Iterator[Measured]:
            raise SubjectError(verdict)

        return run_checks([replace(c, run=refuse) for c in ROLLOUT_CHECKS], None, name=name, kind="rollout", **options)
    return run_checks(ROLLOUT_CHECKS, pair, name=name, kind="rollout", **options)


def _check_methods(argument: str, value: object, methods: Sequence[str]) -> None:
    for method in methods:
        if not callable(getattr(value, method, None)):
            remedy = f"See the protocol {argument.title()}."
            raise bad(argument, f"an object with a method {method}", type(value).__name__, remedy)


def _settings(settings: Sequence[tuple[float, float]]) -> list[Setting]:
    if not settings:
        raise bad("settings", "at least one pair (temperature, top_p)", "none")
    chosen = []
    for pair in settings:
        if len(pair) != 2 or not all(is_real(x) for x in pair) or not 0 < pair[0] < math.inf or not 0 < pair[1] <= 1:
            raise bad("settings", "pairs (temperature > 0, top_p in (0, 1])", repr(pair))
        chosen.append(Setting(float(pair[0]), float(pair[1])))
    return chosen
