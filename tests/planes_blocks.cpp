// ycc_to_rgb.cu with blocks of many threads, on one host thread. There are no barriers in it, so threads can run one after
// the other, the last one first.
#include "cpu_shim.h"
#include "ycc_to_rgb.cu"

extern "C" void launch(int grid, int threads, const ycc::Planes* images, const i64* first, i64 count) {
  gridDim = {(unsigned)grid, 1, 1}, blockDim = {(unsigned)threads, 1, 1};
  for (int block = grid - 1; block >= 0; --block)
    for (int thread = threads - 1; thread >= 0; --thread) {
      blockIdx = {(unsigned)block, 0, 0}, threadIdx = {(unsigned)thread, 0, 0};
      ycc_to_rgb(images, first, count);
    }
}
