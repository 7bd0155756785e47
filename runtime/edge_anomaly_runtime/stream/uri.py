"""Source URIs: what to open, what to call the camera, and what must never be shown."""

from __future__ import annotations

import base64
import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from edge_anomaly_runtime.errors import UsageError, did_you_mean
from edge_anomaly_runtime.images import SUFFIXES

Kind = Literal["rtsp", "http", "video", "images", "v4l2", "csi", "test"]

_SCHEMES: dict[str, Kind] = {
    "rtsp": "rtsp",
    "rtsps": "rtsp",
    "http": "http",
    "https": "http",
    "file": "video",
    "v4l2": "v4l2",
    "csi": "csi",
    "test": "test",
}
_PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}
_FORMS = "rtsp://HOST/PATH, http://HOST/PATH, FILE, FOLDER, v4l2:///dev/video0, csi://0 or test://moving"
_VARIABLE = re.compile(r"\$\{([^{}]*)\}")
_HIDDEN = "***"

_SECRET_WORD = r"passw(?:or)?d|passwd|password|pwd|pass|token|secret|credentials?|auth|apikey|api[_-]key|signature|sig"
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # Greedy to the last @ of the word: an unquoted password may hold @, /, ? and quotes itself. Every repetition has a
    # limit, or a long line without any secret takes seconds.
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s<>\"]{0,1000}@"), rf"\1{_HIDDEN}@"),
    (re.compile(r"(%3A%2F%2F)[^\s<>\"]{0,1000}(?:%40|@)", re.IGNORECASE), rf"\1{_HIDDEN}%40"),
    (re.compile(r"(?<![^\s'\"(\[=,])[^\s/'\"<>@:]{0,100}:(?!//)[^\s'\"<>]{0,300}@(?=[\w\[])"), f"{_HIDDEN}@"),
    (re.compile(r"((?:proxy-)?authorization\s*[:=]\s*)[^\r\n]+", re.IGNORECASE), rf"\1{_HIDDEN}"),
    (re.compile(r"\b((?:basic|bearer)\s+)[A-Za-z0-9+/=._-]{6,}", re.IGNORECASE), rf"\1{_HIDDEN}"),
    (
        re.compile(rf"((?:(?:{_SECRET_WORD})[\w.-]{{0,40}}|\bkey)(?:=|%3D))[^\s&\"'<>]+", re.IGNORECASE),
        rf"\1{_HIDDEN}",
    ),
)


@dataclass(frozen=True)
class SourceUri:
    """One source, ready to open.

    camera: its name in records and metrics; holds no credential. shown: the URI as it may be printed. location: what
    the reader opens, credentials included: never print it. live: a camera, whose end is a fault. options: the query of
    v4l2, csi and test URIs. address: host and port of a network camera. clear_password: the password was spelled out
    instead of taken from the environment.
    """

    kind: Kind
    camera: str
    shown: str
    live: bool
    location: str = field(repr=False)
    options: dict[str, str] = field(default_factory=dict, repr=False)
    address: tuple[str, int] | None = None
    clear_password: bool = False
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def redact(self, text: str) -> str:
        """Return `text` without this source's credentials in any spelling, and without any other URI's."""
        for secret in self.secrets:
            text = text.replace(secret, _HIDDEN)
        return redact(text)


