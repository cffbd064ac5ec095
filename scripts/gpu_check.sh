#!/usr/bin/env bash
# Check the GPU side within ten minutes on a machine without a network: tests marked gpu, then the benchmarks.
#
#   scripts/gpu_check.sh [--bundle .gpu_bundle] [--out .gpu_check] [--seconds 570] [--rehearse]
#
# --bundle    what scripts/make_gpu_bundle.sh prepared
# --out       the folder of the logs: summary.txt, with a line per step, and at most seven others. A step writes as it
#             goes, so a run that is cut off leaves its part
# --seconds   the time for everything; each step has a limit of its own besides, and gets no more than is left
# --rehearse  the same on a CPU: gpu tests are collected, set up and skipped, benchmarks run at small sizes; steps may
#             take three times as long
#
# Needs Python 3.12 (another one: PYTHON=/path/to/python) with torch, torchvision, timm, OpenCV, rich, hypothesis,
# pytest and pytest-xdist; nvcc, scikit-build-core, pybind11, CMake and Ninja to build the kernels, else the bundle's
# are used.
set -euo pipefail
usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; }
fail() { echo "error: $*" >&2; exit 2; }

root=$(realpath "$(dirname "$0")/..")
bundle=$root/.gpu_bundle out=$root/.gpu_check seconds=570 rehearse= slower=1
while (($#)); do
  case $1 in
    --rehearse) rehearse=1 slower=3; shift; continue ;;
    -h | --help) usage; exit ;;
    --bundle | --out | --seconds) (($# > 1)) || fail "$1 needs a value" ;;
    *) fail "$1: not an option; --help lists them" ;;
  esac
  case $1 in
    --bundle) bundle=$(realpath -m "$2") ;;
    --out) out=$(realpath -m "$2") ;;
    --seconds) [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--seconds $2: not a number of seconds"; seconds=$2 ;;
  esac
  shift 2
done
cd "$root"
((seconds *= slower))
python=${PYTHON:-python3}
compgen -G "$bundle/wheels/*.whl" >/dev/null ||
  fail "$bundle: no wheels there; make them with scripts/make_gpu_bundle.sh where there is a network"
if [[ ! $rehearse ]]; then
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "$python sees no CUDA device; --rehearse goes the same way without one"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'kill "$!" 2>/dev/null; exit 130' INT TERM
mkdir -p "$out"
rm -f "$out"/{summary,setup,smoke,tests,ops_gpu,models_gpu,sanitizer}.txt
errors=0

# step FILE SECONDS NAME COMMAND...: run a command within its limit, its output at the end of FILE.txt
step() {
  local log=$out/$1.txt limit=$((slower * $2)) name=$3 begin=$SECONDS status=0 result=ok
  shift 3
  ((limit < seconds - SECONDS)) || limit=$((seconds - SECONDS))
  if ((limit > 0)); then
    printf '\n== %s: %s\n' "$name" "$*" >>"$log"
    timeout --kill-after=3 "$limit" "$@" >>"$log" 2>&1 </dev/null &
    wait "$!" || status=$?  # in the background, so that a signal is answered at once
    case $status in 0) ;; 124 | 137) result="cut off" ;; *) result="failed ($status)" ;; esac
  else
    status=124 result="left out"
  fi
  printf '%-60s %-12s %4d s\n' "$name" "$result" $((SECONDS - begin)) | tee -a "$out/summary.txt"
  [[ $result != failed* ]] || tail -n 12 "$log" | sed 's/^/    /'
  return "$status"
}
check() { step "$@" || errors=$((errors + 1)); }

# Sources come before the carried packages, which add what is compiled and the metadata that names the methods.
site=$work/site sources=
for source in "$root"/packages/*/src; do [[ $source == */cuda-ops/* ]] || sources+=$source:; done
export PYTHONPATH=$sources$site:$root/scripts
[[ ! -d $bundle/reference ]] || export SEG_REFERENCE=$bundle/reference
export PYTHONUNBUFFERED=1 CUDAARCHS=${CUDAARCHS:-90}
install=("$python" -m pip install --no-index --no-deps --no-compile --upgrade --target "$site")
check setup 60 "install the bundle" "${install[@]}" "$bundle"/wheels/*.whl
build=("$python" -m pip wheel --no-index --no-deps --no-build-isolation --wheel-dir "$work" packages/cuda-ops)
build+=(--config-settings build-dir="$work/build")
{ step setup 120 "build the kernels" env CMAKE_ARGS=-DSEG_CUDA=ON "${build[@]}" &&
  step setup 30 "install the kernels" "${install[@]}" "$work"/*.whl; } ||
  echo "the bundle's kernels are used" | tee -a "$out/summary.txt"

device=cuda few=() skip=()
if [[ $rehearse ]]; then
  device=cpu few=(--small --repeats 1) skip=(-p gpu_rehearsal)
fi
sanitize() { check sanitizer 60 "$1" compute-sanitizer --tool "$@" --error-exitcode 9 "${operators[@]}"; }
operators=("$python" benchmarks/ops_gpu.py --small --repeats 1 --device "$device")
check smoke 40 "versions" "$python" -m segcore env
check smoke 60 "operators, small" "${operators[@]}"

# Only files with such tests are imported: that saves half a minute, and what others import may be missing here.
pytest=("$python" -m pytest -v -v -m gpu -n auto --maxprocesses=8 -o faulthandler_timeout=60)
pytest+=(-p no:cacheprovider "${skip[@]}")
tests() { check tests "$1" "tests: $2" "${pytest[@]}" $(grep -rl --include='test_*.py' 'mark\.gpu' "${@:3}"); }
tests 100 kernels packages/cuda-ops
if [[ $rehearse ]]; then
  check ops_gpu 60 "benchmark: operators" "${operators[@]}"
else
  check ops_gpu 100 "benchmark: operators" "$python" benchmarks/ops_gpu.py
fi
tests 80 segcore packages/segcore
tests 120 methods packages/{ddp,ddps,ddrnet,dgmn2}
models=("$python" benchmarks/models_gpu.py --device "$device" "${few[@]}")
check models_gpu 75 "benchmark: training" "${models[@]}" --train
for model in ddp_convnext_t_4x4_512x1024_160k_cityscapes fpn_dgmn2_tiny_4x2_769x769_40k_cityscapes \
  ddrnet_23_slim_cityscapes ddps_segformer_mit_b2_cityscapes20_multistep; do
  check models_gpu 90 "benchmark: $model" "${models[@]}" --only "$model"
done
if [[ ! $rehearse ]] && command -v compute-sanitizer >/dev/null; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  sanitize memcheck --report-api-errors no  # CUDA graphs cannot be recorded without torch's cache, which says so
  sanitize racecheck
fi

totals=$(grep -Es ' in [0-9.]+s' "$out/tests.txt" || true)
if [[ $rehearse ]]; then
  skipped=$(grep -Eo '[0-9]+ skipped' <<<"$totals" | awk '{n += $1} END {print n + 0}' || true)
  echo "rehearsed: $skipped gpu tests collected, $errors errors"
else
  echo "$totals"
  echo "$errors steps did not pass; logs: $out"
fi | tee -a "$out/summary.txt"
((errors == 0))
