"""Reference statistics: two float32 numbers a token, computed once, kept on disk under a hash of what they depend on.

So no reference model stays in memory. Parts are written whole under another name and moved into place; each begins with its
digest, and one that was damaged or cut short is computed again.
"""

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shiq_lab.hf.heads import core
from shiq_lab.hf.rows import Row
from shiq_lab.progress import progress
from shiq_lab.stats import TokenStats

logger = logging.getLogger(__name__)
PART = 256  # rows a file
DIGEST = 64  # hexadecimal digits of sha256
# Entries of a configuration that saving, loading or a trainer changes, and no logit depends on; weights tell their own dtype.
_NO_NUMBER = ("transformers_version", "_name_or_path", "dtype", "architectures", "use_cache")


@dataclass(frozen=True, eq=False)
class Reference:
    """A row's reference: token_logit, logsumexp float[L - 1] in the row's own columns, and the end's log-sum-exp."""

    token_logit: np.ndarray[Any, Any]
    logsumexp: np.ndarray[Any, Any]
    end_logsumexp: float


def of_batch(stats: TokenStats, rows: Sequence[Row]) -> list[Reference]:
    """A batch's statistics, right-padded, row by row."""
    level, logit, end = (x.detach().cpu().numpy() for x in (stats.logsumexp, stats.token_logit, stats.end_logsumexp))
    return [
        Reference(logit[i, : len(row.input_ids) - 1], level[i, : len(row.input_ids) - 1], float(end[i]))
        for i, row in enumerate(rows)
    ]


# ------------------------------------------------------------------------------------------------------------ the hash
def fingerprint(model: nn.Module) -> str:
    """sha256 of a model's configuration and of every byte of its weights and buffers, adapters left out.

    So a model under PEFT has the hash of the model that it wraps. A few seconds for a thousand million weights.
    """
    digest = hashlib.sha256()
    inner = core(model)
    config = getattr(inner, "config", None)
    if config is not None and hasattr(config, "to_diff_dict"):
        kept = {k: v for k, v in config.to_diff_dict().items() if k not in _NO_NUMBER}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    named = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    plain = {name.replace(".base_layer", "").replace(".original_module", ""): weight for name, weight in named.items()
             if "lora_" not in name and "modules_to_save" not in name}  # fmt: skip
    for name, weight in sorted(plain.items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        _add_bytes(digest, weight)
    return digest.hexdigest()


def _add_bytes(digest: Any, weight: torch.Tensor, chunk: int = 1 << 24) -> None:
    whole = weight.detach().contiguous().view(-1).view(torch.uint8)
    for begin in range(0, len(whole), chunk):
        digest.update(whole[begin : begin + chunk].cpu().numpy())


def data_hash(rows: Sequence[Row]) -> str:
    """A hash of what the reference sees of rows: ids and masks (a template or tokenizer shows in them), and which are cut."""
    digest = hashlib.sha256()
    for row in rows:
        parts = np.array([[*row.input_ids], [*row.completion_mask]], dtype=np.int64)
        digest.update(f"{parts.shape[1]} {bool(row.terminated)} ".encode() + parts.tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- the files
def statistics_of(
    rows: Sequence[Row],
    compute: Callable[[Sequence[Row]], list[Reference]],
    folder: Path | None,
    *,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], Any] = lambda: None,
) -> list[Reference]:
    """Every row's reference: read from `folder` where it is whole, else computed; None keeps nothing.

    Several processes share the parts out (rank, rank + world, ...) and meet at `wait`; they need one file system.
    """
    parts = [rows[i : i + PART] for i in range(0, len(rows), PART)]
    if folder is None:
        return [found for part in progress(parts, "reference") for found in compute(part)]
    folder.mkdir(parents=True, exist_ok=True)
    mine = [(i, part) for i, part in enumerate(parts) if i % world == rank]
    for i, part in progress(mine, "reference"):
        if read_part(folder / f"{i:06d}", part) is None:
            write_part(folder / f"{i:06d}", compute(part), part)
    wait()
    return [found for i, part in enumerate(parts) for found in read_part(folder / f"{i:06d}", part) or compute(part)]


def write_part(path: Path, found: Sequence[Reference], rows: Sequence[Row]) -> None:
    """A part's rows to its file, whole or not at all."""
    content = io.BytesIO()
    arrays: dict[str, Any] = {name: np.concatenate([getattr(f, name) for f in found]) for name in ("token_logit", "logsumexp")}
    arrays |= {"end_logsumexp": np.array([f.end_logsumexp for f in found]), "rows": np.array(data_hash(rows))}
    np.savez(content, **arrays)
    data = content.getvalue()
    half = path.with_name(f"{path.name}.{os.getpid()}.half")
    with half.open("wb") as file:
        file.write(hashlib.sha256(data).hexdigest().encode() + data)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def read_part(path: Path, rows: Sequence[Row]) -> list[Reference] | None:
    """A part's rows; None where the file is missing or damaged."""
    if not path.exists():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content[DIGEST:]).hexdigest().encode() != content[:DIGEST]:
        logger.warning("reference statistics in %s are damaged or cut short: computed again", path)
        return None
    arrays = np.load(io.BytesIO(content[DIGEST:]), allow_pickle=False)
    if str(arrays["rows"]) != data_hash(rows):
        logger.warning("reference statistics in %s are of other rows: computed again", path)
        return None
    ends = np.cumsum([len(row.input_ids) - 1 for row in rows])
    cut: Callable[[str], Iterator[Any]] = lambda name: iter(np.split(arrays[name], ends[:-1]))  # noqa: E731
    return [
        Reference(a, b, float(c)) for a, b, c in zip(cut("token_logit"), cut("logsumexp"), arrays["end_logsumexp"], strict=True)
    ]
