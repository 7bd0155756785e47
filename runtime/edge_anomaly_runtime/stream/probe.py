"""A cheap look whether a network camera answers, without opening its stream."""

from __future__ import annotations

import socket
import ssl

from .uri import SourceUri

# Both may be asked without credentials; neither makes a session in the camera. Any answer will do, an error as well.
_QUESTIONS = {"rtsp": "OPTIONS rtsp://{place}/ RTSP/1.0\r\nCSeq: 1\r\n\r\n", "http": "HEAD / HTTP/1.0\r\n\r\n"}
_TIMEOUT_S = 0.5


def answers(uri: SourceUri) -> bool:
    """Tell within about a second whether the camera says anything: a connection alone is taken by a hung one, too.

    Nothing secret is sent, so the certificate of an encrypted source is not checked here.

    >>> from edge_anomaly_runtime.stream.uri import parse_source
    >>> answers(parse_source("rtsp://127.0.0.1:9/live"))
    False
    """
    assert uri.address is not None
    host, port = uri.address
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        connection = socket.create_connection(uri.address, _TIMEOUT_S)
        if uri.location.partition(":")[0].lower() in ("rtsps", "https"):
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = context.wrap_socket(connection)
        with connection:
            connection.sendall(_QUESTIONS[uri.kind].format(place=place).encode())
            return bool(connection.recv(1))
    except (OSError, UnicodeError):
        return False
