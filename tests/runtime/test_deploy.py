"""The unit and the Dockerfiles are not built here; what can be read off them is."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy/edge-anomaly@.service"
DOCKERFILES = sorted((ROOT / "deploy").glob("Dockerfile.*"))


def keys_of(unit: Path) -> dict[str, list[str]]:
    """Return 'Section.Key' to its values; systemd's files repeat keys, which configparser refuses."""
    found: dict[str, list[str]] = defaultdict(list)
    section = ""
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found[f"{section}.{key}"].append(value)
    return found


def instructions_of(dockerfile: Path) -> list[tuple[str, str]]:
    """Return the instructions with their arguments, continued lines joined, comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def test_the_unit_is_confined_and_comes_back() -> None:
    keys = keys_of(UNIT)
    for key, value in {
        "Unit.StartLimitBurst": "5",
        "Service.Type": "notify",
        "Service.Restart": "on-failure",
        "Service.RestartPreventExitStatus": "2 3 4",
        "Service.User": "edge-anomaly",
        "Service.NoNewPrivileges": "yes",
        "Service.ProtectSystem": "strict",
        "Service.ProtectHome": "yes",
        "Service.CapabilityBoundingSet": "",
        "Service.KillSignal": "SIGTERM",
    }.items():
        assert keys[key] == [value], key
    assert re.fullmatch(r"[1-9][0-9]*[MG]", keys["Service.MemoryMax"][0])
    seconds = {key: int(keys[f"Service.{key}"][0]) for key in ("RestartSec", "WatchdogSec", "TimeoutStopSec")}
    assert seconds["RestartSec"] >= 1
    assert seconds["WatchdogSec"] > 10, "the stream's own watchdog has 10 s"
    assert seconds["TimeoutStopSec"] > 5, "the stream drains for up to 5 s"
    # Were the interval shorter, a unit that fails at once would be restarted for ever.
    assert int(keys["Unit.StartLimitIntervalSec"][0]) > 5 * (seconds["RestartSec"] + seconds["WatchdogSec"])
    assert not [value for values in keys.values() for value in values if re.search(r"password|token|secret", value)]


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / "edge-anomaly@line1.service"
    text = UNIT.read_text().replace("/opt/edge-anomaly/bin/edge-anomaly stream", "/bin/true stream")
    copy.write_text(re.sub(r"(?m)^(User|Group)=.*$", r"\1=daemon", text))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60)
    complaints = [line for line in done.stderr.splitlines() if "line1" in line]
    assert complaints == []


def test_the_drop_in_only_changes_keys_that_the_unit_knows() -> None:
    known = {*keys_of(UNIT), "Service.DevicePolicy"}
    assert set(keys_of(ROOT / "deploy/jetson.conf")) <= known


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_run_without_root_and_stop_in_order(dockerfile: Path) -> None:
    instructions = instructions_of(dockerfile)
    of = {name: [value for key, value in instructions if key == name] for name, _ in instructions}
    assert of["USER"][-1] == "10001"
    assert [name for name, _ in instructions].index("ENTRYPOINT") > [name for name, _ in instructions].index("USER")
    for name in ("ENTRYPOINT", "CMD"):
        assert of[name][-1].startswith("["), f"{name} in exec form: a shell would swallow SIGTERM"
    assert of["STOPSIGNAL"] == ["SIGTERM"]
    assert "/healthz" in of["HEALTHCHECK"][0]
    assert "ADD" not in of
    for value in of["RUN"]:
        assert not re.search(r"curl|wget|sudo|chmod 777", value)
        assert "apt-get" not in value or ("--no-install-recommends" in value and "/var/lib/apt/lists" in value)
        assert "pip install" not in value or "--no-cache-dir" in value
    for value in [*of.get("ENV", []), *of["ARG"]]:
        assert not re.search(r"password|token|secret|key", value, re.IGNORECASE)
    for value in of["FROM"]:
        assert ":latest" not in value
        assert "." not in value.split("/")[0].split(":")[0], "no registry's host"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_images_copy_is_there_and_their_extras_exist(dockerfile: Path) -> None:
    extras = set(re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for name, value in instructions_of(dockerfile):
        if name == "COPY" and not value.startswith("--from"):
            for source in value.split()[:-1]:
                assert (ROOT / source).exists(), source
        for wanted in re.findall(r"\[([a-z,-]+)\]\"", value):
            assert set(wanted.split(",")) <= extras, wanted


def test_the_jetson_image_has_what_its_decoder_needs() -> None:
    text = (ROOT / "deploy/Dockerfile.jetson").read_text()
    for package in ("kmod", "gstreamer1.0-tools", "gstreamer1.0-plugins-good", "--system-site-packages"):
        assert package in text
