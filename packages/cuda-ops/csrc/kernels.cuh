// The operators on a GPU: device code without launches, so that a C++ compiler can run it, too (tests/host_shim.h).
//
// A sample's channels lie beside each other in memory and are shared by `lanes` threads (a power of two, at most a warp)
// of VEC channels each, which reads 16 bytes at a time. threadIdx.x is the lane, threadIdx.y the item of the block; so
// the lanes of an item lie in one warp. All threads of a block take the same branches around a shuffle.
#pragma once
#include <math.h>

#include <cstdint>

#include "arguments.h"
#include "sampling.h"

namespace {

using seg::Columns;
using seg::LocalAttn;
using seg::MsDeformAttn;

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

// VEC values that are read or written at once.
template <typename V, int VEC>
struct alignas(sizeof(V) * VEC) Pack {
  V v[VEC];
};

// VEC channels from c on, in the type of sums; zeros beyond the last channel.
template <typename V, int VEC>
__device__ __forceinline__ void load(const V* row, int64_t c, int64_t d, exact_t<V> out[VEC]) {
  if (c < d) {
    const Pack<V, VEC> pack = *reinterpret_cast<const Pack<V, VEC>*>(row + c);
#pragma unroll
    for (int i = 0; i < VEC; ++i) out[i] = exact_t<V>(pack.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i) out[i] = 0;
  }
}

template <typename V, int VEC>
__device__ __forceinline__ void store(V* row, int64_t c, int64_t d, const exact_t<V> in[VEC]) {
  if (c >= d) return;
  Pack<V, VEC> pack;
#pragma unroll
  for (int i = 0; i < VEC; ++i) pack.v[i] = V(in[i]);
  *reinterpret_cast<Pack<V, VEC>*>(row + c) = pack;
}

// The sum over the lanes of an item, for each of them.
template <typename T>
__device__ __forceinline__ T over_lanes(T value) {
  for (int offset = blockDim.x / 2; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// row[c …] += factor * g, atomically; four floats at a time where the chip can.
template <typename T, int VEC>
__device__ __forceinline__ void add_to(T* row, T factor, const T g[VEC]) {
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

// The corners of one sample, and their weights; none if it lies outside.
template <typename T>
struct Corners {
  T weight[4];
  int pixel[4];  // pixel[0] < 0: outside

  // out += factor * sample of VEC channels from c on. `map` is the first row, rows are `stride` apart.
  template <int VEC, typename V>
  __device__ __forceinline__ void sample(const V* map, int64_t stride, int64_t c, int64_t d, T factor, T* out) const {
    if (pixel[0] < 0) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T value[VEC];
      load<V, VEC>(map + pixel[i] * stride, c, d, value);
#pragma unroll
      for (int j = 0; j < VEC; ++j) out[j] += factor * weight[i] * value[j];
    }
  }

  // out[i] += <g, corner i> over this lane's VEC channels from c on.
  template <int VEC, typename V>
  __device__ __forceinline__ void dots(const V* map, int64_t stride, int64_t c, int64_t d, const T* g, T* out) const {
    if (pixel[0] < 0) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T value[VEC];
      load<V, VEC>(map + pixel[i] * stride, c, d, value);
#pragma unroll
      for (int j = 0; j < VEC; ++j) out[i] += g[j] * value[j];
    }
  }

  // map += factor * weight * g.
  template <int VEC>
  __device__ __forceinline__ void scatter(T* map, int64_t stride, int64_t c, int64_t d, T factor, const T* g) const {
    if (pixel[0] < 0 || c >= d) return;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (weight[i] != T(0)) add_to<T, VEC>(map + pixel[i] * stride + c, factor * weight[i], g);
  }
};

template <typename T>
struct Sample {
  Point<T> point;
  Corners<T> corner;

  __device__ __forceinline__ Sample() : point{}, corner{{0, 0, 0, 0}, {-1, 0, 0, 0}} {}
  __device__ __forceinline__ Sample(T y, T x, int height, int width) : Sample() {
    point = locate(y, x, height, width);
    if (!point.inside) return;
    int64_t pixel[4];
    corners(point, width, corner.weight, pixel);
#pragma unroll
    for (int i = 0; i < 4; ++i) corner.pixel[i] = int(pixel[i]);
  }

  __device__ __forceinline__ Corners<T> of_lane(int lane) const {
    Corners<T> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out.weight[i] = __shfl_sync(0xffffffffu, corner.weight[i], lane, blockDim.x);
      out.pixel[i] = __shfl_sync(0xffffffffu, corner.pixel[i], lane, blockDim.x);
    }
    return out;
  }

  // The derivatives of <g, sample> from its dots; zeros for a sample outside.
  __device__ __forceinline__ void derive(const T* dots, T& value, T& d_y, T& d_x) const {
    value = d_y = d_x = 0;
    if (point.inside) derivatives(point, dots, value, d_y, d_x);
  }
};

// Calls body(j, corners, sample, mine) for every sample j < count. Each lane works one sample out and hands its corners
// to the others; `mine` is true in that lane, whose `sample` is j's.
template <typename T, typename Make, typename Body>
__device__ __forceinline__ void for_samples(int count, Make make, Body body) {
  for (int base = 0; base < count; base += blockDim.x) {
    const int own = base + threadIdx.x;
    const Sample<T> sample = own < count ? make(own) : Sample<T>();
    for (int lane = 0; lane < int(blockDim.x) && base + lane < count; ++lane)
      body(base + lane, sample.of_lane(lane), sample, lane == int(threadIdx.x));
  }
}

// For every item that this thread's block takes, `item` is its number and `active` whether there is one: threads without
// go along with item 0 and write nothing, because shuffles need whole warps.
#define FOR_ITEMS(count)                                                                             \
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y, item, active; first < (count) &&            \
       (active = first + threadIdx.y < (count), item = active ? first + threadIdx.y : 0, true);      \
       first += int64_t(gridDim.x) * blockDim.y)
