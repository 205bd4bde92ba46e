"""TabularLM as a real Hugging Face model: a table of logits behind `from_pretrained`, `generate` and every trainer.

The backbone's hidden state is the table's row of the automaton's state (width V) and the head is a frozen identity, so that
trainers with a fused head, which ask for a backbone and a head, see the same logits as `forward`.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from shiq_lab.bellman import solve
from shiq_lab.errors import bad
from shiq_lab.mdp import TokenMDP
from shiq_lab.models.tabular import walk
from shiq_lab.sampling import require_prompt

MAX_VOCABULARY = 4096  # the identity head holds V^2 numbers: 64 MiB in float32


class TabularConfig(PreTrainedConfig):
    """The automaton as plain lists, so that a saved model carries it; -inf of ref_logits is None there.

    automaton    next_state, reward, ref_logits (rows of V), is_policy, start, tokens, name
    dropout      of the logits, for tests of trainers that must switch it off
    """

    model_type = "shiq_lab_tabular"
    automaton: dict | None = None
    dropout: float | int = 0.0
    auto_map: dict = field(default_factory=dict)  # TRL reads it of models whose class is not transformers' own
    vocab_size: int = 1
    hidden_size: int = 1
    num_hidden_layers: int = 1
    use_cache: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def from_mdp(cls, mdp: TokenMDP, *, dropout: float = 0.0, **options: Any) -> "TabularConfig":
        """The configuration of an automaton with an environment root and no horizon.

        The token called "<eos>" (or eos_token_id) ends a string for `generate`; padding is the same token, the hardest case.
        """
        require_prompt(mdp)
        if mdp.horizon is not None:
            raise bad("mdp", "an automaton without a horizon", f"horizon {mdp.horizon}", "Use mdp.unroll().")
        if mdp.n_tokens > MAX_VOCABULARY:
            raise bad("mdp", f"at most {MAX_VOCABULARY} tokens, as the head is an identity", f"{mdp.n_tokens}")
        named = mdp.tokens.index("<eos>") if mdp.tokens and "<eos>" in mdp.tokens else None
        options.setdefault("eos_token_id", named)
        options.setdefault("pad_token_id", 0 if options["eos_token_id"] is None else options["eos_token_id"])
        arrays = {
            "next_state": mdp.next_state.tolist(),
            "reward": mdp.reward.tolist(),
            "ref_logits": [[x if x > -np.inf else None for x in row] for row in mdp.ref_logits.tolist()],
            "is_policy": mdp.is_policy.tolist(),
            "start": mdp.start,
            "tokens": None if mdp.tokens is None else list(mdp.tokens),
            "name": mdp.name,
        }
        return cls(automaton=arrays, dropout=dropout, vocab_size=mdp.n_tokens, hidden_size=mdp.n_tokens, **options)

    def mdp(self) -> TokenMDP:
        """The automaton again, bit for bit: Python writes the shortest decimal that reads back as the same float64."""
        if self.automaton is None:
            raise bad("config.automaton", "the arrays of an automaton", "None", "TabularConfig.from_mdp(mdp) makes them.")
        parts = dict(self.automaton)
        parts["ref_logits"] = [[-np.inf if x is None else x for x in row] for row in parts["ref_logits"]]
        return TokenMDP(**parts)


class TabularPreTrained(PreTrainedModel):
    """What both parts share. Gradient checkpointing may be switched on and changes nothing: there is nothing to recompute."""

    config_class = TabularConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing is random: every weight is set by the constructor from the configuration."""


def _frozen(module: nn.Module, weight: Tensor) -> nn.Module:
    """The module with its weight as a buffer: no loading, casting or unfreezing makes it trainable."""
    del module.weight
    module.register_buffer("weight", weight)
    return module


