"""Who may talk to the server, and how much of it: TLS, callers and what they may call, limits of connections.

Nothing of this is on the path of a request where nothing of it is configured. docs/security.md has the threat model.
"""

from engine.config import Config
from engine.online.security.addresses import check_address, is_loopback
from engine.online.security.gate import Gate, interceptors
from engine.online.security.limits import IdleWatch, options
from engine.online.security.tls import credentials, validity
from engine.online.security.tokens import Tokens

__all__ = [
    "Gate",
    "IdleWatch",
    "Tokens",
    "check",
    "check_address",
    "credentials",
    "interceptors",
    "is_loopback",
    "options",
    "validity",
]


def check(config: Config) -> None:
    """Look at all that `credentials` and `interceptors` would need.

    Raises:
        ConfigError: a server would not start with it.
    """
    credentials(config)
    interceptors(config)
