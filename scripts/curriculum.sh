#!/usr/bin/env bash
# All three stages end to end, on captioned shapes, on whatever this machine has:
#
#   bash scripts/curriculum.sh [name]        default name: demo; the same command continues a run that stopped
#
# SCALE multiplies the length of every stage.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-demo} scale=${SCALE:-1} out=outputs/${1:-demo}
mkdir -p "$out"

# runs a command and notes how long it took and how much memory it held, for the report
step() { python scripts/measured.py "$out/commands.json" "$@"; }
images() { echo $(($1 * scale)); }

# the report refreshes as pictures appear, in time that training leaves over
python scripts/report.py "$out" --partial >/dev/null
(while sleep 60; do nice -n 19 python scripts/report.py "$out" --partial >/dev/null 2>&1 || true; done) &
refresher=$!
trap 'kill $refresher 2>/dev/null || true' EXIT

step prepare-64 python scripts/prepare.py shapes --resolution 64 --images 20000 --two 0
step stage1 python train_stage1.py name="$name/stage1" experiment=demo/stage1 train.images="$(images 64000)"
step prepare-128 python scripts/prepare.py shapes --resolution 128 --images 12000 --two 0.1 --text-states
[ -d "$out/stage1-as-pixart" ] ||
  step reparameterize python reparameterize.py from="$out/stage1" model=pixart_tiny out="$out/stage1-as-pixart"
step stage2 python train_stage2.py name="$name/stage2" experiment=demo/stage2 init.from="$out/stage1-as-pixart" train.images="$(images 64000)"
step stage3 python train_stage3.py name="$name/stage3" experiment=demo/stage3 init.from="$out/stage2" train.images="$(images 80000)"

kill $refresher 2>/dev/null || true
python scripts/report.py "$out"
echo "Look at $out/report.html"
