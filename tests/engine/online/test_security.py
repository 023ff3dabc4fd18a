"""Who may talk to the server: TLS, certificates, tokens, addresses, limits; and that no secret is ever said."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from ingest_world import ingest_config, ingesting
from online_world import PATIENCE
from security_world import (
    GOAWAY,
    MAX_CONCURRENT_STREAMS,
    PING,
    SETTINGS,
    TOKENS,
    Authority,
    Raw,
    frame,
    line,
    running,
    secured,
    tokens_file,
    with_server,
)
from typer.testing import CliRunner

from engine.cli import app
from engine.client import (
    Action,
    AsyncIngestClient,
    AsyncRecallClient,
    Event,
    Follow,
    IngestClient,
    RecallClient,
)
from engine.client._security import is_local
from engine.config import AllowConfig, SecurityConfig, ServerConfig, load_config, parse_config
from engine.core.errors import ConfigError, StateError
from engine.online import security
from engine.online.security import Tokens, check, interceptors, is_loopback, validity
from engine.online.state import open_state

OWN_POOL = (("grpc.use_local_subchannel_pool", 1),)
"""Else gRPC shares one connection among channels to one address with the same credentials."""

UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(scope="session")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def pair(authority) -> dict[str, str]:
    certificate, key = authority.issue("server")
    return {"certificate": str(certificate), "key": str(key)}


@pytest.fixture(scope="session")
def web(authority) -> dict[str, Any]:
    """The arguments of a client with a certificate."""
    certificate, key = authority.issue("web", "DNS:web.internal,URI:spiffe://here/web")
    return {"ca": authority.ca, "certificate": certificate, "key": key}


@pytest.fixture
def tokens(tmp_path) -> str:
    return str(tokens_file(tmp_path))


async def ask(port: int, **arguments: Any) -> None:
    arguments = {"timeout": PATIENCE, "options": OWN_POOL, **arguments}
    async with AsyncRecallClient(f"127.0.0.1:{port}", **arguments) as client:
        await client.recall(user_id=1)


async def refused(port: int, **arguments: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        await ask(port, **arguments)
    return caught.value.code(), caught.value.details()


# --- TLS ---------------------------------------------------------------------------------------------------


async def test_tls_serves_who_believes_the_authority_and_nobody_else(world, authority, pair, tmp_path):
    async with running(world, **pair) as port:
        await ask(port, ca=authority.ca)
        await ask(port, ca=authority.ca.read_bytes())
        assert (await refused(port))[0] is UNAVAILABLE
        assert (await refused(port, ca=Authority(tmp_path / "other").ca))[0] is UNAVAILABLE
        async with AsyncRecallClient(f"127.0.0.1:{port}", ca=authority.ca) as client:
            await client.wait_ready()


async def test_with_a_client_ca_everybody_needs_a_certificate_of_it(world, authority, pair, web, tmp_path):
    stranger = Authority(tmp_path / "other").issue("web")
    async with running(world, **pair, client_ca=str(authority.ca)) as port:
        await ask(port, **web)
        assert (await refused(port, ca=authority.ca))[0] is UNAVAILABLE
        bad = {"ca": authority.ca, "certificate": stranger[0], "key": stranger[1]}
        assert (await refused(port, **bad))[0] is UNAVAILABLE


@pytest.mark.parametrize("name", ["web", "web.internal", "spiffe://here/web"])
async def test_a_certificate_may_call_what_lists_one_of_its_names(world, authority, pair, web, name):
    allow = AllowConfig(recall=(f"certificate:{name}",), ingest=("certificate:feed",), admin=())
    async with running(world, **pair, client_ca=str(authority.ca), allow=allow) as port:
        await ask(port, **web)
        async with AsyncIngestClient(f"127.0.0.1:{port}", **web) as client:
            for _ in range(2):
                with pytest.raises(grpc.RpcError) as caught:
                    await client.report([Event(1, Follow(2))])
                # Without a state store there is no such service; who may not call it is not told even that.
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert await reflected(port, **web) == (
            "certificate:web, certificate:web.internal, certificate:spiffe://here/web may not call admin"
        )


async def reflected(port: int, **arguments: Any) -> str:
    """Call reflection; returns "" or why it was refused."""
    return await asyncio.to_thread(_reflected, f"127.0.0.1:{port}", arguments)


def _reflected(target: str, arguments: dict[str, Any]) -> str:
    # Not grpc.aio: where a stream is refused before its first request is written, that may say INTERNAL instead.
    from engine.client._security import Access

    access = Access(target, **arguments)
    with (
        grpc.insecure_channel(target)
        if access.credentials is None
        else grpc.secure_channel(target, access.credentials)
    ) as channel:
        method = access.on(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        failure = None
        try:
            answers = list(method(iter([request]), timeout=PATIENCE))
        except grpc.RpcError as error:
            failure = error
    if failure is not None:
        assert failure.code() is DENIED
        return str(failure.details())
    assert "recall.v1.RecallService" in [s.name for s in answers[0].list_services_response.service]
    return ""


async def test_an_allowed_certificate_reads_streams_too(world, authority, pair, web):
    allow = AllowConfig(recall=(), admin=("certificate:web",))
    async with running(world, **pair, client_ca=str(authority.ca), allow=allow) as port:
        assert await reflected(port, **web) == ""
        assert (await refused(port, **web))[0] is DENIED


def served_certificate(port: int, ca: Path) -> int:
    """The serial number of the certificate that a server shows."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        shown = connection.getpeercert()
        assert shown is not None
        return int(str(shown["serialNumber"]), 16)


