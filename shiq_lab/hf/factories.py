"""Factories for check_trainer around the package's own trainer and TRL's.

Their data preparation, collator, fused head, accumulation and optimiser loop all run.

    shiq()        ShiQTrainer: token ids, its reference's statistics precomputed
    trl_dpo()     DPOTrainer: pairs as text, tokenised and collated by it
    trl_rloo()    RLOOTrainer: prompts as text; it calls generate, which says listed answers; rewards by walking the automaton
    trl_grpo()    GRPOTrainer, without division by the standard deviation
"""

import contextlib
import gc
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from datasets.utils import are_progress_bars_disabled
from torch import Tensor
from transformers import PrinterCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from shiq_lab.checks.trainer.rows import Example, TrainerConfig
from shiq_lab.hf.config import ShiQConfig
from shiq_lab.hf.tabular import TabularLM, make_tokenizer
from shiq_lab.hf.trainer import Rows, ShiQTrainer
from shiq_lab.mdp import TokenMDP


class RecordedSGD(torch.optim.SGD):
    """Plain SGD that adds up the gradients of its steps, before a trainer clears them."""

    def __init__(self, table: Tensor, lr: float) -> None:
        super().__init__([table], lr=lr)
        self.table, self.total = table, torch.zeros_like(table)

    def step(self, closure: Any = None) -> Any:
        """Adds the gradient up, then steps."""
        if self.table.grad is not None:
            self.total += self.table.grad
        return super().step(closure)


def common_arguments(config: TrainerConfig, folder: str, micro: int) -> dict[str, Any]:
    """Training arguments under which a step is plain SGD and nothing is written, logged or clipped."""
    return {
        "output_dir": folder,
        "beta": config.beta,
        "learning_rate": config.lr,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": config.accumulation,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "bf16": False,
        "disable_dropout": True,
        "pad_to_multiple_of": config.pad_to_multiple_of,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **config.options,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, no progress bars, no telemetry, no warnings of one library about another, and fast garbage collection.

    A check makes dozens of trainers. TRL reports each of them unless CI is set; every train() collects garbage, which takes
    0.25 s where all of transformers is loaded, and passes over frozen objects.
    """
    shown = not are_progress_bars_disabled()
    switches = {"TQDM_DISABLE": "1", "CI": "1"}
    before = {name: os.environ.get(name) for name in switches}
    disable_progress_bars()
    logging.disable_progress_bar()
    os.environ.update(switches)
    gc.freeze()
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        gc.unfreeze()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if shown:
            enable_progress_bars()
            logging.enable_progress_bar()


def own_folder(owner: object) -> str:
    """A temporary folder that goes when its owner does."""
    folder = tempfile.mkdtemp(prefix="shiq_lab_")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


def texts(rows: Sequence[Example], decode: Callable[..., str]) -> list[dict[str, Any]]:
    """The examples as TRL's text columns; a tokenizer of the automaton reads the same ids back."""
    names = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}
    return [{name: decode(row[key]) for key, name in names.items() if key in row} for row in rows]


class RecordedShiQ(ShiQTrainer):
    """ShiQTrainer that adds its losses up as they are: the engine's own sum is float32."""

    total = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The engine's."""
        loss = super().training_step(*args, **kwargs)
        self.total += float(loss)
        return loss


class ShiQLoop:
    """ShiQTrainer on examples of token ids. Every call of step is a call of its train()."""

    def __init__(self, model: Any, ref_model: Any, dataset: Sequence[Example], config: TrainerConfig, **options: Any) -> None:
        self.model, self.config = model, config
        self.folder = own_folder(self)
        self.optimizer = RecordedSGD(model.table, config.lr)
        arguments = common_arguments(config, self.folder, config.batch_size or len(dataset))
        self.packing = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in dataset) * 2
        with quiet():
            args = ShiQConfig(
                **arguments, gamma=config.gamma, padding_side=config.padding_side,
                packing=self.packing if config.packing else None, **options,
            )  # fmt: skip
            given = [{k: v for k, v in row.items() if k in ROW_COLUMNS} for row in dataset]
            self.trainer = RecordedShiQ(model, args, given, ref_model=ref_model, optimizers=(self.optimizer, None))
        self.trainer.pad_id = config.pad_id
        self.trainer.remove_callback(PrinterCallback)
        self.prepared: Any = self.trainer.train_dataset

    @property
    def gradient(self) -> Tensor:
        """Of the table, summed over the steps of the last call."""
        return self.optimizer.total

    def _some(self, rows: Sequence[Example]) -> Rows:
        index = [row["index"] for row in rows]
        reference = None if self.prepared.reference is None else [self.prepared.reference[i] for i in index]
        return Rows([self.prepared.rows[i] for i in index], reference)

    def step(self, rows: Sequence[Example]) -> float:
        """One pass over the rows, in as many optimiser steps as the configuration makes of them."""
        self.optimizer.total = torch.zeros_like(self.model.table)
        self.trainer.train_dataset = self._some(rows)
        if self.config.batch_size is None:
            self.trainer.args.per_device_train_batch_size = self.trainer._train_batch_size = len(rows)
        self.trainer.args.max_steps = len(self.config.micro_batches(rows))
        self.trainer.total = 0.0
        with quiet():
            self.trainer.train()
        return self.trainer.total / self.trainer.args.max_steps

    def evaluate(self, rows: Sequence[Example]) -> float:
        """The trainer's own evaluation of the rows."""
        self.trainer.args.per_device_eval_batch_size = len(rows)
        with quiet():
            return float(self.trainer.evaluate(self._some(rows))["eval_loss"])


