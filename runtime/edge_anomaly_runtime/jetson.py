"""What a Jetson says about itself: release and power mode, both by name."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

_RELEASE = Path("/etc/nv_tegra_release")
_NVPMODEL_FOLDER = "/usr/sbin"  # not in every user's PATH


def l4t_release(path: Path = _RELEASE) -> str | None:
    """Return the release of Jetson Linux, for instance "36.4.0"; None on anything that is no Jetson."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None


def power_mode() -> str | None:
    """Return the power mode's name, for instance "MAXN"; the numbers differ from board to board.

    None where there is no nvpmodel, or it does not answer without root.
    """
    command = shutil.which("nvpmodel") or shutil.which("nvpmodel", path=_NVPMODEL_FOLDER)
    if command is None:
        return None
    try:
        done = subprocess.run([command, "-q"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_power_mode(done.stdout)


def parse_power_mode(text: str) -> str | None:
    """Return the mode's name out of what `nvpmodel -q` prints.

    >>> parse_power_mode("NV Power Mode: MAXN_SUPER\\n2\\n")
    'MAXN_SUPER'
    """
    found = re.search(r"NV Power Mode:\s*(\S+)", text)
    return found[1] if found else None
