"""OpenVINO without its model converter.

The package's own `__init__` loads the converter where it can, and with it a telemetry client: a third of the import
time, for nothing that a device needs. A process that wants `openvino.convert_model`, too, imports openvino first.
"""

import sys

_CONVERTER = "openvino.tools.ovc"

sys.modules.setdefault(_CONVERTER, None)  # type: ignore[arg-type]
try:
    import openvino as ov
finally:
    if sys.modules[_CONVERTER] is None:
        del sys.modules[_CONVERTER]

__all__ = ["ov"]
