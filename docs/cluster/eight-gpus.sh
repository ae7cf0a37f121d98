#!/bin/sh
# dec7 on all GPUs of one machine. The same command resumes it.
set -eu

pip install 'kvpatch[ray]'
kvpatch run dec7 --model llama-3-8b-instruct --gpus all --out results
kvpatch status results
