// Enough of CUDA for csrc/kernels.cuh to run on the CPU, one block after the other. Each CUDA thread has a stack of its
// own; at a barrier it hands over to the next one. For that all threads of a block must come by the same barriers, so a
// shuffle in a branch that only some take shows as a wrong answer.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline std::vector<ucontext_t> contexts;
inline std::vector<uint64_t> slots;

inline unsigned thread_number() { return threadIdx.y * blockDim.x + threadIdx.x; }

inline void __syncwarp() {
  const dim3 self = threadIdx;
  const unsigned number = thread_number();
  swapcontext(&contexts[number], &contexts[(number + 1) % contexts.size()]);
  threadIdx = self;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width) {
  const unsigned number = thread_number();
  std::memcpy(&slots[number], &value, sizeof(T));
  __syncwarp();
  std::memcpy(&value, &slots[number / width * width + lane], sizeof(T));
  __syncwarp();
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  return __shfl_sync(0, value, int(thread_number() ^ offset) % 32, 32);
}

template <typename T>
void atomicAdd(T* target, T value) {
  *target += value;
}

inline const std::function<void()>* running;
inline ucontext_t caller;

inline void run_thread(unsigned x, unsigned y) {
  threadIdx = {x, y};
  (*running)();
  threadIdx = {x, y};
  const unsigned next = thread_number() + 1;
  setcontext(next == contexts.size() ? &caller : &contexts[next]);
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  constexpr size_t stack = 1 << 16;
  const unsigned count = block.x * block.y;
  std::vector<char> stacks(count * stack);
  gridDim = grid, blockDim = block, running = &kernel;
  slots.assign(count, 0);
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = {b};
    contexts.assign(count, {});
    for (unsigned i = 0; i < count; ++i) {
      getcontext(&contexts[i]);
      contexts[i].uc_stack.ss_sp = stacks.data() + i * stack;
      contexts[i].uc_stack.ss_size = stack;
      makecontext(&contexts[i], reinterpret_cast<void (*)()>(run_thread), 2, i % block.x, i / block.x);
    }
    swapcontext(&caller, &contexts[0]);
  }
}
