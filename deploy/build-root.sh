#!/bin/sh
# Fills ROOT with everything an image of ours holds beside a Python interpreter. The Dockerfile runs it, and so do the
# cluster tests for their images: there is one description of what is in an image.
#
#   deploy/build-root.sh control|worker WHEEL ROOT
#
# control: operator and routers, without torch. worker: prefill and decode workers, with the native CPU kernels, which
# pods find by LANEWISE_NATIVE_DIR=/opt/lanewise-native (the Dockerfile sets it), since they have no compiler.
# Needs python (the version the image has) with pip, and obeys pip's own environment (PIP_INDEX_URL, PIP_FIND_LINKS, ...);
# worker needs a C++ compiler on x86-64. No package is built from source: what has no wheel for this platform is an error.
set -eu

USAGE="usage: build-root.sh control|worker WHEEL ROOT"
IMAGE=${1:?$USAGE} WHEEL=${2:?$USAGE} ROOT=${3:?$USAGE}
case $IMAGE in control | worker) ;; *) echo "build-root.sh: expected control or worker, got $IMAGE" >&2; exit 2 ;; esac
[ -f "$WHEEL" ] || { echo "build-root.sh: no wheel at $WHEEL" >&2; exit 2; }
PYTHON=${PYTHON:-python}
mkdir -p "$ROOT/opt/lanewise" "$ROOT/etc" "$ROOT/usr/local/bin"
ROOT=$(cd "$ROOT" && pwd)
PACKAGES=$ROOT/opt/lanewise

"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile --only-binary=:all: \
    --target "$PACKAGES" --upgrade "$WHEEL[$IMAGE]"
rm -rf "$PACKAGES/bin"

if [ "$IMAGE" = control ] && [ -e "$PACKAGES/torch" ]; then
    echo "build-root.sh: torch is in the control image; something that routers need pulls it in" >&2
    exit 1
fi

if [ "$IMAGE" = worker ] && [ "$(uname -m)" = x86_64 ]; then # elsewhere torch computes
    (cd / && PYTHONPATH=$PACKAGES PYTHONDONTWRITEBYTECODE=1 \
        "$PYTHON" -s -m lanewise.kernels.cpu_build "$ROOT/opt/lanewise-native")
    chmod 755 "$ROOT"/opt/lanewise-native/*.so
fi

# The root file system is read-only at run time, so byte code is made here; it carries no time stamps, as copies change them.
"$PYTHON" -m compileall -q -j 0 --invalidation-mode unchecked-hash -s "$ROOT" "$PACKAGES" ||
    echo "build-root.sh: some files of other packages do not compile with this Python; they are not used" >&2

printf '#!/bin/sh\nexec python -m lanewise "$@"\n' >"$ROOT/usr/local/bin/lanewise"
chmod 755 "$ROOT/usr/local/bin/lanewise"
printf 'root:x:0:0:root:/root:/bin/sh\nlanewise:x:65532:65532:lanewise:/tmp:/bin/sh\n' >"$ROOT/etc/passwd"
printf 'root:x:0:\nlanewise:x:65532:\n' >"$ROOT/etc/group"

# Whatever is missing shows here, not in a cluster.
case $IMAGE in
control) CHECK="import lanewise.cli, lanewise.router.main, kopf, kubernetes" ;;
worker) CHECK="import lanewise.cli, lanewise.prefill_worker.server, lanewise.decode_worker.server, torch" ;;
esac
cd / && PYTHONPATH=$PACKAGES PYTHONDONTWRITEBYTECODE=1 "$PYTHON" -s -c "$CHECK"
