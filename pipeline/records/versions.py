"""Which artifacts MLflow's registry names: asked of the store itself, without making anything there."""

from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.config import Config
from pipeline.records.inventory import Registered

PAGE = 500  # versions asked for at once
URLS = ("checkpoint_url", "evaluation_url")  # tags of a version, see pipeline/register.py


def read_registered(config: Config) -> list[Registered]:
    """Every version of every model.

    Raises `ValueError` where MLflow does not answer: nobody knows what it needs then.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    client = open_client(config)
    if client is None:
        return []
    found: list[Registered] = []
    try:
        aliases = {
            model.name: {str(version): alias for alias, version in model.aliases.items()}
            for model in _all(client.search_registered_models)
        }
        for version in _all(client.search_model_versions):
            alias = aliases.get(version.name, {}).get(str(version.version))
            names = [version.tags.get(tag, "") for tag in URLS]
            found.append(
                Registered(
                    label=f"{version.name} version {version.version}" + (f" ({alias})" if alias else ""),
                    names=frozenset(_name_of(url) for url in names if url),
                    fingerprints=frozenset({version.tags.get("fingerprint", "")} - {""}),
                )
            )
    except (MlflowException, SQLAlchemyError) as error:
        raise ValueError(tracking.explain_trouble(error, tracking.address(config))) from None
    return found


def open_client(config: Config) -> Any:
    """A client of the config's MLflow store; None where it is a file that nobody has made yet."""
    import mlflow

    uri = tracking.address(config)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return None
    tracking.prepare_client(uri)
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def _all(search: Any) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = search(max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _name_of(url: str) -> str:
    """<pipeline>/<folder> of an artifact's address, or of a folder inside it."""
    parts = url.rstrip("/").split("/")
    if parts[-1] == "checkpoint":
        parts.pop()
    return "/".join(parts[-2:])
