"""The parts that pages are put together from: one file without scripts that fetches nothing.

Functions that return `str` return HTML. What they take as title, name or value of a fact is text and is escaped here;
what they take as body, cell or detail is HTML already, and whoever builds it escapes with `escape`.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape as escape
from typing import Any

from PIL import Image

NA = "n/a"
NBSP = "\u00a0"

_SIDE = 320  # longest side of a picture in the page, in pixels


def header(title: str, line: str) -> str:
    """Return the head of a page: its title and one line (HTML) below."""
    return f"<header><h1>{escape(title)}</h1><p>{line}</p></header>"


@dataclass(frozen=True)
class Tile:
    """One big figure: what it is, the figure, and one line below it (HTML)."""

    name: str
    value: str
    detail: str


def tiles(tiles: Sequence[Tile]) -> str:
    """Return the big figures of a page in one band."""
    cells = "".join(
        f"<div><dt>{tile.name}</dt><dd><b>{tile.value}</b><span>{tile.detail}</span></dd></div>" for tile in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def section(title: str, body: str, lead: str = "") -> str:
    """Return a titled part of the page, or nothing where it has no body."""
    intro = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{intro}{body}</section>" if body else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], css: str = "") -> str:
    """Return a table of HTML cells whose first column names the row; too wide, it scrolls sideways.

    `css`: "stack" lets it fall in one line per cell on a phone instead.
    """
    top = "".join(f'<th scope="col">{name}</th>' if name else "<td></td>" for name in head)
    lines = "".join(f"<tr>{_cells(head, row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="{css}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cells(head: Sequence[str], row: Sequence[str]) -> str:
    cells = "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in zip(head[1:], row[1:], strict=True))
    return f'<th scope="row">{row[0]}</th>{cells}'


def facts(facts: Mapping[str, object]) -> str:
    """Return names and values as a list; what has no value (None, empty) is left out."""
    texts = {name: "" if value is None else _value_text(value) for name, value in facts.items()}
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text[:16] + '…' if name.endswith('SHA-256') else text)}</dd></div>"
        for name, text in texts.items()
        if text
    )
    return f'<dl class="facts">{items}</dl>'


def _value_text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def time_text(utc: str) -> str:
    """Return an ISO 8601 time as people write it."""
    return utc.replace("T", " ").replace("Z", " UTC")


def code_block(commands: Sequence[str]) -> str:
    """Return commands to copy, one a line."""
    return f'<pre tabindex="0">{escape(chr(10).join(commands))}</pre>' if commands else ""


def chip(text: str, css: str) -> str:
    """Return a coloured word; `css`: ok, warn, ng or plain."""
    return f'<span class="chip {css}">{escape(text)}</span>'


def meter(share: float, images: int) -> str:
    """Return a share of images in words and as a bar."""
    found = f"{round(share * images)} of {images} ({percent(share, 0)})"
    return f'{found} <span class="meter"><i style="width:{100 * share:.1f}%"></i></span>'


def image_tag(picture: Image.Image, alt: str) -> str:
    """Return a photo, at most 320 pixels a side, inside the page."""
    shown = small(picture)
    return f'<img src="{data_uri(shown, "JPEG")}" alt="{escape(alt)}" width="{shown.width}" height="{shown.height}">'


def small(picture: Image.Image) -> Image.Image:
    """Return the picture, shrunk to at most 320 pixels a side."""
    shrunk = picture.copy()
    shrunk.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return shrunk


def data_uri(picture: Image.Image, kind: str) -> str:
    """Return a picture as the address of an image; `kind`: JPEG or PNG."""
    buffer = io.BytesIO()
    # Full colour resolution: thin red lines blur otherwise.
    options: dict[str, Any] = {"quality": 85, "subsampling": 0} if kind == "JPEG" else {}
    picture.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def percent(share: float, digits: int = 1) -> str:
    """Return 0.123 as 12.3 %."""
    return f"{share:.{digits}%}".replace("%", f"{NBSP}%")


def milliseconds(value: float | None) -> str:
    """Return three digits of a time, or n/a."""
    if value is None:
        return NA
    return f"{value:.{2 if value < 10 else 1}f}{NBSP}ms"


def megabytes(size: float) -> str:
    """Return a number of bytes as megabytes of a million bytes."""
    return f"{size / 1e6:.1f}{NBSP}MB"


def per_many(rate: float, like: float | None = None) -> str:
    """Say a rate in counts, '10 of 1000', by the first of 1000, 10000 ... that makes `like` (or itself) at least 1.

    A bound (with `like`) is rounded up: 'not more than 42' must stay true.
    """
    base = 1000
    while (rate if like is None else like) * base < 1 - 1e-9 and base < 10**9:
        base *= 10
    count = f"{rate * base:.3g}" if like is None else f"{math.ceil(rate * base - 1e-9)}"
    return f"{count} of {base}"


def page(title: str, body: Sequence[str]) -> str:
    """Return the whole file; `body` are its parts, of which empty ones are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{_CSS}</style></head>\n'
        f"<body><main>\n{chr(10).join(part for part in body if part)}\n</main>"
        "<footer>Made by edge-anomaly. This page fetches nothing.</footer></body></html>\n"
    )


