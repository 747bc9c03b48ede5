#!/usr/bin/env bash
# Run the tests with the lowest version of each dependency that pyproject.toml allows, in an environment of its own.
#     tests/lowest_versions.sh FOLDER [OPTION OF PYTEST ...]
set -euo pipefail
folder=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check uv
"$folder/bin/uv" pip compile --quiet --resolution lowest-direct --extra dev --output-file "$folder/lowest.txt" pyproject.toml
"$folder/bin/uv" pip install --quiet --python "$folder/bin/python" --requirement "$folder/lowest.txt"
"$folder/bin/uv" pip install --quiet --python "$folder/bin/python" --no-deps --editable .
OMP_NUM_THREADS=1 "$folder/bin/pytest" "$@"
