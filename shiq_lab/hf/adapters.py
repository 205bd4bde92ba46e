"""LoRA on a model, through peft: settings are checked before any weight is loaded."""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from shiq_lab.errors import bad, unknown

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a Llama-like layer


def lora_config(settings: Mapping[str, Any]) -> Any:
    """A peft.LoraConfig, on every linear layer unless target_modules says otherwise; ValueError for what does not fit."""
    from peft import LoraConfig

    known = [f.name for f in fields(LoraConfig)]
    for key in settings:
        if key not in known:
            raise unknown(f"lora.{key}", "a setting of peft.LoraConfig", key, known)
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **settings})
    except (TypeError, ValueError) as error:
        raise bad("lora", "settings that fit together", " ".join(str(error).split())) from None


def with_lora(model: Any, config: Any) -> Any:
    """The model with that adapter, whose start changes nothing: B = 0."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 by a name that it is to lose
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def on_last_layers(model: Any, layers: int, rank: int) -> Any:
    """LoRA of alpha = 2 rank on every linear map of the last layers: the backward pass ends there."""
    depth = int(model.config.num_hidden_layers)
    last = list(range(max(0, depth - layers), depth))
    return with_lora(
        model, lora_config({"r": rank, "lora_alpha": 2 * rank, "target_modules": list(LINEAR), "layers_to_transform": last})
    )
