#!/usr/bin/env bash
# Regenerates the committed gRPC stubs from lanewise.proto. tests/rpc checks that they are not stale.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
.venv/bin/python -m grpc_tools.protoc -I. --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" lanewise/rpc/lanewise.proto
