// The CPU build of ycc_to_rgb.cu, with a plain C interface for ctypes (so callers hold no GIL): the source itself, block
// by block. For planes in host memory, and for tests where there is no GPU.
#include "cpu_shim.h"
#include "ycc_to_rgb.cu"

extern "C" void gpuload_ycc_to_rgb(const ycc::Planes* images, const i64* first, i64 count) {
  gridDim = {(unsigned)first[count], 1, 1};
  for (unsigned x = 0; x < gridDim.x; ++x) {
    blockIdx = {x, 0, 0};
    ycc_to_rgb(images, first, count);
  }
}
