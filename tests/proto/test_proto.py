"""The API as files: generated code, buf's lint rules, and versions that belong together."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from typing import TYPE_CHECKING

import pytest

import generate

if TYPE_CHECKING:
    from pathlib import Path


def buf_lint(image: Path) -> subprocess.CompletedProcess[str]:
    """Lint our files in `image` by the rules of buf.yaml; what they import is not ours."""
    return subprocess.run(
        [generate.TOOLS / "buf", "lint", image, "--path", "holdoff"],
        cwd=generate.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    """Fails when a proto was changed and `make generate` was not run."""
    generate.generate(tmp_path)
    assert generate.differences(tmp_path) == []


def test_protos_pass_buf_lint(tmp_path: Path) -> None:
    """Every message, field, enum and call keeps buf's STANDARD rules and has a comment."""
    image = tmp_path / "image.binpb"
    generate.write_image(image)
    result = buf_lint(image)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("sample", "complaint"),
    [
        ("// Said.\nmessage Sample {\n  string silent = 1;\n}", '"silent" should have a non-empty'),
        ("// Said.\nmessage sample {}", '"sample" should be PascalCase'),
    ],
    ids=["comment", "name"],
)
def test_buf_lint_reads_our_files(tmp_path: Path, sample: str, complaint: str) -> None:
    """Fails when the lint above has become blind to the files that it is meant for."""
    proto = tmp_path / "proto"
    shutil.copytree(generate.PROTO, proto)
    package = 'syntax = "proto3";\n\npackage holdoff.v1;\n\n'
    (proto / "holdoff" / "v1" / "sample.proto").write_text(f"{package}{sample}\n")
    image = tmp_path / "image.binpb"
    generate.write_image(image, proto)
    result = buf_lint(image)
    assert result.returncode
    assert complaint in result.stdout


def test_lower_bounds_are_the_generators_versions() -> None:
    """Fails when a user could install a gRPC older than the generated code accepts."""
    project = tomllib.loads((generate.ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["coordinator"]
    grpc_bounds = {
        requirement.partition(">=")[2].partition(",")[0]
        for requirement in requirements
        if requirement.startswith("grpcio")
    }
    generated = "".join(
        path.read_text() for path in (generate.OUT / "holdoff" / "v1").glob("*_pb2*.py")
    )
    assert grpc_bounds == set(re.findall(r"GRPC_GENERATED_VERSION = '(.+)'", generated))
    (protobuf,) = set(re.findall(r"# Protobuf Python Version: (.+)", generated))
    assert f"protobuf>={protobuf},<8" in project["dependencies"]
