"""Messages byte by byte: fields of extreme values, and of types of the wire that are not theirs."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from typing import Any

_INT64 = (
    0,
    1,
    2,
    17,
    1_000,
    1_700_000_000,
    4_102_444_800,
    2**31 - 1,
    2**31,
    2**53,
    2**63 - 1,
    -1,
    -(2**31),
    -(2**63),
)
_FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 90.0, 91.0, -180.0, 181.0, 1e-310, 1e38, 3.5e38, 1e308)
_FLOATS += (float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    "",
    "x",
    "click",
    "like",
    "default",
    "related",
    "itemcf",
    "fresh",
    "1",
    "\0",
    "a\0b",
    "\ufeff",
    "日本",
    "🍞" * 9,
)
_TEXTS += (
    "ü" * 128,
    "x" * 256,
    "x" * 257,
    "y" * 5_000,
    "\u202e\r\n\x1b[31m",
    "%s%n{0}",
    "'; --",
    "../../etc/passwd",
)
_BAD_UTF8 = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"abc\xf5\x80\x80\x80", b"\xe2\x82", b"x" * 200 + b"\x80")


def message(draw: random.Random, descriptor: Any, depth: int, bad_text: bool = False) -> bytes:
    """Serialize a message of a type, field by field, from values at and beyond the edges."""
    out = bytearray()
    for each in fields_of(descriptor):
        # A request with everything in it at once is refused for one reason; most cases leave most fields out.
        chance = 0.9 if each.is_container else 0.35
        if draw.random() > chance:
            continue
        times = draw.choice((0, 1, 1, 2, 5, 30 if depth else 3)) if each.repeated else 1
        if each.repeated and each.packable and draw.random() < 0.8:
            body = b"".join(_scalar(draw, each) for _ in range(times))
            out += varint(each.number << 3 | 2) + varint(len(body)) + body
            continue
        for _ in range(times):
            if each.message is not None:
                body = message(draw, each.message, depth + 1, bad_text) if depth < 4 else b""
                out += varint(each.number << 3 | 2) + varint(len(body)) + body
            elif each.text:
                body = _text(draw, each.name, bad_text)
                out += varint(each.number << 3 | 2) + varint(len(body)) + body
            else:
                out += varint(each.number << 3 | each.wire_type) + _scalar(draw, each)
    return bytes(out)


@dataclass(frozen=True)
class _Field:
    """What is needed of a field's descriptor, looked up once: descriptors are slow to ask."""

    name: str
    number: int
    repeated: bool
    message: Any
    text: bool
    wire_type: int
    form: str

    @property
    def packable(self) -> bool:
        return self.message is None and not self.text

    @property
    def is_container(self) -> bool:
        return self.repeated and self.message is not None


_known_fields: dict[str, list[_Field]] = {}


def fields_of(descriptor: Any) -> list[_Field]:
    found = _known_fields.get(descriptor.full_name)
    if found is None:
        found = [_field(each) for each in descriptor.fields]
        _known_fields[descriptor.full_name] = found
    return found


def _field(each: Any) -> _Field:
    forms = {each.TYPE_DOUBLE: (1, "<d"), each.TYPE_FLOAT: (5, "<f")}
    wire_type, form = forms.get(each.type, (0, ""))
    return _Field(
        name=each.name,
        number=each.number,
        repeated=each.is_repeated,
        message=each.message_type,
        text=each.type in (each.TYPE_STRING, each.TYPE_BYTES),
        wire_type=wire_type,
        form=form,
    )


def _scalar(draw: random.Random, each: _Field) -> bytes:
    if each.form == "<f":
        value = draw.choice(_FLOATS)
        return struct.pack("<f", value if abs(value) < 3e38 or value != value else float("inf"))
    if each.form:
        return struct.pack(each.form, draw.choice(_FLOATS))
    return varint(draw.choice(_INT64) if draw.random() < 0.5 else draw.randrange(10_000))


def _text(draw: random.Random, name: str, bad: bool) -> bytes:
    if bad and draw.random() < 0.7:
        return draw.choice(_BAD_UTF8)
    if name in ("kind", "event") and draw.random() < 0.7:
        return b"click"
    if name == "scene" and draw.random() < 0.7:
        return b""
    return draw.choice(_TEXTS).encode()


def any_field(draw: random.Random, number: int) -> bytes:
    kind = draw.randrange(8)
    tag = varint(number << 3 | kind)
    if kind == 0:
        return tag + varint(draw.getrandbits(draw.choice((7, 32, 64))))
    if kind == 1:
        return tag + draw.randbytes(8)
    if kind == 2:
        body = draw.randbytes(draw.randrange(20))
        return tag + varint(len(body)) + body
    return tag + draw.randbytes(4)


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
