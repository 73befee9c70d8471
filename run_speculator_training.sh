#!/usr/bin/env bash
# Train a speculator as the guide shows it:
#   ./run_speculator_training.sh <nproc_per_node> <save_path> [key=value ...]
set -euo pipefail
if [ "$#" -lt 2 ]; then
    echo "Usage: $0 <nproc_per_node> <save_path> [key=value ...]" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=python3
if [ -x "$here/.venv/bin/python" ]; then
    python=$here/.venv/bin/python
fi
nproc=$1 save_path=$2
shift 2
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m stages.run --nproc-per-node "$nproc" --save-path "$save_path" -- "$@"
