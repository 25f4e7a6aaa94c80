#!/usr/bin/env bash
# Regenerates the committed gRPC stubs from our proto and from KEDA's. A test checks that they are not stale.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
.venv/bin/python -m grpc_tools.protoc -I. --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" \
    lanewise/rpc/lanewise.proto lanewise/rpc/externalscaler.proto