// For every VEC channels of this lane from c on; all lanes take the same number of steps.
#define FOR_CHANNELS(d)                                                                              \
  for (int64_t base = 0, c = threadIdx.x * VEC; base < (d); base += blockDim.x * VEC, c += blockDim.x * VEC)

// Arrays of the values' type V beside the arguments, whose arrays are of exact_t<V>: gradients, places and weights.
template <typename V>
struct Values {
  const V *a, *b, *c, *grad;  // value; input; q, k, v; and the gradient of the output
  V* out;
};

constexpr int max_levels = 16;
struct Levels {
  int height[max_levels], width[max_levels];
};

// ---- ms_deform_attn -------------------------------------------------------------------------------------------------

template <typename V, int VEC>
__global__ void ms_deform_attn(MsDeformAttn<exact_t<V>> a, Values<V> values, const __grid_constant__ Levels levels) {
  using T = exact_t<V>;
  const int64_t stride = a.m * a.d;
  FOR_ITEMS(a.n * a.q * a.m) {  // (n, q, m)
    FOR_CHANNELS(a.d) {
      const V* map = values.a + item / (a.q * a.m) * a.s * stride + item % a.m * a.d;
      T out[VEC] = {};
      for (int level = 0; level < a.levels; ++level) {
        const int height = levels.height[level], width = levels.width[level];
        const int64_t start = (item * a.levels + level) * a.points;
        for_samples<T>(
            int(a.points),
            [&](int j) {
              const T *loc = a.loc + 2 * (start + j), weight = a.attn[start + j];
              Sample<T> sample(loc[1] * height - T(0.5), loc[0] * width - T(0.5), height, width);
              for (int i = 0; i < 4; ++i) sample.corner.weight[i] *= weight;
              return sample;
            },
            [&](int, const Corners<T>& corner, const Sample<T>&, bool) {
              corner.template sample<VEC>(map, stride, c, a.d, T(1), out);
            });
        map += int64_t(height) * width * stride;
      }
      if (active) store<V, VEC>(values.out + item * a.d, c, a.d, out);
    }
  }
}

