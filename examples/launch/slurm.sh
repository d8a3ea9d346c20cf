#!/bin/bash
# Training on GPUs under Slurm, a process for each node. From the repository's root:
#
#   sbatch examples/launch/slurm.sh
#
# The run is on a disk that all nodes share, or at gs://. `--distributed=true` finds the other
# processes by Slurm's own variables.

#SBATCH --job-name=nha-340m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append

srun --kill-on-bad-exit=1 \
  nha train configs/nha-340m.yaml --run runs/340m --distributed=true --mesh.fsdp=8
code=$?

case $code in
  0 | 2 | 130) ;; # finished; wrong input or Ctrl-C, which starting again would not help
  *)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$code"
