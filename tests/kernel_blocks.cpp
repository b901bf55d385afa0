// The kernel with blocks of many threads, on one host thread: what a block of one thread (cpu_shim.h) cannot show.
//
// Each thread of a block is a fibre that runs until __syncthreads(). Their order between two barriers is chosen by the
// caller: ascending, descending or shuffled. Two threads that meet in memory without a barrier between them make the
// result depend on the order. Blocks run in that order, too, and find the shared memory that the one before left.
// Threads that do not all come to the same barrier are an error, as they would hang a GPU.
#define __syncthreads no_barrier
#include "cpu_shim.h"
#undef __syncthreads
static void __syncthreads();
#include "resize_normalize.cu"

#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr size_t STACK = 64 << 10;  // bytes

struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  void* barrier;  // where it waits; null: it has returned
};

ucontext_t scheduler;
std::vector<Fibre> fibres;
Fibre* running;
std::function<void()> body;

void enter() {
  body();
  running->barrier = nullptr;
}

std::vector<int> shuffled(int count, int order, unsigned seed) {
  std::vector<int> found(count);
  std::iota(found.begin(), found.end(), 0);
  if (order == 1) std::reverse(found.begin(), found.end());
  if (order == 2) std::shuffle(found.begin(), found.end(), std::mt19937(seed));
  return found;
}

// Whether all threads of the block met at every barrier.
bool run_block(int order, unsigned seed) {
  for (Fibre& f : fibres) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &scheduler;
    makecontext(&f.context, enter, 0);
  }
  for (unsigned phase = 0;; ++phase) {
    for (int i : shuffled((int)fibres.size(), order, seed + phase)) {
      running = &fibres[i];
      threadIdx = {(unsigned)i, 0, 0};
      swapcontext(&scheduler, &running->context);
    }
    for (const Fibre& f : fibres)
      if (f.barrier != fibres[0].barrier) return false;
    if (!fibres[0].barrier) return true;
  }
}

}  // namespace

__attribute__((noinline)) static void __syncthreads() {
  running->barrier = __builtin_return_address(0);
  swapcontext(&running->context, &scheduler);
}

// Launches one kernel; `order` is 0 (ascending), 1 (descending) or 2 (shuffled). Returns 0, 1 for a
// divergent barrier, 2 for a name that there is not.
extern "C" int launch(const char* name, int grid_x, int grid_y, int threads, int order, const Row* rows, void* out,
                      i64 count, int out_h, int out_w, int channels, i64 sn, i64 sc, i64 sy, i64 sx, const float* s) {
  fibres.resize(threads);
  for (Fibre& f : fibres) f.stack.resize(STACK);
  blockDim = {(unsigned)threads, 1, 1};
  gridDim = {(unsigned)grid_x, (unsigned)grid_y, 1};
  const auto call = [&](auto kernel, auto* to) {
    body = [=] {
      kernel(rows, to, count, out_h, out_w, channels, sn, sc, sy, sx, s[0], s[1], s[2], s[3], s[4], s[5]);
    };
  };
  const std::string kind(name);
  if (kind == "resize_normalize_f32") call(resize_normalize_f32, (float*)out);
  else if (kind == "resize_normalize_f16") call(resize_normalize_f16, (Half*)out);
  else if (kind == "resize_normalize_bf16") call(resize_normalize_bf16, (Bfloat*)out);
  else if (kind == "resize_normalize_u8") call(resize_normalize_u8, (unsigned char*)out);
  else return 2;
  for (int b : shuffled(grid_x * grid_y, order, 0)) {
    blockIdx = {(unsigned)(b % grid_x), (unsigned)(b / grid_x), 0};
    if (!run_block(order, (unsigned)b)) return 1;
  }
  return 0;
}
