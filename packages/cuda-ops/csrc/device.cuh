// The pieces of the kernels in kernels.cuh: forms, 16-byte access, sums over lanes, corners of samples, division.
#pragma once
#include <cstdint>
#include <type_traits>

#include "arguments.h"
#include "sampling.h"

namespace {

// The type in which values of type V are summed, and all places and weights are given.
template <typename V>
struct Exact {
  using type = float;
};
template <>
struct Exact<double> {
  using type = double;
};
template <typename V>
using exact_t = typename Exact<V>::type;

// Whether V's bits are the upper half of the same number as a float: two of them are then unpacked by two instructions.
template <typename V>
constexpr bool upper_half_of_float = false;

// A form of the kernels for values of type V. The channels of a sample lie beside each other in memory and are shared by
// LANES threads (a power of two, at most a warp) of VEC channels each, read at once. An exact form takes arrays of
// less than 2^31 numbers, and in the attentions just LANES * VEC channels; others take any size and number of channels.
template <typename V_, int VEC_, int LANES_, bool EXACT>
struct Form {
  using V = V_;
  using T = exact_t<V>;
  using I = std::conditional_t<EXACT, int32_t, int64_t>;  // of offsets into arrays
  static constexpr int vec = VEC_, lanes = LANES_;
  static constexpr bool exact = EXACT;
};

// How many blocks of a kernel must have room on a multiprocessor, for ptxas to give out registers accordingly: `warps`
// of exact forms, and a third of those of others, whose 64-bit offsets take twice the registers.
template <typename F>
constexpr int blocks_for(int warps, int threads) {
  return (F::exact ? warps : warps / 3) * 32 / threads;
}

// ---- values ---------------------------------------------------------------------------------------------------------

template <typename V, int VEC>
struct alignas(sizeof(V) * VEC) Pack {
  V v[VEC];
};

// Reads VEC values, 16 bytes at a time.
template <int VEC, typename V>
__device__ __forceinline__ Pack<V, VEC> read(const V* p) {
  Pack<V, VEC> pack;
  if constexpr (sizeof(pack) % 16 == 0) {
    uint4 bits[sizeof(pack) / 16];
#pragma unroll
    for (int i = 0; i < int(sizeof(pack) / 16); ++i) bits[i] = reinterpret_cast<const uint4*>(p)[i];
    __builtin_memcpy(&pack, bits, sizeof(pack));
  } else {
    pack = *reinterpret_cast<const Pack<V, VEC>*>(p);
  }
  return pack;
}

// The same pointer, of which the compiler does not know how it came about: offsets are then added by one instruction each
// instead of being combined with what the pointer was made of.
template <typename V>
__device__ __forceinline__ V* opaque(V* p) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

__device__ __forceinline__ float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// The values of a pack in the type of sums.
template <typename V, int VEC>
__device__ __forceinline__ void unpack(const Pack<V, VEC>& pack, exact_t<V>* out) {
  if constexpr (upper_half_of_float<V> && VEC % 2 == 0) {
    uint32_t pairs[VEC / 2];
    __builtin_memcpy(pairs, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) out[2 * i] = as_float(pairs[i] << 16), out[2 * i + 1] = as_float(pairs[i] & 0xffff0000u);
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i) out[i] = exact_t<V>(pack.v[i]);
  }
}

template <int VEC, typename V>
__device__ __forceinline__ void load(const V* p, exact_t<V>* out) {
  unpack(read<VEC>(p), out);
}

// Writes VEC numbers, 16 bytes at a time.
template <int VEC, typename V>
__device__ __forceinline__ void store(V* p, const exact_t<V>* in) {
  Pack<V, VEC> pack;
#pragma unroll
  for (int i = 0; i < VEC; ++i) pack.v[i] = V(in[i]);
  if constexpr (sizeof(pack) % 16 == 0) {
    uint4 bits[sizeof(pack) / 16];
    __builtin_memcpy(bits, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < int(sizeof(pack) / 16); ++i) reinterpret_cast<uint4*>(p)[i] = bits[i];
  } else {
    *reinterpret_cast<Pack<V, VEC>*>(p) = pack;
  }
}

