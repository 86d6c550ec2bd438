#!/usr/bin/env bash
# 11. Four machines with eight GPUs each, under Slurm. One torchrun per machine; degrees follow from the hosts.
#
#     sbatch examples/11_slurm.sh
#
#SBATCH --job-name=sf-xfuser
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=00:30:00
#SBATCH --output=sf-xfuser-%j.log
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun sf-xfuser doctor # on each machine; the job ends here if one of them is not usable
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m xfuser.runner --model FLUX.1-dev --prompt "a red chair" --height 4096 --width 4096 --sp-backend torus