template <typename V, int VEC>
__global__ void ms_deform_attn_backward(MsDeformAttn<exact_t<V>> a, Values<V> values, const __grid_constant__ Levels levels) {
  using T = exact_t<V>;
  const int64_t stride = a.m * a.d;
  FOR_ITEMS(a.n * a.q * a.m) {
    int64_t map = item / (a.q * a.m) * a.s * stride + item % a.m * a.d;
    for (int level = 0; level < a.levels; ++level) {
      const int height = levels.height[level], width = levels.width[level];
      const int64_t start = (item * a.levels + level) * a.points;
      for_samples<T>(
          int(a.points),
          [&](int j) {
            const T* loc = a.loc + 2 * (start + j);
            return Sample<T>(loc[1] * height - T(0.5), loc[0] * width - T(0.5), height, width);
          },
          [&](int j, const Corners<T>& corner, const Sample<T>& sample, bool mine) {
            const T weight = a.attn[start + j];
            T dots[4] = {};
            FOR_CHANNELS(a.d) {
              T g[VEC];
              load<V, VEC>(values.grad + item * a.d, c, a.d, g);
              corner.template dots<VEC>(values.a + map, stride, c, a.d, g, dots);
              if (active) corner.template scatter<VEC>(a.grad_value + map, stride, c, a.d, weight, g);
            }
            for (int i = 0; i < 4; ++i) dots[i] = over_lanes(dots[i]);
            if (!mine || !active) return;
            T value, d_y, d_x;
            sample.derive(dots, value, d_y, d_x);
            a.grad_attn[start + j] = value;
            a.grad_loc[2 * (start + j)] = d_x * weight * width;
            a.grad_loc[2 * (start + j) + 1] = d_y * weight * height;
          });
      map += int64_t(height) * width * stride;
    }
  }
}

// ---- deform_unfold and deform_conv2d --------------------------------------------------------------------------------

// An item is (place, tap, group), in the order of the columns.
template <typename T>
struct Tap {
  int64_t map, index, places, place;  // start of the map, (n, group, tap) * places, number of places, place
  Sample<T> sample;

  __device__ __forceinline__ Tap(const Columns<T>& a, int64_t item) {
    const int64_t taps = a.kernel[0] * a.kernel[1], group = item % a.groups, tap = item / a.groups % taps;
    places = a.out_height * a.out_width;
    const int64_t n = (a.first + item / (a.groups * taps)) / places;
    place = (a.first + item / (a.groups * taps)) % places;
    map = n * a.height * a.width * a.groups * a.d + group * a.d;
    index = ((n * a.groups + group) * taps + tap) * places;
    const T* offset = a.offset + 2 * index + place;
    const int64_t y = place / a.out_width * a.stride[0] - a.padding[0] + tap / a.kernel[1] * a.dilation[0];
    const int64_t x = place % a.out_width * a.stride[1] - a.padding[1] + tap % a.kernel[1] * a.dilation[1];
    sample = Sample<T>(T(y) + offset[0], T(x) + offset[places], int(a.height), int(a.width));
  }
};

template <typename V, int VEC>
__global__ void columns(Columns<exact_t<V>> a, Values<V> values) {
  using T = exact_t<V>;
  FOR_ITEMS(a.count * a.kernel[0] * a.kernel[1] * a.groups) {
    const Tap<T> tap(a, item);
    const T mask = a.mask ? a.mask[tap.index + tap.place] : T(1);
    FOR_CHANNELS(a.d) {
      T out[VEC] = {};
      tap.sample.corner.template sample<VEC>(values.a + tap.map, a.groups * a.d, c, a.d, mask, out);
      if (active) store<V, VEC>(values.out + item * a.d, c, a.d, out);
    }
  }
}

