#!/bin/bash
# From data to a trained, scored and reported network in one night. After any stop, start it again with the same
# words: it goes on where it was.
#
#   scripts/overnight.sh data/imagenet runs/night --config recipes/overnight.yaml
#   scripts/overnight.sh tiny-imagenet runs/tiny --arch resnet18 --resize-schedule 32,48,64 --epochs 30
#
# Start it in the repository, with DATA, RUN and flags of train.py. DATA is a folder (ImageNet's two tar files with
# the development kit, class folders, or a packed copy) or the name of a dataset. Without --config and --lr,
# lr_finder.py gets the flags first and chooses the rate. SIZES=192,224 in the environment are the sizes to score
# at, GPU_PRICE=2.5 is the price of a GPU hour. Ctrl-C stops it; so does kill -TERM -- -PID, its process group.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data=${1%/} run=${2%/} tries=0 && shift 2
[ -x .venv/bin/python ] || make setup
python() { command .venv/bin/python "$@"; }
mkdir -p "$run" && exec 9> "$run/overnight.lock"
if command -v flock > /dev/null; then flock 9; fi # wait for what a killed script left running

if [ -d "$data" ]; then
  if [ ! -f "$data/manifest.json" ]; then python pack_dataset.py --data-dir "$data" --out "$data-packed"; data+=-packed; fi
  where=(--data-dir "$data")
elif [[ $data == digits || $data == synthetic* ]]; then
  where=(--dataset "$data")
else
  where=(--dataset "$data" --data-dir "data/$data")
  python download_imagenet.py --method simple "${where[@]}"
fi
if [[ ! " $* " =~ \ --(lr|config)[=\ ] ]]; then
  [ -f "$run/lr_finder.json" ] || python lr_finder.py "${where[@]}" "$@" --out "$run"
  lr=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["suggestion"] or "")' "$run/lr_finder.json")
  set -- "$@" ${lr:+--lr "$lr"}
fi
until python train.py "${where[@]}" "$@" --save-dir "$run" --resume auto; do
  code=$? # 134 to 139: killed, for its memory perhaps, or crashed
  [[ $code == 13[4-9] && $((++tries)) -lt 20 ]] || exit $code
done
best=("$run"/best_*.pt) sizes=$run/validation/sizes.txt # of the scores that are there
if [[ ! $run/validation/scores.json -nt ${best[0]} || $(cat "$sizes" 2> /dev/null) != "${SIZES-}" ]]; then
  python validate.py "${best[0]}" "${where[@]}" ${SIZES:+--image-sizes "$SIZES"}
  echo "${SIZES-}" > "$sizes"
fi
python -m analysis.report "$run"
python -m analysis.report_card "$run" ${GPU_PRICE:+--gpu-price "$GPU_PRICE"}
