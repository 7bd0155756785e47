"""What a bundle tells the device about building its TensorRT engines: `tensorrt/recipe.json`."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ArtefactError

RECIPE = "tensorrt/recipe.json"
RECIPE_SCHEMA = "edge-anomaly.tensorrt/1"


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class BuildFiles(_Model):
    """The ONNX files of one precision.

    `weak`: for TensorRT up to 10, whose builder chooses FP16 and INT8 by flags. `strong`: for TensorRT from 11 on,
    where every tensor has the type that the graph gives it.
    """

    weak: str
    strong: str


class TensorrtRecipe(_Model):
    """How to build, and how to know that the result is right.

    `float_prefix`: nodes whose name starts so compute in FP32 at any precision, without TF32. `score_tolerance`: by
    precision, the largest |score - expected| / |expected| on golden images. `normal_images`: model inputs as PNG files
    of held-out normal images, from which the engine's own thresholds are set at the rates `alpha_warn`, `alpha_fail`.
    """

    schema_: str = Field(alias="schema", default=RECIPE_SCHEMA)
    opset: int
    graphs: dict[str, BuildFiles] = Field(description="By precision: fp32, fp16, int8.")
    float_prefix: str = "head/"
    workspace_mib: int = Field(default=1024, ge=1)
    optimization_level: int = Field(default=3, ge=0, le=5)
    score_tolerance: dict[str, float]
    normal_images: tuple[str, ...]
    alpha_warn: float
    alpha_fail: float
    device: Literal["gpu"] = "gpu"


def recipe_bytes(recipe: TensorrtRecipe) -> bytes:
    """Return the recipe as it is written to disk, UTF-8 JSON."""
    return recipe.model_dump_json(by_alias=True, indent=1).encode() + b"\n"


def parse_recipe(data: bytes) -> TensorrtRecipe:
    """Read a recipe.

    Raises:
        ArtefactError: it is no JSON, of an unknown schema, or a field is missing or wrong.
    """
    try:
        raw = json.loads(data)
        schema = raw.get("schema") if isinstance(raw, dict) else None
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{RECIPE} is not valid JSON: {error}.", _AGAIN) from None
    if schema != RECIPE_SCHEMA:
        raise ArtefactError(
            f"{RECIPE} has schema {schema!r}; this version of edge-anomaly reads {RECIPE_SCHEMA!r}.",
            "Install the edge-anomaly version that wrote the bundle, or export it again.",
        )
    try:
        return TensorrtRecipe.model_validate(raw)
    except ValidationError as error:
        raise ArtefactError(f"{RECIPE} is not valid: {error}", _AGAIN) from None


_AGAIN = "Export the bundle again with --target tensorrt."
