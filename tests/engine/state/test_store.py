"""The connection: addresses, credentials, TLS, clusters that move slots, servers that go and come back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from stores import cluster, connected, free_ports, redis_server, server

from engine.core.errors import StateError, StateUnavailableError
from engine.state.embedded import server_binary
from engine.state.store import Script, StateStore
from engine.state.url import address_of, state_url


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("", "must begin with"),
        ("localhost:6379", "must begin with"),
        ("http://:secret@host", "must begin with"),
        ("redis://:secret@host:port/0", "is wrong"),
        ("redis://:secret@host/0?colour=red", "unknown option 'colour'"),
        ("redis://:secret@host/0?retry_on_timeout=perhaps&db=x", "is wrong"),
        ("redis://:sec/secret@host/0", "unreadable URL. is wrong: .*percent-encode"),
        ("redis://me:secret/x@host/0", "percent-encode"),
        ("redis://me:12?secret=3@host/0", "percent-encode"),
        ("redis://me:secret#x@host/0", "percent-encode"),
        ("redis://[secret", "percent-encode"),
    ],
)
def test_a_wrong_url_is_named_without_its_password(url: str, what: str) -> None:
    with pytest.raises(StateError, match=what) as raised:
        StateStore(url, "test", 100)
    assert "secret" not in str(raised.value)


def test_the_environment_stands_in_for_the_configured_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECALL_STATE_URL", raising=False)
    assert state_url("redis://a") == "redis://a"
    monkeypatch.setenv("RECALL_STATE_URL", "redis://b")
    assert state_url("redis://a") == "redis://b"


def test_an_address_shows_no_credentials() -> None:
    assert address_of("rediss://me:secret@host:1/0?ssl_keyfile=k") == "rediss://host:1"
    assert address_of("unix://:secret@/run/s.sock") == "unix:///run/s.sock"


def test_a_password_may_stand_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RECALL_STATE_URL", raising=False)
    file = tmp_path / "password"
    file.write_text("a/b:c@d?%\nsecond line\n")
    quoted = "a%2Fb%3Ac%40d%3F%25"
    assert state_url("redis://host:1/0", str(file)) == f"redis://:{quoted}@host:1/0"
    assert state_url("rediss://me@host", str(file)) == f"rediss://me:{quoted}@host"
    assert state_url("redis+cluster://me:old@host", str(file)) == f"redis+cluster://me:{quoted}@host"
    assert state_url("unix:///run/s.sock", str(file)) == f"unix://:{quoted}@/run/s.sock"
    assert (
        StateStore(state_url("redis://me@h:1", str(file)), "test", 100)._node.options["password"]
        == "a/b:c@d?%"
    )
    for url, path, what in (
        ("", str(file), "no URL"),
        ("none", str(file), "no URL"),
        ("redis://host", str(tmp_path / "absent"), "cannot be read: No such file"),
        ("redis://host", str(tmp_path), "cannot be read"),
    ):
        with pytest.raises(StateError, match=what):
            state_url(url, path)
    file.write_text("\n")
    with pytest.raises(StateError, match="is empty"):
        state_url("redis://host", str(file))


def test_commands_answer_raw(any_store: StateStore) -> None:
    any_store.execute("SET", b"raw", 1.5)
    assert any_store.execute(b"GET", "raw") == b"1.5"
    assert any_store.execute("GET", "nothing") is None
    any_store.execute("XADD", "stream", "1-1", "c", b"\xff")
    assert any_store.execute("XRANGE", "stream", "-", "+") == [[b"1-1", [b"c", b"\xff"]]]
    assert any_store.execute("XREAD", "COUNT", 1, "STREAMS", "stream", "0") == [
        [b"stream", [[b"1-1", [b"c", b"\xff"]]]]
    ]
    any_store.ping()


def test_an_error_stands_in_its_place(any_store: StateStore) -> None:
    any_store.execute("SET", "text", "x")
    replies = any_store.pipeline([("GET", "text"), ("INCR", "text"), ("GET", "text")])
    assert replies[0] == replies[2] == b"x"
    assert isinstance(replies[1], Exception)
    with pytest.raises(StateError, match="not an integer") as raised:
        any_store.execute("INCR", "text")
    assert not isinstance(raised.value, StateUnavailableError)
    assert any_store.pipeline([]) == []


def test_scripts_run_where_their_keys_are(any_store: StateStore) -> None:
    script = Script(f"-- {time.time_ns()}\nreturn redis.call('INCRBY', KEYS[1], ARGV[1])")
    replies = any_store.run_script(script, [([b"count%d" % n], [n]) for n in range(40)])
    assert all(isinstance(reply, int) for reply in replies)


def test_a_read_that_is_refused_leaves_the_connection_as_it_was(any_store: StateStore) -> None:
    nodes = [
        StateStore(
            f"unix://{node.options['path']}" if "path" in node.options else f"redis://{node.address}",
            "t",
            1000,
        )
        for node in any_store._nodes()
    ]
    for node in nodes:
        node.execute("ACL", "SETUSER", "default", "-mget")
    try:
        for _ in range(3):
            with pytest.raises(StateError, match=r"refused a command: .*(mget|MGET)") as raised:
                any_store.mget_users([b"{a}", b"{b}", b"{c}"], [b"r", b"f"])
            assert not isinstance(raised.value, StateUnavailableError)
            assert any_store.execute("GET", "nothing") is None
    finally:
        for node in nodes:
            node.execute("ACL", "SETUSER", "default", "+mget")
    assert list(any_store.mget_users([b"{a}", b"{b}"], [b"r", b"f"])) == [None] * 4


def test_a_full_store_is_unavailable_and_not_wrong(tmp_path: Path) -> None:
    options = ("--port", "0", "--unixsocket", str(tmp_path / "s"), "--maxmemory", "1")
    with server(server_binary(), tmp_path, *options):
        store = connected(f"unix://{tmp_path / 's'}")
        with pytest.raises(StateUnavailableError, match="memory"):
            store.execute("SET", "a", "b")


def test_a_store_that_went_away_is_not_asked_for_a_moment_and_found_again(tmp_path: Path) -> None:
    options = ("--port", "0", "--unixsocket", str(tmp_path / "s"), "--appendonly", "yes")
    with server(server_binary(), tmp_path, *options):
        store = connected(f"unix://{tmp_path / 's'}", 200.0)
        store.execute("SET", "a", 1)
    with pytest.raises(StateUnavailableError, match="does not answer"):
        store.execute("GET", "a")
    with pytest.raises(StateUnavailableError, match="does not answer"):
        store.mget_users([b"a"], [b"r"])
    with server(server_binary(), tmp_path, *options):
        deadline = time.monotonic() + 60
        while True:
            try:
                assert store.execute("GET", "a") == b"1"
                break
            except StateUnavailableError:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_a_store_that_hangs_costs_one_time_limit_and_then_nothing(tmp_path: Path) -> None:
    options = ("--port", "0", "--unixsocket", str(tmp_path / "s"))
    with server(server_binary(), tmp_path, *options) as process:
        store = connected(f"unix://{tmp_path / 's'}", 500.0)
        store.mget_users([b"test:{u1}"], [b"r"])
        os.kill(process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(StateUnavailableError):
                store.mget_users([b"test:{u1}"], [b"r"])
            # Many times what fits between the first failure and the end of the rest if each waited.
            failures = 0
            for _ in range(1000):
                with pytest.raises(StateUnavailableError):
                    store.mget_users([b"test:{u1}"], [b"r"])
                failures += 1
            assert failures == 1000
        finally:
            os.kill(process.pid, signal.SIGCONT)
        deadline = time.monotonic() + 60
        while True:
            try:
                assert list(store.mget_users([b"test:{u1}"], [b"r"])) == [None]
                break
            except StateUnavailableError:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_a_read_that_took_too_long_holds_up_no_write(tmp_path: Path) -> None:
    options = ("--port", "0", "--unixsocket", str(tmp_path / "s"))
    with server(server_binary(), tmp_path, *options):
        store = connected(f"unix://{tmp_path / 's'}", 50.0)
        store.execute("CLIENT", "PAUSE", 400, "ALL")
        with pytest.raises(StateUnavailableError, match="Timeout"):
            store.mget_users([b"test:{u1}"], [b"r"])
        assert store.execute("SET", "a", 1) == b"OK"


def test_a_password_is_needed_and_never_shown(tmp_path: Path) -> None:
    options = ("--port", "0", "--unixsocket", str(tmp_path / "s"), "--requirepass", "right%horse")
    with server(server_binary(), tmp_path, *options):
        store = connected(f"unix://:right%25horse@{tmp_path / 's'}")
        assert store.execute("SET", "a", 1) == b"OK"
        assert "horse" not in repr(store._node) + store.address
        for url in (f"unix://:wrong-horse@{tmp_path / 's'}", f"unix://{tmp_path / 's'}"):
            with pytest.raises(StateUnavailableError) as raised:
                StateStore.connect(url, "test", 1000)
            assert "horse" not in str(raised.value)


def test_tls_with_a_password(tmp_path: Path) -> None:
    binary = redis_server()
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on PATH")
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=localhost",
            ),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    for _ in range(5):
        (port,) = free_ports(1)
        options = (
            *("--port", "0", "--tls-port", str(port), "--requirepass", "right-horse"),
            *(
                "--tls-cert-file",
                str(certificate),
                "--tls-key-file",
                str(key),
                "--tls-ca-cert-file",
                str(certificate),
            ),
            *("--tls-auth-clients", "no", "--bind", "127.0.0.1"),
        )
        with server(binary, tmp_path, *options) as process:
            try:
                store = connected(f"rediss://:right-horse@127.0.0.1:{port}?ssl_ca_certs={certificate}")
            except StateUnavailableError:
                if process.poll() is not None:  # somebody took the port meanwhile
                    continue
                raise
            assert store.execute("SET", "a", b"x" * 300_000) == b"OK"
            assert store.execute("GET", "a") == b"x" * 300_000
            assert list(store.mget_users([b"a", b"b"], [b"r", b"f"])) == [None] * 4
            # A certificate that nobody vouches for is refused.
            with pytest.raises(StateUnavailableError, match="certificate"):
                StateStore.connect(f"rediss://:right-horse@127.0.0.1:{port}", "test", 1000)
            store.close()
        return
    pytest.skip("no free port")


def test_a_cluster_that_moves_a_slot_is_followed(tmp_path: Path) -> None:
    with cluster(tmp_path) as url:
        store = connected(url)
        assert store._cluster is not None
        for n in range(50):
            store.execute("SET", f"{{tag}}:{n}", n)
        slot = store.execute("CLUSTER", "KEYSLOT", "{tag}")
        owner = store._cluster._slots[slot]
        target = next(node for node in store._cluster.nodes() if node is not owner)
        assert owner is not None
        a, b = (connected(f"redis://{node.address}") for node in (owner, target))
        names = [store_.execute("CLUSTER", "MYID").decode() for store_ in (a, b)]
        b.execute("CLUSTER", "SETSLOT", slot, "IMPORTING", names[0])
        a.execute("CLUSTER", "SETSLOT", slot, "MIGRATING", names[1])
        host, port = target.address.split(":")
        for n in range(25):  # half of the keys have gone: ASK
            a.execute("MIGRATE", host, port, f"{{tag}}:{n}", 0, 1000)
        got = store.pipeline([("GET", f"{{tag}}:{n}") for n in range(50)])
        assert got == [str(n).encode() for n in range(50)]
        for n in range(25, 50):
            a.execute("MIGRATE", host, port, f"{{tag}}:{n}", 0, 1000)
        for node in (b, a):
            node.execute("CLUSTER", "SETSLOT", slot, "NODE", names[1])
        suffixes = [b"%d" % n for n in range(50)]
        assert list(store.mget_users([b"{tag}", b"{other}"], suffixes)) == [*suffixes, *[None] * 50]  # MOVED
        got = store.pipeline([("GET", f"{{tag}}:{n}") for n in range(50)])
        assert got == [str(n).encode() for n in range(50)]
        assert store._cluster._slots[slot].address == target.address  # type: ignore[union-attr]


def test_no_cluster_is_told_apart(embedded: StateStore, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with server(server_binary(), tmp_path, "--port", str(port), "--bind", "127.0.0.1"):
        connected(f"redis://127.0.0.1:{port}").close()
        with pytest.raises(StateError, match="no cluster's node"):
            StateStore.connect(f"redis+cluster://127.0.0.1:{port}", "test", 1000)


def test_connections_are_shared_by_threads_and_not_piled_up(embedded: StateStore) -> None:
    def work() -> None:
        for n in range(200):
            assert embedded.execute("ECHO", n) == str(n).encode()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(map(len, embedded._node.idle.values())) <= 8
