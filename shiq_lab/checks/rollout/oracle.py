"""A sampler and a trainer that are right: tables over one automaton, where every probability is known exactly."""

from collections.abc import Sequence

import numpy as np
import torch

from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.checks.rollout.protocol import Ids, Rollout, TrainingRow, Turn
from shiq_lab.errors import bad
from shiq_lab.graph import Floats
from shiq_lab.mdp import TokenMDP
from shiq_lab.models.tabular import TabularLM


class ToyTokenizer:
    """Text to ids and back with one merge, so that decoding and encoding again need not give the same ids.

    Encoding takes the longest token that fits, from the left: "a" then "b", sampled one by one, come back as "ab".
    """

    def __init__(self, tokens: Sequence[str], bos: int) -> None:
        self.tokens, self.bos = list(tokens), bos
        self._longest_first = sorted(range(len(self.tokens)), key=lambda i: -len(self.tokens[i]))

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """The ids of a text; ValueError where no token fits."""
        ids, at = [self.bos] if bos else [], 0
        while at < len(text):
            fits = next((i for i in self._longest_first if text.startswith(self.tokens[i], at)), None)
            if fits is None:
                raise bad("text", f"made of {', '.join(self.tokens)}", repr(text[at:]))
            ids.append(fits)
            at += len(self.tokens[fits])
        return ids

    def decode(self, ids: Ids) -> str:
        """The text of ids, special tokens included."""
        return "".join(self.tokens[i] for i in ids)


TOY_TOKENS = ("a", "b", "ab", "!", "x", "y", "r", "s", "<bos>")
TOY_PROMPTS = ((8, 4, 0), (8, 5, 1))  # "<bos>xa" ends where a completion that begins with "b" would merge; "<bos>yb" does not


def toy_dialogue(seed: int = 0) -> TokenMDP:
    """Two turns of "a", "b", "ab" ended by "!", a tool's reply between them: however the text is split, a valid path.

    The policy's logits depend on the last token, so another split of the same text has other probabilities.
    """
    a, b, ab, stop, x, y, r, s, bos = range(9)
    letters = (a, b, ab)

    def describe(state: tuple[str, int, int]) -> Row:
        phase, turn, _ = state
        if phase == "root":
            return Row(next={bos: ("opening", 0, 0)}, probs={bos: 1.0})
        if phase == "opening":  # the prompt's or the reply's first token
            first = (x, y) if turn == 0 else (r, s)
            return Row(next={i: ("letter", turn, i) for i in first}, probs={i: 0.5 for i in first})
        if phase == "letter":  # and its second
            return Row(next={i: ("act", turn, i) for i in letters}, probs={a: 0.5, b: 0.25, ab: 0.25})
        after = END if turn == 1 else ("opening", 1, 0)
        return Row(next={**{i: ("act", turn, i) for i in letters}, stop: after}, reward={stop: 1.0})

    return random_reference(from_states(("root", 0, 0), describe, len(TOY_TOKENS), tokens=TOY_TOKENS, name="ToyDialogue"), seed)


class TableTrainer:
    """A Trainer whose model is a table over an automaton: the right one, and what the planted bugs are planted in."""

    def __init__(self, mdp: TokenMDP, *, keep_logprobs: bool = True, seed: int = 0) -> None:
        self.model = TabularLM(mdp)
        self.tokenizer = ToyTokenizer(mdp.tokens or [f"<{i}>" for i in range(mdp.n_tokens)], bos=mdp.n_tokens - 1)
        self.keep_logprobs = keep_logprobs
        self.noise = torch.Generator().manual_seed(seed)

    def logprobs(self, rows: Sequence[Ids], *, temperature: float, top_p: float) -> list[list[float]]:
        """ln softmax(logits / temperature) cut to top_p, an entry an id; 0 for a row's first."""
        width = max(map(len, rows), default=0)
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]).reshape(len(rows), width)
        with torch.no_grad():
            logp = torch.log_softmax(self.model(ids).logits / temperature, -1)  # (B, L, V)
            ranked, order = logp.sort(dim=-1, descending=True, stable=True)
            above = ranked.exp().cumsum(-1) - ranked.exp()  # mass of the likelier ones
            kept = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, order, above < top_p)
            logp = torch.log_softmax(torch.where(kept, logp, -torch.inf), -1)
            taken = logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        return [[0.0, *taken[k, : len(row) - 1].tolist()] for k, row in enumerate(rows)]

    def training_rows(self, rollouts: Sequence[Rollout]) -> list[TrainingRow]:
        """A row an episode: the ids as they were sampled, the mask and the log-probs turn by turn."""
        rows = []
        for number, rollout in enumerate(rollouts):
            ids: list[int] = []
            mask: list[int] = []
            old: list[float] = []
            for turn in rollout.turns:
                ids += turn.context[len(ids) :]
                mask += [0] * (len(ids) - len(mask))
                old += [0.0] * (len(ids) - len(old))
                ids += turn.completion
                mask += [1] * (len(ids) - len(mask))
                old += turn.logprobs
            rows.append(TrainingRow(number, ids, mask, old if self.keep_logprobs else None))
        return rows

    def update(self) -> None:
        """Noise of size 0.5 on every logit: as far as many steps of training."""
        with torch.no_grad():
            table = self.model.table
            table.add_(0.5 * torch.randn(table.shape, generator=self.noise, dtype=table.dtype))

    def weights(self) -> Floats:
        """A copy of the table, float[S, V]."""
        return self.model.table.detach().clone().numpy()


