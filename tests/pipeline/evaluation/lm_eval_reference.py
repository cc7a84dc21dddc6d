"""What lm-eval says of small checkpoints and items of our own: the table beside this file, and how it was made.

python -m tests.pipeline.evaluation.lm_eval_reference     # writes lm_eval.json again; needs lm-eval 0.4.13

The task definitions are lm-eval's own files; their data alone is replaced by the items beside this file.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import save_model
from model.config import ModelConfig
from model.gpt import GPT
from model.tokenizer import Tokenizer, load_tokenizer

HERE = Path(__file__).parent
ITEMS = {path.stem: path for path in sorted((HERE / "items").glob("*.jsonl"))}
TABLE = HERE / "lm_eval.json"
FAMILIES = ("classic", "modern")
# Our name -> lm-eval's file; our figure's name is the same as theirs.
DEFINITIONS = {
    "blimp": "blimp/adjunct_island.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "wikitext2": "wikitext/wikitext.yaml",
}


def make_checkpoint(folder: Path, family: str) -> Path:
    """Write a model whose weights are waves, the same on every machine, with a tokenizer that is kept as a file."""
    [kept] = (HERE.parent / "written_before/train-first/checkpoints").iterdir()
    tokenizer: Tokenizer = load_tokenizer(kept)
    config = ModelConfig(family=family, num_layers=2, width=32, num_heads=4, context_length=96, dropout=0.0)
    model = GPT(config, tokenizer.vocab_size)
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            wave = torch.sin(torch.arange(weight.numel(), dtype=torch.float64) * (1.7 + 0.31 * number))
            size = 1.0 if weight.dim() == 1 else 0.35
            weight.copy_(size * wave.view_as(weight) + (weight.dim() == 1))
    model.clear_padding()
    save_model(folder, model.eval(), tokenizer)
    return folder


def ask_lm_eval(checkpoint: Path, items: Mapping[str, Path], batch_size: int = 8) -> dict[str, dict[str, Any]]:
    """Run lm-eval's Hugging Face model on a folder."""
    from lm_eval.models.huggingface import HFLM

    return evaluate(HFLM(pretrained=str(checkpoint), device="cpu", batch_size=batch_size, dtype="float32"), items)


def ask_lm_evals_client(url: str, items: Mapping[str, Path], context_length: int) -> dict[str, dict[str, Any]]:
    """Run lm-eval's client of completions, which knows the tokenizer from the endpoint alone."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    settings = {"tokenizer_backend": "remote", "max_length": context_length, "num_concurrent": 4, "max_retries": 1}
    return evaluate(LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="tiny", **settings), items)


def evaluate(model: Any, items: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return for each task its figures, and each item's answers in order.

    An item's answers are one [nats, greedy] for each ending; a document's greedy is None.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_DATASETS_CACHE"] = cache
        tasks = {}
        for name, path in items.items():
            config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / DEFINITIONS[name])
            for key in ("tag", "dataset_name", "training_split", "validation_split", "test_split"):
                config.pop(key, None)
            files = {"data_files": {"test": str(path)}, "cache_dir": cache}
            config |= {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "task": name}
            if config["output_type"] == "multiple_choice":  # lm-eval knows it and asks for it in few tasks
                config["metric_list"].append({"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True})
            tasks[name] = ConfigurableTask(config=config)
        found = lm_eval.evaluate(lm=model, task_dict=tasks, log_samples=True, bootstrap_iters=100)
    told = {}
    for name in items:
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        answers = [
            [
                [float(said[0]), bool(said[1])] if isinstance(said, (list, tuple)) else [float(said), None]
                for said in each
            ]
            for each in (sample["filtered_resps"] for sample in samples)
        ]
        figures = {}
        for key, value in found["results"][name].items():
            metric, _, filtered = key.partition(",")
            error = found["results"][name].get(f"{metric}_stderr,{filtered}")
            if filtered and not metric.endswith("_stderr"):
                figures[metric] = [float(value), float(error) if isinstance(error, float) else None]
        told[name] = {"answers": answers, "figures": figures}
    return told


def main() -> None:
    table = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            table[family] = ask_lm_eval(make_checkpoint(Path(folder), family), ITEMS)
    families = []
    for family, tasks in table.items():
        rows = [f"  {json.dumps(name)}: {json.dumps(told)}" for name, told in tasks.items()]
        families.append(f" {json.dumps(family)}: {{\n{_joined(rows)}\n }}")
    TABLE.write_text(f"{{\n{_joined(families)}\n}}\n")


def _joined(rows: list[str]) -> str:
    return ",\n".join(rows)


if __name__ == "__main__":
    main()
