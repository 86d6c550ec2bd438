#!/usr/bin/env bash
# 6. The xdit command without degrees: it starts one process per device (here 2 x 2, by --sp-topology), and computes the
# degrees from the topology and the model's heads. With the real model:
#
#     xdit --model FLUX.1-dev --prompt "a red chair" --sp-backend torus
#
# This script does the same with a tiny model, in a folder named like the model on Hugging Face.
#
#     bash examples/06_xdit_command.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
mkdir -p out/example6 && cd out/example6

[ -d black-forest-labs/FLUX.1-dev ] || $python -m sf_xfuser.bench.tiny_models flux black-forest-labs/FLUX.1-dev
OMP_NUM_THREADS=1 "${XDIT:-xdit}" --master_port "${PORT:-29571}" --model FLUX.1-dev --prompt "a red chair" --seed 1 \
    --height 128 --width 128 --num_inference_steps 1 --max_sequence_length 16 --num_iterations 1 --output_directory . \
    --sp-backend torus --sp-topology 2x2
# shellcheck disable=SC2012 # the newest; xDiT chooses the names
echo "picture: out/example6/$(ls -t ./*.png | head -1)"
