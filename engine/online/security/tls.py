"""TLS: the certificate of a server and its key, and for how long it is valid."""

from __future__ import annotations

import logging
import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc

from engine.config import Config, SecurityConfig
from engine.core.errors import ConfigError
from engine.online.security.addresses import check_address, is_loopback
from engine.online.security.files import read_file, signature_of, warn_of_readers
from engine.online.security.tokens import TOKENS_VARIABLE

EXPIRY_DAYS = 14
"""A certificate that ends within so many days is warned of."""

_log = logging.getLogger(__name__)


def credentials(config: Config) -> grpc.ServerCredentials | None:
    """Return what a server's port is secured with; None is a plain one. Files that change are read again.

    Raises:
        ConfigError: a file cannot be read or used, or without TLS others than this machine could connect.
    """
    check_address(config)
    settings, host = config.security, config.server.host
    if not is_loopback(host):
        named = settings.client_ca or settings.tokens or os.environ.get(TOKENS_VARIABLE)
        lacks = [
            *([] if settings.certificate else ["encryption"]),
            *([] if named else ["a check of who calls"]),
        ]
        if lacks:
            _log.warning("%s is open to others, without %s", host, " and without ".join(lacks))
    if not settings.certificate:
        return None
    pair = _KeyPair(settings)
    return grpc.dynamic_ssl_server_credentials(
        pair.configuration, pair.changed, require_client_authentication=bool(settings.client_ca)
    )


class _KeyPair:
    """The certificate, its key and the clients' authorities, and whether their files have changed."""

    def __init__(self, settings: SecurityConfig) -> None:
        self._files = {
            name: Path(value)
            for name in ("certificate", "key", "client_ca")
            if (value := getattr(settings, name))
        }
        self._signature = self._look()
        self.configuration = self._read()

    def changed(self) -> Any:
        """Return what is new; None where nothing is. gRPC calls it in every handshake, from a thread of its own."""
        signature = self._look()
        if signature == self._signature:
            return None
        # Remembered even if they are refused, so that a wrong file is told of once and not in every handshake.
        self._signature = signature
        try:
            self.configuration = self._read()
        except ConfigError as error:
            _log.error("the certificate stays as it was: %s", error)
            return None
        _log.info("certificate read anew from %s", self._files["certificate"])
        return self.configuration

    def _look(self) -> list[Any]:
        return [signature_of(file) for file in self._files.values()]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        pem = {name: read_file(file, f"security.{name}") for name, file in self._files.items()}
        warn_of_readers(self._files["key"], "security.key")
        if b"ENCRYPTED" in pem["key"]:
            raise ConfigError("is encrypted, and nobody is here to give the passphrase", "security.key")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._files["certificate"], self._files["key"], lambda: "")
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(*_what_is_wrong(error)) from None
        _check_validity(pem["certificate"], "security.certificate")
        authorities = pem.get("client_ca")
        if authorities is not None:
            try:
                context.load_verify_locations(self._files["client_ca"])
            except ssl.SSLError as error:
                text = f"has no certificates in PEM form: {error.reason or error}"
                raise ConfigError(text, "security.client_ca") from None
        return grpc.ssl_server_certificate_configuration([(pem["key"], pem["certificate"])], authorities)


def _what_is_wrong(error: OSError) -> tuple[str, str]:
    """Return what a certificate and key that cannot be used together lack, and the name of the key at fault."""
    reason = getattr(error, "reason", None) or str(error)
    if reason == "KEY_VALUES_MISMATCH":
        return "is not the key of security.certificate", "security.key"
    return f"this and security.key cannot be used as a certificate in PEM form and its key: {reason}", (
        "security.certificate"
    )


def _check_validity(pem: bytes, field: str) -> None:
    """Warn of a certificate that is not valid now, or not much longer: a clock may be wrong, and clients decide."""
    try:
        begin, end = validity(ssl.PEM_cert_to_DER_cert(_first_certificate(pem)))
    except (ValueError, IndexError):
        _log.warning("%s: cannot see how long it is valid", field)
        return
    now = datetime.now(UTC)
    if now < begin:
        _log.warning("%s: is not valid before %s; clients will refuse it", field, begin)
    elif now > end:
        _log.warning("%s: expired on %s; clients will refuse it", field, end)
    elif now + timedelta(days=EXPIRY_DAYS) > end:
        _log.warning("%s: expires on %s", field, end)


def _first_certificate(pem: bytes) -> str:
    begin, end = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    at = pem.index(begin)
    return pem[at : pem.index(end, at) + len(end)].decode("ascii")


def validity(der: bytes) -> tuple[datetime, datetime]:
    """Return from when to when a certificate is valid (RFC 5280, section 4.1).

    Args:
        der: the certificate as DER.

    Raises:
        ValueError, IndexError: it is not one.
    """
    _, at, _ = _element(der, 0)  # the certificate
    _, at, _ = _element(der, at)  # what is signed of it
    tag, _, end = _element(der, at)
    if tag == 0xA0:  # the version, which may be absent
        at = end
    for _ in range(3):  # serial number, algorithm, issuer
        at = _element(der, at)[2]
    _, at, _ = _element(der, at)
    times = []
    for _ in range(2):
        tag, begin, at = _element(der, at)
        form = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}.get(tag)
        if form is None:
            raise ValueError("expected a time")
        times.append(datetime.strptime(der[begin:at].decode("ascii"), form).replace(tzinfo=UTC))
    return times[0], times[1]


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Return the tag of the DER element at a place, where its content begins, and where it ends."""
    tag, length, at = der[at], der[at + 1], at + 2
    if length & 0x80:
        size = length & 0x7F
        length, at = int.from_bytes(der[at : at + size], "big"), at + size
    return tag, at, at + length
