# shellcheck shell=bash
# Which exported variables go to ranks on other hosts, for deepspeed.sh and mpirun.sh: where programs and libraries are,
# and the settings of Python, Hugging Face, the loggers, torch, CUDA, the interconnects, the threads, DeepSpeed and us.
# What belongs to one host (HOME, TMPDIR, HOSTNAME, DISPLAY, a scheduler's variables, another launcher's RANK) stays.

passed_on() { # their names, a line each
    compgen -e | grep -xE '(LD_LIBRARY_|LD_PRELOAD|C?PATH|VIRTUAL_ENV|XDG_CACHE_HOME|(https?|HTTPS?|no|NO)_(proxy|PROXY)'\
'|PYTHON.*|(HF|TRANSFORMERS|TOKENIZERS|WANDB|MLFLOW|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|CUDA|NCCL|GLOO|UCX|FI|MV2'\
'|OMP|GOMP|KMP|MKL|DS|DEEPSPEED|SELFGEN_DS)_.*)'
}
