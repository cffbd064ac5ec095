#!/usr/bin/env bash
# Train in MMSegmentation, 0.30 or 1.x, continue here, and test the result there, all by the programs' own commands.
#
#     ./exchange.sh [DATA [WORK [MODEL …]]]
#
# DATA is a folder in the Cityscapes layout; a small one is generated if it is missing. WORK is a new folder for
# checkpoints and logs. MODEL is a configuration of ours; without one, four methods and two base models take turns.
set -euo pipefail
here=$(dirname "$0")
data=${1:-data/toy_small}
work=${2:-work_dirs}
models=("${@:3}")
((${#models[@]})) || models=(
  ddp_resnet18_toy ddps_segformer_b0_toy ddrnet_23_slim_toy setr_mla_dgmn2_nano_toy
  ddps_segformer_b0_base_toy deeplabv3plus_m_v2_d8_512x1024_80k_cityscapes
)
[[ -d $data ]] || python - "$data" <<'PYTHON'
import sys, pathlib, segcore.demo.toy
segcore.demo.toy.generate(pathlib.Path(sys.argv[1]), train=8, val=4, height=128, width=256)
PYTHON

# Where MMSegmentation is and which line; a clone's own tools/ serve as well
mmseg=$(python -c 'from importlib.util import find_spec; print(find_spec("mmseg").submodule_search_locations[0])')
tools=$mmseg/.mim/tools
if [[ -d $mmseg/core ]]; then
  config=$here/toy_0x.py metric=(--eval mIoU)
  theirs=(data.{train,val,test}.data_root="$data")
else
  config=$here/toy_1x.py metric=()
  theirs=({train,val,test}_dataloader.dataset.data_root="$data")
fi
ours=(--data.root "$data" --data.workers 0 --evaluate.img-scale 256 128 --evaluate.precision fp32 --no-report)

for model in "${models[@]}"; do
  run=$work/$model
  # Train and evaluate there
  python "$tools/train.py" "$config" --work-dir "$run/theirs" --cfg-options model.experiment="$model" "${theirs[@]}"
  # Evaluate the checkpoint here
  segcore test "$model" "$run/theirs/iter_2.pth" "${ours[@]}" --json "$run/theirs/segcore.json"
  # Continue from it here
  segcore train "$model" "${ours[@]}" --train.init-from "$run/theirs/iter_2.pth" --work-dir "$run/ours" \
    --data.img-scale 256 128 --data.crop 128 128 --train.batch-size 2 --train.device-batch-size 2 \
    --schedule.iterations 2
  # Test the result there
  segcore convert "$run/ours" "$run/ours.pth" --published-names "$run/ours"
  python "$tools/test.py" "$config" "$run/ours.pth" "${metric[@]}" --work-dir "$run/theirs" \
    --cfg-options model.experiment="$model" "${theirs[@]}"
done
