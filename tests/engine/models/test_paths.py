"""Paths of a lattice: their codes, and the beam search held to its plain twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.core.errors import SnapshotError
from engine.models.paths import PathModel, PathSpec, beam_reference, node_logs, random_paths

SMALL = PathSpec(width=7, depth=3, dimension=5, hidden=(6,))


def users_of(spec, count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, spec.dimension), np.float32)


def log_of(spec, arrays, user, code):
    """The log probability of one path, plainly."""
    nodes = tuple(spec.nodes(np.array(code)).tolist())
    return sum(node_logs(spec, arrays, user, nodes[:d])[nodes[d]] for d in range(spec.depth))


def test_codes_are_numbers_to_the_base_of_the_width():
    spec = PathSpec(width=100, depth=3, dimension=1)
    codes = np.array([362720, 0, 999999])
    assert spec.nodes(codes).tolist() == [[36, 27, 20], [0, 0, 0], [99, 99, 99]]
    assert spec.codes(spec.nodes(codes)).tolist() == codes.tolist()
    assert spec.name(362720) == "36-27-20"


def test_more_paths_than_codes_are_refused():
    assert PathSpec(width=2, depth=62, dimension=1).paths == 2**62
    with pytest.raises(ValidationError, match=r"more than 2\^62"):
        PathSpec(width=3, depth=62, dimension=1)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 19),
    depth=st.integers(1, 4),
    dimension=st.integers(1, 9),
    hidden=st.lists(st.integers(1, 11), max_size=3),
    beam=st.integers(1, 40),
    scale=st.sampled_from([0.1, 1.0, 5.0, 40.0]),
    seed=st.integers(0, 2**16),
)
def test_the_beam_is_that_of_the_plain_twin(width, depth, dimension, hidden, beam, scale, seed):
    spec = PathSpec(width=width, depth=depth, dimension=dimension, hidden=tuple(hidden))
    beam = min(beam, spec.paths)
    arrays = random_paths(spec, seed, scale)
    users = users_of(spec, 3, seed)
    paths, logs = PathModel.load(spec, arrays).beam(users, beam)
    assert paths.shape == logs.shape == (3, beam)
    assert (np.diff(logs, axis=1) <= 0).all()
    assert (logs <= 0).all()
    for q, user in enumerate(users):
        assert len(set(paths[q].tolist())) == beam
        expected = beam_reference(spec, arrays, user, beam)
        # Prefixes as good as each other but for the last bits may change places: how good they are is compared.
        near = 1e-4 * (1 + scale)
        np.testing.assert_allclose(logs[q], [log for _, log in expected], atol=near, rtol=1e-4)
        own = [log_of(spec, arrays, user, code) for code in paths[q].tolist()]
        np.testing.assert_allclose(logs[q], own, atol=near, rtol=1e-4)


def test_as_wide_as_the_lattice_it_finds_every_path_and_they_sum_to_one():
    arrays = random_paths(SMALL, 1)
    paths, logs = PathModel.load(SMALL, arrays).beam(users_of(SMALL, 2), SMALL.paths)
    for q in range(2):
        assert sorted(paths[q].tolist()) == list(range(SMALL.paths))
        assert np.exp(logs[q].astype(np.float64)).sum() == pytest.approx(1, abs=1e-4)


def test_of_equals_the_smaller_node_comes_first():
    arrays = {name: np.zeros_like(array) for name, array in random_paths(SMALL).items()}
    paths, logs = PathModel.load(SMALL, arrays).beam(users_of(SMALL, 1), 9)
    assert paths[0].tolist() == list(range(9))
    np.testing.assert_allclose(logs, -3 * np.log(7), rtol=1e-6)


def test_of_many_equals_the_first_prefixes_keep_the_first_nodes():
    spec = PathSpec(width=40, depth=3, dimension=5, hidden=(6,))
    arrays = {name: np.zeros_like(array) for name, array in random_paths(spec).items()}
    paths, _ = PathModel.load(spec, arrays).beam(users_of(spec, 2), 30)
    assert paths.tolist() == [list(range(30))] * 2


def test_nobody_else_in_a_batch_changes_an_answer():
    spec = PathSpec(width=33, depth=3, dimension=12, hidden=(21, 18))
    model = PathModel.load(spec, random_paths(spec, 2))
    users = users_of(spec, 9)
    paths, logs = model.beam(users, 13)
    for q in range(9):
        alone = model.beam(users[q : q + 1], 13)
        assert alone[0][0].tolist() == paths[q].tolist()
        assert alone[1][0].tobytes() == logs[q].tobytes()


def test_sure_and_hopeless_nodes_are_no_trouble():
    arrays = random_paths(SMALL, 3, scale=1e4)
    paths, logs = PathModel.load(SMALL, arrays).beam(users_of(SMALL, 4), 20)
    assert np.isfinite(logs).all()
    assert (paths >= 0).all()


@pytest.mark.parametrize("beam", [0, 344])
def test_a_beam_that_cannot_be_is_refused(beam):
    model = PathModel.load(SMALL, random_paths(SMALL))
    with pytest.raises(ValueError, match="among 343 paths"):
        model.beam(users_of(SMALL, 1), beam)


@pytest.mark.parametrize("name", list(random_paths(SMALL)))
def test_a_parameter_of_another_shape_is_named(name):
    arrays = random_paths(SMALL)
    with pytest.raises(SnapshotError, match=name):
        PathModel.load(SMALL, {each: array for each, array in arrays.items() if each != name})
    with pytest.raises(SnapshotError, match=name):
        PathModel.load(SMALL, {**arrays, name: arrays[name][:-1]})
