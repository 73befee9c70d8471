#!/usr/bin/env bash
# A trainer.launcher for a Slurm allocation: one torchrun a node, and they meet at the first node.
# trainer.launcher: deploy/srun_torchrun.sh
# WORKERS_PER_NODE: workers of a node; without it one a GPU, or one where there is none.
set -euo pipefail
: "${SLURM_JOB_ID:?deploy/srun_torchrun.sh runs inside a Slurm allocation (salloc, sbatch)}"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
# srun does not take the cores of a task over from sbatch by itself.
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 \
    python -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${WORKERS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$port" "$@"
