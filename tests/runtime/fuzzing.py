"""For fuzz tests: seeded damage, and a child process in which it may crash, hang or eat memory."""

from __future__ import annotations

import faulthandler
import json
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Far above what a test allows, far below what would hurt the machine.
_CEILING_MB = 2000


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return `data` cut, with flipped bits, other bytes, a hole, a part twice, or an extreme number somewhere."""
    kind = chance.choice(["cut", "bits", "bytes", "hole", "twice", "number"])
    place = chance.randrange(len(data))
    if kind == "cut":
        return data[:place]
    changed = bytearray(data)
    if kind == "bits":
        for _ in range(chance.choice([1, 1, 2, 8, 64])):
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "twice":
        changed[place:place] = data[place : place + chance.randrange(1, 600)]
    else:
        filling = {
            "bytes": chance.randbytes(chance.choice([1, 4, 16, 200])),
            "hole": bytes(chance.choice([16, 512, 4096])),
            "number": number(chance, chance.choice([2, 4, 8])),
        }
        changed[place : place + len(filling[kind])] = filling[kind]
    return bytes(changed)


def number(chance: random.Random, size: int) -> bytes:
    """Return a number at the edge of what `size` bytes hold, or any."""
    highest = (1 << 8 * size) - 1
    value = chance.choice([0, 1, highest >> 1, (highest >> 1) + 1, highest - 1, highest, chance.randrange(highest)])
    return value.to_bytes(size, chance.choice(["big", "little"]))


# In the child


class Watch:
    """The memory of this process since this object was made; more than a ceiling is a MemoryError."""

    def __init__(self) -> None:
        self._start_mb = _kept("VmHWM")
        ceiling = int((_kept("VmData") + _CEILING_MB) * 1e6)
        resource.setrlimit(resource.RLIMIT_DATA, (ceiling, resource.RLIM_INFINITY))

    def peak_mb(self) -> float:
        """Return the highest resident memory so far over that of the start."""
        return round(_kept("VmHWM") - self._start_mb, 1)


@contextmanager
def no_hang(seconds: float) -> Iterator[None]:
    """End the process, with the place where it hung, after `seconds`: even inside a library that never returns."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def tell(**outcome: Any) -> None:
    """Give one outcome to the parent; what was told before a crash is not lost."""
    print(json.dumps(outcome), flush=True)


def _kept(name: str) -> float:
    """Return a field of /proc/self/status in MB."""
    # The highest resident memory of getrusage would count that of the process that forked this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e6


# In the test


def outcomes_of(module: str, *arguments: object, seconds: float) -> list[dict[str, Any]]:
    """Run a test module as a program; return what it told. It must not crash, nor hang.

    module: as for `python -m`. What was not told any more is the mutation that it died of.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    last = outcomes[-1] if outcomes else "nothing"
    assert done.returncode == 0, f"code {done.returncode}; the last that went well: {last}\n{done.stderr[-3000:]}"
    return outcomes
