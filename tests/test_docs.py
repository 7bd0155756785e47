"""The docs say what is there: commands exist, their options too, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
COMMANDS = ["score", "selftest", "drift", "doctor", "export", "evaluate", "compare", "sample-data", "demo"]
GROUPS = {
    "bench": ["run", "compare", "sweep"],
    "bundle": ["info", "verify", "sign", "install", "activate", "rollback", "list"],
    "engine": ["build", "info", "list", "clean"],
    "train": ["padim", "patchcore", "vit-knn", "fastflow", "stpm", "autoencoder", "classifier"],
}


@cache
def help_of(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", "edge_anomaly", *command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands_in(page: Path) -> list[str]:
    return re.findall(r"^(?:\$ )?(edge-anomaly [a-z].*)$", page.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize(
    "command", [*COMMANDS, *(f"{group} {name}" for group, names in GROUPS.items() for name in names)]
)
def test_every_command_has_an_example_and_a_place_in_the_docs(command: str) -> None:
    assert "Example: edge-anomaly" in help_of(*command.split())
    everything = "\n".join(page.read_text() for page in PAGES)
    assert f"edge-anomaly {command}" in everything


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_documented_command_line_has_known_commands_and_options(page: Path) -> None:
    for line in commands_in(page):
        words = shlex.split(line.split(" > ")[0], comments=True)[1:]
        command = words[:2] if words[0] in GROUPS else words[:1]
        if words[0] == "bench" and words[1] not in GROUPS["bench"]:
            command = ["bench", "run"]  # short for it
        text = help_of(*command)
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", text), f"{page.name}: {line}: no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_python_example_of_the_readme_runs(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert code is not None
    folder = bundle_folder.parent / "readme"
    folder.mkdir()
    shutil.copytree(bundle_folder, folder / "part.eab")
    shutil.copy(bundle_folder / "golden/000.png", folder / "photo.png")
    monkeypatch.chdir(folder)
    exec(compile(code.group(1), "README.md", "exec"), {})


def test_no_machine_paths_or_registries_in_tracked_files() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", "") and path.is_file():
            text = path.read_text(errors="ignore")
            assert not re.search(r"(?<![\w.])/(work|home|root|farm)/", text), name
            assert "index-url" not in text or name == "tests/test_docs.py", name