// row[…] += factor * g, atomically; four floats at a time where the chip can.
template <int VEC, typename T>
__device__ __forceinline__ void add_to(T* row, T factor, const T* g) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int at_once = sizeof(T) == 4 && VEC % 4 == 0 ? 4 : 1;
#else
  constexpr int at_once = 1;
#endif
#pragma unroll
  for (int i = 0; i < VEC; i += at_once) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (at_once == 4)
      atomicAdd(reinterpret_cast<float4*>(row + i),
                make_float4(factor * g[i], factor * g[i + 1], factor * g[i + 2], factor * g[i + 3]));
    else
#endif
      atomicAdd(row + i, factor * g[i]);
  }
}

// ---- lanes ----------------------------------------------------------------------------------------------------------

// Calls body(c) for this lane's channels, VEC from c on. There is no barrier inside: lanes may take fewer steps.
template <typename F, typename I, typename Body>
__device__ __forceinline__ void for_channels(I d, Body body) {
  I c = threadIdx.x * F::vec;
  if constexpr (F::exact) {
    body(c);
  } else {
    for (; c < d; c += F::lanes * F::vec) body(c);
  }
}

template <int LANES, typename T>
__device__ __forceinline__ T sum_over_lanes(T value) {
#pragma unroll
  for (int bit = LANES / 2; bit; bit /= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
  return value;
}

template <int LANES, typename T>
__device__ __forceinline__ T largest_over_lanes(T value) {
#pragma unroll
  for (int bit = LANES / 2; bit; bit /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, bit);
    value = other > value ? other : value;
  }
  return value;
}

// out[i] = the sum of v[i] over the lanes of an item. In every step a lane hands over half of its sums and goes on with
// the rest, which takes COUNT - 1 shuffles instead of COUNT * log2(LANES). Overwrites v.
template <int LANES, int COUNT, typename T>
__device__ __forceinline__ void sums_over_lanes(T* v, T* out) {
  int first = 0, half = COUNT / 2;
#pragma unroll
  for (int bit = LANES / 2; bit; bit /= 2) {
    if (half) {
      const bool upper = threadIdx.x & bit;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const T given = upper ? v[i] : v[i + half], kept = upper ? v[i + half] : v[i];
        v[i] = kept + __shfl_xor_sync(0xffffffffu, given, bit);
      }
      first += upper ? half : 0;
      half /= 2;
    } else {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], bit);
    }
  }
  constexpr int same = LANES > COUNT ? LANES / COUNT : 1, left = LANES < COUNT ? COUNT / LANES : 1;
  if (threadIdx.x % same == 0) {
#pragma unroll
    for (int i = 0; i < left; ++i) out[first + i] = v[i];
  }
}

// ---- samples --------------------------------------------------------------------------------------------------------

// A sample as its lanes need it: weights of the four corners, and where their rows begin. One lane works it out, all
// read it from shared memory.
template <typename F>
struct alignas(16) Corners {
  using T = typename F::T;
  using I = typename F::I;
  T weight[4];
  I offset[4];  // offset[0] < 0: outside of the map

  // Rows are `stride` apart, and the map's first one is number `first`.
  __device__ __forceinline__ void set(const Point<T>& point, int width, I first, I stride, T factor) {
    offset[0] = -1;
    if (!point.inside) return;
    I pixel[4];
    corners(point, width, weight, pixel);
#pragma unroll
    for (int i = 0; i < 4; ++i) weight[i] *= factor, offset[i] = (first + pixel[i]) * stride;
  }
  __device__ __forceinline__ bool inside() const { return offset[0] >= 0; }
};

// The VEC values of four corners; all are on their way before the first is used.
template <typename F>
struct Four {
  using V = typename F::V;
  using T = typename F::T;
  Pack<V, F::vec> pack[4];

