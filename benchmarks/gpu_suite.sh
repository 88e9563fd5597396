#!/bin/bash
# The GPU suite: checks every CUDA and Triton kernel on the device, runs both engines side by side, measures linears and
# a decode, compares every family and what the search computes with the CPU's, and draws what was measured.
# benchmarks/gpu/README.md says how to read it.
#
#     benchmarks/gpu_suite.sh DIR [--smoke]
#
# Runs from a checkout with nothing installed: Python (PYTHON, python3 by default) with torch, triton, numpy, psutil and
# transformers (part search wants msgspec, too), and nvcc unless a library is given. No network, no pip. At most six
# minutes (AMQ_SUITE_SECONDS): each part has its share, leaves out what does not fit, and is ended where it does not leave
# by itself; parts for which nothing is left do not start. DIR gets suite.json, correctness.json, speed.png, decode.png and log.txt, and is safe to use again.
# suite.json is written after every row, so a suite that is ended early leaves what it had. The exit status is 1 if a check
# failed or a part did not finish. --smoke runs the same code at tiny sizes on a CPU and measures nothing.
#
# AMQ_CUDA_LIBRARY names a library of the CUDA kernels to use as it is; else amq/_cuda.so is used if it is newer than
# kernels/cuda, else the kernels are built for the present GPU into a temporary folder. AMQ_CACHE is a cache whose table
# of launch parameters (python benchmarks/gpu/tune.py) is to be used, none by default.

set -u -o pipefail
usage="usage: benchmarks/gpu_suite.sh DIR [--smoke]"
folder=${1:?$usage}
smoke=${2:-}
[ -z "$smoke" ] || [ "$smoke" = --smoke ] || { echo "$usage" >&2; exit 2; }

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
total=${AMQ_SUITE_SECONDS:-360} patience=1
[ -z "$smoke" ] || { total=${AMQ_SUITE_SECONDS:-3600} patience=10; }  # it measures nothing, and may run beside other work
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
work=$(mktemp -d) || exit 2
cd "$root" || exit 2
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 AMQ_CACHE=${AMQ_CACHE:-$work/cache}
rm -f "$folder"/{suite.json,correctness.json,speed.png,decode.png,log.txt,clocks.jsonl}

exec 3>&1 > >(exec tee "$folder/log.txt") 2>&1
tee=$!
running="" clocks="" cpu=""
# Ends what still runs, and waits until the log is whole. A part that gets SIGTERM writes what it has.
leave() {
    local process
    for process in $running $clocks $cpu; do kill "$process" 2>/dev/null && wait "$process" 2>/dev/null; done
    rm -rf "$work"
    exec >&3 2>&3
    wait "$tee" 2>/dev/null
}
trap leave EXIT
trap 'echo "== terminated"; exit 143' TERM INT HUP

left() { echo $((total - SECONDS)); }

# wait_for COMMAND…: in the background, so that a SIGTERM to this script is seen at once.
wait_for() {
    local status
    "$@" &
    running=$!
    wait "$running"
    status=$?
    running=""
    return $status
}

# The library of the CUDA kernels, in AMQ_CUDA_LIBRARY or as installed.
build() {
    local library=$root/amq/_cuda.so architecture
    if [ -n "${AMQ_CUDA_LIBRARY:-}" ]; then echo "build: AMQ_CUDA_LIBRARY is $AMQ_CUDA_LIBRARY"; return; fi
    if [ -n "$smoke" ]; then
        export AMQ_CUDA_LIBRARY=$work/amq_cuda_plain.so
        # As tests build it: what they have built of the same sources is used again.
        PYTHONPATH=$root/tests "$python" -c "import pathlib, sys, cuda_shim.build as b
b.build_shim(pathlib.Path(sys.argv[1]).parent)" "$AMQ_CUDA_LIBRARY"
        return
    fi
    if [ -e "$library" ] && [ -z "$(find kernels/cuda -type f -newer "$library")" ]; then echo "build: $library is up to date"; return; fi
    export AMQ_CUDA_LIBRARY=$work/_cuda.so
    architecture=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())") || return 1
    "$python" -c "from amq.formats import native_header; print(native_header())" >"$work/amq_formats.h" || return 1
    PATH=$PATH:/usr/local/cuda/bin wait_for compile "$architecture" || return 1
    echo "build: $AMQ_CUDA_LIBRARY for sm_$architecture"
}

