"""A kept HTTP connection to a server: JSON in and out, timeouts, retries with backoff, a limit."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from xtoken._extras import needs_extra
from xtoken._files import JsonValue, parse_json
from xtoken.errors import (
    FormatError,
    OptionError,
    RefusedRequestError,
    ServerError,
    UnavailableServerError,
)

if TYPE_CHECKING:
    import ssl

    import httpx2

# Answers that another try may change: too busy, or broken for a moment.
_TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE_SECONDS = 30.0
# Of its own name: a key for another service must go to no server that it was not set for.
KEY_VARIABLE = "XTOKEN_API_KEY"
_USERINFO = re.compile(r"((?:[A-Za-z][A-Za-z0-9+.-]*://)?)([^/?#]*)@(.*)", re.DOTALL)
# What is shorter stands in words, too, and hides nothing.
_SHORTEST_SECRET = 4


def without_password(url: str) -> str:
    """An address as it is kept, compared and told: without the name and password in it.

    >>> without_password("http://me:secret@localhost:8000/v1")
    'http://localhost:8000/v1'
    """
    found = _USERINFO.fullmatch(url)
    return url if found is None else found[1] + found[3]


def _login(url: str) -> tuple[str, str] | None:
    """The name and the password in an address."""
    found = _USERINFO.fullmatch(url)
    if found is None or not found[2]:
        return None
    name, _, password = found[2].partition(":")
    return urllib.parse.unquote(name), urllib.parse.unquote(password)


def _key(given: str | None) -> str | None:
    """The key that is sent: the given one, or that of the environment."""
    name = "api_key"
    if given is None:
        name, given = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "")
    key = given.strip()
    if not key:
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise OptionError(
            f"{name} holds a character that no key has (it is not shown); pass letters, digits and "
            "signs of ASCII alone"
        )
    return key


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently a request is repeated.

    Attributes:
        retries: tries after the first one.
        backoff: seconds before the second try; doubled before each further one, 30 at most.
        timeout: seconds that the server may be silent.
    """

    retries: int = 5
    backoff: float = 0.5
    timeout: float = 120.0

    def pause(self, tries: int) -> float:
        """Seconds to wait after so many tries, spread so that clients do not come back at once."""
        longest = min(self.backoff * 2.0 ** (tries - 1), _LONGEST_PAUSE_SECONDS)
        return longest * random.uniform(0.75, 1.0)


