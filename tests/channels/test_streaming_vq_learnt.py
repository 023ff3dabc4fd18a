"""A build of streaming VQ takes what was learnt earlier, without PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
from streaming_vq_world import SMALL, loaded, random_training

from channels.streaming_vq import StreamingVq, StreamingVqOptions
from channels.streaming_vq.bundle import specified
from engine.core.channel import BuildContext, SilentProgress
from engine.core.memory import MemorySink
from engine.testing.world import catalogue_columns, random_batch, random_columns, tiny_interactions


@pytest.mark.parametrize("rank", ["none", "two_tower"])
def test_a_build_takes_what_was_learnt_earlier(rank):
    liked, columns = tiny_interactions(60, 40), random_columns(40, seed=1)
    words = [f"tag {code}".encode() for code in range(6)]
    offsets = np.concatenate(([0], np.cumsum([len(word) for word in words]))).astype(np.int64)
    described = {
        **catalogue_columns(columns),
        "tags.vocabulary.offsets": offsets,
        "tags.vocabulary.data": np.frombuffer(b"".join(words), np.uint8),
    }
    options = {**SMALL, "rank": rank}
    config, sink = StreamingVqOptions.model_validate(options), MemorySink()
    context = BuildContext(liked, described, 0, sink, SilentProgress(), 1)
    spec, _ = specified(config, context, None)
    learnt = {
        name: array
        for name, array in random_training(spec).items()
        if name.startswith(StreamingVq.learnt) and name not in ("rank.item_vectors", "rank.item_bias")
    }
    context = BuildContext(liked, described, 0, sink, SilentProgress(), 1, learnt=learnt)
    StreamingVq.build(config, context)
    arrays = sink.arrays
    assert np.array_equal(arrays["assignment"], learnt["assignment"])
    assert np.array_equal(arrays["codebook.vectors"], learnt["codebook.vectors"])
    if rank == "two_tower":
        biases = learnt["rank.bias.weight"][1:][arrays["lists.rows"]]
        assert np.allclose(arrays["lists.rank_bias"], biases)
    channel = loaded(arrays, liked.users, liked.items, columns, **options)
    batch = random_batch(liked.items, liked.users, 4)
    assert channel.recall_batch(batch, np.full(4, 5, np.int32)).rows.size == 20