class TabularBackbone(TabularPreTrained):
    """input_ids -> last_hidden_state float[B, L, V]: the table's row of the state after each token.

    Forbidden tokens take the dtype's least finite number (-inf times a 0 of the head would be NaN); rows in padding and after
    the end are 0, and no gradient reaches the table from them.
    """

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        mdp = config.mdp()
        self.gradient_checkpointing = False
        self.start = mdp.start
        known = torch.where(torch.tensor(mdp.allowed), torch.tensor(mdp.ref_logits), 0.0)
        self.table = nn.Parameter(known.to(torch.get_default_dtype()))  # from_pretrained sets it to the dtype asked for
        self.embed = _frozen(nn.Embedding(config.vocab_size, 1), torch.zeros(config.vocab_size, 1))
        self.dropout = nn.Dropout(float(config.dropout))
        self.register_buffer("allowed", torch.tensor(mdp.allowed))
        self.register_buffer("next_state", torch.tensor(mdp.next_state))
        self.allowed: Tensor
        self.next_state: Tensor
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None, **ignored: Any
    ) -> BaseModelOutput:
        """Caches, positions and flags are ignored: the state is walked from the row's first real token every time."""
        states = self.states(input_ids, attention_mask, segment_ids)
        lowest = torch.finfo(self.table.dtype).min
        table = torch.where(self.allowed, self.dropout(self.table), lowest)
        hidden = torch.where((states >= 0)[..., None], table[states.clamp(min=0)], 0.0)  # (B, L, V)
        return BaseModelOutput(last_hidden_state=hidden)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
        """The automaton's state after each token, int[B, L]; -1 where there is none."""
        real = torch.ones_like(input_ids) == 1 if attention_mask is None else attention_mask == 1
        first = None
        if segment_ids is not None:
            first = real & (segment_ids != torch.nn.functional.pad(segment_ids, (1, 0))[:, :-1])
        return walk(self.next_state, self.start, input_ids, real, first)


class TabularLM(TabularPreTrained, GenerationMixin):
    """A table of logits float[S, V] as a causal language model of the transformers library; its parameter is `.table`.

    Rows of environment states hold the environment's own log-probabilities, so `generate` from a bare beginning of sequence
    speaks whole dialogues; it stops where the automaton ends. Save, load, generate (left padding, with and without
    use_cache) and gradient checkpointing work as with any other model.
    """

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.model = TabularBackbone(config)
        self.lm_head = _frozen(nn.Linear(config.vocab_size, config.vocab_size, bias=False), torch.eye(config.vocab_size))
        self._said: list[list[int]] | None = None
        self.post_init()

    # ------------------------------------------------------------------------------------------------ making one
    @classmethod
    def from_logits(
        cls,
        mdp: TokenMDP,
        logits: Tensor,
        *,
        trainable: bool = True,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> "TabularLM":
        """Any table float[S, V]; what it holds where a token is forbidden never matters."""
        if tuple(logits.shape) != mdp.ref_logits.shape:
            raise bad("logits", f"shape {mdp.ref_logits.shape}", f"shape {tuple(logits.shape)}")
        allowed = torch.tensor(mdp.allowed)
        if not torch.isfinite(logits[allowed]).all():
            state, token = (int(x) for x in (~torch.isfinite(logits) & allowed).nonzero()[0])
            found = logits[state, token].item()
            raise bad("logits", "finite numbers where a token is allowed", f"{found} at {mdp.place(state, token)}")
        model = cls(TabularConfig.from_mdp(mdp, dropout=dropout, **options)).to(dtype)
        model.config.dtype = dtype
        with torch.no_grad():
            model.table.copy_(torch.where(allowed, logits, 0.0))
        model.table.requires_grad_(trainable)
        return model

    @classmethod
    def optimal(cls, mdp: TokenMDP, beta: float, gamma: float = 1.0, **options: Any) -> "TabularLM":
        """The oracle, at l* = l_ref + q* / beta: a trainer whose loss has its optimum there leaves it alone."""
        return cls.from_logits(mdp, torch.tensor(solve(mdp, beta=beta, gamma=gamma).optimal_logits()), **options)

    @classmethod
    def reference(cls, mdp: TokenMDP, *, trainable: bool = False, **options: Any) -> "TabularLM":
        """The reference model, at l_ref."""
        return cls.from_logits(mdp, torch.tensor(mdp.ref_logits), trainable=trainable, **options)

    @classmethod
    def perturbed(
        cls, mdp: TokenMDP, beta: float, gamma: float = 1.0, *, size: float = 1.0, seed: int = 0, **options: Any
    ) -> "TabularLM":
        """The oracle with normal noise of the given size on every allowed logit."""
        table = torch.tensor(solve(mdp, beta=beta, gamma=gamma).optimal_logits())
        noise = torch.from_numpy(np.random.default_rng(seed).normal(0.0, size, table.shape))
        return cls.from_logits(mdp, table + noise, **options)

    # --------------------------------------------------------------------------------------------- the interface
    @property
    def table(self) -> nn.Parameter:
        """The logits float[S, V]: the one trainable parameter."""
        return self.model.table

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        segment_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """logits float[B, L, V]; with labels also the mean cross-entropy of the next token. There is never a cache."""
        hidden = self.model(input_ids, attention_mask, segment_ids).last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **ignored)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
        """The automaton's state after each token, int[B, L]; -1 where there is none."""
        return self.model.states(input_ids, attention_mask, segment_ids)

    # ------------------------------------------------------------------------------------------------ generation
    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **ignored: Any
    ) -> dict[str, Any]:
        """The whole row at every step, whatever cache the caller prepared: nothing is ever put into one."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        stopping_criteria: StoppingCriteriaList | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **options: Any,
    ) -> Any:
        """transformers' generate; a row also stops where the automaton ends, and says what `saying` was given."""
        prompt = inputs if inputs is not None else options.get("input_ids")
        if prompt is None:
            raise bad("input_ids", "a prompt", "None", "Begin with the automaton's first token.")
        mask = options.get("attention_mask")
        stop = _AutomatonEnds(self, torch.ones_like(prompt) if mask is None else mask)
        processors = LogitsProcessorList(logits_processor or [])
        if self._said is not None:
            processors.append(_Script(self._said, prompt.shape[1], int(options.get("num_return_sequences") or 1)))
        criteria = StoppingCriteriaList([*(stopping_criteria or []), stop])
        return super().generate(inputs, stopping_criteria=criteria, logits_processor=processors, **options)

    @contextlib.contextmanager
    def saying(self, completions: Sequence[Sequence[int]]) -> Iterator[None]:
        """Inside, `generate` says these completions, one a row: an expectation over listed strings instead of a sample."""
        self._said = [list(said) for said in completions]
        try:
            yield
        finally:
            self._said = None


