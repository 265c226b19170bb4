#!/bin/sh
# A real Slurm on this machine, for tests and to try things: scripts/slurm.sh start|stop|status DIR
#   eval "$(scripts/slurm.sh start DIR)"     # SLURM_CONF points to it
# As root, in a container. Two nodes n1 and n2, both this machine, 8 CPUs and 2 GPUs each (files, no devices);
# slurmdbd with MariaDB, so that sacct works; a munge of its own. Everything is in DIR, on ports of its own
# (SLURM_PORT, the first of 8). Partitions: main; grace, whose jobs are warned 30 s before they are preempted;
# urgent, which preempts both. Programs come from scripts/install_slurm.sh.
set -eu
PATH="$PATH:/usr/sbin:/usr/local/sbin"
[ $# -eq 2 ] || { echo "usage: $0 start|stop|status DIR" >&2; exit 2; }
mkdir -p "$2"
dir=$(cd "$2" && pwd)
port=${SLURM_PORT:-$((20000 + $(echo "$dir" | cksum | cut -d' ' -f1) % 4000 * 8))}
host=$(hostname)
export SLURM_CONF="$dir/slurm.conf"

fail() { echo "error: $1; logs are in $dir/log" >&2; exit 1; }

# running NAME: whether the daemon of that pid file is alive.
running() { [ -s "$dir/$1.pid" ] && kill -0 "$(cat "$dir/$1.pid")" 2>/dev/null; }

# wait_for SECONDS COMMAND...: until it succeeds.
wait_for() {
    deadline=$(($(date +%s) + $1)); shift
    while ! "$@" >/dev/null 2>&1; do
        [ "$(date +%s)" -lt "$deadline" ] || return 1
        sleep 0.1
    done
}

write_config() {
    cat >"$dir/slurm.conf" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is put back waits for as long as a credential lives: 120 s by default.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
SlurmctldPort=$((port + 1))
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 2))
AccountingStoragePass=$dir/munge.socket
ReturnToService=2
MailProg=/bin/true
JobRequeue=1
KillWait=20
InactiveLimit=0
UnkillableStepTimeout=60
MessageTimeout=30
TCPTimeout=10
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 3)) CPUs=8 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 4)) CPUs=8 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=grace Nodes=n[1-2] PriorityTier=1 GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
END
    cat >"$dir/gres.conf" <<END
NodeName=n1 Name=gpu File=$dir/gpu/n1-[0-1]
NodeName=n2 Name=gpu File=$dir/gpu/n2-[0-1]
END
    # slurmdbd refuses a configuration that others may read.
    (umask 077; cat >"$dir/slurmdbd.conf") <<END
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 2))
SlurmUser=root
PidFile=$dir/slurmdbd.pid
LogFile=$dir/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$port
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
END
}

make_gpus() {
    for gpu in n1-0 n1-1 n2-0 n2-1; do
        [ -e "$dir/gpu/$gpu" ] || mknod "$dir/gpu/$gpu" c 1 3
    done
}

start_munge() {
    running munged && return
    [ -s "$dir/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$dir/munge.key")
    munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" --num-threads=2 2>"$dir/log/munged.err"
}

database() { mariadb --no-defaults --user=root --socket="$dir/db.socket" "$@"; }

start_database() {
    running mariadbd && return
    [ -d "$dir/db/mysql" ] || mariadb-install-db --no-defaults --user=root --datadir="$dir/db" \
        --auth-root-authentication-method=normal --skip-test-db >"$dir/log/install-db.log" 2>&1
    mariadbd --no-defaults --user=root --datadir="$dir/db" --socket="$dir/db.socket" --port="$port" \
        --bind-address=127.0.0.1 --pid-file="$dir/mariadbd.pid" --innodb-buffer-pool-size=64M \
        --innodb-flush-log-at-trx-commit=0 >"$dir/log/mariadbd.log" 2>&1 &
    wait_for 60 database -e "SELECT 1" || fail "the database did not start"
    database -e "CREATE DATABASE IF NOT EXISTS slurm_acct_db;
        CREATE USER IF NOT EXISTS 'slurm'@'localhost' IDENTIFIED BY 'slurm';
        CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
        GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost';
        GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';"
}

nodes_ready() { [ "$(sinfo --noheader --Node --partition=main --states=idle,alloc,mix --format=%N | wc -l)" -eq 2 ]; }

start() {
    for program in slurmctld slurmd slurmdbd sbatch munged mariadbd mariadb-install-db; do
        command -v "$program" >/dev/null || fail "no $program; scripts/install_slurm.sh installs it"
    done
    [ "$(id -u)" -eq 0 ] || fail "must be root"
    mkdir -p "$dir/log" "$dir/state" "$dir/spool-n1" "$dir/spool-n2" "$dir/gpu" "$dir/db"
    [ -s "$SLURM_CONF" ] || write_config
    make_gpus
    start_munge
    start_database
    running slurmdbd || slurmdbd
    wait_for 60 sacctmgr --noheader list cluster || fail "slurmdbd does not answer"
    sacctmgr --immediate add cluster local >/dev/null 2>&1 || :    # it may be there already
    running slurmctld || slurmctld
    for node in n1 n2; do running "slurmd-$node" || slurmd -N "$node"; done
    wait_for 60 nodes_ready || fail "the nodes are not ready"
    echo "export SLURM_CONF=$SLURM_CONF"
}

# end NAME: ask a daemon to stop, then make it.
end() {
    running "$1" || return 0
    pid=$(cat "$dir/$1.pid")
    kill "$pid" 2>/dev/null || :
    wait_for "${2:-10}" gone "$pid" || kill -9 "$pid" 2>/dev/null || :
    rm -f "$dir/$1.pid"
}

gone() { ! kill -0 "$1" 2>/dev/null; }

no_jobs() { [ -z "$(squeue --noheader)" ]; }

stop() {
    if running slurmctld; then
        # With SIGKILL: who stops a cluster waits for no run to save.
        squeue --noheader --format=%A | xargs -r scancel --full --signal=KILL 2>/dev/null || :
        squeue --noheader --format=%A | xargs -r scancel 2>/dev/null || :
        wait_for 30 no_jobs || :
    fi
    # Asked together, then waited for: one after the other takes twice as long.
    for daemon in slurmd-n1 slurmd-n2 slurmctld slurmdbd; do
        if running "$daemon"; then kill "$(cat "$dir/$daemon.pid")" 2>/dev/null || :; fi
    done
    for daemon in slurmd-n1 slurmd-n2 slurmctld slurmdbd; do end "$daemon"; done
    end mariadbd 30
    end munged
    rm -rf "$dir/gpu"
}

case $1 in
start) start ;;
stop) stop ;;
status)
    for daemon in munged mariadbd slurmdbd slurmctld slurmd-n1 slurmd-n2; do
        if running "$daemon"; then echo "$daemon runs"; else echo "$daemon is down"; down=1; fi
    done
    exit "${down:-0}" ;;
*) echo "usage: $0 start|stop|status DIR" >&2; exit 2 ;;
esac
