#!/usr/bin/env bash
# Prepare what scripts/gpu_check.sh needs on a machine with a GPU and without a network.
#
#   scripts/make_gpu_bundle.sh [DIR]        default: .gpu_bundle
#
# DIR/wheels: the six packages, the kernels among them compiled for sm_90 and CPython 3.12, and what they need beyond
# torch, torchvision, timm, OpenCV and rich. DIR/reference: the stored answers that gpu tests read, out of SEG_REFERENCE.
# Needs a package index, nvcc, and Python 3.12 with pip (another one: PYTHON=/path/to/python3.12).
set -euo pipefail
case ${1:-} in -*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
bundle=$(realpath -m "${1:-$(dirname "$0")/../.gpu_bundle}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.12}
MISSING_THERE=(tyro docstring-parser typeguard simplejpeg tifffile)
GOLDEN=(ops/golden)
LIMIT=20000000

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' ||
  { echo "error: $python is not Python 3.12; name one in PYTHON" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$bundle/wheels" "$bundle/reference"
mkdir -p "$bundle"
echo "*" > "$bundle/.gitignore"

packages=(packages/*/pyproject.toml)
CMAKE_ARGS=-DSEG_CUDA=ON CUDAARCHS=90 "$python" -m pip wheel -q --no-deps --wheel-dir "$bundle/wheels" \
  --config-settings build-dir="$work" "${MISSING_THERE[@]}" "${packages[@]%/pyproject.toml}"
for folder in "${GOLDEN[@]}"; do
  if [[ -d ${SEG_REFERENCE:-}/$folder ]]; then
    mkdir -p "$bundle/reference/$folder"
    cp "$SEG_REFERENCE/$folder"/*.npz "$bundle/reference/$folder"
  else
    echo "note: no $folder in SEG_REFERENCE (${SEG_REFERENCE:-not set}); the gpu tests that read it will skip"
  fi
done

size() { find "$@" -type f -printf '%s\n' 2>/dev/null | awk '{n += $1} END {print n + 0}'; }
(cd "$bundle" && du -b wheels/*)
echo "wheels: $(size "$bundle/wheels") bytes, goldens: $(size "$bundle/reference") bytes"
(($(size "$bundle") <= LIMIT)) || { echo "error: $bundle has more than $LIMIT bytes" >&2; exit 1; }
echo "ready: $bundle"
