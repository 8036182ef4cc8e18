#!/bin/bash
# Train on several nodes; requeue the job when its time is up or it is preempted.
#
#   sbatch docs/slurm.sh --data-dir /data/imagenet --save-dir runs/r50
#
# Two minutes before the time limit SLURM sends USR1 to the job's steps: train.py finishes its step, saves and exits.
# This script then requeues the job, and --resume auto continues at that step; scancel ends it for good. Submit it from
# the repository, with .venv/bin/activate sourced. All arguments go to train.py. Adapt the next lines to your cluster.

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

log="slurm-$SLURM_JOB_ID.log" # must be the --output above
export HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))"
stops() { grep -ci "^stopped at step" "$log"; } # a message of train.py (loop.py)
before=$(stops)
# How long torchrun waits for its ranks to save, instead of 30 s. Before torch 2.12 it is always 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 # shorter than the warning by --signal above
# The signals are for the ranks; this shell waits until they have saved. (An ignored signal could not be trapped by
# child processes, so the trap is a command that does nothing.) SLURM sends the warning, and the TERM of a preemption,
# to the steps alone. This shell gets TERM too once SLURM ends the job: it was cancelled, or SLURM itself requeues it.
trap : USR1
trap cancelled=yes TERM

# One launcher per node. torchrun forwards TERM to its ranks, but USR1 would kill it, so USR1 becomes TERM.
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

# Requeue the job only if the run was stopped: an error would happen again.
[ $code -ne 0 ] && [ "$(stops)" -gt "$before" ] && [ -z "${cancelled-}" ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
