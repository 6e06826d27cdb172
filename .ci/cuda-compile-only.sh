#!/bin/sh
# Installs what it takes to compile for NVIDIA GPUs without one: JAX's CUDA plugin, ptxas, and nvdisasm to read the
# result, without the CUDA libraries that only a run needs (about 0.6 GB instead of 5).
#
#     sh .ci/cuda-compile-only.sh PYTHON FOLDER
#
# It goes into a folder of its own that only the tests put on their PYTHONPATH: a plugin in the environment itself makes
# JAX look for a driver, and complain at length, each time someone starts `dsjax` on a machine that has none.
# Where it can not be had, the tests that need it skip and say so; that is no failure of this script.

python="$1"
folder="$2"

for plugin in xla_cuda12 xla_cuda13; do
    if "$python" -c "import jax_plugins.$plugin" 2>/dev/null; then
        echo "JAX's CUDA plugin is installed already"
        exit 0
    fi
done

version="$("$python" -c "import jax; print(jax.__version__)")"
case "$version" in
    0.10.*) wheels="jax-cuda12-plugin==$version jax-cuda12-pjrt==$version nvidia-cuda-nvcc-cu12" ;;
    *) wheels="jax-cuda13-plugin==$version jax-cuda13-pjrt==$version nvidia-cuda-nvcc nvidia-nvvm" ;;
esac
wheels="$wheels nvidia-cuda-nvdisasm"

if ls -d "$folder"/jax_cuda1?_plugin-"$version".dist-info "$folder"/nvidia_cuda_nvdisasm-*.dist-info >/dev/null 2>&1; then
    exit 0
fi
rm -rf "$folder"
# $wheels is a list: it has to be split.
# shellcheck disable=SC2086
if ! "$python" -m pip install -qq --no-deps --target "$folder" $wheels; then
    rm -rf "$folder"
    echo "The CUDA compiler wheels for JAX $version can not be installed: tests that compile for a GPU will skip"
fi
