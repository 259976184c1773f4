#!/usr/bin/env bash
# Install wheels into ./build/device/site, for a machine that no index can be reached from. $1: their folder.
set -euo pipefail
site="$(cd "$(dirname "$0")/../.." && pwd)/build/device/site"
compgen -G "$1/*.whl" > /dev/null || exit 0
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$1"/*.whl
