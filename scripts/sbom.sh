#!/usr/bin/env bash
# Prints a bill of materials (CycloneDX) of what `pip install holdoff[coordinator]` brings, in the
# versions of requirements.lock. uv makes one of a project only: so here is one that needs just that.
set -euo pipefail
cd "$(dirname "$0")/.."

project=$(mktemp -d)
trap 'rm -rf "$project"' EXIT

uv pip compile pyproject.toml --all-extras --constraint requirements.lock --no-annotate --no-header \
  --quiet --output-file "$project/pinned.txt" >/dev/null
uv init --quiet --bare --no-workspace --name holdoff --directory "$project"
uv add --quiet --no-sync --directory "$project" --requirements "$project/pinned.txt"
uv version --quiet --no-sync --directory "$project" "$(hatchling version)"
uv export --quiet --preview-features sbom-export --format cyclonedx1.5 --directory "$project"
