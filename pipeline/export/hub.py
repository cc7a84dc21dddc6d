"""A model as a repository of the hub: what would be uploaded, and, once that was seen, the upload.

upload = plan_upload(folder, "me/model", private=True)
print(upload.describe())
address = upload.run("the model of run 1f3…")
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = re.compile(r"[\w][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Upload:
    """Some files of one folder, and the repository that is to hold them."""

    folder: Path
    repository: str
    private: bool
    endpoint: str
    who: str  # whose token it is
    exists: bool

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    def describe(self) -> str:
        """Say file by file what an upload would write where."""
        kind = "is there; files of the same names are replaced" if self.exists else (
            f"will be made, {'private' if self.private else 'PUBLIC: anybody can read it'}"
        )  # fmt: skip
        sizes = [(path.name, path.stat().st_size) for path in self.files]
        lines = [f"{self.endpoint}/{self.repository} {kind}, as {self.who}:"]
        lines += [f"  {size:>14,} bytes  {name}" for name, size in sizes]
        lines.append(f"  {sum(size for _, size in sizes):>14,} bytes in {len(sizes)} files")
        return "\n".join(lines)

    def run(self, message: str) -> str:
        """Upload in one commit and return the address; raises `ValueError` where the hub refuses."""
        api = _api(self.endpoint)
        try:
            api.create_repo(self.repository, private=self.private, exist_ok=True)
            api.upload_folder(repo_id=self.repository, folder_path=str(self.folder), commit_message=message)
        except Exception as error:
            raise ValueError(f"The hub did not take {self.repository}: {_first_line(error)}") from None
        return f"{self.endpoint}/{self.repository}"


def plan_upload(folder: Path, repository: str, *, private: bool) -> Upload:
    """Ask the hub who this is and what is there; raises `ValueError` without a token or with a name that is none."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"{repository!r} is no repository; write owner/name.")
    endpoint = constants.ENDPOINT
    api = _api(endpoint)
    try:
        who = str(api.whoami()["name"])
        try:
            api.model_info(repository)
            exists = True
        except RepositoryNotFoundError:
            exists = False
    except LocalTokenNotFoundError:
        raise ValueError("An upload needs a token of the hub with the right to write: set HF_TOKEN.") from None
    except Exception as error:
        raise ValueError(f"The hub at {endpoint} has no answer: {_first_line(error)}") from None
    return Upload(folder, repository, private, endpoint, who, exists)


def _api(endpoint: str) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, library_name="gpt-53m")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
