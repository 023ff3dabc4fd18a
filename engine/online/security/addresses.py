"""Which addresses a server may listen on: without TLS only those of this machine, unless told otherwise."""

from __future__ import annotations

import ipaddress

from engine.config import Config
from engine.core.errors import ConfigError


def check_address(config: Config) -> None:
    """Refuse to listen in plain text where others than this machine can connect.

    Raises:
        ConfigError: `server.host`, or `server.metrics_host` while there are metrics, is such an address, and
            `server.insecure` is not set.
    """
    server, settings = config.server, config.security
    for one, other in (("key", "certificate"), ("certificate", "key"), ("client_ca", "certificate")):
        if getattr(settings, one) and not getattr(settings, other):
            raise ConfigError(f"is needed too, as security.{one} is set", f"security.{other}")
    if server.insecure:
        return
    if not settings.certificate and not is_loopback(server.host):
        text = (
            f"{server.host} is open to others without encryption: set security.certificate and security.key, or say "
            "that it is meant with server.insecure = true or --insecure"
        )
        raise ConfigError(text, "server.host")
    if server.metrics_port and not is_loopback(server.metrics_host):
        text = (
            f"{server.metrics_host} is open to others, and metrics have neither encryption nor a check of who asks: "
            "say that it is meant with server.insecure = true or --insecure"
        )
        raise ConfigError(text, "server.metrics_host")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address; of names only localhost is known to be such a one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
