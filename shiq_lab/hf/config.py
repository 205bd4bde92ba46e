"""ShiQConfig: transformers' TrainingArguments and what ShiQ adds, grouped by purpose."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from shiq_lab.errors import at_least, bad, check_beta, check_gamma
from shiq_lab.losses import methods
from shiq_lab.losses.methods import Method


@dataclass
class ShiQConfig(TrainingArguments):
    """Settings of ShiQTrainer; every other one is transformers' own.

    The objective
      beta              KL weight > 0: rewards are in units of beta nats
      gamma             discount a policy token, in (0, 1]
      loss              a step of the derivation: naive, easy, shifted, shiq, sequence, semi-gradient, turn-cut
      n_steps           policy tokens before shiq bootstraps; None: to the end of the row
      reduction         "row": the weighted mean of rows' sums of squares; "token": the sum divided by the number of policy
                        tokens; both over the whole optimiser step, whatever its micro-batches and processes
    The reference
      reference         "cache": statistics computed once from ref_model, or from the model as it comes, LoRA switched off;
                        "adapter": the model with its adapter off, at every step; "model": ref_model stays in memory
      reference_cache   folder of the cached statistics; None: computed at every start
    The data (formats.to_rows)
      append_eos        a text's completion ends with the end token
      end_of_turn       text that closes a turn of the template, where that is no special token
      template_options  arguments of the chat template, such as {"enable_thinking": false}
    The batch
      max_length        tokens a row may have; None: any
      on_long           "error", "cut" (and bootstrap there) or "drop"
      padding_side      "right" or "left"; no result depends on it
      pad_to_multiple_of   width of a batch; None: its longest row
      packing           tokens of a packed row; None: one row a sequence
    The model
      fused             True: token statistics from hidden states and head, no logits in memory; False: from logits; None: fused
                        where the model allows it
      allowed_tokens    ids that the policy may say, for model and reference alike; None: the whole vocabulary
      disable_dropout   off in the policy's pass too, as the reference's is
    """

    beta: float = field(default=0.1, metadata={"help": "KL weight > 0."})
    gamma: float = field(default=1.0, metadata={"help": "Discount a policy token, in (0, 1]."})
    loss: str = field(default="shiq", metadata={"help": f"One of {', '.join(methods.METHODS)}."})
    n_steps: int | None = field(default=None, metadata={"help": "Policy tokens before shiq bootstraps."})
    reduction: str = field(default="row", metadata={"help": "row or token."})
    reference: str = field(default="cache", metadata={"help": "cache, adapter or model."})
    reference_cache: str | None = field(default=None, metadata={"help": "Folder of the reference's statistics."})
    append_eos: bool = field(default=True, metadata={"help": "A text's completion ends with the end token."})
    end_of_turn: str | None = field(default=None, metadata={"help": "Text that closes a turn of the template."})
    template_options: dict[str, Any] | None = field(default=None, metadata={"help": "Arguments of the chat template."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens a row may have."})
    on_long: str = field(default="error", metadata={"help": "error, cut or drop."})
    padding_side: str = field(default="right", metadata={"help": "right or left."})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Width of a batch."})
    packing: int | None = field(default=None, metadata={"help": "Tokens of a packed row."})
    fused: bool | None = field(default=None, metadata={"help": "Token statistics without logits in memory."})
    allowed_tokens: list[int] | None = field(default=None, metadata={"help": "Ids that the policy may say."})
    disable_dropout: bool = field(default=True, metadata={"help": "No dropout in the policy's pass."})
    # The engine would log a NaN loss as 0.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Log NaN and infinite losses as 0."})
    # The batch's own columns are no arguments of the model's forward.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False."})

    def __post_init__(self) -> None:
        check_beta(self.beta), check_gamma(self.gamma)
        self.method  # noqa: B018  # an unknown loss is an error now
        for name, value, known in (
            ("reduction", self.reduction, ("row", "token")),
            ("reference", self.reference, ("cache", "adapter", "model")),
            ("on_long", self.on_long, ("error", "cut", "drop")),
            ("padding_side", self.padding_side, ("right", "left")),
        ):
            if value not in known:
                raise bad(name, f"one of {', '.join(known)}", repr(value))
        for name in ("n_steps", "max_length", "pad_to_multiple_of", "packing"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, at_least(name, value, 1))
        if self.n_steps is not None and self.loss != "shiq":
            raise bad("n_steps", "None for a loss whose number of steps is its own", repr(self.n_steps), "Set loss: shiq.")
        if self.loss == "naive" and self.reference == "cache":
            remedy = "Set reference: model or adapter."
            raise bad("reference", "the reference's logits for the naive step", "'cache'", remedy)
        if self.packing is not None and self.padding_side == "left":
            raise bad("padding_side", "'right' where rows are packed", "'left'")
        if self.remove_unused_columns:
            raise bad("remove_unused_columns", "False", "True", "The loss needs columns that no model's forward names.")
        super().__post_init__()

    @property
    def method(self) -> Method:
        """The loss and what its logits mean; a ValueError where the name is unknown."""
        return methods.lookup(self.loss)

    @property
    def steps_ahead(self) -> int | None:
        """Policy tokens before the loss bootstraps, n_steps or the method's own; None: to the end of the row."""
        return self.method.n_steps if self.n_steps is None else self.n_steps

    @property
    def loss_options(self) -> dict[str, Any]:
        """Keyword arguments of the loss."""
        more = {} if self.n_steps is None else {"n_steps": self.n_steps}
        return {"beta": self.beta, "gamma": self.gamma, **more}
