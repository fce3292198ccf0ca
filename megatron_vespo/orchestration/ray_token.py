"""A Ray cluster that takes only who knows its token."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@contextmanager
def private_token(file: Path) -> Iterator[None]:
    """Ray that is started inside has token authentication (Ray 2.60) with a token of its own, written to `file`.

    Ray reads its settings from the environment alone, which its processes inherit when they are started; this process
    has it in memory then, and its environment is put back, so that other children do not learn of the file. Without
    this Ray would take, or make, the user's own ~/.ray/auth_token.
    """
    write_token(file)
    with token_of(file):
        yield


def write_token(file: Path) -> None:
    """A new one, that only this user can read."""
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))


@contextmanager
def token_of(file: Path) -> Iterator[None]:
    """As `private_token`, with the token that is in `file`: of a cluster that somebody else has started, or starts."""
    before = {name: os.environ.pop(name, None) for name in (MODE, TOKEN, TOKEN_FILE)}
    os.environ.update({MODE: "token", TOKEN_FILE: str(file)})
    try:
        # What an earlier cluster of this process left in memory; in this order, as Ray's own tests do it.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
