"""A real model with an exact truth: its policy restricted to k tokens for d steps after each prompt.

Every other logit counts as -inf, for the model and for its reference alike; what is left is a tree of k-ary choices, small
enough to list, whose reference is the model's own raw logits at every prefix. So q*, v* and pi* are exact for a real model,
and what training makes of its logits can be held against them (F1 of the derivation).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shiq_lab.batch import TokenBatch
from shiq_lab.builders import Act, Say, from_turns
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.errors import at_least, bad
from shiq_lab.graph import Floats, Ints
from shiq_lab.mdp import TokenMDP
from shiq_lab.models.prefixes import Prefixes
from shiq_lab.models.tabular import CausalLMOutput

ROWS = 16  # rows a forward pass: their logits over the whole vocabulary are all that is ever held

Reward = Callable[[tuple[str, ...]], float]


@dataclass(frozen=True, eq=False)
class Restricted:
    """Prompts, what may be said after them, for how long, and what is paid.

    prompt_ids  a tuple of the model's token ids a prompt; each prompt has the same probability
    word_ids    the k ids that the policy may say (ShiQConfig.allowed_tokens); words: how they read
    depth       d: the row ends after so many
    reward      of the words said so far, paid on the last of them; a rule, so it is asked for every prefix
    """

    prompt_ids: tuple[tuple[int, ...], ...]
    word_ids: tuple[int, ...]
    words: tuple[str, ...]
    depth: int
    reward: Reward = field(repr=False)

    def __post_init__(self) -> None:
        at_least("depth", self.depth, 1)
        if len(self.word_ids) < 2 or len(set(self.word_ids)) < len(self.word_ids):
            raise bad("word_ids", "at least two different tokens", repr(self.word_ids))
        if len(self.words) != len(self.word_ids):
            raise bad("words", f"{len(self.word_ids)} of them, one a token", repr(self.words))
        if not self.prompt_ids or not all(self.prompt_ids) or len(set(self.prompt_ids)) < len(self.prompt_ids):
            raise bad("prompt_ids", "different prompts of at least one token each", repr(self.prompt_ids)[:80])

    @classmethod
    def of(cls, tokenizer: Any, prompts: Sequence[str], words: Sequence[str], *, depth: int, reward: Reward) -> "Restricted":
        """From texts. ValueError where a word is not one token, or would melt into another token after a prompt or a word."""
        ids = lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
        word_ids, prompt_ids = [ids(word) for word in words], [ids(prompt) for prompt in prompts]
        for word, found in zip(words, word_ids, strict=True):
            if len(found) != 1:
                raise bad("words", "words of one token each", f"{word!r} with {len(found)}", "A leading blank may be missing.")
        for text, before in zip((*prompts, *words), (*prompt_ids, *word_ids), strict=True):
            for word, found in zip(words, word_ids, strict=True):
                if ids(text + word) != before + found:
                    raise bad("words", "words that stay tokens of their own", f"{word!r}, which does not after {text!r}")
        return cls(tuple(prompt_ids), tuple(found[0] for found in word_ids), tuple(words), depth, reward)

    # ---------------------------------------------------------------------------------------------------- the automaton
    @cached_property
    def model_ids(self) -> Ints:
        """int[V']: the model's id of each token of the automaton: the words and whatever the prompts are made of."""
        return np.unique([*self.word_ids, *(token for prompt in self.prompt_ids for token in prompt)])

    def numbers(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The automaton's tokens of the model's ids."""
        return tuple(np.searchsorted(self.model_ids, ids).tolist())

    @cached_property
    def prefixes(self) -> Prefixes:
        """Every prefix of the tree, in few rows; its reference is still a table of zeros."""
        said = dict(zip(self.numbers(self.word_ids), self.words, strict=True))
        prompts = {self.numbers(prompt): 1 / len(self.prompt_ids) for prompt in self.prompt_ids}
        longest = max(map(len, prompts))

        def reward(prefix: tuple[int, ...]) -> float:
            begin = next(n for n in range(1, longest + 1) if prefix[:n] in prompts)
            return self.reward(tuple(said[token] for token in prefix[begin:]))

        turns: list[Say | Act] = [Say(prompts), Act(self.depth, list(said))]
        return Prefixes.of(from_turns(turns, reward, len(self.model_ids), name="Restricted"))

    def mdp(self, model: nn.Module) -> TokenMDP:
        """The tree whose reference is the model as it stands: raw logits, since their levels are what the shift is about."""
        with still(model):
            return self.prefixes.with_reference(self._few(model)).tree

    def table(self, model: nn.Module) -> Floats:
        """The model's logits at every prefix, float64[S, V'], -inf where forbidden; what training.measure reads."""
        with still(model):
            found: Floats = self.prefixes.table(self._few(model)).numpy()
        return found

    def _few(self, model: nn.Module) -> "Few":
        return Few(model, torch.from_numpy(self.model_ids))

    def one_by_one(self, model: nn.Module) -> Floats:
        """`table` by the slow road: each prefix alone, in the model's own ids and without padding, its last logits read."""
        tree, found = self.prefixes.tree, np.array(self.prefixes.tree.ref_logits)
        device, columns = next(model.parameters()).device, list(self.numbers(self.word_ids))
        strings = chain(*(product(self.word_ids, repeat=n) for n in range(self.depth)))
        with still(model):
            for prompt, said in product(self.prompt_ids, strings):
                ids, state = torch.tensor([prompt + said], device=device), tree.start
                for token in self.numbers(prompt + said):
                    state = int(tree.next_state[state, token])
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
                found[state, columns] = logits[list(self.word_ids)].double().cpu().numpy()
        return found

    # --------------------------------------------------------------------------------------------------------- the data
    def rows(self, batch: TokenBatch | None = None) -> list[dict[str, Any]]:
        """Token-id examples for ShiQTrainer: every string once, or the rows of a batch of this automaton with their weights."""
        if batch is None:
            batch = enumerate_trajectories(self.prefixes.tree)
            batch = replace(batch, weights=torch.ones_like(batch.weights))
        real, acted, found = batch.attention_mask == 1, batch.completion_mask == 1, []
        for i in range(len(batch)):
            prompt, said = (self.model_ids[batch.input_ids[i][part].numpy()] for part in (real[i] & ~acted[i], acted[i]))
            found.append({
                "prompt_ids": prompt.tolist(), "completion_ids": said.tolist(), "rewards": batch.rewards[i][acted[i]].tolist(),
                "weight": float(batch.weights[i]), "group": int(batch.group_ids[i]),
            })  # fmt: skip
        return found


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Inside, no gradient and no dropout."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@dataclass(frozen=True, eq=False)
class Few:
    """A model as a causal language model of a few of its tokens: their numbers in, their raw logits float[B, L, V'] out."""

    model: nn.Module
    ids: Tensor  # int[V']

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> CausalLMOutput:
        ids = self.ids.to(next(self.model.parameters()).device)
        parts = []
        for rows, mask in zip(input_ids.split(ROWS), attention_mask.split(ROWS), strict=True):
            logits = self.model(input_ids=ids[rows.to(ids.device)], attention_mask=mask.to(ids.device)).logits
            parts.append(logits[..., ids].double().cpu())  # exact: sums behind it are float64's
        return CausalLMOutput(torch.cat(parts))
