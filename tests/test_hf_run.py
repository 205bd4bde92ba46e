"""`shiq-lab train-hf`: a YAML file to a trained model; what is wrong in it is one line that names the entry."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random model, a tokenizer of ten words, rows, and a configuration of them."""
    import yaml
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<s>", "</s>", "one", "two", "three", "four", "plus", "is", "what", "?"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained(
        tmp_path / "model"
    )
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **size)).save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": "what is one plus two ?", "completion": said, "reward": paid}
        for said, paid in (("three", 1.0), ("four", -1.0), ("one plus two is three", 0.5))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trainer = {
        "output_dir": "out", "beta": 0.5, "max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": [], "save_steps": 2, "logging_steps": 1, "disable_tqdm": True,
        "reference_cache": "reference", "dataloader_pin_memory": False,
    }  # fmt: skip
    said = {"model": "model", "data": {"train": "rows.jsonl", "eval": "rows.jsonl"}, "trainer": trainer}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(said))
    return tmp_path


def changed(folder: Path, **entries: Any) -> Path:
    """A copy of the configuration with other entries; a dotted name reaches inside."""
    import yaml

    said = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in entries.items():
        outer, dot, inner = name.partition("__")
        if dot:
            said[outer][inner] = value
        elif value is None:
            del said[name]
        else:
            said[name] = value
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    from shiq_lab import cli

    monkeypatch.setattr("sys.argv", ["shiq-lab", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_train_and_go_on(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss falls, the model is saved, the reference is kept; a second call finds the run done, --fresh repeats it."""
    code, out, _ = run(capsys, monkeypatch, "train-hf", str(folder / "config.yaml"), "--json")
    found = json.loads(out[out.index('{"') :].splitlines()[-1])
    assert code == 0 and (folder / "out/model.safetensors").exists() and list((folder / "reference").iterdir())
    assert found["eval_loss"] < 0.9 * (1 + 1 + 0.25 * 6) / 3, "at the reference the loss is the mean of sums of squared rewards"
    weights = (folder / "out/model.safetensors").read_bytes()
    code, out, _ = run(capsys, monkeypatch, "train-hf", str(folder / "config.yaml"))
    assert code == 0 and (folder / "out/model.safetensors").read_bytes() == weights
    run(capsys, monkeypatch, "train-hf", str(folder / "config.yaml"), "--fresh")
    assert (folder / "out/model.safetensors").read_bytes() == weights, "same seed, same numbers"


def test_lora_and_eval_need_no_more(folder: Path) -> None:
    """An adapter is trained and saved; without an eval file nothing is evaluated."""
    from shiq_lab.hf import run as runs

    found = runs.train(runs.read(changed(folder, lora={"r": 2}, data={"train": "rows.jsonl"})))
    assert "eval_loss" not in found and (folder / "out/adapter_config.json").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"modle": "x"},
         "CONFIG: expected entries among model, data, trainer, ref_model, tokenizer, chat_template, dtype, lora, "
         "got 'modle'. Did you mean 'model'?"),
        ({"model": None}, "model: expected an entry in the file, got nothing."),
        ({"dtype": "float31"}, "dtype: expected one of float32, bfloat16, float16, got 'float31'. Did you mean 'float32'?"),
        ({"trainer__betta": 0.1}, "trainer.betta: expected a setting, got 'betta'. Did you mean 'beta'?"),
        ({"trainer__beta": -1.0}, "beta: expected a finite number > 0, got -1.0."),
        ({"trainer__output_dir": None}, "trainer.output_dir: expected a folder, got nothing."),
        ({"data__trian": "x"}, "data.trian: expected a setting, got 'trian'. Did you mean 'train'?"),
        ({"data": {"eval": "rows.jsonl"}}, "data.train: expected a file of examples, got nothing."),
        ({"data": {"train": "rows.jsonl", "format": "ultrafeed"}},
         "data.format: expected a format, got 'ultrafeed'. Did you mean 'ultrafeedback'?"),
        ({"lora": {"target_module": "q_proj"}},
         "lora.target_module: expected a setting of peft.LoraConfig, got 'target_module'. Did you mean 'target_modules'?"),
        ({"chat_template": "none.jinja"}, "chat_template: expected an existing file, got "),
        ({"data": {"train": "config.yaml"}}, "data: expected JSON lines (.jsonl), JSON (.json) or Parquet (.parquet), got "),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_what_is_wrong_is_named(
    entries: dict[str, Any], message: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, monkeypatch, "train-hf", str(changed(folder, **entries)))
    assert code == 2 and "Traceback" not in err
    assert " ".join(err.split()).startswith(f"error {message}"), err
    assert not (folder / "out").exists(), "nothing is written before the first step"


def test_no_file_and_no_yaml(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "broken.yaml").write_text("model: [")
    (folder / "list.yaml").write_text("- a")
    for name, said in (("none.yaml", "No such file"), ("broken.yaml", "expected a YAML file"), ("list.yaml", "a mapping with")):
        code, _, err = run(capsys, monkeypatch, "train-hf", str(folder / name))
        assert code == 2 and said in " ".join(err.split())


def test_every_entry_is_obeyed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, reference, tokenizer, template, precision and files, each another than the default, come into the job."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shiq_lab.hf import run as runs

    other = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(folder / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = "<s>"
    tokenizer.save_pretrained(folder / "words")
    (folder / "template.jinja").write_text("{{ messages }}", encoding="utf-8")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    (folder / "eval.json").write_text(json.dumps(rows[:2]))
    monkeypatch.setitem(runs.FORMATS, "ultrafeedback", lambda found: found[::-1])
    monkeypatch.chdir(folder.parent)  # paths are relative to the file
    entries = {"ref_model": "other", "tokenizer": "words", "chat_template": "template.jinja", "dtype": "bfloat16"}
    data = {"train": "rows.jsonl", "eval": "eval.json", "format": "ultrafeedback"}
    job = runs.load(runs.read(changed(folder, **entries, data=data, lora={"r": 2})), beta=0.25)
    assert job.ref_model is not None and not any("lora_" in name for name, _ in job.ref_model.named_parameters())
    assert torch.equal(job.ref_model.lm_head.weight, other.lm_head.weight.bfloat16())
    assert job.model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert (job.tokenizer.pad_token, job.tokenizer.chat_template) == ("<s>", "{{ messages }}")
    assert job.train == rows[::-1] and job.eval == rows[1::-1]
    assert job.args.beta == 0.25 and Path(job.args.output_dir) == folder / "out"
    assert Path(str(job.args.reference_cache)) == folder / "reference"


def test_parquet_is_read(tmp_path: Path) -> None:
    from datasets import Dataset

    from shiq_lab.hf import run as runs

    rows = [
        {"prompt_ids": [1, 2], "completion_ids": [3], "reward": 0.5},
        {"prompt_ids": [4], "completion_ids": [5], "reward": 1.0},
    ]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert runs.examples(tmp_path / "rows.parquet") == rows


def test_a_run_goes_on_from_its_checkpoint(folder: Path) -> None:
    """Two steps, then two more: the steps of the first run are not repeated, and --fresh does repeat them."""
    from shiq_lab.hf import run as runs

    def logged(resume: bool, steps: int) -> list[tuple[int, float]]:
        runs.train(runs.read(changed(folder, trainer__max_steps=steps)), resume=resume)
        state = json.loads((folder / f"out/checkpoint-{steps}/trainer_state.json").read_text())
        return [(log["step"], log["loss"]) for log in state["log_history"] if "loss" in log]

    first = logged(True, 2)
    assert len(first) == 2
    mark = folder / "out/checkpoint-2/trainer_state.json"
    mark.write_text(mark.read_text().replace(f'"loss": {first[0][1]}', '"loss": 77.0'))
    assert logged(True, 4)[0] == (1, 77.0)  # the first run's own record goes on
    assert logged(False, 4)[:2] == first


TEXTS = {"BOM": (b"\xef\xbb\xbf", "a", b"\n"), "CRLF": (b"", "a", b"\r\n"), "blanks": (b"", "a\u2028b\u2029c\x85d", b"\n")}


@pytest.mark.parametrize("name", TEXTS)
def test_lines_end_at_line_feeds_alone(name: str, tmp_path: Path) -> None:
    """JSON may hold U+2028 and its like as they are, and texts from the web do: str.splitlines would cut them in two."""
    from shiq_lab.hf import run as runs

    start, prompt, end = TEXTS[name]
    said = {"prompt": prompt, "completion": "b", "reward": 1}
    line = json.dumps(said, ensure_ascii=False).encode()
    (tmp_path / "rows.jsonl").write_bytes(start + line + end + end + line + end)
    assert runs.examples(tmp_path / "rows.jsonl") == [said, said]
    (tmp_path / "rows.json").write_bytes(start + b"[" + line + b"]")
    assert runs.examples(tmp_path / "rows.json") == [said]


@pytest.mark.parametrize(
    ("name", "raw"), [("a.jsonl", "\u00eb".encode("latin1")), ("a.json", b"5"), ("a.json", b"null"), ("a.jsonl", b"[" * 100000)]
)
def test_files_that_are_no_rows_are_named(name: str, raw: bytes, tmp_path: Path) -> None:
    from shiq_lab.hf import run as runs

    (tmp_path / name).write_bytes(raw)
    with pytest.raises(
        ValueError, match=r"^data: expected JSON lines \(.jsonl\), JSON \(.json\) or Parquet \(.parquet\), got "
    ):
        runs.examples(tmp_path / name)


def test_numbers_without_a_point_are_numbers(folder: Path) -> None:
    """YAML 1.1 reads 1e-4 as text: the commonest way to write a learning rate."""
    from shiq_lab.hf import run as runs

    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.01", "learning_rate: 1e-4").replace("beta: 0.5", "beta: 5e-1"))
    args = runs.load(runs.read(path)).args
    assert (args.learning_rate, args.beta) == (1e-4, 0.5)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"trainer__max_steps": "100"}, "trainer.max_steps: expected a whole number, got '100'."),
        ({"trainer__max_steps": 2.5}, "trainer.max_steps: expected a whole number, got 2.5."),
        ({"trainer__learning_rate": [1]}, "trainer.learning_rate: expected a number, got [1]."),
        ({"trainer__learning_rate": "fast"}, "trainer.learning_rate: expected a number, got 'fast'."),
        ({"trainer__disable_dropout": "false"}, "trainer.disable_dropout: expected true or false, got 'false'."),
        ({"trainer__fused": 1}, "trainer.fused: expected true or false, got 1."),
        ({"trainer__seed": 1.5}, "trainer.seed: expected a whole number, got 1.5."),
        ({"trainer__packing": True}, "trainer.packing: expected a whole number, got True."),
        ({"trainer__reference_cache": 5}, "trainer.reference_cache: expected text, got 5."),
        ({"model": 5}, "model: expected text, got 5."),
        ({"dtype": ["float32"]}, "dtype: expected text, got ['float32']."),
        ({"lora": True}, "lora: expected a mapping, got True."),
        ({"data": {"train": ["rows.jsonl"]}}, "data.train: expected text, got ['rows.jsonl']."),
        ({"data": {"train": None}}, "data.train: expected a file of examples, got nothing."),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_types_are_looked_at_before_any_weight(entries: dict[str, Any], message: str, folder: Path) -> None:
    from shiq_lab.hf import run as runs

    (folder / "model/model.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        runs.load(runs.read(changed(folder, **entries)))
    assert str(error.value) == message


def test_weights_cut_short_are_named(folder: Path) -> None:
    from shiq_lab.hf import run as runs

    path = folder / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"^model: expected a model folder, or a name on a hub that can be reached, got 'model'"
    ):
        runs.load(runs.read(folder / "config.yaml"))
