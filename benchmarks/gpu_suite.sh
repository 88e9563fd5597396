#!/bin/bash
# The GPU suite: builds the CUDA kernels, checks every kernel on the device, measures linears and a decode, draws both.
#
#     benchmarks/gpu_suite.sh DIR [--smoke]
#
# Runs from a checkout with nothing installed: Python (PYTHON, python3 by default) with torch, triton and numpy, and nvcc.
# No network, no pip, no amq._cpu. At most 8 minutes; each part has its share and leaves out what does not fit. DIR gets
# suite.json, correctness.json, speed.png, decode.png and log.txt, and is safe to use again. The exit status is 1 if a
# check failed or a part did not finish. --smoke runs the same code at tiny sizes on a CPU and measures nothing.
#
# amq/_cuda.so is used if it is newer than kernels/cuda, else the kernels are built for the present GPU into a temporary
# folder. AMQ_CUDA_LIBRARY names a library to use as it is; AMQ_CACHE a cache whose table of launch parameters
# (python -m amq.gpu.tune) is to be used, none by default.

set -u -o pipefail
usage="usage: benchmarks/gpu_suite.sh DIR [--smoke]"
folder=${1:?$usage}
smoke=${2:-}
[ -z "$smoke" ] || [ "$smoke" = --smoke ] || { echo "$usage" >&2; exit 2; }

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
cd "$root" || exit 2
export PYTHONPATH=$root PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 AMQ_CACHE=${AMQ_CACHE:-$work/cache}
rm -f "$folder"/{suite.json,correctness.json,speed.png,decode.png,log.txt}

# The flags of target _cuda in CMakeLists.txt, for one architecture.
build() {
    local library=$root/amq/_cuda.so architecture
    if [ -n "${AMQ_CUDA_LIBRARY:-}" ]; then echo "build: AMQ_CUDA_LIBRARY is $AMQ_CUDA_LIBRARY"; return; fi
    if [ -n "$smoke" ]; then
        export AMQ_CUDA_LIBRARY=$work/amq_cuda_plain.so
        PYTHONPATH=$root/tests "$python" -c \
            "import pathlib, sys, cuda_shim.build as b; b.build_shim(pathlib.Path(sys.argv[1]))" "$work"
        return
    fi
    if [ -e "$library" ] && [ -z "$(find kernels/cuda -type f -newer "$library")" ]; then echo "build: $library is up to date"; return; fi
    export AMQ_CUDA_LIBRARY=$work/_cuda.so
    architecture=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())") || return 1
    PATH=$PATH:/usr/local/cuda/bin nvcc -O3 -DNDEBUG -std=c++17 \
        "-gencode=arch=compute_80,code=[compute_80,sm_$architecture]" \
        -Xfatbin=-compress-all -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -shared -cudart static \
        -Xlinker --exclude-libs,ALL -o "$AMQ_CUDA_LIBRARY" kernels/cuda/launch.cu || return 1
    echo "build: $AMQ_CUDA_LIBRARY for sm_$architecture"
}

# part NAME SECONDS [OPTIONS]: runs benchmarks/gpu/NAME.py, which leaves out what SECONDS do not suffice for; kills it well after.
part() {
    local started=$SECONDS status name=$1 seconds=$2
    shift 2
    timeout -k 5 $((seconds + 20)) "$python" "benchmarks/gpu/$name.py" "$folder" --seconds "$seconds" $smoke "$@"
    status=$?
    echo "== $name: status $status, $((SECONDS - started)) s"
    parts="$parts $name=$status"
    [ $status -eq 0 ] || failed="$failed $name"
}

suite() {
    local failed="" parts="build=0" started=$SECONDS
    if ! build; then failed=" build" parts="build=1"; fi  # the parts say that there is no library, and try Triton
    echo "== $parts: $((SECONDS - started)) s"
    [ -z "$smoke" ] || export TRITON_INTERPRET=1
    part machine 30
    if [[ $failed = *machine* ]]; then echo "== nothing can run here"; return 1; fi
    part correctness 120
    part speed 170
    part decode 90
    part plot 20 --parts "$parts"
    echo "== all: $((SECONDS - started)) s, failed:${failed:- nothing}"
    [ -z "$failed" ]
}

suite 2>&1 | tee "$folder/log.txt"
exit "${PIPESTATUS[0]}"