ROW_COLUMNS = ("prompt_ids", "completion_ids", "completion_mask", "rewards", "terminated", "group")


def shiq(make_model: Callable[..., Any] = TabularLM.from_logits, **options: Any) -> Any:
    """A factory for ShiQTrainer; options are ShiQConfig's. make_model: of which models, transformers' or the package's own."""

    def factory(model: Any, ref_model: Any, dataset: Sequence[Example], config: TrainerConfig) -> ShiQLoop:
        return ShiQLoop(model, ref_model, dataset, config, **options)

    same: dict[str, Any] = {"fused": False, "reference": "model"}
    if make_model == TabularLM.from_logits:
        same["gradient_checkpointing"] = True
    factory.__name__ = "ShiQTrainer"
    factory.trainer_traits = {  # type: ignore[attr-defined]
        "kind": "bellman",
        "make_model": make_model,
        "padding": ("right", "left"),
        "packing": True,
        "options": {"n_steps": 1},
        "same": same,
    }
    return factory


class TRLPreference:
    """A TRL trainer of pairs. Every call of step is a call of its train()."""

    def __init__(
        self,
        model: TabularLM,
        ref_model: TabularLM,
        dataset: Sequence[Example],
        config: TrainerConfig,
        trainer: type[DPOTrainer],
    ) -> None:
        self.model, self.config = model, config
        self.folder = own_folder(self)
        self.tokenizer = make_tokenizer(model.config.mdp())
        self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(config.pad_id)
        self.optimizer = RecordedSGD(model.table, config.lr)
        with quiet():
            args = DPOConfig(**common_arguments(config, self.folder, config.batch_size or len(dataset)), max_length=None)
            self.trainer = trainer(
                model=model,
                ref_model=ref_model,
                args=args,
                train_dataset=Dataset.from_list(texts(dataset, self.tokenizer.decode)),
                processing_class=self.tokenizer,
                optimizers=(self.optimizer, None),
            )
        self.trainer.remove_callback(PrinterCallback)
        self.prepared: Any = self.trainer.train_dataset

    @property
    def gradient(self) -> Tensor:
        """Of the table, summed over the steps of the last call."""
        return self.optimizer.total

    def step(self, rows: Sequence[Example]) -> float:
        """One pass over the rows, in as many optimiser steps as the configuration makes of them."""
        self.optimizer.total = torch.zeros_like(self.model.table)
        self.trainer.train_dataset = self.prepared.select([row["index"] for row in rows])
        windows = self.config.micro_batches(rows)
        if self.config.batch_size is None:
            self.trainer.args.per_device_train_batch_size = len(rows)
            self.trainer._train_batch_size = len(rows)
        self.trainer.args.max_steps = len(windows)
        with quiet():
            return float(self.trainer.train().training_loss)

    def evaluate(self, rows: Sequence[Example]) -> float:
        """The trainer's own evaluation of the rows, prepared anew from their text."""
        self.trainer.args.per_device_eval_batch_size = len(rows)
        with quiet():
            found = self.trainer.evaluate(Dataset.from_list(texts(rows, self.tokenizer.decode)))
        return float(found["eval_loss"])


