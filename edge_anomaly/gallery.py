"""Pictures with heat maps and verdicts, as figures of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from edge_anomaly_runtime.bundle import Threshold, Thresholds
from edge_anomaly_runtime.overlay import draw_overlay
from edge_anomaly_runtime.preprocess import Preprocess

from . import html
from .data import GOOD, UNSURE

_MARKED = (0, 190, 255)
_RAMP_END = 2.5  # where the colour scale ends, in pixel limits

_SCALE_TEXT = (
    "The scale is fixed: it is tied to the pixel limit, not to the picture, so the same colour means the same in every "
    "one. Heat maps are transparent below half the limit, yellow at the limit and dark red from twice the limit on. "
    "The red line encloses what is above the limit."
)


@dataclass(frozen=True)
class Example:
    """One picture of the gallery.

    name: such as "scratch/003.png". label: good, unsure or the kind of defect. verdict: OK, WARN, NG or INVALID.
    picture, overlay: RGB, the same size, without and with heat map. mask: where people marked the defect, mode L.
    """

    name: str
    label: str
    verdict: str
    score: float
    picture: Image.Image
    overlay: Image.Image
    mask: Image.Image | None


def gallery_section(examples: Sequence[Example], limits: Thresholds) -> tuple[str, str, str]:
    """Return title, gallery with colour scale, and lead; examples without masks are shown as pairs."""
    if not examples:
        return "Examples", "", ""
    masks = any(example.mask is not None for example in examples)
    pictures = "heat map and, as a blue line, what people marked" if masks else "and heat map"
    lead = f"Picture{',' if masks else ''} {pictures}. The limit is the one that makes a part NG."
    return "Examples", example_figures(examples, limits) + colour_scale(limits.pixel), lead


def example_figures(examples: Sequence[Example], limits: Thresholds) -> str:
    """Return the examples side by side: picture, heat map and, where one example has a mask, what people marked."""
    masks = any(example.mask is not None for example in examples)
    figures = "".join(_example(example, limits.fail, masks=masks) for example in examples)
    return f'<div class="gallery{" three" if masks else ""}">{figures}</div>'


def _example(example: Example, limit: Threshold, *, masks: bool) -> str:
    """Return one figure; `masks` keeps the third place also where there is no mask."""
    pictures = [
        html.image_tag(example.picture.convert("RGB"), f"Picture of {example.name}"),
        html.image_tag(example.overlay.convert("RGB"), f"Heat map of {example.name}"),
    ]
    if example.mask is not None:
        pictures.append(html.image_tag(marked(example.picture, example.mask), f"Marked defect of {example.name}"))
    elif masks:
        pictures.append('<div class="empty">nothing marked</div>')
    css = {"OK": "ok", "WARN": "warn", "NG": "ng"}.get(example.verdict, "plain")
    return (
        f'<figure class="card"><div class="pictures">{"".join(pictures)}</div>'
        f"<figcaption>{html.chip(example.verdict, css)} <b>{html.escape(example.label)}</b> "
        f"{_relative(example.score, limit.value)}{_remark(example.label, example.verdict)}"
        f'<span class="faint">{html.escape(example.name)}</span></figcaption></figure>'
    )


def _remark(label: str, verdict: str) -> str:
    """Name a wrong verdict."""
    if label == UNSURE or verdict == "INVALID":
        return ""
    if label == GOOD:
        return html.chip("false alarm", "plain") if verdict == "NG" else ""
    return {"OK": html.chip("missed", "plain"), "WARN": html.chip("warned only", "plain")}.get(verdict, "")


def _relative(score: float, limit: float) -> str:
    if not math.isfinite(score):
        return "<span>no score</span>"
    digits = 2 if 0.9 * limit < score < 1.1 * limit else 1
    text = f"{score / limit:.{digits}f} × the limit" if limit > 0 else f"score {score:.4g}, limit {limit:.4g}"
    return f'<span title="score {score:.4g}, NG above {limit:.4g}">{text}</span>'


def marked(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Return the picture, at most 320 pixels a side, with a line just outside of what the mask marks."""
    small = html.small(picture.convert("RGB"))
    region = mask.convert("L").resize(small.size, Image.Resampling.BOX).point(lambda value: 255 if value else 0)
    near, far = region.filter(ImageFilter.MaxFilter(3)), region.filter(ImageFilter.MaxFilter(7))
    small.paste(_MARKED, mask=ImageChops.subtract(far, near))
    return small


def colour_scale(limit: Threshold) -> str:
    """Return the legend of the heat maps, drawn by the function that draws them: a ramp over a grey picture."""
    width, height = 600, 28
    ramp = np.tile(np.linspace(0.0, _RAMP_END, width, dtype=np.float32), (height, 1))
    grey = Image.new("RGB", (width, height), (142, 146, 150))
    strip = draw_overlay(grey, ramp, Preprocess(height, width), 1.0)
    ticks = {0.5: f"half: {limit.value / 2:.3g}", 1: f"limit: {limit.value:.3g}", 2: f"twice: {limit.value * 2:.3g}"}
    marks = "".join(f'<span style="left:{100 * at / _RAMP_END:g}%">{text}</span>' for at, text in ticks.items())
    return (
        f'<div class="scale"><h3>Colour scale</h3><img src="{html.data_uri(strip, "PNG")}" width="{width}" '
        f'height="{height}" alt="Colour scale from transparent over yellow to dark red">'
        f'<div class="ticks">{marks}</div><p class="faint">{_SCALE_TEXT}</p></div>'
    )
