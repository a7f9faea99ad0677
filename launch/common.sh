# shellcheck shell=bash
# Functions that deepspeed.sh and mpirun.sh share.

me=$(basename "$0")
say() { printf '%s: %s\n' "$me" "$1" >&2 || :; } # a closed terminal is no reason to fail
fail() {
    say "error: $1"
    exit 2
}

# Print the names of the exported variables that ranks on other hosts need, one per line: the paths of programs and
# libraries, and the settings of Python, Hugging Face, the loggers, torch, CUDA, the interconnects, threads, DeepSpeed
# and this package. Variables of one host or shell are left out: HOME, TMPDIR, DISPLAY, those of a scheduler, and RANK.
passed_on() {
    compgen -e | grep -xE '(PATH|LD_LIBRARY_PATH|LD_PRELOAD|VIRTUAL_ENV|XDG_CACHE_HOME|(http|https|no)_proxy'\
'|(HTTP|HTTPS|NO)_PROXY|PYTHON.*|(HF|TRANSFORMERS|TOKENIZERS|WANDB|MLFLOW|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|CUDA|NCCL'\
'|GLOO|UCX|FI|MV2|OMP|GOMP|KMP|MKL|DS|DEEPSPEED|SELFGEN_DS)_.*)'
}
