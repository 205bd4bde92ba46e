"""Bugs between sampler and trainer, each planted in the table's sampler or trainer by one edit, at the place of its thread."""

from collections.abc import Callable
from functools import partial
from typing import Any

from shiq_lab.checks.bugs.plant import Bug, plant
from shiq_lab.checks.report import Report
from shiq_lab.checks.rollout.oracle import TOY_PROMPTS, TableSampler, TableTrainer, table_pair
from shiq_lab.checks.rollout.suite import check_rollout

Makes = Callable[[], tuple[TableSampler, TableTrainer]]  # a fresh pair: the checks move the trainer's weights
DRAWS = 250  # a prompt: every bug below is off by far more than so many draws leave open


def suite(make: Makes) -> Report:
    """check_rollout on a fresh pair over the toy dialogue, in float64."""
    return check_rollout(*make(), TOY_PROMPTS, n=DRAWS, dtype="float64")


def with_bug(part: type, method: str, *edits: tuple[str, str], **names: Any) -> type:
    """A sampler or trainer with one method edited."""
    return type(part.__name__, (part,), {method: plant(getattr(part, method), *edits, **names)})


def padded(logprobs: list[float], length: int) -> list[float]:
    """What a stack does to log-probs of another length: drop the rest, or fill with 0."""
    return [*logprobs, *[0.0] * length][:length]


def _sampler(*edits: tuple[str, str], method: str, **names: Any) -> Makes:
    return partial(table_pair, sampler=with_bug(TableSampler, method, *edits, **names))


def _trainer(*edits: tuple[str, str], method: str, **options: Any) -> Makes:
    return partial(table_pair, trainer=with_bug(TableTrainer, method, *edits), **options)


HISTORY = (
    "context = [*context, *completion, *reply]",
    "context = self.tokenizer.encode(self.tokenizer.decode([*context, *completion, *reply]))",
)
RETOKENISED = (
    "turns.append(Turn(list(context), completion, logprobs))",
    "ids = self.tokenizer.encode(self.tokenizer.decode(completion))\n"
    "        turns.append(Turn(list(context), ids, padded(logprobs, len(ids))))",
)
FULL_VOCABULARY = ("above < top_p", "above < 1")
NO_COPY = ("self.table = self.trainer.weights()", "pass")
JOINT = ("ids += turn.completion", "ids = self.tokenizer.encode(self.tokenizer.decode([*ids, *turn.completion]))")
BEGINNING = ("ids += turn.completion", "ids += [self.tokenizer.bos, *turn.completion]")

BUGS = [
    Bug(
        "C7",
        "trl#5224",
        "log-probs of tokens that were never sampled",
        "the history is decoded and encoded again before the next turn",
        "R",
        right=table_pair,
        wrong=_sampler(HISTORY, method="_episode"),
        suite=suite,
    ),
    Bug(
        "C8",
        "rllm#816",
        "old log-probs on other tokens",
        "the engine returns its text encoded again, with the server's log-probs cut or padded with 0 to that length",
        "R",
        right=table_pair,
        wrong=_sampler(RETOKENISED, method="_episode", padded=padded),
        suite=suite,
    ),
    Bug(
        "F4",
        "trl#6789",
        "gradient times the kept mass",
        "the trainer's log-probs ignore top_p, the sampler's are renormalised over the kept tokens",
        "R",
        right=table_pair,
        wrong=_trainer(FULL_VOCABULARY, method="logprobs"),
        suite=suite,
    ),
    Bug(
        "K2",
        "verl#7495, trl#5312",
        "samples from a stale policy",
        "the weights are never synchronised",
        "R",
        right=table_pair,
        wrong=_sampler(NO_COPY, method="synchronise"),
        suite=suite,
    ),
    Bug(
        "K3",
        "AReaL#1427",
        "the boundary of prompt and completion is mislabelled",
        "prompt and completion encoded as one text, the mask from the length of the prompt alone",
        "R",
        right=partial(table_pair, keep_logprobs=False),
        wrong=_trainer(JOINT, method="training_rows", keep_logprobs=False),
        suite=suite,
    ),
    Bug(
        "K3-bos",
        "axolotl#1616",
        "a beginning-of-sequence token is trained on",
        "it is put at the start of every completion",
        "R",
        right=partial(table_pair, keep_logprobs=False),
        wrong=_trainer(BEGINNING, method="training_rows", keep_logprobs=False),
        suite=suite,
    ),
]
