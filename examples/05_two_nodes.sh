#!/usr/bin/env bash
# 5. A launch on two machines, emulated by two local "nodes": one torchrun command per machine.
#
#     bash examples/05_two_nodes.sh
#
# On real machines replace 127.0.0.1 by the first machine's address, run one command on each, and omit --sp-topology: the
# topology is then detected from the hosts. Here both nodes are on one host, so --sp-topology sets it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
port=${PORT:-29517}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT INT TERM

[ -d out/tiny-flux ] || $python -m sf_xfuser.bench.tiny_models flux out/tiny-flux
export OMP_NUM_THREADS=1
for node in 0 1; do
    $python -m torch.distributed.run --nnodes 2 --node-rank "$node" --nproc-per-node 2 \
        --master-addr 127.0.0.1 --master-port "$port" \
        examples/03_flux_with_the_flag.py --model out/tiny-flux --prompt "a small cat on a red chair" \
        --height 128 --width 128 --num_inference_steps 2 --max_sequence_length 64 --out out/example5 \
        --sp-backend torus --sp-topology 2x2 &
done
wait %1 # a failed node ends the script with its status
wait %2
echo "picture: out/example5/image.png"
