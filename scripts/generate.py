"""Generate clients/python/holdoff/v1 from proto/, or check it with `--check`.

The Python path equals the proto package, so the generated imports need no
repair.
"""

from __future__ import annotations

import filecmp
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
OUT = ROOT / "clients" / "python"


def includes() -> list[str]:
    """Folders that hold our protos, google/protobuf and google/rpc."""
    return [
        f"-I{PROTO}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"-I{Path(str(files('google.rpc') / 'status.proto')).parents[2]}",
    ]


def sources() -> list[str]:
    """All protos, relative to `proto/`."""
    return sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))


def generate(out: Path) -> None:
    """Write messages, stubs and their types below `out`."""
    status = protoc.main(
        [
            "protoc",
            *includes(),
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *sources(),
        ]
    )
    if status:
        raise SystemExit(status)
    (out / "holdoff" / "v1" / "__init__.py").write_text(
        '"""Generated from proto/holdoff/v1; change the protos and run `make generate`."""\n'
    )


def differences(fresh: Path) -> list[str]:
    """Names of generated files that are missing, stale or left over."""
    comparison = filecmp.dircmp(
        fresh / "holdoff" / "v1", OUT / "holdoff" / "v1", ignore=["__pycache__"]
    )
    return sorted(comparison.left_only + comparison.right_only + comparison.diff_files)


def main() -> None:
    """Generate in place, or say what differs."""
    if sys.argv[1:] != ["--check"]:
        generate(OUT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = differences(Path(folder))
    if stale:
        raise SystemExit(f"generated code is not up to date, run `make generate`: {stale}")


if __name__ == "__main__":
    main()
