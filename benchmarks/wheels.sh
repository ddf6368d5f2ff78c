#!/usr/bin/env bash
# Download what a GPU machine without a network lacks, as wheels for its Python: benchmarks/wheels.sh [FOLDER] [PYTHON]
# There, benchmarks/gpu.sh installs them beside what is there (torch, triton, transformers, pyarrow, xxhash, pytest).
set -euo pipefail
folder=${1:-.whl} version=${2:-3.12}
platforms=()
for platform in manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do
  platforms+=(--platform "$platform")
done
${PIP:-python3 -m pip} download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  "${platforms[@]}" -d "$folder" \
  'tyro>=1,<2' docstring-parser typeguard 'nltk>=3.9.1,<4' \
  'eai-sparsify>=1.3,<2' schedulefree simple-parsing natsort 'datasets>=5,<6' 'multiprocess<0.70.20' 'dill<0.4.2'
du -sh "$folder"
