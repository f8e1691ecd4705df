"""Write the table of values in the chart's README from its schema."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHART = Path(__file__).parents[1] / "deploy" / "chart"
MARK = "<!-- made by scripts/chart_values.py -->\n"


def readme() -> str:
    """Return the README as it should be."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    rows = "".join(_rows(schema, ""))
    head = (CHART / "README.md").read_text(encoding="utf-8").partition(MARK)[0]
    return f"{head}{MARK}\n| value | default | what |\n|---|---|---|\n{rows}"


def _rows(node: dict[str, Any], name: str) -> Iterator[str]:
    for key, child in node.get("properties", {}).items():
        yield from _rows(child, f"{name}.{key}".lstrip("."))
    if "default" in node:
        choice = "; one of " + ", ".join(f"`{word}`" for word in node.get("enum", []))
        what = node["description"] + (choice if "enum" in node else "")
        yield f"| `{name}` | `{json.dumps(node['default'])}` | {what} |\n"


if __name__ == "__main__":
    (CHART / "README.md").write_text(readme(), encoding="utf-8")
