"""Generate clients/python/holdoff/v1 from proto/; tests/proto compares the two.

The Python path equals the proto package, so the generated imports need no
repair.
"""

from __future__ import annotations

import filecmp
import sysconfig
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
OUT = ROOT / "clients" / "python"
TOOLS = Path(sysconfig.get_path("scripts"))


def includes(proto: Path = PROTO) -> list[str]:
    """Folders that hold our protos, google/protobuf and google/rpc."""
    return [
        f"-I{proto}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"-I{Path(str(files('google.rpc') / 'status.proto')).parents[2]}",
    ]


def run_protoc(proto: Path, *options: str) -> None:
    """Run protoc with `options` on every proto below `proto`; exit as it does on an error."""
    sources = sorted(str(path.relative_to(proto)) for path in proto.rglob("*.proto"))
    status = protoc.main(["protoc", *includes(proto), *options, *sources])
    if status:
        raise SystemExit(status)


def generate(out: Path) -> None:
    """Write messages, stubs and their types below `out`."""
    run_protoc(
        PROTO,
        f"--plugin=protoc-gen-mypy={TOOLS / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={TOOLS / 'protoc-gen-mypy_grpc'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
    )
    (out / "holdoff" / "v1" / "__init__.py").write_text(
        '"""Generated from proto/holdoff/v1; change the protos and run `make generate`."""\n'
    )


def write_image(image: Path, proto: Path = PROTO) -> None:
    """Write every descriptor, comments and imports included, for `buf` to read offline."""
    run_protoc(proto, "--include_imports", "--include_source_info", f"--descriptor_set_out={image}")


def differences(fresh: Path) -> list[str]:
    """Names of generated files that are missing, stale or left over in the source tree."""
    comparison = filecmp.dircmp(
        fresh / "holdoff" / "v1", OUT / "holdoff" / "v1", ignore=["__pycache__"]
    )
    return sorted(comparison.left_only + comparison.right_only + comparison.diff_files)


if __name__ == "__main__":
    generate(OUT)
