"""Results as HTTP POST requests with a JSON body."""

from __future__ import annotations

import http.client
import os
import random
import socket
import ssl
import threading
from time import sleep
from urllib.parse import urlsplit

from edge_anomaly_runtime.errors import UsageError

from .frame import Scored
from .record import record_line
from .sink import ItemLost, When, is_wanted

AUTHORIZATION_ENV = "EDGE_ANOMALY_WEBHOOK_AUTHORIZATION"

_BUSY = {408, 425, 429}


class WebhookSink:
    """Posts each item to `url`; by default when a camera's verdict changes.

    timeout_s: for one try as a whole, connecting included. tries: with a pause of 0.5, 1 ... s between them; after the
    last one the item is lost. An answer 2xx is a success; redirects are not followed. `authorization_env` names the
    environment variable with the Authorization header. ca: file with the authorities to trust for https.

    Raises:
        UsageError: the URL is not one, or holds a user or password.
    """

    needs_pixels = False

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 5.0,
        tries: int = 3,
        pause_s: float = 0.5,
        authorization_env: str = AUTHORIZATION_ENV,
        ca: str | None = None,
        when: When = "change",
    ) -> None:
        scheme, host, port, target = _parts(url)
        # The path and the query of a webhook are often its secret.
        self.name = f"{scheme}://{host}"
        self._host, self._port, self._target = host, port, target
        self._context = ssl.create_default_context(cafile=ca) if scheme == "https" else None
        self._timeout_s, self._tries, self._pause_s = timeout_s, tries, pause_s
        self._headers = {"Content-Type": "application/json", "User-Agent": "edge-anomaly", "Connection": "close"}
        if authorization := os.environ.get(authorization_env):
            self._headers["Authorization"] = authorization
        self._when = when

    def wants(self, item: Scored) -> bool:
        return is_wanted(self._when, item)

    def open(self) -> None: ...

    def write(self, item: Scored) -> None:
        body = record_line(item)
        fault = ""
        for attempt in range(self._tries):
            if attempt:
                sleep(self._pause_s * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))
            try:
                status = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                fault = _named(error)
                continue
            if 200 <= status < 300:
                return
            fault = f"answer {status}"
            if status < 500 and status not in _BUSY:
                raise ItemLost(f"{fault}, which another try would not change")
        raise ItemLost(f"{fault} after {self._tries} tries")

    def close(self) -> None: ...

    def _post(self, body: bytes) -> int:
        """Return the status of one request; a socket's own timeout would begin anew with every byte that drips in."""
        connection = self._connection()
        is_late = threading.Event()
        try:
            connection.connect()
            timer = threading.Timer(self._timeout_s, _cut, (connection.sock, is_late))
            timer.daemon = True
            timer.start()
            try:
                connection.request("POST", self._target, body, self._headers)
                status = connection.getresponse().status
            finally:
                timer.cancel()
            if is_late.is_set():  # cut in the middle of the headers, which reads like their end
                raise TimeoutError
            return status
        except (OSError, http.client.HTTPException):
            if is_late.is_set():
                raise TimeoutError from None
            raise
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=self._context)


def _parts(url: str) -> tuple[str, str, int | None, str]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in ("http", "https") or any(ord(letter) <= 32 for letter in url):
        raise UsageError("The URL of a webhook sink is not valid.", "Give one such as https://host/path")
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            f"The URL of the webhook at {host} holds a user or password, which everybody can see in the process list.",
            f"Put the Authorization header into the environment variable {AUTHORIZATION_ENV}.",
        )
    return parts.scheme, host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _cut(connection: socket.socket, is_late: threading.Event) -> None:
    is_late.set()
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed already


def _named(error: OSError | http.client.HTTPException) -> str:
    """Name a fault without the URL, which some exceptions repeat."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted ({error.verify_message})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__
