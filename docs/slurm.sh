#!/bin/bash
# Train on several nodes, and continue by itself when the time is up or the job is preempted.
#
#   sbatch docs/slurm.sh --data-dir /data/imagenet --save-dir runs/r50
#
# Two minutes before the limit SLURM sends USR1 to the job's steps: train.py finishes the step, saves and exits. This
# script then puts the job back into the queue, where --resume auto goes on at that step. Submit it from the
# repository; everything after the script's name goes to train.py. Adapt the next lines to the cluster.

#SBATCH --job-name=resnet50
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

log="slurm-$SLURM_JOB_ID.log"
export HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))"
stops() { grep -c "^Stopped at step" "$log"; }
before=$(stops)
trap : USR1 TERM # they are for the ranks; this shell waits until those have saved (ignored, no child could trap them)

# One launcher a node. torchrun hands TERM on to its ranks but would die of USR1, so that is translated.
srun --kill-on-bad-exit=1 bash -c '
  (trap "" USR1; exec torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
     --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD" train.py --resume auto "$@") &
  launcher=$!
  trap "kill -TERM $launcher" USR1 TERM
  code=0
  wait $launcher || code=$?
  while kill -0 $launcher 2>/dev/null; do wait $launcher || code=$?; done # a trap interrupts wait
  exit $code' bash "$@"
code=$?

# Only a run that was stopped goes back into the queue: an error would meet it again.
[ $code -ne 0 ] && [ "$(stops)" -gt "$before" ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
