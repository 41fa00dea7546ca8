# shellcheck shell=bash
# What the cluster's network and libraries need to know; sourced by job.sh on the first node before the ranks start.
# One line of reason each. Site settings belong at the end of this file, hyper-parameters into the recipe.

# The interpreter: the repository's own environment where there is one. In a container: its python3.
if [[ -z ${FD_SCALE_PYTHON:-} ]]; then
    FD_SCALE_PYTHON=python3
    [[ -x .venv/bin/python ]] && FD_SCALE_PYTHON=$PWD/.venv/bin/python
fi

# Left over in the shell that submitted, these would make every rank believe that torchrun started it as rank 0.
unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT

# The first node is where rank 0 runs. It is looked up here because an image of a container holds no scontrol.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR

# Where the ranks meet on that node, which other jobs may share: its own number for every start (job.sh allows a
# hundred), and the next one where somebody listens already.
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 101 + ${SLURM_RESTART_COUNT:-0}) % 12000))
while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do ((MASTER_PORT++)); done
export MASTER_PORT

# srun stopped to inherit --cpus-per-task from the job in Slurm 22.05; without it a rank and its workers share one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# Without a number, every rank makes a thread per core of the node, and eight ranks fight over them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# The last words of a rank that is killed reach the log only if nothing is buffered.
export PYTHONUNBUFFERED=1

# A rank that dies of a signal in native code says where it was.
export PYTHONFAULTHANDLER=1

# Eight ranks that abort at once would fill the disk with their memory.
ulimit -c 0

# Kernels are compiled where they run: in a shared home, all ranks of all nodes wait for one lock file.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/fd_scale-$UID/triton}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-${TMPDIR:-/tmp}/fd_scale-$UID/torch_extensions}

# NCCL then names the cause of a failure; without it there is only "unhandled system error".
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Site settings ------------------------------------------------------------------------------------------------------
# The interface that connects the nodes, where the first one found is the wrong one (`ip -brief address` shows them):
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# No way from the compute nodes to the hubs of weights; fetch them on the login node first (README.md):
# export HF_HUB_OFFLINE=1
# A folder on the node's own disk, where the shared file system takes long over a checkpoint: every rank writes its part
# (12 bytes per parameter, over all ranks) there first, which frees the memory, and copies it from there:
# export FD_SCALE_STAGE_SAVES=/local/$USER/saves
# Assignments for every run of this site; those of the command line come after and win:
# export FD_SCALE_SET="data.shards=/data/imagenet/shards run.root=/scratch/$USER/runs"
