"""The wheel and the sdist: what is in them, and what a stranger can do with the wheel alone."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([BIN / "hatchling", "build", "-d", folder], cwd=ROOT, check=True)
    return folder


def closure(name: str, extra: str = "") -> set[str]:
    """Return the distributions that another one needs, itself left out."""
    found: set[str] = set()
    waiting = {(name, extra)}
    while waiting:
        one, extra = waiting.pop()
        for text in distribution(one).requires or ():
            needed = Requirement(text)
            if needed.marker and not needed.marker.evaluate({"extra": extra}):
                continue
            if (name := canonicalize_name(needed.name)) not in found:
                found.add(name)
                waiting.add((name, ""))
    return found


@pytest.fixture(scope="module")
def client_only(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with the wheel, and of its dependencies those of the client alone."""
    folder = tmp_path_factory.mktemp("client")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [site] = folder.glob("lib/python*/site-packages")
    for name in closure("holdoff"):
        one = distribution(name)
        for path in one.files or ():
            # Folders that several share, such as `google`, are made; files are links.
            if ".." not in path.parts and path.suffix != ".pyc":
                link = site / path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(Path(str(one.locate_file(path))))
    wheel = next(dist.glob("*.whl"))
    python = folder / "bin" / "python"
    install = (BIN / "uv", "pip", "install", "--quiet", "--offline", "--no-deps", "--python")
    subprocess.run([*install, python, wheel], check=True)
    return folder / "bin"


def test_the_wheel_has_what_runs(dist: Path) -> None:
    """Code, Lua, policies and types of both packages; no test, and nothing of this folder.

    Fails when data files are left out, or more is taken in.
    """
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    ours = {
        f"{package.name}/{path.relative_to(package)}"
        for package in (ROOT / "clients/python/holdoff", ROOT / "coordinator/holdoff_coordinator")
        for path in package.rglob("*")
        if path.suffix in {".py", ".pyi", ".lua", ".toml", ".typed"}
    }
    assert {name for name in names if ".dist-info/" not in name} == ours
    assert f"holdoff-{version('holdoff')}.dist-info/licenses/LICENSE" in names


def test_the_sdist_is_the_repository(dist: Path) -> None:
    """Whoever gets it can run `make test`.

    Fails when a folder is left out.
    """
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert not {name for name in tracked if name} - names
    assert not [name for name in names if name.startswith(".venv/")]


def test_pypi_would_take_them(dist: Path) -> None:
    """Fails when the README cannot be shown there, or a classifier does not exist."""
    files = list(dist.iterdir())
    assert len(files) == 2
    subprocess.run([BIN / "twine", "check", "--strict", *files], check=True)


def test_the_client_needs_nothing_of_the_coordinator(client_only: Path) -> None:
    """The commands start; the service says what is missing.

    Fails when a module of the client imports what only the coordinator needs.
    """

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [client_only / command[0], *command[1:]], capture_output=True, text=True, check=False
        )

    for arguments in (("--version",), ("run", "--help"), ("policy", "check", "--help")):
        done = run("holdoff", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
    done = run("python", "-c", "import holdoff.aio, holdoff; print(holdoff.Client.__module__)")
    assert done.stdout == "holdoff._client\n", done.stderr
    done = run("holdoff-coordinator", "serve")
    assert done.returncode == 1
    assert "pip install 'holdoff[coordinator]'" in done.stderr


def test_the_extra_brings_all_that_the_coordinator_needs() -> None:
    """Fails when the service imports what only developers have."""
    needed = closure("holdoff", "coordinator")
    assert {"redis", "python-redis-lock", "structlog", "pydantic-settings", "hiredis"} <= needed
    assert "pytest" not in needed