template <typename V, int VEC>
__global__ void columns_backward(Columns<exact_t<V>> a, Values<V> values) {
  using T = exact_t<V>;
  FOR_ITEMS(a.count * a.kernel[0] * a.kernel[1] * a.groups) {
    const Tap<T> tap(a, item);
    const T mask = a.mask ? a.mask[tap.index + tap.place] : T(1);
    const int64_t stride = a.groups * a.d;
    T dots[4] = {};
    FOR_CHANNELS(a.d) {
      T g[VEC];
      load<V, VEC>(values.grad + item * a.d, c, a.d, g);
      tap.sample.corner.template dots<VEC>(values.a + tap.map, stride, c, a.d, g, dots);
      if (active) tap.sample.corner.template scatter<VEC>(a.grad_input + tap.map, stride, c, a.d, mask, g);
    }
    for (int i = 0; i < 4; ++i) dots[i] = over_lanes(dots[i]);
    if (!active || threadIdx.x) continue;
    T value, d_y, d_x;
    tap.sample.derive(dots, value, d_y, d_x);
    T* grad_offset = a.grad_offset + 2 * tap.index + tap.place;
    grad_offset[0] = d_y * mask;
    grad_offset[tap.places] = d_x * mask;
    if (a.grad_mask) a.grad_mask[tap.index + tap.place] = value;
  }
}

// ---- deform_local_attn ----------------------------------------------------------------------------------------------

template <typename T>
struct Token {
  int64_t map, bias, taps;  // start of the maps, index of the first bias
  int64_t y, x, offset;
  const LocalAttn<T>& a;