class TableSampler:
    """A Sampler over the same automaton with a table of its own, in numpy; the automaton also speaks for the tools."""

    def __init__(self, mdp: TokenMDP, trainer: TableTrainer, *, max_tokens: int = 64) -> None:
        self.mdp, self.trainer, self.max_tokens = mdp, trainer, max_tokens
        self.tokenizer = trainer.tokenizer
        self.table = trainer.weights()

    def synchronise(self) -> None:
        """Copy the trainer's table."""
        self.table = self.trainer.weights()

    def generate(self, prompts: Sequence[Ids], *, n: int, temperature: float, top_p: float, seed: int) -> list[Rollout]:
        """n episodes a prompt, one token at a time."""
        rng = np.random.default_rng(seed)
        log_policy = cut_table(self.table, self.mdp, temperature, top_p)
        return [self._episode(list(prompt), log_policy, rng) for prompt in prompts for _ in range(n)]

    def _episode(self, context: list[int], log_policy: Floats, rng: np.random.Generator) -> Rollout:
        turns = []
        while True:
            completion, logprobs, state = self._speak(context, log_policy, rng)
            turns.append(Turn(list(context), completion, logprobs))
            if state < 0 or self.mdp.is_policy[state]:  # the episode ended, or the turn was too long
                return Rollout(turns)
            reply, state = self._answer(state, rng)
            context = [*context, *completion, *reply]
            if state < 0:
                return Rollout(turns)

    def _speak(self, context: Ids, log_policy: Floats, rng: np.random.Generator) -> tuple[list[int], list[float], int]:
        """The policy's tokens after a context, their log-probs, and the automaton's state after them."""
        state = self._state(context)
        said: list[int] = []
        logprobs: list[float] = []
        while state >= 0 and self.mdp.is_policy[state] and len(said) < self.max_tokens:
            token = _draw(np.exp(log_policy[state]), rng)
            said.append(token)
            logprobs.append(float(log_policy[state, token]))
            state = int(self.mdp.next_state[state, token])
        return said, logprobs, state

    def _answer(self, state: int, rng: np.random.Generator) -> tuple[list[int], int]:
        """The environment's tokens, and the state where it has spoken."""
        said: list[int] = []
        while state >= 0 and not self.mdp.is_policy[state]:
            said.append(_draw(np.exp(self.mdp.ref_log_policy[state]), rng))
            state = int(self.mdp.next_state[state, said[-1]])
        return said, state

    def _state(self, context: Ids) -> int:
        state = self.mdp.start
        for token in context:
            state = int(self.mdp.next_state[state, token])
            if state < 0:
                raise bad("context", "a path of the automaton that goes on", str(list(context)))
        return state


def _draw(chance: Floats, rng: np.random.Generator) -> int:
    ladder = chance.cumsum()
    return int(ladder.searchsorted(rng.random() * ladder[-1], side="right"))


def cut_table(table: Floats, mdp: TokenMDP, temperature: float, top_p: float) -> Floats:
    """Log-probs float[S, V] of softmax(table / temperature), cut in every state to the likeliest tokens of mass >= top_p."""
    scaled = np.where(mdp.allowed, table, -np.inf) / temperature
    top = scaled.max(1, keepdims=True)
    p = np.exp(scaled - np.where(np.isfinite(top), top, 0.0))
    p /= p.sum(1, keepdims=True)
    for row in p:
        mass = 0.0
        for token in np.argsort(-row, kind="stable"):
            row[token], mass = (row[token] if mass < top_p else 0.0), mass + row[token]
    with np.errstate(divide="ignore"):
        return np.log(p / p.sum(1, keepdims=True))


def table_pair(
    mdp: TokenMDP | None = None, *, sampler: type[TableSampler] = TableSampler, trainer: type[TableTrainer] = TableTrainer,
    keep_logprobs: bool = True,
) -> tuple[TableSampler, TableTrainer]:  # fmt: skip
    """A sampler and a trainer that belong together, on the toy dialogue or on any automaton with an environment root."""
    mdp = toy_dialogue() if mdp is None else mdp
    learner = trainer(mdp, keep_logprobs=keep_logprobs)
    return sampler(mdp, learner), learner
