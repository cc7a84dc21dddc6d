"""Which MLflow store the tests' own process talks to, kept from leaking into the next test."""

import os


def forget_mlflow() -> None:
    """Take out of the environment what `mlflow.set_tracking_uri` and `set_experiment` write there.

    The pipeline takes MLFLOW_TRACKING_URI for the user's wish: left there, one test's store becomes the next one's.
    """
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
        os.environ.pop(name, None)


def point_mlflow_at(uri: str) -> None:
    """Make a store MLflow's own in this process only: not for the processes and pipelines that it starts."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    forget_mlflow()
