"""The author channels: followed, interacted, similar."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channels.followed_authors import FollowedAuthors
from channels.interacted_authors import InteractedAuthors
from channels.similar_authors import (
    SimilarAuthors,
    SimilarAuthorsOptions,
    author_neighbours,
    engagement,
    others,
    others_reference,
)
from engine.core.candidates import CandidateBatch, Candidates
from engine.core.channel import SilentProgress
from engine.core.interactions import Interactions
from engine.core.items import ItemColumns
from engine.core.query import History, QueryBatch
from engine.core.similarity import Finish, power, top_k_products_reference
from engine.core.types import RaggedRows
from engine.testing import (
    ChannelContract,
    built_channel,
    interactions_of,
    random_batch,
    random_columns,
    tiny_interactions,
)

DAY = 86_400
NOW = 100 * DAY
AUTHORS = 8


def with_follows(batch, seed=4):
    rng = np.random.default_rng(seed)
    lists = [
        rng.choice(AUTHORS, rng.integers(0, 4), replace=False).astype(np.int32) for _ in range(len(batch))
    ]
    return replace(batch, live=replace(batch.live, follows=RaggedRows.of(lists)))


class AuthorContract(ChannelContract):
    kind: type

    def channel(self):
        columns = random_columns(self.items, AUTHORS)
        return built_channel(
            self.kind, tiny_interactions(self.users, self.items), columns=columns, authors=AUTHORS
        )

    def batch(self):
        return with_follows(random_batch(self.items, self.users, self.size))


class TestFollowedContract(AuthorContract):
    kind = FollowedAuthors


class TestInteractedContract(AuthorContract):
    kind = InteractedAuthors


class TestSimilarContract(AuthorContract):
    kind = SimilarAuthors


def posts(authors, days):
    """Items of these authors, published on these days."""
    columns = ItemColumns(len(authors))
    columns.set("authors", np.array(authors))
    columns.set("published_at", np.array(days) * DAY)
    return columns


def asked(follows=(), liked=()):
    """One query; `liked` are (item, interest, age in days)."""
    history = History(
        np.array([row for row, _, _ in liked], np.int32),
        np.array([interest for _, interest, _ in liked], np.float32),
        np.array([NOW - age * DAY for _, _, age in liked], np.int64),
        np.array([0, len(liked)]),
    )
    batch = QueryBatch.plain(np.zeros(1, np.int32), history, now=NOW)
    return replace(batch, live=replace(batch.live, follows=RaggedRows.of([np.array(follows, np.int32)])))


def answer(channel, batch, k=50):
    return channel.recall_batch(batch, np.array([k], np.int32)).query(0)


def test_followed_authors_newest_posts_first_with_the_author_as_trigger():
    columns = posts([0, 1, 0, 2, 1], [10, 20, 30, 40, 50])
    channel = built_channel(
        FollowedAuthors, interactions_of([[0]], 5), columns=columns, authors=3, half_life_days=10
    )
    got = answer(channel, asked(follows=[1, 0]))
    assert got.rows.tolist() == [4, 2, 1, 0]
    assert got.triggers.tolist() == [1, 0, 1, 0]
    assert got.scores.tolist() == [-5.0, -7.0, -8.0, -9.0]  # minus the age in half-lives
    assert answer(channel, asked()).rows.tolist() == []


def test_only_the_newest_follows_and_the_newest_posts_of_each_count():
    columns = posts([0, 0, 1, 1, 2], [1, 2, 3, 4, 5])
    channel = built_channel(
        FollowedAuthors, interactions_of([[0]], 5), columns=columns, authors=3, per_author=1
    )
    assert answer(channel, asked(follows=[0, 1])).rows.tolist() == [3, 1]
    columns.available[3] = False
    channel.update(np.array([3], np.int32))
    assert answer(channel, asked(follows=[0, 1])).rows.tolist() == [2, 1]


def test_posts_appear_move_and_go_as_they_are_published_changed_and_taken_down():
    columns = posts([0, 1], [10, 20])
    channel = built_channel(FollowedAuthors, interactions_of([[0]], 2), columns=columns, authors=2)
    columns.grow(4)
    columns.authors[2:4] = [0, 5]  # author 5 was not known at the build
    columns.published_at[2:4] = [15 * DAY, 16 * DAY]
    channel.update(np.array([2, 3], np.int32))
    assert answer(channel, asked(follows=[0, 5])).rows.tolist() == [3, 2, 0]
    columns.authors[0] = 5
    columns.available[2] = False
    channel.update(np.array([0, 2], np.int32))
    assert answer(channel, asked(follows=[0, 5])).rows.tolist() == [3, 0]
    assert answer(channel, asked(follows=[0])).rows.tolist() == []


def test_interacted_authors_are_weighed_by_recent_interest_and_aged_out():
    columns = posts([0, 0, 1, 1, 2, 2], [100] * 6)
    channel = built_channel(
        InteractedAuthors,
        interactions_of([[0]], 6),
        columns=columns,
        authors=3,
        interest_days=10,
        max_days=30,
    )
    got = answer(channel, asked(liked=[(0, 2.0, 10), (2, 1.0, 0), (3, 1.0, 0), (4, 9.0, 31)]))
    # Author 0: 2 points halved once; author 1: 1 + 1; author 2 was too long ago. Posts are of today: log2 of the weight.
    assert got.rows.tolist() == [2, 3, 0, 1]
    assert got.scores.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert got.triggers.tolist() == [1, 1, 0, 0]


def follows_of(pairs, users, authors):
    lists = [[author for user, author in pairs if user == u] for u in range(users)]
    return interactions_of(lists, authors)


def test_engagement_adds_interest_in_an_authors_items_and_follows():
    liked = Interactions(
        3,
        4,
        np.array([0, 3, 3, 4]),
        np.array([0, 1, 2, 3], np.int32),
        np.array([1, 2, 4, 8], np.float32),
        np.zeros(4, np.int64),
    )
    follows = follows_of([(0, 1), (1, 2)], users=3, authors=3)
    authors = np.array([0, 0, 1, -1], np.int32)
    engaged = engagement(liked, authors, 3, follows, 0.5)
    assert engaged.indptr.tolist() == [0, 2, 3, 3]
    assert engaged.rows.tolist() == [0, 1, 2]
    assert engaged.weights.tolist() == [3.0, 4.5, 0.5]
    assert engagement(liked, authors, 3, None, 0.5).weights.tolist() == [3.0, 4.0]


def test_similar_authors_are_the_cosine_over_engagement():
    liked = tiny_interactions(30, 20, seed=5)
    authors = np.random.default_rng(1).integers(-1, 6, 20).astype(np.int32)
    engaged = engagement(liked, authors, 6, None, 1.0)
    dense = np.zeros((6, 30))
    for u in range(30):
        mine = slice(engaged.indptr[u], engaged.indptr[u + 1])
        dense[engaged.rows[mine], u] = engaged.weights[mine]
    norms = power(np.square(dense).sum(axis=1), 0.5)
    options = SimilarAuthorsOptions(neighbours=3)
    wanted = top_k_products_reference(
        dense, np.ones(30, np.float32), norms, 0.0, 3, Finish(False, 1.0, norms)
    )
    blocks = list(author_neighbours(engaged, options, 1, SilentProgress()))
    got = np.concatenate([block.similarities for block in blocks])
    assert got.tolist() == pytest.approx([similarity for part in wanted for _, similarity in part], abs=1e-6)


def test_similar_authors_of_those_followed_or_liked_but_not_those_themselves():
    # Users 0 and 1 like authors 0 and 1; user 2 likes 2 and follows 3. Items 0 to 4 are of authors 0 to 3, 1.
    liked = interactions_of([[0, 1], [0, 1], [2]], 5)
    follows = follows_of([(2, 3)], users=3, authors=4)
    columns = posts([0, 1, 2, 3, 1], [90, 91, 92, 93, 99])
    channel = built_channel(SimilarAuthors, liked, columns=columns, follows=follows, authors=4)
    got = answer(channel, asked(follows=[2], liked=[(0, 1.0, 0)]))
    # 1 is similar to 0, 3 to 2; of author 1 the newest post alone.
    assert got.rows.tolist() == [4, 3]
    assert got.triggers.tolist() == [0, 2]
    assert answer(channel, asked(follows=[2, 3])).rows.tolist() == []


@given(
    st.lists(st.tuples(*[st.lists(st.integers(0, 9), unique=True, max_size=6)] * 2), min_size=1, max_size=4)
)
@settings(max_examples=100, deadline=None)
def test_the_others_of_those_found_are_those_of_the_twin(queries):
    found = CandidateBatch.of(
        [
            Candidates(*(np.array(rows, dtype) for dtype in (np.int32, np.float32, np.int32)))
            for rows, _ in queries
        ]
    )
    sources = RaggedRows.of([np.array(rows, np.int32) for _, rows in queries])
    for mine, wanted in zip(others(found, sources), others_reference(found, sources), strict=True):
        assert mine.dtype == wanted.dtype
        assert mine.tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", [FollowedAuthors, InteractedAuthors, SimilarAuthors])
def test_a_catalogue_without_authors_gives_an_empty_channel(kind):
    channel = built_channel(kind, interactions_of([[0, 1], [0, 1]], 2))
    assert answer(channel, asked(liked=[(0, 1.0, 0)])).rows.tolist() == []
    channel.update(np.array([0], np.int32))
