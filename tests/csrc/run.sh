#!/bin/sh
# Builds the CPU kernels with AddressSanitizer and UBSan and runs their checks: tests/csrc/run.sh [BUILD_FOLDER]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
source=$here/../../csrc
if [ $# -gt 0 ]; then
  build=$1
  mkdir -p "$build"
else
  build=$(mktemp -d)
  trap 'rm -rf "$build"' EXIT
fi
cxx=${CXX:-c++}
# Contraction is off as in the real build: with it, the instruction sets would round differently.
flags="-std=c++17 -O1 -g -ffp-contract=off -fno-omit-frame-pointer -Wall -Wextra
  -fsanitize=address,undefined -fno-sanitize-recover=all"
variants=
case $(uname -m) in
  x86_64 | amd64) variants=-DLADA_RT_X86_VARIANTS ;;
esac

$cxx $flags $variants -c "$source/rows.cpp" -o "$build/rows.o"
if [ -n "$variants" ]; then
  $cxx $flags $variants -mavx2 -DLADA_RT_ISA=kRowsAvx2 -c "$source/rows.cpp" -o "$build/rows_avx2.o"
  $cxx $flags $variants -mavx512f -mavx512dq -mavx512bw -mavx512vl -DLADA_RT_ISA=kRowsAvx512 \
    -c "$source/rows.cpp" -o "$build/rows_avx512.o"
fi
for name in sample remask noise; do
  $cxx $flags $variants -c "$source/$name.cpp" -o "$build/$name.o"
done
$cxx $flags $variants -c "$here/test_kernels.cpp" -o "$build/test_kernels.o"
$cxx $flags "$build"/*.o -o "$build/test_kernels" -lpthread
"$build/test_kernels"
