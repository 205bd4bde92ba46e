"""UltraFeedback's rows to examples for to_rows: scored answers, or the best against the worst.

The schema is that of openbmb/UltraFeedback: instruction, and completions of {response, overall_score, fine-grained_score,
custom_system_prompt, annotations: {aspect: {Rating, Rationale}}}; ratings are strings, some of them "N/A". No package ships
its rows, so the tests run on a made fixture in the schema.
"""

import importlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from shiq_lab.errors import bad, unknown

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
REWARDS = ("overall_score", "fine-grained_score", "ratings")
_log = logging.getLogger(__name__)


def ultrafeedback(
    rows: str | Path | Iterable[Mapping[str, Any]], *, kind: Literal["scored", "pairs"] = "scored",
    reward: str = "overall_score", system: bool = False, on_bad: Literal["drop", "error"] = "drop",
) -> list[dict[str, Any]]:  # fmt: skip
    """Examples in the formats of `shiq_lab.hf.formats.to_rows`.

      scored   messages [(system), user, assistant], reward: one example a completion
      pairs    prompt, chosen, rejected as messages, chosen_score, rejected_score: best against worst, one example a row
    rows     a .jsonl, .json or .parquet file, a folder of them, a datasets.Dataset, or any iterable of dicts
    reward   a score as it stands, or "ratings": the mean of the four aspects' ratings. Some published overall scores of 10
             stand for a 1 (found by Argilla, told at their ultrafeedback-binarized-preferences); ratings are free of that
    system   whether custom_system_prompt stands before the instruction; it differs between the completions of a row, so
             that pairs cannot have it
    Completions without a text or with a score that is no number ("N/A", None, NaN) are dropped, as are rows without an
    instruction and pairs whose scores are equal; the log says how many. With on_bad="error" the first is a ValueError that
    names row and column.
    """
    if kind not in ("scored", "pairs"):
        raise bad("kind", "'scored' or 'pairs'", repr(kind))
    if reward not in REWARDS:
        raise unknown("reward", "the name of a score", reward, REWARDS)
    if on_bad not in ("drop", "error"):
        raise bad("on_bad", "'drop' or 'error'", repr(on_bad))
    if system and kind == "pairs":
        raise bad("system", "False for pairs", "True", "The completions of a row were written under different system prompts.")
    examples: list[dict[str, Any]] = []
    faults: list[ValueError] = []
    for number, row in enumerate(_loaded(rows)):
        made, wrong = _examples(row, f"row {number}", kind, reward, system)
        if wrong and on_bad == "error":
            raise wrong[0]
        examples += made
        faults += wrong
    if faults:
        _log.warning(
            "UltraFeedback: %d examples, %d bad rows or completions dropped, the first: %s",
            len(examples),
            len(faults),
            faults[0],
        )
    if not examples:
        raise bad("rows", "at least one scored completion", str(faults[0]) if faults else "no rows")
    return examples


def _examples(
    row: Mapping[str, Any], name: str, kind: str, reward: str, system: bool
) -> tuple[list[dict[str, Any]], list[ValueError]]:
    """(the row's examples, what was dropped)."""
    if not isinstance(row, Mapping):
        return [], [bad(name, "a dict in UltraFeedback's schema", type(row).__name__)]
    instruction, completions = row.get("instruction"), row.get("completions")
    if not isinstance(instruction, str) or not instruction.strip():
        return [], [bad(f"{name}, column instruction", "a text", repr(instruction))]
    if not isinstance(completions, (list, tuple)) or not completions:
        return [], [bad(f"{name}, column completions", "at least one completion", repr(completions))]
    scored, faults = [], []
    for i, completion in enumerate(completions):
        try:
            scored.append((_score(completion, f"{name}, column completions[{i}]", reward), completion))
        except ValueError as fault:
            faults.append(fault)
    user = {"role": "user", "content": instruction}
    answer = lambda completion: {"role": "assistant", "content": completion["response"]}  # noqa: E731
    if kind == "scored":
        before = lambda completion: _system(completion) if system else []  # noqa: E731
        return [{"messages": [*before(c), user, answer(c)], "reward": score} for score, c in scored], faults
    ranked = sorted(scored, key=lambda pair: -pair[0])
    best, worst = (ranked[0], ranked[-1]) if ranked else ((0.0, {}), (0.0, {}))
    if best[0] == worst[0]:
        return [], [
            *faults,
            bad(f"{name}, column completions", "two different scores", f"{len(scored)} scored completions without"),
        ]
    pair = {"prompt": [user], "chosen": [answer(best[1])], "rejected": [answer(worst[1])]}
    return [{**pair, "chosen_score": best[0], "rejected_score": worst[0]}], faults


def _system(completion: Mapping[str, Any]) -> list[dict[str, str]]:
    text = completion.get("custom_system_prompt")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def _score(completion: object, name: str, reward: str) -> float:
    """The completion's reward; ValueError where it has none, or no text."""
    if not isinstance(completion, Mapping):
        raise bad(name, "a dict", type(completion).__name__)
    response = completion.get("response")
    if not isinstance(response, str) or not response.strip():
        raise bad(f"{name}.response", "a text", repr(response))
    if reward != "ratings":
        return _finite(completion.get(reward), f"{name}.{reward}")
    ratings = completion.get("annotations")
    rating = lambda aspect: (ratings.get(aspect) or {}).get("Rating") if isinstance(ratings, Mapping) else None  # noqa: E731
    return sum(_finite(rating(aspect), f"{name}.annotations.{aspect}.Rating") for aspect in ASPECTS) / len(ASPECTS)


def _finite(value: object, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # what it cannot take is caught
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise bad(name, "a finite number", repr(value))
    return number


def _loaded(rows: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """The rows of files, or the rows themselves."""
    if not isinstance(rows, (str, Path)):
        yield from rows
        return
    path = Path(rows)
    files = sorted(f for f in path.iterdir() if f.suffix in (".jsonl", ".json", ".parquet")) if path.is_dir() else [path]
    if not files or not all(f.is_file() for f in files):
        raise bad("rows", "a .jsonl, .json or .parquet file, or a folder of them", str(rows))
    for file in files:
        if file.suffix == ".parquet":
            parquet = importlib.import_module("pyarrow.parquet")  # comes with the extra hf, through datasets
            for block in parquet.ParquetFile(file).iter_batches():
                yield from block.to_pylist()
        else:
            yield from _json_rows(file)


def _json_rows(file: Path) -> Iterator[Any]:
    """JSON lines, or one JSON list."""
    text = file.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold other line separators
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise bad(f"{file.name}, line {number}", "a JSON object", str(error)) from None
