#!/usr/bin/env bash
# Train, or carry out a pilot, on several hosts over ssh; see the usage below.
#
# This script starts the same launcher on every host as `deepspeed --hostfile`. It does not call that command: with
# DeepSpeed 0.19 a dead host does not end the others, a killed launcher counts as success, signals do not reach the
# ranks, and arguments and variables are passed on unquoted, where `ps` and logs show them.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: launch/deepspeed.sh [--dry-run] [--master_port PORT] HOSTFILE RECIPE [overrides...]
       launch/deepspeed.sh --pilot [--dry-run] HOSTFILE RECIPE --rows N [options of selfgen-ds pilot...]

  HOSTFILE   one line per host: NAME slots=NUMBER_OF_RANKS; the first host has rank 0
  RECIPE     trained with --resume auto and the overrides: --train.max_steps 100 --output_dir runs/x ...
  --dry-run  make the checks and print the command of each host, without running it (ranks check data and values)
  --pilot    start `selfgen-ds pilot` on every host: they share its runs, --jobs of --ranks processes at a time on each
             host, and must see the same output_dir. The last host to end writes the report

Run it in the project's folder (or your own) with the environment active. Folder, environment, recipe and DeepSpeed JSON
must be on every host under the same path, and `ssh NAME` must work without a question. The script checks all of this
before it starts anything. The variables that launch/common.sh lists reach all ranks over ssh's standard input, where
neither `ps` nor a log shows them; DeepSpeed's .deepspeed_env (in ~ or in this folder) adds more. The ranks of a host
take its GPUs in order, from GPU 0; CUDA_VISIBLE_DEVICES is not read.

Ranks talk over the interface that leads to the first host; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose another.
SIGTERM, SIGUSR1, SIGHUP and Ctrl-C make the ranks save and stop; a second Ctrl-C ends them at once. When one host
fails, the script ends the run on all hosts. The exit code is that of the ranks: 0 done, 2 bad input, 3 stopped by a
signal after saving, 1 anything else.
USAGE
}

here=$(dirname "$(readlink -f "$0")")
# shellcheck source=launch/common.sh
source "$here/common.sh"
quote() { printf "'%s'" "${1//\'/\'\\\'\'}"; } # so that another shell reads the text unchanged

dry_run='' port=29500 command=train
while [[ ${1-} == -* ]]; do
    case $1 in
        --dry-run) dry_run=yes ;;
        --pilot) command=pilot ;;
        --master_port | --master_port=*)
            if [[ $1 == *=* ]]; then port=${1#*=}; else port=${2-} && shift; fi
            [[ $port =~ ^[1-9][0-9]{0,4}$ && $port -lt 65536 ]] || fail "--master_port: expected a port, got '$port'"
            ;;
        -h | --help) usage && exit ;;
        *) fail "unknown option $1 (overrides follow HOSTFILE and RECIPE)" ;;
    esac
    shift
