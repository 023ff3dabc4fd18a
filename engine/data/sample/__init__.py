"""A small real data set that comes with the package: part of KuaiRand-Pure, under the licence beside it."""

from pathlib import Path


def sample_path() -> Path:
    """Return the directory of the bundled data set, for `Dataset.open`."""
    return Path(__file__).resolve().parent