@dataclass
class _AutomatonEnds(StoppingCriteria):
    """Stops a row behind its last token. `eos_token_id` makes generate fill ended rows with padding."""

    model: TabularLM
    prompt_mask: Tensor
    eos_token_id: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **ignored: Any) -> Tensor:
        mask = self.prompt_mask.repeat_interleave(len(input_ids) // len(self.prompt_mask), 0)
        said = torch.ones(len(mask), input_ids.shape[1] - mask.shape[1], dtype=mask.dtype, device=mask.device)
        return self.model.states(input_ids, torch.cat([mask, said], 1))[:, -1] < 0


@dataclass
class _Script(LogitsProcessor):
    """Leaves one token a row: the next one of its script."""

    said: list[list[int]]
    prompt: int
    repeats: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self.said) != len(input_ids):
            raise bad("completions", f"one a row, {len(input_ids)}", f"{len(self.said)}")
        at = input_ids.shape[1] - self.prompt
        only = torch.full_like(scores, -torch.inf)
        for row, said in enumerate(self.said):
            if at < len(said):
                only[row, said[at]] = 0.0
            else:
                only[row] = 0.0  # an ended row is filled with padding
        return only


# ------------------------------------------------------------------------------------------------------ the tokenizer
def token_texts(mdp: TokenMDP) -> list[str]:
    """A string for every token so that any text splits back in one way: the automaton's own, or "<0>", "<1>", ... .

    Its own are taken where none is empty and none is the beginning of another.
    """
    names = list(mdp.tokens or [])
    ordered = sorted(names)
    clear = all(names) and not any(b.startswith(a) for a, b in itertools.pairwise(ordered))
    return names if names and clear else [f"<{i}>" for i in range(mdp.n_tokens)]


def make_tokenizer(mdp: TokenMDP, *, eos_token_id: int | None = None, padding_side: str = "left") -> FastTokenizer:
    """A tokenizer of the automaton's tokens, with the same ids; built here, nothing is downloaded. Padding is the end token."""
    config = TabularConfig.from_mdp(mdp, **({} if eos_token_id is None else {"eos_token_id": eos_token_id}))
    texts = token_texts(mdp)
    core = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token=texts[0]))
    pattern = "|".join("".join(f"\\x{{{ord(c):x}}}" for c in text) for text in texts)
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Fuse()
    special = {"eos_token": texts[config.eos_token_id]} if config.eos_token_id is not None else {}
    return FastTokenizer(
        tokenizer_object=core,
        pad_token=texts[config.pad_token_id],
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
        **special,
    )


AutoConfig.register(TabularConfig.model_type, TabularConfig)
AutoModelForCausalLM.register(TabularConfig, TabularLM)