class TRLOnPolicy:
    """A TRL trainer that generates. Inside step its call of generate says the rows' completions; all else is its own."""

    def __init__(
        self,
        model: TabularLM,
        ref_model: TabularLM,
        dataset: Sequence[Example],
        config: TrainerConfig,
        trainer: type[RLOOTrainer] | type[GRPOTrainer],
        arguments: type[RLOOConfig] | type[GRPOConfig],
        options: dict[str, Any],
    ) -> None:
        self.model, self.config = model, config
        self.make, self.arguments, self.options = trainer, arguments, options
        self.mdp: TokenMDP = model.config.mdp()
        self.longest = max(len(row["completion_ids"]) for row in dataset)
        self.folder = own_folder(self)
        reference = os.path.join(self.folder, "reference")
        with quiet():
            ref_model.save_pretrained(reference)  # such trainers load their reference by the model's name
        model.config._name_or_path = reference
        self.tokenizer = make_tokenizer(self.mdp)
        self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(config.pad_id)
        self.optimizer = RecordedSGD(model.table, config.lr)
        self.built: dict[int, Any] = {}
        self.forward = model.forward

    @property
    def gradient(self) -> Tensor:
        """Of the table, summed over the steps of the last call."""
        return self.optimizer.total

    def trainer_for(self, rows: Sequence[Example]) -> Any:
        """A trainer whose generation batch is exactly these many rows, spread over micro-batches."""
        if len(rows) not in self.built:
            windows = self.config.micro_batches(rows)
            self.model.forward = self.forward  # type: ignore[method-assign]  # trainers put a fused head around the one they find
            args = self.arguments(
                **common_arguments(self.config, self.folder, len(windows[0][0])),
                steps_per_generation=sum(map(len, windows)),
                num_generations=self.config.group_size,
                max_completion_length=self.longest,
                max_steps=len(windows),
                temperature=1.0,
                shuffle_dataset=False,
                **self.options,
            )
            prompts = Dataset.from_list(texts(rows, self.tokenizer.decode))
            self.built = {  # one at a time: they share the model's forward
                len(rows): self.make(
                    model=self.model,
                    reward_funcs=self.reward,
                    args=args,
                    train_dataset=prompts,
                    processing_class=self.tokenizer,
                    optimizers=(self.optimizer, None),
                )
            }
            self.built[len(rows)].remove_callback(PrinterCallback)
        return self.built[len(rows)]

    def step(self, rows: Sequence[Example]) -> float:
        """One generation and all its optimiser steps."""
        self.optimizer.total = torch.zeros_like(self.model.table)
        with quiet():
            trainer = self.trainer_for(rows)
            trainer.train_dataset = Dataset.from_list(texts(rows[:: self.config.group_size], self.tokenizer.decode))
            with self.model.saying([row["completion_ids"] for row in rows]):
                return float(trainer.train().training_loss)

    def reward(self, prompts: list[str], completion_ids: list[list[int]], **ignored: Any) -> list[float]:
        """The sum of the automaton's rewards along each completion."""
        paid = []
        for prompt, said in zip(prompts, completion_ids, strict=True):
            state, total = self.mdp.start, 0.0
            for token in [*self.tokenizer(prompt)["input_ids"], *said]:
                total += float(self.mdp.reward[state, token])
                state = int(self.mdp.next_state[state, token])
            paid.append(total)
        return paid


TRL_TRAITS: dict[str, Any] = {
    "make_model": TabularLM.from_logits,
    "dtypes": ("float32", "bfloat16"),  # TRL's log-probabilities are float32 whatever the model is
    "multi_turn": False,
}


def trl_dpo(trainer: type[DPOTrainer] = DPOTrainer, **traits: Any) -> Any:
    """A factory for DPOTrainer or a subclass. Its collator pads on the right alone."""

    def factory(model: TabularLM, ref_model: TabularLM, dataset: Sequence[Example], config: TrainerConfig) -> TRLPreference:
        return TRLPreference(model, ref_model, dataset, config, trainer)

    factory.__name__ = f"TRL {trainer.__name__}"
    same = {"precompute_ref_log_probs": True, "gradient_checkpointing": True}
    declared = {**TRL_TRAITS, "kind": "preference", "padding": ("right",), "options": {"ld_alpha": 0.5}, "same": same}
    factory.trainer_traits = {**declared, **traits}  # type: ignore[attr-defined]
    return factory


def _on_policy(trainer: Any, arguments: Any, options: dict[str, Any], traits: dict[str, Any]) -> Any:
    def factory(model: TabularLM, ref_model: TabularLM, dataset: Sequence[Example], config: TrainerConfig) -> TRLOnPolicy:
        return TRLOnPolicy(model, ref_model, dataset, config, trainer, arguments, options)

    factory.__name__ = f"TRL {trainer.__name__}"
    declared = {**TRL_TRAITS, "kind": "on_policy", "padding": ("left",)}  # its prompts stand left-padded before the completions
    factory.trainer_traits = {**declared, **traits}  # type: ignore[attr-defined]
    return factory


def trl_rloo(trainer: type[RLOOTrainer] = RLOOTrainer, **traits: Any) -> Any:
    """A factory for RLOOTrainer: KL in the reward, leave-one-out baseline, so pi* is its fixed point."""
    return _on_policy(trainer, RLOOConfig, {}, traits)


def trl_grpo(trainer: type[GRPOTrainer] = GRPOTrainer, **traits: Any) -> Any:
    """A factory for GRPOTrainer with rewards not divided by their standard deviation.

    pi* is not its fixed point: the group's mean includes the completion itself, which weakens the reward against the KL; the KL
    in the loss has the gradient of each token's KL at fixed states, without its effect on later ones; and a mean over the
    batch's tokens weighs groups by their lengths. Every other check applies.
    """
    # its token mean is over each optimiser step, and which rows share a step is drawn at random
    return _on_policy(trainer, GRPOConfig, {"scale_rewards": "none"}, {"windows": False, **traits})