  __device__ __forceinline__ Token(const LocalAttn<T>& a, int64_t item) : a(a) {
    const int64_t tokens = a.height * a.width, token = item / a.m % tokens, b = item / a.m / tokens;
    taps = a.kernel[0] * a.kernel[1];
    map = b * tokens * a.m * a.d + item % a.m * a.d;
    bias = ((b * a.m + item % a.m) * tokens + token) * taps;
    y = token / a.width - a.kernel[0] / 2, x = token % a.width - a.kernel[1] / 2;
    offset = item * taps * 2;
  }
  __device__ __forceinline__ Sample<T> sample(int tap) const {
    const T* moved = a.offset + offset + 2 * tap;
    return Sample<T>(T(y + tap / a.kernel[1]) + moved[0], T(x + tap % a.kernel[1]) + moved[1], int(a.height),
                     int(a.width));
  }
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// A softmax over numbers that come one at a time: `rescale` is what sums so far must be multiplied with.
template <typename T>
struct Running {
  T largest = -INFINITY, total = 0, rescale = 1;
  __device__ __forceinline__ T add(T logit) {
    const T before = largest;
    largest = logit > largest ? logit : largest;
    rescale = before == largest ? T(1) : exponential(before - largest);  // both may be -inf
    const T weight = logit == largest ? T(1) : exponential(logit - largest);
    total = total * rescale + weight;
    return weight;
  }
};

template <typename V, int VEC>
__global__ void local_attn(LocalAttn<exact_t<V>> a, Values<V> values) {
  using T = exact_t<V>;
  const V *q = values.a, *k = values.b, *v = values.c;
  const int64_t stride = a.m * a.d;
  FOR_ITEMS(a.b * a.height * a.width * a.m) {
    const Token<T> token(a, item);
    for (int64_t out_base = 0; out_base < a.d; out_base += blockDim.x * VEC) {  // once, unless heads are very wide
      const int64_t out_c = out_base + threadIdx.x * VEC;
      T out[VEC] = {};
      Running<T> softmax;
      for_samples<T>(
          int(token.taps), [&](int tap) { return token.sample(tap); },
          [&](int tap, const Corners<T>& corner, const Sample<T>&, bool) {
            T product = 0;
            FOR_CHANNELS(a.d) {
              T query[VEC], key[VEC] = {};
              load<V, VEC>(q + item * a.d, c, a.d, query);
              corner.template sample<VEC>(k + token.map, stride, c, a.d, T(1), key);
              for (int i = 0; i < VEC; ++i) product += query[i] * key[i];
            }
            const T logit = over_lanes(product) * a.scale + (a.bias ? a.bias[token.bias + tap] : T(0));
            const T weight = softmax.add(logit);
            for (int i = 0; i < VEC; ++i) out[i] *= softmax.rescale;
            corner.template sample<VEC>(v + token.map, stride, out_c, a.d, weight, out);
          });
      const T total = softmax.largest == -INFINITY ? T(NAN) : softmax.total;  // all masked: NaN, as everywhere else
      for (int i = 0; i < VEC; ++i) out[i] /= total;
      if (active) store<V, VEC>(values.out + item * a.d, out_c, a.d, out);
    }
  }
}

// grad_q, grad_k and grad_v start at zero.
template <typename V, int VEC>
__global__ void local_attn_backward(LocalAttn<exact_t<V>> a, Values<V> values) {
  using T = exact_t<V>;
  const V *q = values.a, *k = values.b, *v = values.c;
  const int64_t stride = a.m * a.d;
  FOR_ITEMS(a.b * a.height * a.width * a.m) {
    const Token<T> token(a, item);
    T* logits = a.factors + item * 2 * token.taps;  // logits and the gradients of the attention, for the second round
    T* by_tap = logits + token.taps;
    Running<T> softmax;
    T mean = 0;
    for_samples<T>(
        int(token.taps), [&](int tap) { return token.sample(tap); },
        [&](int tap, const Corners<T>& corner, const Sample<T>&, bool mine) {
          T of_key = 0, of_value = 0;
          FOR_CHANNELS(a.d) {
            T query[VEC], g[VEC], key[VEC] = {}, value[VEC] = {};
            load<V, VEC>(q + item * a.d, c, a.d, query);
            load<V, VEC>(values.grad + item * a.d, c, a.d, g);
            corner.template sample<VEC>(k + token.map, stride, c, a.d, T(1), key);
            corner.template sample<VEC>(v + token.map, stride, c, a.d, T(1), value);
            for (int i = 0; i < VEC; ++i) of_key += query[i] * key[i], of_value += g[i] * value[i];
          }
          const T logit = over_lanes(of_key) * a.scale + (a.bias ? a.bias[token.bias + tap] : T(0));
          of_value = over_lanes(of_value);
          const T weight = softmax.add(logit);
          mean = mean * softmax.rescale + weight * of_value;
          if (mine && active) logits[tap] = logit, by_tap[tap] = of_value;
        });
    __syncwarp();
    mean /= softmax.total;
    T grad_q[VEC] = {};  // of this lane's first channels; those of very wide heads are added up in memory
    for_samples<T>(
        int(token.taps), [&](int tap) { return token.sample(tap); },
        [&](int tap, const Corners<T>& corner, const Sample<T>& sample, bool mine) {
          const T attention = active ? exponential(logits[tap] - softmax.largest) / softmax.total : T(0);
          const T by_logit = active ? attention * (by_tap[tap] - mean) : T(0), to_key = by_logit * a.scale;
          T dots[4] = {};
          FOR_CHANNELS(a.d) {
            T query[VEC], g[VEC], key[VEC] = {};
            load<V, VEC>(q + item * a.d, c, a.d, query);
            load<V, VEC>(values.grad + item * a.d, c, a.d, g);
            corner.template sample<VEC>(k + token.map, stride, c, a.d, to_key, key);
            if (active) {
              corner.template scatter<VEC>(a.grad_k + token.map, stride, c, a.d, to_key, query);
              corner.template scatter<VEC>(a.grad_v + token.map, stride, c, a.d, attention, g);
            }
            for (int i = 0; i < VEC; ++i) {
              if (base == 0) grad_q[i] += key[i];
              else if (active && c < a.d) a.grad_q[item * a.d + c + i] += key[i];
              query[i] *= to_key, g[i] *= attention;
            }
            corner.template dots<VEC>(k + token.map, stride, c, a.d, query, dots);
            corner.template dots<VEC>(v + token.map, stride, c, a.d, g, dots);
          }
          for (int i = 0; i < 4; ++i) dots[i] = over_lanes(dots[i]);
          if (!mine || !active) return;
          T value, d_y, d_x;
          sample.derive(dots, value, d_y, d_x);
          a.grad_offset[token.offset + 2 * tap] = d_y;
          a.grad_offset[token.offset + 2 * tap + 1] = d_x;
          if (a.grad_bias) a.grad_bias[token.bias + tap] = by_logit;
        });
    if (active) store<T, VEC>(a.grad_q + item * a.d, threadIdx.x * VEC, a.d, grad_q);
  }
}

}  // namespace