def redact(text: str) -> str:
    """Return `text` with the credentials of every URI, query and header in it replaced by ***.

    Rather too much than too little: from `://` to the last @ of the word, and any value whose name sounds secret.

    >>> redact("cannot open rtsp://user.name:p@ss@10.0.0.5:554/live?token=abc&channel=1")
    'cannot open rtsp://***@10.0.0.5:554/live?token=***&channel=1'
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def parse_source(text: str, *, camera: str = "", environ: Mapping[str, str] | None = None) -> SourceUri:
    """Read a source as the user writes it.

    rtsp(s)://, http(s)://, file://, a path, a folder, a quoted glob, v4l2:///dev/video0, /dev/video0, 0, csi://0,
    test://moving. `${NAME}` anywhere stands for an environment variable (`environ`, else the process's own) and is
    quoted as a URI needs it. `camera` overrides the derived name.

    >>> parse_source("rtsp://${CAM_USER}:${CAM_PW}@10.0.0.5/live", environ={"CAM_USER": "u", "CAM_PW": "p@ss"})
    SourceUri(kind='rtsp', camera='10.0.0.5', shown='rtsp://***@10.0.0.5/live', live=True, \
address=('10.0.0.5', 554), clear_password=False)

    Raises:
        UsageError: an unknown scheme or option, a missing variable, file or host.
    """
    text = text.strip()
    if not text:
        raise UsageError("The source is empty.", f"Give one of: {_FORMS}.")
    kind, spelled = _kind_of(text)
    if kind in ("rtsp", "http"):
        return _network_source(kind, spelled, camera, os.environ if environ is None else environ)
    located = _expand(spelled, os.environ if environ is None else environ)
    if kind in ("v4l2", "csi", "test"):
        return _device_source(kind, located, camera)
    return _file_source(located, camera)


def unique_names(sources: list[SourceUri]) -> list[str]:
    """Return one camera name per source; a name that was there before gets -2, -3 and so on."""
    taken: set[str] = set()
    names = []
    for source in sources:
        name, number = source.camera, 1
        while name in taken:
            number += 1
            name = f"{source.camera}-{number}"
        taken.add(name)
        names.append(name)
    return names


def _kind_of(text: str) -> tuple[Kind, str]:
    """Return the kind and the text with its scheme: a bare number and a device file are V4L2 cameras."""
    if text.isdecimal():
        return "v4l2", f"v4l2:///dev/video{int(text)}"
    if re.fullmatch(r"/dev/video\d+(\?.*)?", text):
        return "v4l2", f"v4l2://{text}"
    if "://" not in text:
        return "video", text
    scheme = text.partition("://")[0].lower()
    if scheme not in _SCHEMES:
        raise did_you_mean("source scheme", redact(scheme), sorted(_SCHEMES))
    return _SCHEMES[scheme], text


def _expand(text: str, environ: Mapping[str, str], *, safe: str | None = None) -> str:
    """Replace ${NAME}; with `safe` the values are percent-encoded except for these characters."""

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name not in environ or not environ[name]:
            raise UsageError(
                f"The source needs the environment variable {name}, which is not set.", f"Run: export {name}=..."
            )
        return environ[name] if safe is None else quote(environ[name], safe=safe)

    return _VARIABLE.sub(value, text)


def _network_source(kind: Kind, text: str, camera: str, environ: Mapping[str, str]) -> SourceUri:
    scheme, rest = text.split("://", 1)
    scheme = scheme.lower()
    cut = re.search(r"[/?#]", rest)
    authority, tail = (rest[: cut.start()], rest[cut.start() :]) if cut else (rest, "")
    userinfo, at, host_part = authority.rpartition("@")
    clear = bool(at) and bool(_VARIABLE.sub("", userinfo.partition(":")[2]))
    host_part = _expand(host_part, environ)
    host, port = _host_and_port(host_part, scheme, redact(text))
    path, mark, query = tail.partition("?")
    user, colon, password = (_expand(part, environ, safe="") for part in userinfo.partition(":"))
    # unquote first: a part may be percent-encoded already, and both spellings must end as the same one.
    quoted = f"{quote(unquote(user), safe='')}{colon}{quote(unquote(password), safe='')}"
    location = f"{scheme}://{quoted}{at}{host_part}{_expand(path, environ)}{mark}{_expand(query, environ, safe='')}"
    # As it was written: a variable in the path or query may hold a token.
    shown = redact(f"{scheme}://{at and _HIDDEN}{at}{host_part}{tail}")
    return SourceUri(
        kind,
        _clean_name(camera or host + (f"-{port}" if port != _PORTS[scheme] else "")),
        shown,
        True,
        location,
        address=(host, port),
        clear_password=clear,
        secrets=_secret_spellings(unquote(user), unquote(password), tail, environ),
    )


def _host_and_port(host_part: str, scheme: str, shown: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"{scheme}://{host_part}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host:
        raise UsageError(f"The source {shown} names no valid host and port.", f"Write it as {scheme}://HOST:PORT/PATH.")
    return host, port if port is not None else _PORTS[scheme]


def _secret_spellings(user: str, password: str, tail: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return every text that gives a credential away, longest first."""
    values = {password, *(environ.get(name, "") for name in _VARIABLE.findall(tail))}
    values |= {
        value for name, value in parse_qsl(tail.partition("?")[2]) if re.search(_SECRET_WORD, name, re.IGNORECASE)
    }
    found = set()
    if user or password:
        found.add(base64.b64encode(f"{user}:{password}".encode()).decode())
    if user and not password:
        values.add(user)  # a token in the place of the user
    for value in values:
        found |= {value, quote(value, safe=""), quote(value)}
    # A short value would blank out half of every message; it is still covered wherever it stands in a URI.
    return tuple(sorted((value for value in found if len(value) >= 4), key=len, reverse=True))


def _device_source(kind: Kind, text: str, camera: str) -> SourceUri:
    body, _, query = text.split("://", 1)[1].partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if kind == "v4l2" and not re.fullmatch(r"/dev/[\w./-]+", body):
        raise UsageError(f"{text} names no video device.", "Write it as v4l2:///dev/video0.")
    if kind == "csi" and not body.isdecimal():
        raise UsageError(f"{text} names no CSI camera.", "Write it as csi://0 for the first one.")
    default = {"v4l2": Path(body).name, "csi": f"csi{body}", "test": f"test-{body}"}[kind]
    # Without a frame rate nothing is lost by waiting: every picture counts, as with files.
    live = not (kind == "test" and options.get("fps") == "0")
    return SourceUri(kind, _clean_name(camera or default), text, live, body, options)


def _file_source(text: str, camera: str) -> SourceUri:
    located = unquote(text[len("file://") :]) if text.lower().startswith("file://") else text
    path = Path(located).expanduser()
    name = _clean_name(camera or path.stem.strip("*?[]") or path.parent.name or "files")
    if path.is_dir() or (path.exists() and path.suffix.lower() in SUFFIXES):
        kind: Kind = "images"
    elif path.exists():
        kind = "video"
    elif glob.has_magic(located):
        if not glob.glob(str(path), recursive=True):
            raise UsageError(f"No file matches {redact(text)}.", "Check the pattern; quote it with single quotes.")
        kind = "images"
    else:
        raise UsageError(f"There is no file or folder {redact(text)}.", f"Check the path, or give one of: {_FORMS}.")
    return SourceUri(kind, name, redact(text), False, str(path))


def _clean_name(name: str) -> str:
    """Return a name of letters, digits, dot, dash and underscore: it becomes a label, a topic and a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:64] or "camera"
