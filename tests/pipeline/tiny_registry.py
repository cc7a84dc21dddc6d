"""A registered model small enough for tests: random weights, a tokenizer trained on a few sentences."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlflow
import torch

from model.chat import save_template
from model.checkpoint import save_model
from model.gpt import GPT, ModelConfig
from model.pattern import PATTERNS
from model.tokenizer import Tokenizer, train_bpe
from pipeline import registry
from tests.mlflow_store import point_mlflow_at

TEXT = ["Return a new list of the sorted items. " * 20, registry.PROBE_TEXT * 3, "Grüße, 你好 🌍 naïve café. " * 10]


@dataclass(frozen=True)
class TinyRegistry:
    """An MLflow store of a test's own, with one model in it."""

    tracking_uri: str
    name: str = "tiny"

    def add_version(
        self,
        *,
        seed: int,
        probe_shift: float = 0.0,
        alias: str = "",
        context_length: int = 128,
        chat_template: str = "",
        width: int = 32,
        pattern: str = "gpt4",
    ) -> str:
        """Register random weights; a `probe_shift` makes the registry's figure for them wrong by so much."""
        torch.manual_seed(seed)
        tokenizer = train_bpe(TEXT, 400, PATTERNS[pattern])
        config = ModelConfig(
            family="modern", num_layers=2, width=width, num_heads=2, context_length=context_length, dropout=0.0
        )
        model = GPT(config, tokenizer.vocab_size).eval()
        with torch.no_grad():  # fresh weights know no favourites: every answer would be evenly likely
            for weight in model.parameters():
                weight += 0.1 * torch.randn_like(weight)
        model.clear_padding()
        probe = registry.measure_probe(model, tokenizer)
        point_mlflow_at(self.tracking_uri)
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("tiny")
        with mlflow.start_run(experiment_id=experiment.experiment_id) as run, tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), model, tokenizer)
            if chat_template:
                save_template(Path(folder), chat_template)
            mlflow.log_artifacts(folder, "model/artifacts/checkpoint")
            for step in range(20):
                mlflow.log_metrics({"train/loss": 9 - step / 10, "validation/loss": 9.1 - step / 11}, step=step)
        tags = {
            "mlflow_run_id": run.info.run_id,
            "bits_per_byte": "2.50000",
            "data_digest": "0123456789abcdef",
            "num_parameters": str(model.num_parameters()),
            registry.PROBE_TAG: f"{probe + probe_shift:.5f}",
        }
        if not client.search_registered_models(f"name = '{self.name}'"):
            client.create_registered_model(self.name)
        source = f"{run.info.artifact_uri}/model"
        version = client.create_model_version(self.name, source=source, run_id=run.info.run_id, tags=tags).version
        if alias:
            self.move_alias(alias, str(version))
        return str(version)

    def current(self) -> "TinyRegistry":
        """Make this store MLflow's own in this process, whatever other tests have set."""
        point_mlflow_at(self.tracking_uri)
        return self

    def move_alias(self, alias: str, version: str) -> None:
        mlflow.MlflowClient(tracking_uri=self.tracking_uri).set_registered_model_alias(self.name, alias, version)


def make_registry(folder: Path) -> TinyRegistry:
    """Open a fresh store in a folder, and make it MLflow's current one."""
    uri = f"sqlite:///{folder}/mlflow.db"
    point_mlflow_at(uri)
    client = mlflow.MlflowClient()
    client.create_experiment("tiny", artifact_location=str(folder / "mlflow"))
    return TinyRegistry(uri)


def tiny_tokenizer() -> Tokenizer:
    return train_bpe(TEXT, 400)