_CSS = """
:root{--bg:#f3f5f7;--card:#fff;--ink:#17212b;--faint:#566371;--line:#dbe1e7;--good:#2368b0;--bad:#c2500c;
--unsure:#6b7785;--ok:#11653b;--okbg:#dcf3e5;--warn:#7c5300;--warnbg:#fcefcd;--fail:#a80f39;--failbg:#fde1e7;--plainbg:#e8ecf0}
@media screen and (prefers-color-scheme:dark){:root{--bg:#0e1318;--card:#161d24;--ink:#e5eaf0;--faint:#9fadbb;
--line:#2b3640;--good:#6aaef2;--bad:#f39a5b;--unsure:#94a1ae;--ok:#7fdba6;--okbg:#123524;--warn:#f0c060;--warnbg:#3a2d0c;
--fail:#ff8ba3;--failbg:#451825;--plainbg:#27313b}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 -apple-system,"Segoe UI",Roboto,Inter,"Noto Sans",
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
body::before{content:"";display:block;height:4px;background:linear-gradient(90deg,#8e9296 20%,#ffd200 40%,
#f05a00 60%,#960014 80%);print-color-adjust:exact;-webkit-print-color-adjust:exact}
main,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding:34px 0 18px}
h1{font-size:clamp(25px,4.5vw,36px);line-height:1.15;letter-spacing:-.02em;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:19px;letter-spacing:-.01em;margin:0 0 4px}
h3{font-size:15px;margin:0 0 10px}
p{margin:0 0 12px}
header p,.lead,.faint,footer{color:var(--faint)}
header b{color:var(--ink);font-weight:600}
.lead{max-width:760px;margin-bottom:16px;text-wrap:pretty}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px;margin:0 0 16px}
section>:last-child{margin-bottom:0}
footer{padding-bottom:36px;font-size:13px}
.tiles{display:flex;flex-wrap:wrap;gap:1px;margin:0 0 16px;
background:var(--line);border:1px solid var(--line);border-radius:12px;overflow:hidden}
.tiles div{flex:1 1 165px;background:var(--card);padding:16px 18px}
.tiles dt{font-size:13px;color:var(--faint)}
.tiles dd{margin:0}
.tiles dd>b{display:block;font-size:29px;line-height:1.25;letter-spacing:-.025em;font-weight:650;white-space:nowrap}
.tiles span{font-size:13px;line-height:1.4;color:var(--faint)}
.tiles dd>span{display:block}
.tiles span b{color:var(--ink);font-weight:600}
.chip{display:inline-block;padding:1px 8px;border-radius:99px;font-size:12px;font-weight:650;line-height:18px;
white-space:nowrap;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.tiles .chip{display:table;margin-top:4px}
.chip.ok{color:var(--ok);background:var(--okbg)}
.chip.warn{color:var(--warn);background:var(--warnbg)}
.chip.ng{color:var(--fail);background:var(--failbg)}
.chip.plain{color:var(--ink);background:var(--plainbg)}
.hist{display:block;overflow:visible;font-family:inherit}
.hist text{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.hist .plate{fill:var(--card)}
.hist g rect{stroke:var(--card);stroke-width:1px}
.hist .good{fill:var(--good)}.hist .bad{fill:var(--bad)}.hist .unsure{fill:var(--unsure)}
.hist .faint{fill:var(--faint)}
.hist text.warn,.hist rect.warn{fill:var(--warn)}.hist line.warn{stroke:var(--warn)}
.hist text.fail,.hist rect.fail{fill:var(--fail)}.hist line.fail{stroke:var(--fail)}
.scroll{overflow-x:auto;margin:0 -8px}
table{border-collapse:collapse;min-width:min(100%,820px);font-size:14px}
th,td{padding:7px 8px;text-align:right;border-bottom:1px solid var(--line);font-weight:400;vertical-align:top}
th:first-child,td:first-child{text-align:left}
thead th{color:var(--faint);font-size:13px;vertical-align:bottom;white-space:nowrap}
tbody tr:last-child>*{border-bottom:0}
td{white-space:nowrap}
.meter{display:inline-block;width:84px;height:8px;border-radius:4px;background:var(--plainbg);overflow:hidden;margin-left:6px;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.meter i{display:block;height:100%;background:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:14px;margin-top:14px}
.card{border:1px solid var(--line);border-radius:10px;padding:16px;margin:0;break-inside:avoid}
.limits{margin:0 0 14px}
.limits dt{font-weight:600}
.limits dd{margin:1px 0 10px;font-size:14px}
.limits:last-child,.limits dd:last-child{margin-bottom:0}
ul{margin:16px 0 0;padding-left:18px;font-size:14px}
ul b{color:var(--ink)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr));gap:12px 24px;margin:10px 0 0}
.facts dt{font-size:13px;color:var(--faint)}
.facts dd{margin:0;overflow-wrap:anywhere}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:14px;margin-top:14px}
.gallery .card{padding:10px}
.gallery:not(.three){grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.pictures{display:grid;grid-template-columns:1fr 1fr;gap:6px}
.three .pictures{grid-template-columns:repeat(3,1fr)}
.pictures img{display:block;width:100%;height:auto;border-radius:5px}
.empty{display:grid;place-items:center;border:1px dashed var(--line);border-radius:5px;font-size:12px;
color:var(--faint);text-align:center}
figcaption{display:flex;flex-wrap:wrap;align-items:baseline;gap:3px 9px;font-size:14px;margin-top:9px}
figcaption .faint{margin-left:auto;font-size:13px;overflow-wrap:anywhere}
.scale{max-width:600px;margin-top:22px}
.scale img{display:block;width:100%;height:24px;border-radius:5px}
.ticks{position:relative;height:28px;font-size:13px;margin-bottom:6px}
.ticks span{position:absolute;transform:translateX(-50%);white-space:nowrap;line-height:18px}
.ticks span::before{content:"";display:block;width:1px;height:5px;margin:0 auto 1px;background:currentColor}
.plot{background:#fff;border-radius:8px;padding:8px;margin-top:12px;text-align:center;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.plot img{display:block;width:100%;max-width:960px;height:auto;margin:0 auto}
a{color:var(--good)}
pre{margin:12px 0 0;padding:14px 16px;background:var(--bg);border:1px solid var(--line);border-radius:8px;
overflow-x:auto;font:13px/1.7 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
:focus-visible{outline:2px solid var(--good);outline-offset:2px}
@media (max-width:640px){main,footer{padding:0 10px}header{padding:22px 6px 14px}section{padding:16px 14px}
.tiles div{flex-basis:40%;padding:12px}.tiles dd>b{font-size:24px}.meter{display:block;margin:4px 0 3px auto}
.stack thead{display:none}.stack tr{display:block;padding:10px 0;border-bottom:1px solid var(--line)}
.stack th,.stack td{display:flex;justify-content:space-between;gap:12px;padding:2px 6px;border:0}
.stack td::before{content:attr(data-name);color:var(--faint)}.stack tr:last-child{border:0}
th,td{padding:7px 6px}.scroll{margin:0 -6px}}
@media print{:root{--bg:#fff}body{font-size:11pt}.hist,tr,.tiles{break-inside:avoid}
h2,.lead{break-after:avoid}section{padding:12px 0;border:0}
.gallery{grid-template-columns:1fr 1fr}.scroll{overflow:visible}pre{white-space:pre-wrap}}
"""
