import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pybloom_live import ScalableBloomFilter

from engine.core.candidates import FanOut
from engine.core.errors import StateUnavailableError
from engine.core.exposure import (
    HEADER,
    ExposureBits,
    ExposureLayout,
    add,
    contains,
    parse_header,
    probes,
    splitmix64,
)

SHIPPED = ExposureLayout(1000, 10, 7)
SMALL = ExposureLayout(8, 10, 7)


def of_everything(keys, queries):
    """Every key as a candidate of every query: key i is row i."""
    rows = np.tile(np.arange(len(keys), dtype=np.int32), queries)
    return FanOut(rows, np.arange(queries + 1, dtype=np.int64) * len(keys), queries)


def seen(bits, keys):
    queries = bits.shown().size
    return bits.seen(of_everything(keys, queries), np.array(keys, np.int64)).reshape(queries, len(keys))


layouts = st.builds(
    ExposureLayout, st.integers(1, 40), st.sampled_from([1, 4, 10, 33, 64]), st.integers(1, 16)
)
keys_ = st.lists(st.integers(0, (1 << 63) - 1), max_size=120)


@given(
    users=st.lists(st.lists(st.one_of(st.none(), st.tuples(layouts, keys_)), max_size=12), max_size=4),
    strangers=keys_,
    padding=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_the_kernel_finds_what_the_reference_finds(users, strangers, padding):
    wanted = strangers[:]
    values = []
    for slices in users:
        values.append([])
        for slice_ in slices:
            if slice_ is None:
                values[-1].append(None)
                continue
            layout, keys = slice_
            wanted += keys[:5]
            value = add(None, keys, layout)
            if padding:
                header = parse_header(value)
                value = value.ljust(header.layout.link_starts(header.links)[-1], b"\0")
            values[-1].append(value)
    bits = ExposureBits.of(values)
    found = seen(bits, wanted)
    for q, slices in enumerate(values):
        expected = np.zeros(len(wanted), np.bool_)
        for value in slices:
            expected |= contains(value, wanted)
        assert found[q].tolist() == expected.tolist()
        assert bits.shown()[q] == sum(parse_header(value).shown for value in slices if value)
        assert seen(bits.alone(q), wanted)[0].tolist() == expected.tolist()


@given(layout=layouts, parts=st.lists(keys_, max_size=4))
@settings(deadline=None, max_examples=150)
def test_what_was_added_is_found_as_pybloom_finds_it(layout, parts):
    value, oracle = None, ScalableBloomFilter(layout.planned, 0.0075)
    added = []
    for keys in parts:
        value = add(value, keys, layout)
        added += keys
        for key in keys:
            oracle.add(key)
        assert contains(value, added).all()
        assert seen(ExposureBits.of([[value]]), added).all()
        assert all(key in oracle for key in added)
        # Adding one by one or all at once is the same.
        assert value == add(None, added, layout)


@given(layout=layouts, keys=keys_)
@settings(deadline=None, max_examples=100)
def test_a_link_takes_its_capacity_and_no_more(layout, keys):
    header = parse_header(add(None, keys, layout))
    assert header.newest <= layout.capacity(header.links - 1)
    assert header.shown <= len(keys)
    assert header.links == 1 or header.newest >= 1


def test_an_exposure_that_is_there_already_changes_nothing():
    value = add(None, range(8), SMALL)  # its link is full
    assert parse_header(value).links == 1
    assert add(value, range(8), SMALL) == value
    assert parse_header(add(value, [8], SMALL)).links == 2


def test_a_slice_keeps_the_layout_it_began_with():
    value = add(None, range(20), SMALL)
    longer = add(value, range(20, 40), SHIPPED)
    assert parse_header(longer).layout == SMALL
    assert contains(longer, range(40)).all()


def test_links_grow_to_a_limit():
    layout = ExposureLayout(1000, 10, 7)
    assert [layout.link_bits(j) for j in range(4)] == [10_048, 20_096, 40_192, 80_384]
    assert layout.link_bits(7) == layout.link_bits(4_000_000_000) == 1 << 20
    assert [layout.capacity(j) for j in (0, 1, 2, 7)] == [1000, 1004, 2009, 52_428]
    # A first link as long as a link may be is as long as all that follow.
    longest = ExposureLayout(1 << 20, 1, 1)
    assert [longest.link_bits(j) for j in (0, 1)] == [1 << 20, 1 << 20]


@pytest.mark.parametrize("shape", [(0, 10, 7), (1000, 0, 7), (1000, 10, 0), (1000, 10, 17), (100_000, 11, 7)])
def test_a_layout_that_makes_no_sense_is_refused(shape):
    with pytest.raises(ValueError, match="must be between"):
        ExposureLayout(*shape)


def header(version=1, hashes=7, bits=10, planned=8, count=1, links=1):
    return HEADER.pack(version, hashes, bits, planned, count, links)


DAMAGED = {
    "cut": add(None, [1], SMALL)[:15],
    "newer": header(version=2) + b"\x01",
    "no hashes": header(hashes=0) + b"\x01",
    "many hashes": header(hashes=17) + b"\x01",
    "no bits": header(bits=0) + b"\x01",
    "nothing planned": header(planned=0) + b"\x01",
    "too long a link": header(planned=1 << 20, bits=10) + b"\x01",
    "no links": header(links=0),
    "links beyond number": header(links=0xFFFFFFFF) + b"\x01" * 16,
    "a full link that is not there": header(links=3) + b"\x01" * 16,
    "too long": header() + b"\x01" * 17,
    "text": b"WRONGTYPE Operation against a key holding the wrong kind of value",
}


@pytest.mark.parametrize("value", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_value_is_said_to_be_damaged(value):
    for refuse in (parse_header, lambda v: contains(v, [1]), lambda v: add(v, [1], SMALL)):
        with pytest.raises(ValueError, match=r".+"):
            refuse(value)
    good = add(None, [1, 2], SMALL)
    bits = ExposureBits.of([[good], [good, value, good], [], [good, good]])
    with pytest.raises(StateUnavailableError, match="of 1 of 4 users"):
        seen(bits, [1])
    assert bits.shown().tolist() == [2, 0, 0, 4]
    # The others are judged where they are asked alone.
    assert seen(bits.alone(0), [1, 3]).tolist() == [[True, False]]
    assert seen(bits.alone(3), [1, 3]).tolist() == [[True, False]]
    with pytest.raises(StateUnavailableError):
        seen(bits.alone(1), [1])


@given(
    st.binary(max_size=60)
    | st.builds(
        lambda a, b, c, d, e, rest: struct.pack("<BBHIII", 1, a, b, c, d, e) + rest,
        st.integers(0, 20),
        st.integers(0, 70),
        st.integers(0, 200),
        st.integers(0, 0xFFFFFFFF),
        st.integers(0, 8) | st.integers(0, 0xFFFFFFFF),
        st.binary(max_size=200),
    )
)
@settings(deadline=None, max_examples=400)
def test_the_kernel_refuses_what_the_reference_refuses(value):
    bits = ExposureBits.of([[value]])
    try:
        expected = contains(value, [1, 2, 3]).tolist()
    except ValueError:
        with pytest.raises(StateUnavailableError):
            seen(bits, [1, 2, 3])
    else:
        assert seen(bits, [1, 2, 3])[0].tolist() == expected


def test_measuring_tells_rate_and_fill():
    rng = np.random.default_rng(0)
    slices = [add(None, rng.integers(0, 1 << 62, 1000).tolist(), SHIPPED) for _ in range(4)]
    asked, positives, bits_set, bits = ExposureBits.of([slices, [], slices[:1]]).measure(seed=1)
    assert asked == 2 * 256
    assert 0 < positives < 0.06 * asked
    assert bits == 5 * 10_048
    assert 0.49 < bits_set / bits < 0.51
    assert ExposureBits.of([[], [None]]).measure(seed=1) == (0, 0, 0, 0)


VECTORS = json.loads(
    re.search(
        r"```json\n(.*?)```",
        (Path(__file__).parents[3] / "docs" / "exposure-format.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )[1]
)


@pytest.mark.parametrize("vector", VECTORS["probes"], ids=lambda vector: vector["key"])
def test_hashes_and_probes_of_the_documented_vectors(vector):
    key = int(vector["key"])
    assert f"{splitmix64(key):016x}" == vector["splitmix64"]
    assert probes(key, 7, 10_048) == vector["bits_of_10048"]
    assert probes(key, 7, 128) == vector["bits_of_128"]


@pytest.mark.parametrize("vector", VECTORS["values"], ids=lambda vector: vector["keys"])
def test_values_of_the_documented_vectors(vector):
    first, last = (int(key) for key in vector["keys"].split(".."))
    layout = ExposureLayout(vector["planned"], vector["bits"], vector["hashes"])
    value = add(None, range(first, last + 1), layout)
    assert len(value) == vector["bytes"]
    assert hashlib.sha256(value).hexdigest() == vector["sha256"]
    assert parse_header(value)[1:] == (vector["count"], vector["links"])
    if "hex" in vector:
        assert value.hex() == vector["hex"]
    strangers = range(100_000, 101_500)
    said = [key for key, is_in in zip(strangers, contains(value, strangers), strict=True) if is_in]
    assert said == vector["false_positives"]
