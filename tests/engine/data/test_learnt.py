"""What a training learnt, beside its data: written, found again, and refused where it is of something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from channels.two_tower import TwoTower, TwoTowerOptions
from engine.core.errors import DatasetError
from engine.core.options import build_parameters
from engine.data.learnt import learnt_channels, read_learnt, write_learnt
from engine.offline.build import learnt_of

ARRAYS = {"user.a": np.arange(6, dtype=np.float32).reshape(2, 3), "item.b": np.arange(3)}
MADE_OF = {"dataset": "abc", "options": {"dimension": 3, "names": ["x"]}}


def test_what_is_written_is_found_again_bit_for_bit(tmp_path: Path) -> None:
    first = write_learnt(tmp_path, "two_tower", MADE_OF, ARRAYS).read_bytes()
    assert write_learnt(tmp_path, "two_tower", MADE_OF, dict(reversed(ARRAYS.items()))).read_bytes() == first
    found = read_learnt(tmp_path, "two_tower")
    assert found is not None
    assert found[0] == MADE_OF
    assert {name: (array.dtype, array.tobytes()) for name, array in found[1].items()} == {
        name: (array.dtype, array.tobytes()) for name, array in ARRAYS.items()
    }
    assert learnt_channels(tmp_path) == {"two_tower": MADE_OF}
    assert [path.name for path in tmp_path.iterdir()] == ["two_tower.model.npz"]


def test_where_nothing_was_learnt_there_is_nothing(tmp_path: Path) -> None:
    assert read_learnt(tmp_path, "two_tower") is None
    assert learnt_channels(tmp_path) == {}
    write_learnt(tmp_path, "two_tower", MADE_OF, ARRAYS)
    assert read_learnt(tmp_path, "other") is None


def test_it_is_taken_for_just_this_data_and_these_options(tmp_path: Path) -> None:
    options = TwoTowerOptions(dimension=64)
    old = {name: value for name, value in build_parameters(options).items() if name != "hidden"}
    write_learnt(tmp_path, "two_tower", {"dataset": "abc", "options": old}, ARRAYS)

    def taken(dataset: str = "abc", **more: int) -> bool:
        wanted = {"dataset": dataset, "options": build_parameters(options.model_copy(update=more))}
        return learnt_of(tmp_path, "two_tower", TwoTower, wanted) is not None

    assert taken()  # an option that did not exist then has its default
    assert not taken("abd")
    assert not taken(dimension=32)
    write_learnt(tmp_path, "two_tower", {"dataset": "abc", "options": {"dimension": "many"}}, ARRAYS)
    assert not taken()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"\x93NUMPY"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "two_tower.model.npz").write_bytes(content)
    for read in (lambda: read_learnt(tmp_path, "two_tower"), lambda: learnt_channels(tmp_path)):
        with pytest.raises(DatasetError, match=r"two_tower\.model\.npz"):
            read()


def test_a_file_without_its_description_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "two_tower.model.npz", a=np.zeros(1))
    with pytest.raises(DatasetError, match="does not hold what a channel learnt"):
        learnt_channels(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be written"):
        write_learnt(tmp_path / "absent", "two_tower", MADE_OF, ARRAYS)
