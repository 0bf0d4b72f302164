#!/usr/bin/env bash
# All three stages as jobs that wait for each other. From the checkout; the same command continues what stopped:
#
#   TRIPTYCH_SBATCH="--nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00" \
#   STAGE1="experiment=mine/stage1" STAGE2="experiment=mine/stage2" STAGE3="experiment=mine/stage3" \
#       bash scripts/slurm/curriculum.sh NAME [key=value for every stage ...]
#
# Runs are NAME/stage1, NAME/stage2, NAME/stage3. STAGE1, STAGE2 and STAGE3 are the settings of each, split at spaces.
# A stage starts from the weights of the one before, carried over to its own model (init.from). To have the account of
# that carrying before stage 2 trains, or to choose its mode, give what reparameterize.py should make as
# REPARAMETERIZE="model=... mode=..."; a job of one task then makes NAME/reparameterized, where stage 2 starts.
# TRIPTYCH_SBATCH are the options of sbatch for the training jobs. All log files are in outputs/NAME.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:?"give a name: bash scripts/slurm/curriculum.sh NAME [key=value ...]"}
shift
read -ra sbatch <<<"${TRIPTYCH_SBATCH:-}"
read -ra stage1 <<<"${STAGE1:-}"
read -ra stage2 <<<"${STAGE2:-}"
read -ra stage3 <<<"${STAGE3:-}"
read -ra carried <<<"${REPARAMETERIZE:-}"
outputs=outputs
for word in "$@"; do [[ $word != outputs=* ]] || outputs=${word#outputs=}; done
out=$outputs/$name
mkdir -p "$out"

before=
submit() { # JOB-NAME [sbatch option ...] SCRIPT ARGUMENT ...: starts once the job submitted before it has ended well
    local job=$1 options=()
    shift
    [[ -z $before ]] || options+=("--dependency=afterok:$before" --kill-on-invalid-dep=yes)
    while [[ $1 == --* ]]; do options+=("$1") && shift; done
    before=$(sbatch --parsable --job-name="$job" --output="$out/slurm-%x-%j.log" "${sbatch[@]}" "${options[@]}" \
        scripts/slurm/train.sbatch "$@")
    before=${before%%;*} # sbatch adds the cluster's name where there are several
    echo "$before $job"
}

start=$out/stage1
submit stage1 train_stage1.py name="$name/stage1" "$@" "${stage1[@]}"
if ((${#carried[@]})); then
    start=$out/reparameterized
    [[ -d $start ]] || submit reparameterize --nodes=1 --ntasks=1 --ntasks-per-node=1 --gpus-per-node=0 \
        reparameterize.py from="$out/stage1" out="$start" "${carried[@]}"
fi
submit stage2 train_stage2.py name="$name/stage2" init.from="$start" "$@" "${stage2[@]}"
submit stage3 train_stage3.py name="$name/stage3" init.from="$out/stage2" "$@" "${stage3[@]}"
