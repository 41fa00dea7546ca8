#!/usr/bin/env bash
# Slurm, munge and an MPI for the tests of all launchers, from the packages of Debian or Ubuntu. Nothing is configured
# or started.
#
# Exit status 1, with the reason, where they are absent and cannot be installed; the tests are then skipped.
set -euo pipefail

missing() {
    local program
    for program in munged slurmctld slurmd sbatch srun shellcheck mpirun; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || echo "$program"
    done
}

[[ -z $(missing) ]] && exit 0
# shellcheck disable=SC2046  # one line
echo "absent:" $(missing)
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "install Slurm, munge, shellcheck and an MPI, or run this as root on Debian or Ubuntu" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --yes --no-install-recommends slurm-wlm munge shellcheck openmpi-bin
