#!/usr/bin/env bash
# Everything that is to be known about a GPU, in about half an hour: networks in both precisions, eager and compiled,
# against the dense network of equal width and timm's ResNet; the batch norm of fields alone; what `tune` finds.
#
#     scripts/benchmark_gpu.sh cuda out/          # device and folder of the results
#     scripts/benchmark_gpu.sh cpu out/ --size 65 --batch-size 2 --repeats 1    # a rehearsal; further options of benchmark.py
set -euo pipefail
device=$1 out=$2
shift 2
cd "$(dirname "$0")"
models=(c8resnet50 d4resnet50 c8resnet18 d8resnet18)
for amp in "" bfloat16; do
    for form in eager compile; do
        options=(--device "$device" --batch-size 128 --channels-last --modes eval train --out "$out")
        [ -z "$amp" ] || options+=(--amp "$amp")
        [ "$form" = eager ] && options+=(--eager) || options+=(--compile)
        python benchmark.py "${models[@]}" "${options[@]}" --name "networks-${amp:-float32}-$form" "$@"
    done
    python benchmark_norm.py --device "$device" --dtype "${amp:-float32}" > "$out/norm-${amp:-float32}.md"
done
