#!/bin/bash
# What overnight.sh does, on the CPU of a laptop: with digits, in minutes, or with CIFAR-10, in an hour.
#
#   scripts/laptop.sh [digits|cifar10] [flags of train.py]
set -euo pipefail
case ${1:-} in
  digits | cifar10) data=$1 && shift ;;
  *) data=digits ;;
esac
if [ "$data" = digits ]; then sizes=32,40,48 recipe=digits; else sizes=32,40 recipe=cifar10_one_hour; fi
export SIZES=${SIZES:-$sizes}
exec "$(dirname "$0")/overnight.sh" "$data" "${RUN:-runs/$data}" --config "recipes/$recipe.yaml" "$@"