done
(($# >= 2)) || fail "expected HOSTFILE and RECIPE; see launch/deepspeed.sh --help"
hostfile=$1
arguments=("$command" --config "$2")
[[ $command == pilot ]] || arguments+=(--resume auto) # a pilot always goes on
arguments+=("${@:3}")

python=$(python3 -c 'import sys; print(sys.executable)') || fail "no python3 on PATH: activate the environment"
run=$(od -An -N8 -tx8 /dev/urandom | tr -d ' ') # marks this run's processes, in their environment
work=$(mktemp -d)                               # mode 700
trap 'rm -rf "$work" || :' EXIT
trap 'say "stopped before anything was started" && kill $(jobs -p) 2>/dev/null; exit 3' HUP INT TERM USR1

# --- The hosts

hosts=() slots=()
read_hostfile() {
    local line number=0 name='[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?'
    [[ -f $hostfile && -r $hostfile ]] || fail "$hostfile: expected a hostfile that can be read"
    while IFS= read -r line || [[ $line ]]; do
        number=$((number + 1))
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ ^[[:space:]]*($name)[[:space:]]+slots=([1-9][0-9]{0,3})[[:space:]]*(#.*)?$ ]] ||
            fail "$hostfile, line $number: expected NAME slots=NUMBER, got $(printf %q "$line")"
        [[ " ${hosts[*]-} " != *" ${BASH_REMATCH[1]} "* ]] ||
            fail "$hostfile, line $number: host ${BASH_REMATCH[1]} is there twice"
        hosts+=("${BASH_REMATCH[1]}") slots+=("${BASH_REMATCH[3]}")
    done <"$hostfile"
    ((${#hosts[@]})) || fail "$hostfile: expected at least one line NAME slots=NUMBER"
}

remote() { # HOST: run the input in a shell on the host, as the end of a pipeline; a broken link is noticed after 30 s
    exec ssh -aTx -S none -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 "$1" sh
}

# NUMBERS COMMAND [ARGUMENTS]: run the script that `COMMAND HOST_NUMBER ARGUMENTS` prints, on several hosts at once.
# The outputs are in $work/NUMBER.out and .err afterwards, the exit codes in codes.
codes=()
on() {
    local n processes=()
    for n in $1; do
        "$2" "$n" "${@:3}" | remote "${hosts[n]}" >"$work/$n.out" 2>"$work/$n.err" &
        processes[n]=$!
    done
    for n in $1; do
        wait "${processes[n]}" && codes[n]=0 || codes[n]=$?
    done
}

last() { tail -n 1 "$1" | tr -d '\r'; } # print the last line of a file; lines of ssh end with a carriage return

# --- The environment and the command of every process

deepspeed_env() { # export the variables of DeepSpeed's files, expanded on the remote host as DeepSpeed does
    local file line number
    for file in ~/"${DS_ENV_FILE:-.deepspeed_env}" "${DS_ENV_FILE:-.deepspeed_env}"; do
        [[ -f $file ]] || continue
        number=0
        while IFS= read -r line || [[ $line ]]; do
            number=$((number + 1))
            [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
            [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] || fail "$file, line $number: expected NAME=VALUE"
            printf 'export %s="%s"\n' "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]//\"/\\\"}"
        done <"$file"
    done
}

setting() {
    local name folder
    for name in $(passed_on); do
        printf 'export %s=%s\n' "$name" "$(quote "${!name}")"
    done
    deepspeed_env
    folder=$(quote "$PWD")
    printf '[ -x %s ] || { echo there is no %s >&2; exit 2; }\n' "$(quote "$python")" "$(quote "$python")"
    printf 'cd %s 2>/dev/null || { echo there is no folder %s >&2; exit 2; }\n' "$folder" "$folder"
}

check() { # HOST_NUMBER ARGUMENTS: run launch/check_host.py
    printf '%s\nexec %s -' "$setting" "$(quote "$python")"
    printf ' %s' "${@:2}"
    printf " <<'END'\n%s\nEND\n" "$(<"$here/check_host.py")"
}

told() { # HOST_NUMBER NAME: print a value that launch/check_host.py has printed
    sed -n "s/^$2\t//p" "$work/$1.out"
}

launcher() { # HOST_NUMBER: print the host's command
    printf '%s -u -m' "$(quote "$python")"
    if [[ $command == train ]]; then
        printf ' deepspeed.launcher.launch --quiet --world_info=%s --node_rank=%s' "$world" "$1"
        printf ' --master_addr=%s --master_port=%s --module' "$(quote "$address")" "$port"
    fi
    printf ' selfgen_ds'
    printf ' %s' "${quoted[@]}"
}

start() { # HOST_NUMBER
    printf '%s\nexport SELFGEN_DS_RUN=%s\n' "$setting" "$run"
    # shellcheck disable=SC2016 # the remote shell expands them, after .deepspeed_env
    printf 'export %s="${%s:-%s}"\n' {GLOO_SOCKET_IFNAME,GLOO_SOCKET_IFNAME,"${interfaces[$1]}"} \
        {NCCL_SOCKET_IFNAME,NCCL_SOCKET_IFNAME,"${interfaces[$1]}"}
    printf '%s </dev/null\n' "$(launcher "$1")"
}

# --- Signals for the processes of this run. Only ranks know how to stop: DeepSpeed's launcher would kill them.

signal() { # HOST_NUMBER SIGNAL: send a signal to the ranks, and to a pilot itself
    cat <<END
cd /proc
for file in \$(grep -lzx SELFGEN_DS_RUN=$run [0-9]*/environ 2>/dev/null); do
    process=\${file%/environ}
    { [ $command = pilot ] || grep -qz ^RANK= \$process/environ; } &&
        grep -qzx selfgen_ds \$process/cmdline && kill -$2 \$process
done
END
}

end() { # HOST_NUMBER SECONDS: send SIGTERM to the remaining processes, and SIGKILL after SECONDS
    cat <<END
cd /proc
left() { grep -lzx SELFGEN_DS_RUN=$run [0-9]*/environ 2>/dev/null | cut -d / -f 1; }
second=0
while processes=\$(left) && [ "\$processes" ]; do
    if [ \$second -ge $(($2 + 10)) ]; then echo \$processes && exit 1; fi
    if [ \$second -ge $2 ]; then kill -KILL \$processes; elif [ \$second = 0 ]; then kill \$processes; fi
    sleep 1
    second=\$((second + 1))
done 2>/dev/null
END
}

# --- Checks before anything starts

read_hostfile
setting=$(setting)
quoted=()
for argument in "${arguments[@]}"; do
    quoted+=("$(quote "$argument")")
done
all=${!hosts[*]}

check - same "${quoted[@]}" | sh >"$work/here" 2>"$work/err" || fail "$(last "$work/err")"
on "$all" check same "${quoted[@]}"
differences=0
for n in $all; do
    if ((codes[n])); then
        say "error: host ${hosts[n]}: $(last "$work/$n.err")"
        differences=1
        continue
    fi
    while IFS=$'\t' read -r what mine && IFS=$'\t' read -r _ theirs <&3; do
        [[ $what == address || $mine == "$theirs" ]] && continue
        say "error: host ${hosts[n]}: $what is $theirs, here $mine"
        differences=1
    done <"$work/here" 3< <(grep $'\t' "$work/$n.out") # lines without a tab are from the shell's start-up files
done
((!differences)) || exit 2

address=127.0.0.1 # the first host's or, if ssh reaches that over the loopback, the next host's: a target for `route`
for n in $all; do
    [[ $address == 127.* || $address == ::1 ]] && address=$(told "$n" address)
done
interfaces=()
for numbers in 0 "${all#0}"; do
    on "$numbers" check route "$(quote "$address")"
    for n in $numbers; do
        ((!codes[n])) || fail "host ${hosts[n]}: $(last "$work/$n.err")"
        interfaces[n]=$(told "$n" interface)
    done
    address=$(told 0 address)
done

ranks=0 world=''
for n in $all; do
    ranks=$((ranks + slots[n]))
    world+="${world:+, }\"${hosts[n]}\": [$(seq -s , 0 $((slots[n] - 1)))]"
done
world=$(printf '{%s}' "$world" | base64 -w 0 | tr +/ -_)
if [[ $dry_run ]]; then
    printf 'in %s, with the variables %s\n' "$PWD" "$(sed -n 's/^export \([^=]*\)=.*/\1/p' <<<"$setting" | xargs)"
    for n in $all; do
        printf '%s, over %s: %s\n' "${hosts[n]}" "${interfaces[n]}" "$(launcher "$n")"
    done
    exit
fi

# --- The run

mkfifo "$work/ended"
exec 4<>"$work/ended"
say "run $run: $ranks ranks on ${#hosts[@]} hosts, the first at $address ($(printf '%s\n' "${interfaces[@]}" | sort -u | xargs))"
stop='' sent=0 interrupted='' patience=10
trap 'stop=TERM' HUP TERM
trap 'stop=USR1' USR1
trap 'interrupted+=x stop=TERM' INT
for n in $all; do
    (
        trap '' HUP INT TERM USR1 # ssh has to live until the ranks are done
        start "$n" | { echo "$BASHPID" >"$work/$n.ssh" && remote "${hosts[n]}"; } && code=0 || code=$?
        echo "$n $code" >&4
    ) &
done

running=${#hosts[@]} code=0 deadline=''
while ((running)); do
    if read -r -t 1 -u 4 n ended; then
        running=$((running - 1))
        rm "$work/$n.ssh"
        ((ended != 255)) || say "host ${hosts[n]}: the connection is lost"
        how="ended with exit code $ended"
        ((ended <= 240 || ended == 255)) || how="ended, killed by signal $((256 - ended))"
        [[ ! $stop || $ended != 24[16] ]] || ended=3 # the signal came before Python handled it
        if ((ended && !code)); then # the first failure is the reason why other hosts fail
            code=$ended
            [[ $command == train ]] || continue # the other hosts go on with their runs of the pilot
            deadline=$((SECONDS + 40)) # the others miss a rank that was alone on its host after 30 s
            ((code != 2)) || deadline=$((SECONDS + 5)) # other ranks may still wait for the ranks that refused
            ((code == 2 || code == 3)) || say "host ${hosts[n]} $how: the run ends on all hosts"
        fi
    fi
    if [[ $stop ]] && ((!sent || SECONDS >= sent + 10)); then # again: a rank may not have started yet
        ((sent)) || say "SIG$stop: the ranks save and stop"
        sent=$SECONDS
        on "$all" signal "$stop"
    fi
    [[ $interrupted != xx* ]] || deadline=$SECONDS code=1 patience=0
    [[ ! $deadline ]] || ((SECONDS < deadline)) || break
done
trap '' HUP INT TERM USR1
on "$all" end "$patience"
for n in $all; do
    ((!codes[n])) || say "host ${hosts[n]}: processes with SELFGEN_DS_RUN=$run may be left: $(cat "$work/$n".{out,err} | tail -n 1)"
done
((!running)) || cat "$work"/*.ssh | xargs kill -KILL 2>/dev/null || : # ssh processes that wait for hosts that are gone
((code == 0 || code == 2 || code == 3)) || code=1
exit "$code"