@dataclass(eq=False)
class Connection:
    """Connections to one server, kept between requests and shared by threads.

    Args:
        url: where the server listens; a path in it stays, a trailing `/v1` does not. A name and
            password in it (`http://NAME:PASSWORD@HOST`) are sent, and stand nowhere else.
        connections: kept at most.
        policy: of retries.
        api_key: sent as a bearer token; None for the environment variable `XTOKEN_API_KEY` where it
            is set and the address has no password; empty for none.

    Raises:
        ServerError: the address is none.
        OptionError: a key that no header can hold, or beside a password.
    """

    url: str
    connections: int = 8
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    api_key: str | None = field(default=None, repr=False)
    # Set when a request has failed for good: the others give up instead of waiting.
    stopped: threading.Event = field(default_factory=threading.Event)
    # Of all variants together.
    _troubles: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        given, login = self.url, _login(self.url)
        self.url = without_password(given).rstrip("/").removesuffix("/v1")
        if login is not None and self.api_key:
            raise OptionError(
                f"api_key= and a password in the address of {self.url}, and a request has one of "
                "them; pass one"
            )
        key = self.api_key = None if login is not None else _key(self.api_key)
        self._secrets = [each for each in (key, *(login or ())[1:]) if each]
        with needs_extra():
            import httpx2
        self._httpx = httpx2
        try:
            address = httpx2.URL(self.url)
        except httpx2.InvalidURL:
            address = httpx2.URL("")
        if address.scheme not in ("http", "https") or not address.host:
            # Where a password is spelled wrongly, it ends at any later @.
            shown = re.sub(r"\A([^:/?#]*://)?.*@", r"\1", given, flags=re.DOTALL)
            raise ServerError(
                f"url = {shown!r}, expected the address of a server such as http://localhost:8000"
            )
        self._client: httpx2.Client = httpx2.Client(
            timeout=httpx2.Timeout(
                self.policy.timeout,
                connect=min(10.0, self.policy.timeout),
                pool=None,  # another thread's request may take its time
            ),
            limits=httpx2.Limits(
                max_connections=self.connections, max_keepalive_connections=self.connections
            ),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            auth=login,
            verify=_certificates(),
        )

    @property
    def troubles(self) -> int:
        """Tries that got no answer until now: behind each there may be another server."""
        return len(self._troubles)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def variant(
        self, *, stopped: threading.Event | None = None, retries: int | None = None
    ) -> Connection:
        """The same connections, for requests that an event ends or that are repeated less."""
        same = copy.copy(self)
        if stopped is not None:
            same.stopped = stopped
        if retries is not None:
            same.policy = replace(self.policy, retries=retries)
        return same

    def get(self, path: str) -> JsonValue:
        """The JSON that a path answers with.

        Raises: as `post`.
        """
        return self._request("GET", path, None)

    def post(self, path: str, body: Mapping[str, JsonValue]) -> JsonValue:
        """The JSON that a path answers a body with.

        Raises:
            RefusedRequestError: the server refused the request; repeating it would not help.
            UnavailableServerError: no answer in all tries.
        """
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: Mapping[str, JsonValue] | None) -> JsonValue:
        began = time.monotonic()
        tries = 0
        while True:
            tries += 1
            pause = self.policy.pause(tries)
            try:
                response = self._client.request(method, self.url + path, json=body)
                if response.is_success:
                    return parse_json(response.content)
                if response.status_code not in _TEMPORARY:
                    raise self._refused(path, response)
                failure = f"{response.status_code} {self._reason(response)}"
                pause = max(pause, _retry_after(response))
            except self._httpx.TimeoutException as error:
                failure = f"silent for {self.policy.timeout:g} s ({type(error).__name__})"
            except self._httpx.RequestError as error:
                # Refused, reset, or cut off in the middle of an answer.
                failure = f"{type(error).__name__}: {error}"
            except FormatError as error:
                # A whole answer by its length, which something on the way cut.
                failure = f"an answer that {str(error).rpartition('; ')[0]}"
            self._troubles.append(time.monotonic())
            if tries > self.policy.retries or self.stopped.wait(pause):
                raise UnavailableServerError(
                    f"{self.url}{path} gave no answer in {tries} tries over "
                    f"{time.monotonic() - began:.1f} s (last: {failure}); start the server again "
                    "and repeat the command, with a larger --timeout (distill: --teacher-timeout), "
                    "or raise timeout= and retries= in Python"
                )

    def _refused(self, path: str, response: httpx2.Response) -> RefusedRequestError:
        reason = self._reason(response)
        remedy = "look at the server's log"
        if response.status_code in (401, 403):
            remedy = f"set {KEY_VARIABLE} to the server's key, or pass api_key= in Python"
            if self.api_key is not None:
                remedy = f"correct the key in {KEY_VARIABLE} or api_key="
            elif self._secrets:
                remedy = "correct the name and password in the address"
        elif response.status_code == 404:
            remedy = "check url=, api= and model= against the server"
        return RefusedRequestError(
            f"{self.url}{path} refused the request ({response.status_code}: {reason}); {remedy}",
            response.status_code,
            reason,
        )

    def _reason(self, response: httpx2.Response) -> str:
        """What an error's body says, in one line: vLLM and SGLang nest it differently."""
        text = response.text
        content: JsonValue = text
        with contextlib.suppress(FormatError):
            content = parse_json(text)
        for key in ("error", "message"):
            if isinstance(content, dict) and key in content:
                content = content[key]
        said = " ".join(str(content).split())
        for secret in self._secrets:
            # Some servers say which key they refuse.
            if len(secret) >= _SHORTEST_SECRET:
                said = said.replace(secret, "***")
        return said[:500]


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Whom to trust, read once: each client would read the files again, for 40 ms."""
    import httpx2

    return httpx2.create_ssl_context()


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait, within our own limit."""
    try:
        seconds = float(response.headers.get("retry-after", "0"))
    except ValueError:  # a date
        return 0.0
    return min(max(seconds, 0.0), _LONGEST_PAUSE_SECONDS)
