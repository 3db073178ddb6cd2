#!/usr/bin/env bash
# A run notebook on one or more nodes, which goes on by itself after its time was up:
#   sbatch --nodes 2 --gpus-per-node 8 --time 12:00:00 tools/slurm.sh train_coupled --out runs/mine -p preset paper
# Give --out: it is how the next job finds what this one left. The virtual environment is VENV (.venv).
#SBATCH --job-name=defi_nb
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -uo pipefail
case " $* " in *" --out "*) ;; *) echo "give --out FOLDER: without it, a job that is started again would begin anew" >&2; exit 2 ;; esac

export BIN="${VENV:-.venv}/bin" NODES="${SLURM_NNODES:-1}" PROCESSES="${SLURM_GPUS_ON_NODE:-1}" # one for each GPU of a node
export MASTER="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" PORT=$(( 20000 + SLURM_JOB_ID%20000 ))

srun --kill-on-bad-exit=1 bash -c '
  exec "$BIN/python" -m torch.distributed.run --nnodes "$NODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$PROCESSES" \
    --master-addr "$MASTER" --master-port "$PORT" -m defi_nb.run.launch "$@"' bash "$@"
status=$?

out=$(printf "%s\n" "$@" | sed -n "/^--out$/{n;p;}")
if [ "$status" -ne 0 ] && [ -e "$out/stopped" ]; then # told to stop, not failed
  scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$status"
