"""What a file's name says: its compression, its format, and whether it is read at all (the table is in config.py)."""

import posixpath
from dataclasses import dataclass
from functools import cached_property

from pipeline.config import COMPRESSIONS, FORMAT_OF_ENDING

# Compression -> how many bytes of English one byte holds; only for balancing the work and showing progress.
EXPANSION = {".gz": 2.7, ".zst": 3.0, ".xz": 3.3, ".bz2": 3.3, "": 1.0}
# Members of archives with these are left out although they may look like text; files with any unknown ending are.
NOT_PLAIN_TEXT = frozenset(
    {".csv", ".tsv", ".html", ".htm", ".wat", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".pptx", ".xlsx"}
)
NO_ENDING = "without an ending"


@dataclass(frozen=True)
class File:
    """One input file: where it is, how large, and what tells one version of it from another."""

    url: str
    size: int
    version: str = ""
    given: str = ""  # the path that a person knows it by, if `url` is where a link led

    def __reduce__(self) -> tuple[type["File"], tuple[str, int, str, str]]:
        return File, (self.url, self.size, self.version, self.given)  # what is cached need not travel

    @property
    def where(self) -> str:
        return self.given or self.url

    @property
    def name(self) -> str:
        return posixpath.basename(self.where)

    @cached_property
    def compression(self) -> str:
        ending = posixpath.splitext(self.name.lower())[1]
        return ".gz" if ending == ".tgz" else ending if ending in COMPRESSIONS else ""

    @cached_property
    def inner_ending(self) -> str:
        """The ending before that of the compression."""
        return posixpath.splitext(self.name.lower().removesuffix(self.compression))[1]

    @property
    def ending(self) -> str:
        return self.inner_ending + self.compression or NO_ENDING

    @cached_property
    def format(self) -> str:
        """What the name says is inside; empty where that is not read."""
        if self.inner_ending in FORMAT_OF_ENDING:
            return FORMAT_OF_ENDING[self.inner_ending]
        # OpenWebText's inner archives are called *_data.xz. Whether such a file is a tar is seen when it is opened.
        is_archive = self.compression and (not self.inner_ending or self.inner_ending.endswith("_data"))
        return "tar" if is_archive else ""

    @property
    def text_bytes(self) -> float:
        return self.size * (EXPANSION[".xz"] if self.format == "tar" else EXPANSION[self.compression])