  template <typename I>
  __device__ __forceinline__ Four(const V* map, const I* offset, I stride = 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pack[i] = read<F::vec>(map + offset[i] * stride);
  }
  // out += factor * the sum of weight * corner.
  __device__ __forceinline__ void add_to(T* out, const T* weight) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T value[F::vec];
      unpack(pack[i], value);
#pragma unroll
      for (int j = 0; j < F::vec; ++j) out[j] += weight[i] * value[j];
    }
  }
  // out[i] += <g, corner i>.
  __device__ __forceinline__ void dots(T* out, const T* g) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T value[F::vec];
      unpack(pack[i], value);
#pragma unroll
      for (int j = 0; j < F::vec; ++j) out[i] += g[j] * value[j];
    }
  }
};

// Value and derivatives of a sample from the dots of its corners; zeros for one outside.
template <typename T>
__device__ __forceinline__ void derive(const Point<T>& point, const T* dots, T& value, T& d_y, T& d_x) {
  value = d_y = d_x = 0;
  if (point.inside) derivatives(point, dots, value, d_y, d_x);
}

// ---- which item a thread works on -----------------------------------------------------------------------------------

// Division by a number known before the launch: by a multiplication for 32 bits (Granlund and Montgomery, "Division by
// invariant integers using multiplication", 1994), where x and the divisor are less than 2^31.
template <typename I>
struct Divider {
  I divisor;
  uint32_t factor, shift;
  explicit Divider(int64_t by) : divisor(I(by > 0 ? by : 1)), factor(0), shift(0) {
    if constexpr (sizeof(I) == 4) {
      while ((int64_t(1) << shift) < divisor) ++shift;
      factor = uint32_t((((uint64_t(1) << shift) - divisor) << 32) / divisor + 1);
    }
  }
  // x / divisor; x becomes the remainder.
  __device__ __forceinline__ I split(I& x) const {
    const I whole = x;
    I quotient;
    if constexpr (sizeof(I) == 8) quotient = whole / divisor;
    else quotient = I((uint32_t(uint64_t(uint32_t(whole)) * factor >> 32) + uint32_t(whole)) >> shift);
    x = whole - quotient * divisor;
    return quotient;
  }
};

// Queries of images and heads. A block takes one head of a tile of a map of queries, whose samples are near each other;
// tiles are as wide as `tile` says, and one of a single row as wide as the block has items. Heads come first.
template <typename I>
struct Tiles {
  I height, width;
  int tile;  // log2 of the width
  Divider<I> heads, across, down;

  // For blocks of a number of items that is a power of two, from 8 on.
  Tiles(int64_t heads, int64_t height, int64_t width, int items)
      : height(I(height)), width(I(width)), tile(height > 1 ? 3 : log2(items)), heads(heads),
        across((width + (1 << tile) - 1) >> tile), down((height + (items >> tile) - 1) / (items >> tile)) {}
  int64_t blocks(int64_t images) const { return images * heads.divisor * across.divisor * down.divisor; }
  static int log2(int items) { return items > 1 ? 1 + log2(items / 2) : 0; }
};

// The query of this thread's item. Threads without one go along with query 0 and write nothing: shuffles need whole
// warps.
template <typename I>
struct Query {
  I n, query, head;
  bool active;
  I y, x;

  __device__ __forceinline__ explicit Query(const Tiles<I>& tiles) {
    head = blockIdx.x;
    I column = tiles.heads.split(head), row = tiles.across.split(column);
    n = tiles.down.split(row);
    const I left = (column << tiles.tile) + (threadIdx.y & ((1 << tiles.tile) - 1));
    const I top = row * (blockDim.y >> tiles.tile) + (threadIdx.y >> tiles.tile);
    active = left < tiles.width && top < tiles.height;
    y = active ? top : 0, x = active ? left : 0;
    query = y * tiles.width + x;
  }
};

}  // namespace
