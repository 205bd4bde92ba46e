"""check_rollout: does the trainer train on what the sampler sampled, with the probabilities that it was sampled with?

Two small protocols stand between a stack and the checks. An engine with its tool loop becomes a Sampler, whatever holds the
weights becomes a Trainer; adapters of a dozen lines each. In full:

    class Engine:                                              # a Sampler
        def generate(self, prompts, *, n, temperature, top_p, seed):
            for ids in prompts:
                for _ in range(n):
                    out = self.llm.generate(ids, temperature=temperature, top_p=top_p, seed=...)
                    yield Rollout((Turn(ids, out.token_ids, out.logprobs),))     # one Turn a call of the model
        def synchronise(self):
            self.llm.load_weights(self.trainer.state_dict())

    class Mine:                                                # a Trainer
        def logprobs(self, rows, *, temperature, top_p): ...   # what the loss calls log pi, an entry a token
        def training_rows(self, rollouts): ...                 # the ids and masks that the loss would get
        def update(self): ...                                  # one step; it must move the weights

    check_rollout(Engine(), Mine(), prompts=[[1, 5, 9], [1, 7]])

`TableSampler` and `TableTrainer` of oracle.py play both parts with a table over an automaton, where every probability is
known exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Ids = Sequence[int]


class Setting(NamedTuple):
    """How tokens are drawn: softmax(logits / temperature), cut to the smallest likeliest set of mass >= top_p."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __str__(self) -> str:
        return f"temperature {self.temperature:g}, top_p {self.top_p:g}"


@dataclass(frozen=True)
class Turn:
    """One call of the model.

    context     the ids that the model was given, everything before this turn included
    completion  the ids that it sampled
    logprobs    one a sampled id: the log-probability with which it was drawn
    """

    context: Ids
    completion: Ids
    logprobs: Sequence[float]


@dataclass(frozen=True)
class Rollout:
    """One episode: the model's turns in order; replies of tools stand in the next turn's context."""

    turns: Sequence[Turn]


@dataclass(frozen=True)
class TrainingRow:
    """What the loss gets of rollout number `rollout`; one row an episode, or several (one a turn) in order.

    input_ids        the ids as trained on
    completion_mask  1 where an id counts as sampled by the policy
    old_logprobs     the sampler's log-probs moved to these ids, read under the mask; None: the trainer recomputes them
    """

    rollout: int
    input_ids: Ids
    completion_mask: Sequence[int]
    old_logprobs: Sequence[float] | None = None


class Sampler(Protocol):
    """What makes completions."""

    def generate(self, prompts: Sequence[Ids], *, n: int, temperature: float, top_p: float, seed: int) -> Sequence[Rollout]:
        """n rollouts a prompt, those of the first prompt first. Another seed gives independent ones."""
        ...

    def synchronise(self) -> None:
        """Take over the trainer's weights as they are now."""
        ...


class Trainer(Protocol):
    """What holds the weights and computes the loss."""

    def logprobs(self, rows: Sequence[Ids], *, temperature: float, top_p: float) -> Sequence[Sequence[float]]:
        """For each row as many numbers as it has ids: entry i is what the loss calls ln pi(row[i] | row[:i]) when the
        rollouts were drawn at this temperature and top_p. Only entries of sampled ids are read."""
        ...

    def training_rows(self, rollouts: Sequence[Rollout]) -> Sequence[TrainingRow]:
        """The rows that these rollouts become."""
        ...

    def update(self) -> None:
        """Change the weights as training would, by enough to be seen."""
        ...
