#!/bin/bash
#SBATCH --job-name=kvpatch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# dec7 on all GPUs of two nodes: sbatch slurm.sh. RESULTS must lie where every node sees it, on a file system with file
# locks. A job that was ended or requeued goes on from what it stored.
set -eu

RESULTS="${RESULTS:-$SLURM_SUBMIT_DIR/results}"
PORT=6379
export RAY_USAGE_STATS_ENABLED=0

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}')

srun --overlap --nodes=1 --ntasks=1 -w "$head" \
    ray start --head --node-ip-address="$address" --port=$PORT --include-dashboard=false --block &
sleep 20
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
        ray start --address="$address:$PORT" --block &
    sleep 20
fi

srun --overlap --nodes=1 --ntasks=1 -w "$head" \
    kvpatch run dec7 --model llama-3-8b-instruct --on ray --gpus all --address "$address:$PORT" --out "$RESULTS" &
run=$!
trap 'kill -TERM $run' TERM
wait $run