async def test_a_certificate_that_changes_is_taken_and_half_a_change_is_not(
    world, authority, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    files = {"certificate": tmp_path / "server.pem", "key": tmp_path / "server.key"}
    issued = [authority.issue("server", file=f"turn-{n}") for n in range(2)]
    for name, source in zip(files, issued[0], strict=True):
        shutil.copy(source, files[name])
    async with running(world, **{name: str(file) for name, file in files.items()}) as port:
        before = await asyncio.to_thread(served_certificate, port, authority.ca)
        async with AsyncRecallClient(f"127.0.0.1:{port}", ca=authority.ca, timeout=PATIENCE) as client:
            await client.recall(user_id=1)
            shutil.copy(issued[1][0], files["certificate"])
            assert await asyncio.to_thread(served_certificate, port, authority.ca) == before
            assert "stays as it was: security.key: is not the key of security.certificate" in caplog.text
            shutil.copy(issued[1][1], files["key"])
            after = await asyncio.to_thread(served_certificate, port, authority.ca)
            assert after != before
            assert await asyncio.to_thread(served_certificate, port, authority.ca) == after
            await client.recall(user_id=1)  # on the connection of before


@pytest.mark.parametrize(("days", "said"), [(-1, "expired on 2"), (3, "expires on 2"), (30, "")])
def test_a_certificate_near_its_end_or_past_it_is_warned_of(world, authority, caplog, days, said):
    certificate, key = authority.issue("server", days=days, file=f"days-{days}")
    check(secured(world, certificate=str(certificate), key=str(key)).config)
    assert said in caplog.text
    assert said or not caplog.records


def test_validity_is_what_openssl_says(pair):
    form = ["openssl", "x509", "-in", pair["certificate"], "-noout", "-dates"]
    said = subprocess.run(form, capture_output=True, text=True, check=True).stdout
    der = ssl.PEM_cert_to_DER_cert(Path(pair["certificate"]).read_text())
    for when, word in zip(validity(der), said.splitlines(), strict=True):
        assert when == datetime.strptime(word.partition("=")[2], "%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC)
    for broken in (b"", b"\x30\x82", der[:40], bytes(200)):
        with pytest.raises((ValueError, IndexError)):
            validity(broken)


# --- tokens ------------------------------------------------------------------------------------------------


async def test_a_call_needs_a_known_token_and_health_needs_none(world, tokens):
    async with running(world, tokens=tokens) as port:
        await ask(port, token=TOKENS["web"])
        assert await refused(port) == (
            UNAUTHENTICATED,
            "expected a token, as metadata: authorization: Bearer TOKEN",
        )
        assert await refused(port, token="kangaroo") == (UNAUTHENTICATED, "the token is not known")
        async with AsyncRecallClient(f"127.0.0.1:{port}") as client:
            await client.wait_ready()


async def test_a_token_may_call_what_lists_its_name(world, tokens):
    allow = AllowConfig(recall=("token:web",), ingest=("token:feed",), admin=())
    async with running(world, tokens=tokens, allow=allow) as port:
        await ask(port, token=TOKENS["web"])
        assert await refused(port, token=TOKENS["feed"]) == (DENIED, "token:feed may not call recall")
        assert await reflected(port, token=TOKENS["web"]) == "token:web may not call admin"
        async with AsyncIngestClient(f"127.0.0.1:{port}", token=TOKENS["feed"]) as client:
            with pytest.raises(grpc.RpcError) as caught:
                await client.report([Event(1, Follow(2))])
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # let in, but this server has none
        async with AsyncIngestClient(f"127.0.0.1:{port}", token=TOKENS["web"]) as client:
            with pytest.raises(grpc.RpcError) as caught:
                await client.report([Event(1, Follow(2))])
            assert (caught.value.code(), caught.value.details()) == (DENIED, "token:web may not call ingest")


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ((("authorization", f"bearer  {TOKENS['web']}"),), None),
        ((("authorization", f"Basic {TOKENS['web']}"),), UNAUTHENTICATED),
        ((("authorization", TOKENS["web"]),), UNAUTHENTICATED),
        ((("authorization", ""),), UNAUTHENTICATED),
        ((("authorization", "Bearer "),), UNAUTHENTICATED),
        ((("authorization", f"Bearer {TOKENS['web']}"),) * 2, UNAUTHENTICATED),
        ((("authorization-bin", TOKENS["web"].encode()),), UNAUTHENTICATED),
    ],
)
async def test_only_one_bearer_header_is_a_token(world, tokens, metadata, code):
    async with (
        running(world, tokens=tokens) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        call = channel.unary_unary("/recall.v1.RecallService/Recall")(
            b"\x08\x01", metadata=metadata, timeout=10
        )
        assert await call.code() is (code or grpc.StatusCode.OK)


async def test_what_has_no_list_of_its_own_needs_the_rights_of_admin(world, tokens):
    allow = AllowConfig(admin=())
    metadata = (("authorization", f"Bearer {TOKENS['web']}"),)
    async with (
        running(world, tokens=tokens, allow=allow) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        for method in (
            "/some.Service/Method",
            "/recall.v1.RecallServiceX/Recall",
            "/grpc.health.v1/Health/Check",
        ):
            call = channel.unary_unary(method)(b"", metadata=metadata, timeout=PATIENCE)
            assert await call.code() is DENIED, method
        call = channel.unary_unary("/recall.v1.RecallService/Absent")(
            b"", metadata=metadata, timeout=PATIENCE
        )
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_token_or_a_certificate_suffices_where_both_are_asked_for(
    world, authority, pair, web, tokens
):
    allow = AllowConfig(recall=("token:feed", "certificate:nobody"), ingest=("certificate:web",), admin=())
    more = {"client_ca": str(authority.ca), "tokens": tokens, "allow": allow}
    async with running(world, **pair, **more) as port:
        await ask(port, **web, token=TOKENS["feed"])
        assert (await refused(port, **web))[0] is DENIED
        code, text = await refused(port, **web, token=TOKENS["web"])
        assert code is DENIED
        assert text.startswith("token:web, certificate:web, ")
        assert (await refused(port, **web, token="kangaroo"))[0] is UNAUTHENTICATED


def test_tokens_are_read_again_when_their_file_changes(tokens, monkeypatch, caplog):
    monkeypatch.setattr("engine.online.security.tokens.LOOK_SECONDS", 0.0)
    file = Path(tokens)
    known = Tokens(file, "")
    assert known.holder(TOKENS["web"]) == "token:web"
    file.write_text(line("web", "kangaroo-new") + line("web", "kangaroo-newer"))
    assert known.holder(TOKENS["web"]) is None
    assert known.holder("kangaroo-new") == known.holder("kangaroo-newer") == "token:web"
    file.write_text("kangaroo-plain\n")
    assert known.holder("kangaroo-new") == "token:web"
    file.unlink()
    assert known.holder("kangaroo-new") == "token:web"
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == 2  # once each, however many calls there are
    assert "line 1: expected NAME:SHA256" in said[0]
    assert "cannot be read" in said[1]
    assert "kangaroo" not in caplog.text


def test_tokens_of_the_environment_count_besides(tokens, monkeypatch):
    monkeypatch.setenv("RECALL_TOKENS", f"{line('ops', 'kangaroo-ops').strip()}, {line('b', 'kangaroo-b')}")
    for settings, names in (
        (SecurityConfig(), {"token:ops", "token:b"}),
        (SecurityConfig(tokens=tokens), {"token:ops", "token:b", "token:web", "token:feed"}),
    ):
        known = Tokens.of(settings)
        assert known is not None
        assert known.names == names
        assert known.holder("kangaroo-ops") == "token:ops"


def test_nothing_is_in_the_way_of_a_request_where_nothing_is_configured(world, authority, pair):
    assert interceptors(world.config) == ()
    assert security.credentials(world.config) is None
    # Who has no certificate of the authority does not get through the handshake, and every other may call everything.
    assert interceptors(secured(world, **pair, client_ca=str(authority.ca)).config) == ()


async def test_refusals_are_logged_once_a_second_without_the_token(world, tokens, caplog):
    async with running(world, tokens=tokens) as port:
        for _ in range(20):
            await refused(port, token="kangaroo-wrong")
    said = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert 1 <= len(said) <= 3
    assert "'/recall.v1.RecallService/Recall' from ipv4:127.0.0.1" in said[0]
    assert "the token is not known" in said[0]
    assert "kangaroo" not in caplog.text


# --- addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "only_here"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_addresses_that_others_can_reach_are_told_from_those_of_this_machine(host, only_here):
    assert is_loopback(host) is only_here


def test_others_are_not_listened_to_in_plain_text_unless_that_is_meant(world, pair, caplog):
    opened = with_server(world.config, host="0.0.0.0")
    with pytest.raises(ConfigError, match=r"^server\.host: 0\.0\.0\.0 is open to others.*--insecure"):
        check(opened)
    check(with_server(opened, insecure=True))
    assert "0.0.0.0 is open to others, without encryption and without a check of who calls" in caplog.text
    caplog.clear()
    check(with_server(secured(world, **pair).config, host="0.0.0.0"))
    assert "without a check of who calls" in caplog.text


def test_metrics_are_not_shown_to_others_unless_that_is_meant(world, pair):
    check(with_server(world.config, metrics_host="0.0.0.0"))  # there are none
    shown = with_server(secured(world, **pair).config, metrics_host="0.0.0.0", metrics_port=9000)
    with pytest.raises(ConfigError, match=r"^server\.metrics_host: "):
        check(shown)
    check(with_server(shown, insecure=True))


# --- limits ------------------------------------------------------------------------------------------------


async def test_connections_beyond_the_limit_are_closed(world):
    async with running(world, max_connections=2) as port:
        clients = [
            AsyncRecallClient(
                f"127.0.0.1:{port}", timeout=PATIENCE, options=(*OWN_POOL, ("grpc.enable_retries", 0))
            )
            for _ in range(3)
        ]
        for client in clients[:2]:
            await client.recall(user_id=1)
        with pytest.raises(grpc.RpcError) as caught:
            await clients[2].recall(user_id=1)
        assert caught.value.code() is UNAVAILABLE
        await clients[0].close()
        await clients[2].wait_ready()
        await clients[2].recall(user_id=1)
        for client in clients[1:]:
            await client.close()


async def test_streams_of_a_connection_are_limited(world):
    def announced(port: int) -> dict[int, int]:
        raw = Raw(port)
        payload = next(payload for kind, payload in raw.frames() if kind == SETTINGS)
        return dict(struct.iter_unpack("!HI", payload))

    async with running(world, max_streams=3) as port:
        assert (await asyncio.to_thread(announced, port))[MAX_CONCURRENT_STREAMS] == 3


async def test_large_messages_and_large_headers_are_refused(world):
    async with (
        running(world, max_message_bytes=10_000, max_header_bytes=2_000) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        recall = channel.unary_unary("/recall.v1.RecallService/Recall")
        unknown_field = b"\x9a\x01\x90\x4e" + bytes(10_000)  # field 19, 10,000 bytes
        call = recall(unknown_field, timeout=PATIENCE)
        assert await call.code() is EXHAUSTED
        assert "larger than max" in await call.details()
        for _ in range(10):
            assert await recall(b"", metadata=(("x", "y" * 2_500),), timeout=PATIENCE).code() is EXHAUSTED
        assert (
            await recall(b"", metadata=(("x", "y" * 1_000),), timeout=PATIENCE).code() is grpc.StatusCode.OK
        )


async def test_a_small_message_that_unpacks_to_a_large_one_is_refused(world):
    async with (
        running(world, max_message_bytes=1 << 20) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", compression=grpc.Compression.Gzip) as channel,
    ):
        recall = channel.unary_unary("/recall.v1.RecallService/Recall")
        unknown_field = b"\x9a\x01\x80\x80\x80\x10" + bytes(32 << 20)  # field 19
        call = recall(unknown_field, timeout=PATIENCE)
        assert await call.code() is EXHAUSTED
        assert await recall(b"", timeout=PATIENCE).code() is grpc.StatusCode.OK


async def test_who_says_nothing_or_pings_without_end_is_cut_off(world):
    def said(port: int, hello: bool, data: bytes = b"") -> list[tuple[int, bytes]]:
        raw = Raw(port, hello)
        raw.send(data)
        return list(raw.frames())

    async with running(world, handshake_seconds=0.3) as port:
        frames = await asyncio.to_thread(said, port, False)
        assert b"handshake timeout" in frames[-1][1]
    async with running(world) as port:
        frames = await asyncio.to_thread(said, port, True, frame(PING, payload=bytes(8)) * 10)
        assert frames[-1][0] == GOAWAY
        assert b"too_many_pings" in frames[-1][1]
    async with running(world, idle_seconds=0.3) as port:
        frames = await asyncio.to_thread(said, port, True)
        assert frames[-1][0] == GOAWAY


class _Silence:
    """An iterator of messages that never come, until it is ended."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def __iter__(self) -> _Silence:
        return self

    def __next__(self) -> bytes:
        self.ended.wait()
        raise StopIteration


class Idle:
    """An ingest service whose streams may be idle for a moment only."""

    def __init__(self, folder: Path) -> None:
        config = ingest_config()
        settings = config.security.model_copy(update={"stream_idle_seconds": 0.2})
        self._running = ingesting(folder, config=config.model_copy(update={"security": settings}))

    def __enter__(self) -> str:
        return self._running.__enter__().target

    def __exit__(self, *error: Any) -> None:
        self._running.__exit__(*error)


def test_a_stream_on_which_nothing_comes_is_ended_and_clients_go_on(tmp_path):
    def events(item: int) -> list[Event]:
        return [Event(1, Action(item, "click"))]

    async def slowly() -> AsyncIterator[tuple[int, list[Event]]]:
        for offset in range(3):
            yield offset, events(offset)
            await asyncio.sleep(0.6)

    async def streamed(target: str) -> list[int]:
        async with AsyncIngestClient(target) as client:
            return [answer.offset async for answer in client.stream(slowly(), patience=PATIENCE)]

    with Idle(tmp_path) as target, grpc.insecure_channel(target) as channel:
        silence = _Silence()
        silent = channel.stream_stream("/recall.v1.IngestService/ReportStream")(silence)
        with pytest.raises(grpc.RpcError) as caught:
            next(silent)
        silence.ended.set()
        assert caught.value.code() is UNAVAILABLE
        assert caught.value.details() == "nothing came on the stream for 0.2 s"
        assert asyncio.run(streamed(target)) == [0, 1, 2]
        with IngestClient(target) as client, client.open_stream() as stream:
            for offset in range(2):
                stream.send(offset, events(offset))
                answer = stream.receive(PATIENCE)
                assert answer is not None
                assert answer.offset == offset
                time.sleep(0.6)


# --- secrets -----------------------------------------------------------------------------------------------


def raw_config(**more: Any) -> dict[str, Any]:
    scene = {"quotas": {"popular": 1}, "fallback": []}
    return {"interest": {"click": 1.0}, "channels": {"popular": {}}, "scenes": {"default": scene}, **more}


def test_a_configuration_shows_no_password():
    config = parse_config(raw_config(state={"url": "redis://me:kangaroo@host"}))
    assert config.state.url == "redis://me:kangaroo@host"
    assert "kangaroo" not in f"{config!r} {config} {config.state!r} {config.state}"
    for wrong in (
        {"url": ["redis://me:kangaroo@host"]},
        "redis://me:kangaroo@host",
        {"urls": "redis://:kangaroo@h"},
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config(raw_config(state=wrong))
        error: BaseException | None = caught.value
        while error is not None:
            assert "kangaroo" not in f"{error} {error!r}"
            error = error.__cause__


async def test_no_token_is_in_the_log_or_in_an_error(world, authority, pair, web, tokens, caplog):
    caplog.set_level(logging.DEBUG)
    texts = []
    async with running(world, **pair, client_ca=str(authority.ca), tokens=tokens) as port:
        await ask(port, **web, token=TOKENS["web"])
        texts += [str(await refused(port, **web, token=wrong)) for wrong in ("kangaroo-wrong", "kangaroo")]
        client = AsyncRecallClient(f"127.0.0.1:{port}", **web, token=TOKENS["web"])
        texts += [repr(client), repr(client._access), repr(vars(client._access)["credentials"])]
        await client.close()
    texts.append(repr(secured(world, tokens=tokens).config))
    for text in (caplog.text, *texts):
        assert "kangaroo" not in text


def test_no_password_of_the_store_is_in_the_log_or_in_an_error(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.delenv("RECALL_STATE_URL", raising=False)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"  # nothing listens there
        password = tmp_path / "password"
        password.write_text("kangaroo/1\n")
        texts = []
        for state in (
            {"url": f"redis://me:kangaroo@{address}"},
            {"url": f"redis://me@{address}", "password_file": str(password)},
            {"url": f"redis://:kanga/kangaroo@{address}"},
            {"url": f"redis+cluster://me:kangaroo@{address}"},
        ):
            config = parse_config(raw_config(state=state))
            with pytest.raises(StateError) as caught, open_state(config):
                pass
            error: BaseException | None = caught.value
            while error is not None:
                texts += [str(error), repr(error)]
                error = error.__cause__
            texts.append(repr(config))
    assert len(texts) > 8
    for text in (caplog.text, *texts):
        assert "kangaroo" not in text


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.fixture
def wrong(tmp_path, authority, pair, tokens) -> dict[str, Any]:
    """Files that are wrong in one way each."""
    other = authority.issue("other")
    files = {
        "other_key": str(other[1]),
        "absent": str(tmp_path / "absent"),
        "garbage": str(tmp_path / "garbage"),
        "encrypted": str(tmp_path / "encrypted.key"),
        "writable": str(tmp_path / "writable"),
        "plain": str(tmp_path / "plain"),
        "twice": str(tmp_path / "twice"),
    }
    Path(files["garbage"]).write_bytes(b"\xff\x00 no certificate")
    subprocess.run(
        ["openssl", "ec", "-in", pair["key"], "-aes128", "-passout", "pass:x", "-out", files["encrypted"]],
        check=True,
        capture_output=True,
    )
    shutil.copy(tokens, files["writable"])
    Path(files["writable"]).chmod(0o622)
    Path(files["plain"]).write_text("# these\n\nweb:kangaroo\n")
    Path(files["twice"]).write_text(line("a", "kangaroo") + line("b", "kangaroo"))
    return {**pair, "ca": str(authority.ca), "tokens": tokens, **files}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"certificate": "certificate"}, r"^security\.key: is needed too"),
        ({"key": "key"}, r"^security\.certificate: is needed too"),
        ({"client_ca": "ca"}, r"^security\.certificate: is needed too"),
        (
            {"certificate": "absent", "key": "key"},
            r"^security\.certificate: .*absent cannot be read: No such file",
        ),
        ({"certificate": "certificate", "key": "absent"}, r"^security\.key: .*absent cannot be read"),
        (
            {"certificate": "garbage", "key": "key"},
            r"^security\.certificate: .*cannot be used as a certificate",
        ),
        ({"certificate": "certificate", "key": "garbage"}, r"^security\.certificate: .*cannot be used"),
        (
            {"certificate": "certificate", "key": "other_key"},
            r"^security\.key: is not the key of security\.cert",
        ),
        ({"certificate": "certificate", "key": "encrypted"}, r"^security\.key: is encrypted"),
        (
            {"certificate": "certificate", "key": "key", "client_ca": "garbage"},
            r"^security\.client_ca: has no certificates",
        ),
        ({"certificate": "certificate", "key": "key", "client_ca": "key"}, r"^security\.client_ca: has no"),
        ({"tokens": "absent"}, r"^security\.tokens: .*cannot be read: No such file"),
        ({"tokens": "writable"}, r"^security\.tokens: .*may be written by others"),
        ({"tokens": "plain"}, r"^security\.tokens: line 3: expected NAME:SHA256"),
        ({"tokens": "twice"}, r"^security\.tokens: line 2: this token is another name's already"),
        (
            {"tokens": "tokens", "allow": AllowConfig(ingest=("token:nobody",))},
            r"^security\.allow\.ingest: there is no 'token:nobody' in security\.tokens; known: token:feed, token:web",
        ),
        (
            {"tokens": "tokens", "allow": AllowConfig(admin=("certificate:web",))},
            r"^security\.allow\.admin: 'certificate:web' needs security\.client_ca",
        ),
        ({"allow": AllowConfig(recall=())}, r"^security\.allow\.recall: nobody can be told apart"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(world, wrong, settings, said):
    given = {
        name: wrong.get(value, value) if isinstance(value, str) else value for name, value in settings.items()
    }
    with pytest.raises(ConfigError, match=said) as caught:
        check(secured(world, **given).config)
    assert "kangaroo" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_services_and_callers_are_refused_with_the_configuration():
    for allow, said in (
        ({"search": ["*"]}, r"security\.allow\.search: unknown key; known: recall, ingest, admin"),
        ({"recall": ["web"]}, r"security\.allow\.recall\.0: "),
        ({"recall": "*"}, r"security\.allow\.recall: "),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_config(raw_config(security={"allow": allow}))


def test_files_that_everybody_may_read_are_warned_of(world, pair, tokens, tmp_path, caplog):
    key = tmp_path / "open.key"
    shutil.copy(pair["key"], key)
    key.chmod(0o644)
    Path(tokens).chmod(0o644)
    check(secured(world, certificate=pair["certificate"], key=str(key), tokens=tokens).config)
    assert "security.key: " in caplog.text
    assert "security.tokens: " in caplog.text


# --- clients and the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("localhost:1", True),
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("ipv6:[::1]:1", True),
        ("dns:///localhost:1", True),
        ("unix:///run/recall.sock", True),
        ("recall:50051", False),
        ("10.0.0.1:1", False),
        ("dns:///localhost.example.org:1", False),
        ("ipv4:10.0.0.1:1,127.0.0.1:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
    ],
)
def test_a_client_knows_what_is_on_this_machine(target, local):
    assert is_local(target) is local


def test_a_client_does_not_send_its_token_in_plain_text_to_others(authority, web):
    with pytest.raises(
        ValueError, match="without TLS others could read the token on its way to recall:50051"
    ):
        RecallClient("recall:50051", token="kangaroo")
    for allowed in ({"insecure": True}, {"tls": True}, {"ca": authority.ca}, {**web}):
        RecallClient("recall:50051", token="kangaroo", **allowed).close()
    for token in ("", "two words", "ümlaut", "line\n"):
        with pytest.raises(ValueError, match="printable ASCII"):
            RecallClient("localhost:1", token=token)
    with pytest.raises(ValueError, match="given together"):
        RecallClient("localhost:1", certificate=web["certificate"])
    with pytest.raises(FileNotFoundError):
        RecallClient("localhost:1", ca="absent.pem")
    with pytest.raises(TypeError):
        RecallClient("localhost:1", tokn="kangaroo")  # type: ignore[call-arg]


def run(*arguments: Any, **environment: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, " ".join(done.output.split())


async def test_the_command_line_sends_token_and_certificate(world, authority, pair, web, tokens, tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKENS['web']}\n")
    paths = [f"--{name}={path}" for name, path in web.items()]
    async with running(world, **pair, client_ca=str(authority.ca), tokens=tokens) as port:
        query = ("query", "--user", 1, "--json", "--target", f"127.0.0.1:{port}", *paths)
        status, text = await asyncio.to_thread(run, *query, f"--token-file={file}")
        assert (status, text[0]) == (0, "{")
        status, text = await asyncio.to_thread(lambda: run(*query, RECALL_TOKEN_FILE=str(file)))
        assert status == 0
        file.write_text("kangaroo")
        status, text = await asyncio.to_thread(run, *query, f"--token-file={file}")
        assert status == 1
        assert "answered UNAUTHENTICATED: the token is not known" in text


def test_the_command_line_says_what_is_wrong(authority, tmp_path):
    file = tmp_path / "token"
    file.write_text("kangaroo\n")
    for arguments, said in (
        (("--token-file", tmp_path / "absent"), "--token-file: "),
        (("--ca", tmp_path), "--ca: "),
        (("--certificate", authority.ca), "given together"),
        (("--target", "recall:1", "--token-file", file), "without TLS"),
    ):
        status, text = run("query", *arguments)
        assert status == 2
        assert said in text
        assert "kangaroo" not in text


def test_serve_and_check_refuse_what_is_open(tmp_path):
    config = tmp_path / "recall.toml"
    shipped = Path(__file__).parents[3].joinpath("engine", "recall.toml").read_text()
    config.write_text(shipped.replace('host = "127.0.0.1"', 'host = "0.0.0.0"', 1))
    assert load_config(config).server.host == "0.0.0.0"
    status, text = run("check", "--config", config, "--store", tmp_path / "store")
    assert status == 2
    assert "is open to others" in text
    status, text = run("serve", "--config", config, "--store", tmp_path / "store")
    assert status == 2
    assert "server.host: 0.0.0.0 is open to others" in text
    status, text = run("serve", "--insecure", "--config", config, "--store", tmp_path / "store")
    assert status == 2
    assert "no release has been published here" in text


def test_defaults_are_the_safe_ones():
    assert is_loopback(ServerConfig().host)
    assert is_loopback(ServerConfig().metrics_host)
    assert not ServerConfig().insecure
    assert ingest_config().security == SecurityConfig()
