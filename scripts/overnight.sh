#!/bin/bash
# From data to a trained, scored and reported network in one night. After any stop, run the same command
# again: it continues where it stopped.
#
#   PACK_FLAGS="--stored-sides 192,320 --eval-sizes 256 --eval-crop 0.95" SIZES=224,256 \
#     scripts/overnight.sh data/imagenet runs/night --config recipes/overnight.yaml
#   scripts/overnight.sh tiny-imagenet runs/tiny --arch resnet18 --resize-schedule 32,48,64 --epochs 30
#
# Start it in the repository, with DATA, RUN and flags of train.py. DATA is a folder (ImageNet's two tar files with
# the development kit, class folders, or a packed copy) or the name of a dataset. A folder may be deleted once it is
# packed. Without --config and --lr, lr_finder.py gets the flags first and chooses the rate. In the environment,
# PACK_FLAGS are flags of pack_dataset.py, SIZES=192,224 the sizes to score at, and GPU_PRICE=2.5 the price of a GPU
# hour. Ctrl-C stops it; so does kill -TERM -- -PID, its process group.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ -f train.py ] || { echo "error: $PWD has no train.py"$'\n'"fix: start this script in the repository" >&2; exit 2; }
data=${1%/} run=${2%/} tries=0 && shift 2
[[ -d $data || ! -f $data-packed/manifest.json ]] || data+=-packed
if [[ ! -d $data && $data == */* && $data != hf:* ]]; then
  echo "error: there is no folder $data"$'\n'"fix: check the path, or name a dataset without a slash" >&2
  exit 2
fi
make -s setup # which does nothing if it is up to date
python() { command .venv/bin/python "$@"; }
mkdir -p "$run" && exec 9> "$run/overnight.lock"
if command -v flock > /dev/null && ! flock -n 9; then
  echo "waiting for another run of this script in $run, or what a killed one left running" >&2
  flock 9
fi

if [ -d "$data" ]; then
  if [ ! -f "$data/manifest.json" ]; then
    flags=$data-packed/pack_flags.txt # of what is packed: the manifest is there before the evaluation crops are
    if [[ ! -f $data-packed/manifest.json || ! -f $flags || $(cat "$flags") != "${PACK_FLAGS-}" ]]; then
      read -ra pack <<< "pack_dataset.py ${PACK_FLAGS-}"
      python "${pack[@]}" --data-dir "$data" --out "$data-packed"
      echo "${PACK_FLAGS-}" > "$flags"
    elif [[ $(find "$data/" -mindepth 1 -maxdepth 2 -type d -newer "$data-packed/manifest.json") ]]; then
      echo "note: folders in $data changed after it was packed; to use what is new, delete $data-packed" >&2
    fi
    data+=-packed
  fi
  where=(--data-dir "$data")
elif [[ $data == digits || $data == synthetic* || $data == hf:* ]]; then
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
  echo "train.py was killed (exit code $code); starting it again, restart $tries of at most 19" >&2
  sleep 1
done
best=("$run"/best_*.pt)
[ -e "${best[0]}" ] || { echo "no epoch has been scored, so there is nothing to validate and report"; exit 0; }
sizes=$run/validation/sizes.txt # of the scores that are there
if [[ ! $run/validation/scores.json -nt ${best[0]} || $(cat "$sizes" 2> /dev/null) != "${SIZES-}" ]]; then
  python validate.py "${best[0]}" "${where[@]}" ${SIZES:+--image-sizes "$SIZES"}
  echo "${SIZES-}" > "$sizes"
fi
python -m analysis.report "$run"
python -m analysis.report_card "$run" ${GPU_PRICE:+--gpu-price "$GPU_PRICE"}