# compile ARCHITECTURE: kernels/cuda/*.cu with the flags of target _cuda in CMakeLists.txt, all at once.
compile() {
    local source process processes=""
    mkdir -p "$work/objects"
    for source in kernels/cuda/*.cu; do
        nvcc -O3 -DNDEBUG -std=c++17 "-gencode=arch=compute_80,code=[compute_80,sm_$1]" -Xfatbin=-compress-all \
            -Xcompiler=-fPIC,-fvisibility=hidden,-Wall "-I$work" -c "$source" -o "$work/objects/$(basename "$source").o" &
        processes="$processes $!"
    done
    for process in $processes; do wait "$process" || return 1; done
    nvcc -shared -cudart static -Xlinker --exclude-libs,ALL -o "$AMQ_CUDA_LIBRARY" "$work"/objects/*.o
}

# The CPU module, for parts families and search: built beside the first parts where it is not installed.
build_cpu() {
    "$python" -c "import importlib.util as i, sys; sys.exit(i.find_spec('amq._cpu') is None)" && return
    export AMQ_SUITE_CPU=$work/cpu
    CMAKE_ARGS=-DAMQ_CUDA=OFF "$python" setup.py -q build_ext --build-lib "$AMQ_SUITE_CPU" >"$work/cpu.txt" 2>&1 &
    cpu=$!
}

# part NAME SECONDS [OPTIONS]: runs benchmarks/gpu/NAME.py, which leaves out what SECONDS do not suffice for; ends it soon
# after, or where the whole suite's time is over. RESERVE seconds stay for the pictures.
RESERVE=20
part() {
    local began=$SECONDS status name=$1 seconds=$(($2 * patience)) most
    shift 2
    most=$(($(left) - RESERVE))
    [ "$name" = plot ] && most=$((most + RESERVE > 10 ? most + RESERVE : 10))
    if [ "$most" -lt 5 ]; then
        echo "== $name: not started, the suite's $total s are over"
        parts="$parts $name=124" failed="$failed $name"
        return
    fi
    [ "$seconds" -gt "$most" ] && seconds=$most
    [ "$most" -gt $((seconds + 10)) ] && most=$((seconds + 10))
    wait_for timeout -k 5 "$most" "$python" "benchmarks/gpu/$name.py" "$folder" --seconds "$seconds" \
        --began "$(date +%s.%N)" $smoke "$@"
    status=$?
    echo "== $name: status $status, $((SECONDS - began)) s"
    parts="$parts $name=$status"
    [ $status -eq 0 ] || failed="$failed $name"
}

failed="" parts="build=0"
if ! build; then failed=" build" parts="build=1"; fi  # the parts say that there is no library, and try Triton
echo "== $parts: $SECONDS s"
[ -z "$smoke" ] || export TRITON_INTERPRET=1
part machine 15
if [[ $failed = *machine* ]]; then echo "== nothing can run here"; exit 1; fi
build_cpu
"$python" benchmarks/gpu/clocks.py "$folder" &
clocks=$!
# What they take together, with the build of a library carried in (none), is below the total.
part correctness 65
part engine 90
part speed 70
part decode 30
if [ -n "$cpu" ]; then
    wait_for timeout $((30 * patience)) tail --pid="$cpu" -f /dev/null
    [ -z "$(find "$work/cpu" -name '_cpu.*.so' 2>/dev/null)" ] && tail -n 5 "$work/cpu.txt"
fi
part families 30
part search 20
kill "$clocks" 2>/dev/null
wait "$clocks" 2>/dev/null
clocks=""
part plot 10 --parts "$parts"
echo "== all: $SECONDS s of $total, failed:${failed:- nothing}"
[ -z "$failed" ]
