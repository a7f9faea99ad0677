# shellcheck shell=bash
# What deepspeed.sh and mpirun.sh have in common.

me=$(basename "$0")
say() { printf '%s: %s\n' "$me" "$1" >&2 || :; } # a terminal that has gone is no reason to fail
fail() {
    say "error: $1"
    exit 2
}

# The names of the exported variables that ranks on other hosts need, a line each: where programs and libraries are, and
# the settings of Python, Hugging Face, the loggers, torch, CUDA, the interconnects, threads, DeepSpeed and this package.
# What belongs to one host or shell stays there: HOME, TMPDIR, DISPLAY, a scheduler's variables, another launcher's RANK.
passed_on() {
    compgen -e | grep -xE '(PATH|LD_LIBRARY_PATH|LD_PRELOAD|VIRTUAL_ENV|XDG_CACHE_HOME|(http|https|no)_proxy'\
'|(HTTP|HTTPS|NO)_PROXY|PYTHON.*|(HF|TRANSFORMERS|TOKENIZERS|WANDB|MLFLOW|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|CUDA|NCCL'\
'|GLOO|UCX|FI|MV2|OMP|GOMP|KMP|MKL|DS|DEEPSPEED|SELFGEN_DS)_.*)'
}
