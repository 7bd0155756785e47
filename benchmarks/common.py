"""What several benchmarks share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edge_anomaly_calibration.guard import GuardLimits

# With random weights or few images the guard's limits mean nothing.
OPEN = GuardLimits(auroc_drop=1.0, flips=1.0, distinct=0.0, accuracy_drop=1.0)


def print_rows(rows: Iterable[dict[str, Any]], path: Path | None) -> None:
    """Print rows as JSON lines as they come, and append them to a file, if one is given."""
    for row in rows:
        print(json.dumps(row), flush=True)
        if path:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
