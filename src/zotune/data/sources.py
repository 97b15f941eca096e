"""Sources: rows from a file or from the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from zotune import hub
from zotune.data import files
from zotune.data.files import HELP, Records, extra
from zotune.errors import DataError, first_line
from zotune.paths import expand

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:/]+){0,2}")


@dataclass(frozen=True)
class File:
    """A file of rows.

    Attributes:
        path: Where it is, absolute.
    """

    path: Path

    @property
    def name(self) -> str:
        """For messages."""
        return self.path.name

    def read(self) -> Records:
        """Its rows, in order.

        Raises:
            DataError: It is missing, cannot be read, or is not what its name says.
        """
        if self.path.is_dir():
            raise DataError(f"{self.path} is a folder. {HELP}")
        if not self.path.exists():
            raise DataError(f"the data file {self.path} does not exist. {HELP}")
        return files.read(self.path, _format(self.path))


@dataclass(frozen=True)
class Hub:
    """A split of a data set on the Hugging Face hub.

    Attributes:
        dataset: Its id, e.g. ``stanfordnlp/sst2``.
        config: Its configuration, for data sets that have several.
        split: The split's name, e.g. ``train``.
    """

    dataset: str
    config: str | None
    split: str

    @property
    def name(self) -> str:
        """For messages."""
        return ":".join(part for part in (self.dataset, self.config, self.split) if part)

    def read(self) -> Records:
        """All rows, in order; downloaded and cached by ``datasets``.

        Raises:
            DataError: The extra ``datasets`` is not installed, or the data set cannot be had.
        """
        datasets = extra("datasets", f"{self.dataset!r} is no data file, so it is taken as a Hugging Face data set id")
        reachable = hub.reachable()
        try:
            with hub.offline(not reachable):
                return cast(Records, datasets.load_dataset(self.dataset, self.config, split=self.split))
        # What is raised depends on the versions of several libraries below, and all of it means the same to the user.
        except Exception as error:
            if not reachable:
                raise DataError(
                    f"the data set {self.name!r} is not in the local cache, and the Hugging Face hub cannot be "
                    f"reached: {hub.WITHOUT}. To use local files, set data.train and data.validation to their paths. "
                    f"{HELP}"
                ) from error
            raise DataError(
                f"cannot get the data set {self.name!r} from the Hugging Face hub: {first_line(error)}. Check the id "
                f"(owner/name, owner/name:split or owner/name:configuration:split). {HELP}"
            ) from error


def locate(source: str, split: str) -> File | Hub:
    """What a data source in the configuration means.

    Args:
        source: A file, or a data set id with an optional split, or configuration and split, after colons.
        split: The split of a data set whose id does not name one.

    Raises:
        DataError: It can be neither.
    """
    path = expand(source)
    if _format(path) in FORMATS or path.is_dir():
        return File(path.absolute())
    if path.exists():
        raise DataError(f"{path} is not in a known format. {HELP}")
    if not HUB_ID.fullmatch(source):
        raise DataError(f"{source!r} is neither a file nor a data set id. {HELP}")
    dataset, *rest = source.split(":")
    return Hub(dataset, rest[0] if len(rest) == 2 else None, rest[-1] if rest else split)


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
