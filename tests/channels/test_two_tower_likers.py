"""Item vectors drawn to the users who like the items, held to the formula written out."""

import numpy as np
import pytest
from pydantic import ValidationError
from two_tower_world import SMALL, written

from channels.divide_and_conquer.options import DivideAndConquerOptions
from channels.two_tower import TwoTower
from channels.two_tower.bundle import Bundle
from channels.two_tower.likers import drawn_to_likers
from engine.core.channel import BuildContext, SilentProgress
from engine.core.memory import MemorySink
from engine.models.encoded import EncodedUsers
from engine.models.features import take_encoded
from engine.models.towers import ItemTower, UserTower
from engine.testing import tiny_interactions

OPTIONS = {
    "dimension": 8,
    "sequence": {"kind": "mean", "width": 8, "length": 6},
    "item_features": [{"name": "item_id", "kind": "id", "dimension": 8}],
    "index": "exact",
}


def plainly(vectors, directions, liked, weight):
    """The formula, an item at a time."""
    drawn = vectors.astype(np.float64)
    for item in range(liked.items):
        total = np.zeros(vectors.shape[1])
        for user in range(liked.users):
            mine = liked.rows[liked.indptr[user] : liked.indptr[user + 1]]
            if item in mine:
                total += directions[user] / np.sqrt(mine.size)
        if total.any():
            length = np.linalg.norm(drawn[item])
            to = drawn[item] / length + weight * total / np.linalg.norm(total)
            drawn[item] = length * to / np.linalg.norm(to)
    return drawn


@pytest.mark.parametrize("popularity", [0.0, 0.3])
def test_directions_move_as_the_formula_says_and_lengths_stay(popularity, monkeypatch):
    monkeypatch.setattr("channels.two_tower.likers.BLOCK", 7)  # blocks meet in the middle of the users
    liked = tiny_interactions()
    model = written(liked, {}, popularity_exponent=popularity, **OPTIONS)
    bundle = Bundle.of(model)
    tower = UserTower.load(bundle.spec, model)
    directions = np.zeros((liked.users, 8))
    for user in range(liked.users):
        newest = liked.rows[liked.indptr[user] : liked.indptr[user + 1]][:6]
        known = take_encoded(bundle.users, np.array([user], np.int32))
        sequence = (newest[::-1] + 1).astype(np.int32)[None]
        lengths = np.array([newest.size], np.int32)
        vector = tower.vectors(EncodedUsers(known.codes, known.multi, known.numbers, sequence, lengths))[0]
        directions[user] = vector / max(np.linalg.norm(vector), 1e-12)
    drawn = drawn_to_likers(bundle.vectors, tower, bundle.users, liked, 0.5)
    np.testing.assert_allclose(drawn, plainly(bundle.vectors, directions, liked, 0.5), atol=1e-5)
    alone = np.setdiff1d(np.arange(liked.items), liked.rows)
    assert (drawn[alone] == bundle.vectors[alone]).all()
    assert (drawn != bundle.vectors).any(1).sum() == liked.items - alone.size


def test_a_build_draws_them_and_its_index_has_what_it_drew():
    liked = tiny_interactions()
    model = written(liked, {}, **OPTIONS)
    learnt = {name: each for name, each in model.items() if name.startswith(("user.", "item."))}
    built = {}
    for weight in (0.0, 0.2):
        sink = MemorySink()
        context = BuildContext(liked, {}, 0, sink, SilentProgress(), 1, learnt=learnt)
        TwoTower.build(TwoTower.Config.model_validate(OPTIONS | {"liker_weight": weight}), context)
        built[weight] = sink.arrays
    plain, drawn = built[0.0], built[0.2]
    bundle = Bundle.of(plain)
    of_tower = ItemTower.load(bundle.spec, model).vectors(bundle.items)
    np.testing.assert_array_equal(plain["item_vectors"], of_tower)
    expected = drawn_to_likers(of_tower, UserTower.load(bundle.spec, model), bundle.users, liked, 0.2)
    np.testing.assert_array_equal(drawn["item_vectors"], expected)
    assert bytes(drawn["run"]) != bytes(plain["run"])


def test_several_vectors_of_a_user_are_refused():
    with pytest.raises(ValidationError, match="comirec makes several"):
        TwoTower.Config.model_validate(SMALL | {"sequence": {"kind": "comirec"}, "liker_weight": 0.1})
    with pytest.raises(ValidationError, match="one per prompt"):
        DivideAndConquerOptions.model_validate({"liker_weight": 0.1})
