#!/bin/sh
# Install what scripts/slurm.sh starts, from Debian's or Ubuntu's packages: Slurm, munge, slurmdbd, MariaDB.
# Does nothing when they are there. Where they cannot be installed it says so in one line and succeeds:
# the tests that need Slurm are then skipped.
set -eu
packages="slurm-wlm slurm-client munge slurmdbd mariadb-server"

cannot() {
    echo "no Slurm: $1; the tests that need it are skipped" >&2
    exit 0
}

has_all() {
    for program in slurmctld slurmd slurmdbd sbatch munged mariadbd mariadb-install-db; do
        PATH="$PATH:/usr/sbin:/usr/local/sbin" command -v "$program" >/dev/null 2>&1 || return 1
    done
}

has_all && exit 0
[ "$(id -u)" -eq 0 ] || cannot "not root"
command -v apt-get >/dev/null 2>&1 || cannot "no apt-get here"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
# shellcheck disable=SC2086 # a list of names
if { apt-get update && apt-get install -y --no-install-recommends $packages; } >"$log" 2>&1; then
    rm -f "$log"
else
    cannot "apt-get failed, see $log"
fi
