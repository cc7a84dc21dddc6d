"""The registered model as MLflow's pyfunc sees it: a prompt in, its completion out.

    mlflow.pyfunc.load_model("models:/demo@champion").predict(["def "], params={"max_tokens": 32})

MLflow copies this file beside the weights and runs it on loading ("models from code"): nothing is pickled.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas

from model.checkpoint import load_model
from model.generation import complete
from model.sampling import SamplingSettings
from model.tokenizer import load_tokenizer


class Completion(mlflow.pyfunc.PythonModel):
    """Completes prompts on the CPU, one after the other; for many users there is Ray Serve."""

    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts["checkpoint"])
        self.model = load_model(folder).eval()
        self.tokenizer = load_tokenizer(folder)

    def predict(self, context, model_input, params=None):  # without hints: they would override the signature
        if isinstance(model_input, pandas.DataFrame):
            model_input = model_input["prompt" if "prompt" in model_input else model_input.columns[0]]
        prompts = [model_input] if isinstance(model_input, str) else list(model_input)
        sampling = SamplingSettings(**(params or {}))
        return [complete(self.model, self.tokenizer, str(prompt), sampling) for prompt in prompts]


# Running this file has one effect, the one MLflow asks of it; nothing else in the project imports it.
mlflow.models.set_model(Completion())
