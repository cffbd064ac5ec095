// The operators on a GPU: device code without launches, so that a C++ compiler can run it, too (tests/host_shim.h).
//
// threadIdx.x is the lane, threadIdx.y the item of the block; so the lanes of an item lie in one warp. All threads of a
// block come by the same barriers and shuffles. The corners of samples are worked out by one lane each and handed to the
// others through shared memory, which only the lanes of one item use.
#pragma once
#include <math.h>

#include "device.cuh"

namespace {

using seg::Columns;
using seg::LocalAttn;
using seg::MsDeformAttn;

// Arrays of the values' type V beside the arguments, whose arrays are of exact_t<V>: gradients, places and weights.
template <typename V>
struct Values {
  const V *a, *b, *c, *grad;  // value; input; q, k, v; and the gradient of the output
  V* out;
};

// ---- ms_deform_attn -------------------------------------------------------------------------------------------------

constexpr int max_levels = 16;
struct Levels {
  int height[max_levels] = {}, width[max_levels] = {};
  int64_t start[max_levels] = {};  // the map's first row
  int64_t pixels = 0;              // of all maps
  Divider<int32_t> points;

  template <typename T>
  Levels(const MsDeformAttn<T>& a, const int64_t* shapes) : points(a.points) {
    for (int i = 0; i < a.levels; ++i) {
      height[i] = int(shapes[2 * i]), width[i] = int(shapes[2 * i + 1]), start[i] = pixels;
      pixels += shapes[2 * i] * shapes[2 * i + 1];
    }
  }
};

template <typename F>
constexpr int attn_items = F::exact && F::lanes <= 8 ? 64 : 32;  // of a block: a tile of 8x8 queries or 8x4

// Samples of an item, (n, q, m), in the order of levels and points.
template <typename F>
struct AttnItem {
  using T = typename F::T;
  using I = typename F::I;
  const MsDeformAttn<T>& a;
  const Levels& levels;
  const Query<I> at;
  const I samples, stride, first, row;  // samples, numbers from pixel to pixel, first sample, start of out and grad
  const int64_t map;                    // start of the head's maps

  __device__ __forceinline__ AttnItem(const MsDeformAttn<T>& a, const Levels& levels, const Tiles<I>& tiles)
      : a(a), levels(levels), at(tiles), samples(I(a.levels) * I(a.points)), stride(I(a.m) * I(a.d)),
        first(((at.n * I(a.q) + at.query) * I(a.m) + at.head) * samples),
        row(((at.n * I(a.q) + at.query) * I(a.m) + at.head) * I(a.d)),
        map(int64_t(at.n) * a.s * stride + at.head * I(a.d)) {}

  // The point of sample j, whose corners are set.
  __device__ __forceinline__ Point<T> sample(I j, T factor, int& level, Corners<F>& corners) const {
    int32_t point_of_level = int32_t(j);
    level = levels.points.split(point_of_level);
    const int height = levels.height[level], width = levels.width[level];
    const T* loc = a.loc + 2 * (first + j);
    const Point<T> point = locate(loc[1] * height - T(0.5), loc[0] * width - T(0.5), height, width);
    corners.set(point, width, I(levels.start[level]), stride, factor);
    return point;
  }
};

template <typename F>
__global__ void __launch_bounds__(F::lanes* attn_items<F>, blocks_for<F>(48, F::lanes* attn_items<F>))
    ms_deform_attn(const __grid_constant__ MsDeformAttn<typename F::T> a, const Values<typename F::V> values,
                   const Tiles<typename F::I> tiles, const __grid_constant__ Levels levels) {
  using T = typename F::T;
  using I = typename F::I;
  __shared__ Corners<F> shared[attn_items<F>][F::lanes + 1];  // one more, so that items lie in different banks
  Corners<F>* corners = shared[threadIdx.y];
  const AttnItem<F> item(a, levels, tiles);
  const I lane = threadIdx.x;
  for (I start = 0; start == 0 || (!F::exact && start < a.d); start += F::lanes * F::vec) {
    const I c = start + lane * F::vec;
    const auto* map = opaque(values.a + item.map + c);
    const bool here = F::exact || c < a.d;
    T out[F::vec] = {};
    for (I base = 0; base < item.samples; base += F::lanes) {
      __syncwarp();
      int level;
      if (base + lane < item.samples)
        item.sample(base + lane, a.attn[item.first + base + lane], level, corners[lane]);
      __syncwarp();
      for (int j = 0; j < F::lanes && base + j < item.samples; ++j) {
        const Corners<F> corner = corners[j];
        if (here && corner.inside()) Four<F>(map, corner.offset).add_to(out, corner.weight);
      }
    }
    if (here && item.at.active) store<F::vec>(values.out + item.row + c, out);
  }
}

// grad_value starts at zero.
template <typename F>
__global__ void __launch_bounds__(F::lanes* attn_items<F>, blocks_for<F>(32, F::lanes* attn_items<F>))
    ms_deform_attn_backward(const __grid_constant__ MsDeformAttn<typename F::T> a, const Values<typename F::V> values,
                            const Tiles<typename F::I> tiles, const __grid_constant__ Levels levels) {
  using T = typename F::T;
  using I = typename F::I;
  __shared__ Corners<F> shared[attn_items<F>][F::lanes + 1];
  __shared__ T shared_dots[attn_items<F>][F::lanes][4];
  Corners<F>* corners = shared[threadIdx.y];
  T(*dots)[4] = shared_dots[threadIdx.y];
  const AttnItem<F> item(a, levels, tiles);
  const I lane = threadIdx.x, d = I(a.d);
  T g[F::vec];
  if constexpr (F::exact) load<F::vec>(values.grad + item.row + lane * F::vec, g);
  for (I base = 0; base < item.samples; base += F::lanes) {
    __syncwarp();
    const I own = base + lane;
    Point<T> point{};
    T factor = 0;
    int level = 0;
    if (own < item.samples) {
      factor = a.attn[item.first + own];
      point = item.sample(own, factor, level, corners[lane]);
    }
    __syncwarp();
    for (int j = 0; j < F::lanes && base + j < item.samples; ++j) {
      const Corners<F> corner = corners[j];
      T dot[4] = {};
      if (corner.inside())
        for_channels<F>(d, [&](I c) {
          const Four<F> four(opaque(values.a + item.map + c), corner.offset);
          if constexpr (!F::exact) load<F::vec>(values.grad + item.row + c, g);
          four.dots(dot, g);
          if (!item.at.active) return;
          T* grad_value = opaque(a.grad_value + item.map + c);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (corner.weight[i] != T(0)) add_to<F::vec>(grad_value + corner.offset[i], corner.weight[i], g);
        });
      sums_over_lanes<F::lanes, 4>(dot, dots[j]);
    }
    __syncwarp();
    if (own >= item.samples || !item.at.active) continue;
    T value, d_y, d_x;
    derive(point, dots[lane], value, d_y, d_x);
    a.grad_attn[item.first + own] = value;
    a.grad_loc[2 * (item.first + own)] = d_x * factor * levels.width[level];
    a.grad_loc[2 * (item.first + own) + 1] = d_y * factor * levels.height[level];
  }
}

// ---- deform_unfold and deform_conv2d --------------------------------------------------------------------------------

// What the sizes of a window are divided by.
template <typename I>
struct Window {
  Divider<I> places, out_width, taps, groups, kernel_width;
  template <typename T>
  explicit Window(const Columns<T>& a)
      : places(a.out_height * a.out_width), out_width(a.out_width), taps(a.kernel[0] * a.kernel[1]), groups(a.groups),
        kernel_width(a.kernel[1]) {}
};

// The sample of a group at a tap of place `place`, counted over all images.
template <typename F>
struct Tap {
  using T = typename F::T;
  using I = typename F::I;
  Point<T> point;
  I index, place, first;  // (n, group, tap) * places, the place in its image, the first pixel of the image

  __device__ __forceinline__ Tap(const Columns<T>& a, const Window<I>& window, I place_, I tap, I group) : place(place_) {
    const I n = window.places.split(place), taps = window.taps.divisor;
    index = ((n * window.groups.divisor + group) * taps + tap) * window.places.divisor;
    first = n * I(a.height) * I(a.width);
    const T* offset = a.offset + 2 * index + place;
    I left = place;
    const I top = window.out_width.split(left), down = window.kernel_width.split(tap);
    const I y = top * I(a.stride[0]) - I(a.padding[0]) + down * I(a.dilation[0]);
    const I x = left * I(a.stride[1]) - I(a.padding[1]) + tap * I(a.dilation[1]);
    point = locate(T(y) + offset[0], T(x) + offset[window.places.divisor], int(a.height), int(a.width));
  }
  __device__ __forceinline__ T mask(const Columns<T>& a) const { return a.mask ? a.mask[index + place] : T(1); }
};

// An item is one tap and group of `together` places that follow each other; (places, tap, group).
constexpr int together = 8;
template <typename F>
constexpr int columns_items = 128 / F::lanes;  // of a block

template <typename F>
struct ColumnsItem {
  using T = typename F::T;
  using I = typename F::I;
  I first, tap, group;  // the first place, counted from a.first on

  __device__ __forceinline__ explicit ColumnsItem(const Window<I>& window) {
    group = I(blockIdx.x) * columns_items<F> + threadIdx.y;
    tap = window.groups.split(group);
    first = window.taps.split(tap) * together;
  }
  // Where the columns of its place j begin.
  __device__ __forceinline__ int64_t row(const Columns<T>& a, const Window<I>& window, int j) const {
    return int64_t(((first + j) * window.taps.divisor + tap) * window.groups.divisor + group) * a.d;
  }
};

template <typename F>
__global__ void __launch_bounds__(128, blocks_for<F>(32, 128))
    columns(const __grid_constant__ Columns<typename F::T> a, const Values<typename F::V> values,
            const __grid_constant__ Window<typename F::I> window) {
  using T = typename F::T;
  using I = typename F::I;
  static_assert(F::lanes >= together);
  __shared__ Corners<F> shared[columns_items<F>][together + 1];
  Corners<F>* corners = shared[threadIdx.y];
  const ColumnsItem<F> item(window);
  const I lane = threadIdx.x, d = I(a.d), own = item.first + lane;
  if (lane < together && own < I(a.count)) {
    const Tap<F> tap(a, window, I(a.first) + own, item.tap, item.group);
    corners[lane].set(tap.point, int(a.width), tap.first, I(a.groups) * d, tap.mask(a));
  }
  __syncwarp();
  for (int j = 0; j < together && item.first + j < I(a.count); ++j) {
    const Corners<F> corner = corners[j];
    for (I c = lane * F::vec; c < d; c += F::lanes * F::vec) {
      T out[F::vec] = {};
      if (corner.inside()) Four<F>(opaque(values.a + item.group * d + c), corner.offset).add_to(out, corner.weight);
      store<F::vec>(values.out + item.row(a, window, j) + c, out);
    }
  }
}

// grad_input starts at zero.
template <typename F>
__global__ void __launch_bounds__(128, blocks_for<F>(24, 128))
    columns_backward(const __grid_constant__ Columns<typename F::T> a, const Values<typename F::V> values,
                     const __grid_constant__ Window<typename F::I> window) {
  using T = typename F::T;
  using I = typename F::I;
  __shared__ Corners<F> shared[columns_items<F>][together + 1];
  __shared__ T shared_dots[columns_items<F>][together][4];
  Corners<F>* corners = shared[threadIdx.y];
  T(*dots)[4] = shared_dots[threadIdx.y];
  const ColumnsItem<F> item(window);
  const I lane = threadIdx.x, d = I(a.d), own = item.first + lane;
  const bool mine = lane < together && own < I(a.count);
  const Tap<F> tap(a, window, I(a.first) + (mine ? own : 0), item.tap, item.group);
  const T mask = tap.mask(a);
  if (mine) corners[lane].set(tap.point, int(a.width), tap.first, I(a.groups) * d, mask);
  __syncwarp();
  for (int j = 0; j < together; ++j) {
    T dot[4] = {};
    if (item.first + j < I(a.count) && corners[j].inside()) {
      const Corners<F> corner = corners[j];
      for (I c = lane * F::vec; c < d; c += F::lanes * F::vec) {
        const Four<F> four(opaque(values.a + item.group * d + c), corner.offset);
        T g[F::vec];
        load<F::vec>(values.grad + item.row(a, window, j) + c, g);
        four.dots(dot, g);
        T* grad_input = opaque(a.grad_input + item.group * d + c);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (corner.weight[i] != T(0)) add_to<F::vec>(grad_input + corner.offset[i], corner.weight[i], g);
      }
    }
    sums_over_lanes<F::lanes, 4>(dot, dots[j]);
  }
  __syncwarp();
  if (!mine) return;
  T value, d_y, d_x;
  derive(tap.point, dots[lane], value, d_y, d_x);
  T* grad_offset = a.grad_offset + 2 * tap.index + tap.place;
  grad_offset[0] = d_y * mask;
  grad_offset[window.places.divisor] = d_x * mask;
  if (a.grad_mask) a.grad_mask[tap.index + tap.place] = value;
}

// Samples of all places in the layout of deform_unfold, (N, G, D, K, L): a thread takes all channels of one sample, and
// neighbors take neighboring places, whose numbers lie beside each other.
template <typename F>
__global__ void __launch_bounds__(128)
    unfold(const __grid_constant__ Columns<typename F::T> a, const Values<typename F::V> values,
           const __grid_constant__ Window<typename F::I> window) {
  using T = typename F::T;
  using V = typename F::V;
  using I = typename F::I;
  I place = I(blockIdx.x) * 128 + threadIdx.x;  // (n, group, tap, place)
  I tap = window.places.split(place), group = window.taps.split(tap);
  const I n = window.groups.split(group), d = I(a.d), step = window.taps.divisor * window.places.divisor;
  if (n >= a.n) return;
  const Tap<F> sample(a, window, n * window.places.divisor + place, tap, group);
  Corners<F> corner;
  corner.set(sample.point, int(a.width), sample.first, I(a.groups) * d, sample.mask(a));
  V* to = values.out + int64_t(n * I(a.groups) + group) * d * step + tap * window.places.divisor + place;
  for (I c = 0; c < d; c += F::vec, to += int64_t(F::vec) * step) {
    T out[F::vec] = {};
    if (corner.inside()) Four<F>(values.a + group * d + c, corner.offset).add_to(out, corner.weight);
#pragma unroll
    for (int i = 0; i < F::vec; ++i) to[i * step] = V(out[i]);
  }
}

// ---- deform_local_attn ----------------------------------------------------------------------------------------------

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// A softmax over numbers that come one at a time: `rescale` is what sums so far must be multiplied with.
template <typename T>
struct Running {
  T largest = -INFINITY, total = 0, rescale = 1;
  // Makes room for numbers up to `logit`.
  __device__ __forceinline__ void raise(T logit) {
    const T before = largest;
    largest = logit > largest ? logit : largest;
    rescale = before == largest ? T(1) : exponential(before - largest);  // both may be -inf
    total *= rescale;
  }
  __device__ __forceinline__ T weight(T logit) const { return logit == largest ? T(1) : exponential(logit - largest); }
};

// Taps of a window are taken `taps_at_once`, which are those of 3x3.
constexpr int taps_at_once = 9;
template <typename F>
constexpr int local_items = 256 / F::lanes;

// A token and head, (b, token, m).
template <typename F>
struct Token {
  using T = typename F::T;
  using I = typename F::I;
  const LocalAttn<T>& a;
  const Query<I> at;
  const int taps;
  const I row, offset, bias;  // start of out and of gradients, offsets, biases
  const int64_t q, map, grad;  // start of q, of the maps of k and v, and of their gradients

  __device__ __forceinline__ Token(const LocalAttn<T>& a, const Tiles<I>& tiles)
      : a(a), at(tiles), taps(int(a.kernel[0] * a.kernel[1])),
        row(((at.n * tokens() + at.query) * I(a.m) + at.head) * I(a.d)),
        offset(((at.n * tokens() + at.query) * I(a.m) + at.head) * 2 * taps),
        bias(((at.n * I(a.m) + at.head) * tokens() + at.query) * taps),
        q((int64_t(at.n) * tokens() + at.query) * a.stride + at.head * I(a.d)),
        map(int64_t(at.n) * tokens() * a.stride + at.head * I(a.d)),
        grad(int64_t(at.n) * tokens() * a.m * a.d + at.head * I(a.d)) {}

  __device__ __forceinline__ I tokens() const { return I(a.height) * I(a.width); }
  __device__ __forceinline__ Point<T> point(int tap) const {
    const T* moved = a.offset + offset + 2 * tap;
    const int down = tap / int(a.kernel[1]), right = tap - down * int(a.kernel[1]);
    const T y = T(at.y + (down - int(a.kernel[0] / 2))), x = T(at.x + (right - int(a.kernel[1] / 2)));
    return locate(y + moved[0], x + moved[1], int(a.height), int(a.width));
  }
  __device__ __forceinline__ T biased(int tap, T product) const {
    return product * a.scale + (a.bias ? a.bias[bias + tap] : T(0));
  }
};

// Per chunk of taps first all logits, then their softmax with one exponential per tap, then the values.
template <typename F>
__global__ void __launch_bounds__(256, blocks_for<F>(32, 256))
    local_attn(const __grid_constant__ LocalAttn<typename F::T> a, const Values<typename F::V> values,
               const Tiles<typename F::I> tiles) {
  using T = typename F::T;
  using I = typename F::I;
  __shared__ Corners<F> shared[local_items<F>][taps_at_once];
  __shared__ T shared_logits[local_items<F>][taps_at_once];
  Corners<F>* corners = shared[threadIdx.y];
  T* logits = shared_logits[threadIdx.y];
  const Token<F> token(a, tiles);
  const I lane = threadIdx.x, d = I(a.d), stride = I(a.stride);
  T query[F::vec];
  if constexpr (F::exact) load<F::vec>(values.a + token.q + lane * F::vec, query);
  for (I start = 0; start == 0 || (!F::exact && start < a.d); start += F::lanes * F::vec) {  // once, unless wide
    const I out_c = start + lane * F::vec;
    const bool here = F::exact || out_c < d;
    T out[F::vec] = {};
    Running<T> softmax;
    for (int base = 0; base < token.taps; base += taps_at_once) {
      const int count = token.taps - base < taps_at_once ? token.taps - base : taps_at_once;
      __syncwarp();
      for (int tap = lane; tap < count; tap += F::lanes)
        corners[tap].set(token.point(base + tap), int(a.width), I(0), stride, T(1));
      __syncwarp();
      for (int tap = 0; tap < count; ++tap) {
        const Corners<F> corner = corners[tap];
        T product = 0;
        if (corner.inside())
          for_channels<F>(d, [&](I c) {
            const Four<F> key(opaque(values.b + token.map + c), corner.offset);
            if constexpr (!F::exact) load<F::vec>(values.a + token.q + c, query);
            T dot[4] = {};
            key.dots(dot, query);
            for (int i = 0; i < 4; ++i) product += corner.weight[i] * dot[i];
          });
        sums_over_lanes<F::lanes, 1>(&product, logits + tap);
      }
      __syncwarp();
      T largest = -INFINITY, total = 0;
      for (int tap = lane; tap < count; tap += F::lanes) {
        logits[tap] = token.biased(base + tap, logits[tap]);
        largest = logits[tap] > largest ? logits[tap] : largest;
      }
      softmax.raise(largest_over_lanes<F::lanes>(largest));
      for (int tap = lane; tap < count; tap += F::lanes) {
        const T weight = softmax.weight(logits[tap]);
        total += weight;
        if (corners[tap].inside())
          for (int i = 0; i < 4; ++i) corners[tap].weight[i] *= weight;
      }
      softmax.total += sum_over_lanes<F::lanes>(total);
      __syncwarp();
      for (int i = 0; i < F::vec; ++i) out[i] *= softmax.rescale;
      for (int tap = 0; tap < count; ++tap) {
        const Corners<F> corner = corners[tap];
        if (here && corner.inside()) Four<F>(opaque(values.c + token.map + out_c), corner.offset).add_to(out, corner.weight);
      }
    }
    const T factor = softmax.largest == -INFINITY ? T(NAN) : 1 / softmax.total;  // all masked: NaN, as everywhere else
    for (int i = 0; i < F::vec; ++i) out[i] *= factor;
    if (here && token.at.active) store<F::vec>(values.out + token.row + out_c, out);
  }
}

// grad_k and grad_v start at zero. First the logits, the softmax and the gradient of the attention; then the factors of
// the gradients. Keys and values are multiplied with q and g corner by corner, which gives the gradient of the place,
// too; keys are read again for that of q. Windows of more taps than fit are looked at a second time.
template <typename F>
__global__ void __launch_bounds__(256, blocks_for<F>(24, 256))
    local_attn_backward(const __grid_constant__ LocalAttn<typename F::T> a, const Values<typename F::V> values,
                        const Tiles<typename F::I> tiles) {
  using T = typename F::T;
  using I = typename F::I;
  __shared__ Corners<F> shared[local_items<F>][taps_at_once];
  __shared__ T shared_dots[local_items<F>][taps_at_once][8];
  Corners<F>* corners = shared[threadIdx.y];
  T(*dots)[8] = shared_dots[threadIdx.y];  // <q, corner of k> and <g, corner of v>; then two factors
  const Token<F> token(a, tiles);
  const I lane = threadIdx.x, d = I(a.d), stride = I(a.stride), grad_stride = I(a.m) * d;
  T query[F::vec], g[F::vec];
  const auto load_rows = [&](I c) {
    load<F::vec>(values.a + token.q + c, query);
    load<F::vec>(values.grad + token.row + c, g);
  };
  if constexpr (F::exact) load_rows(lane * F::vec);

  const auto look_at = [&](int base, int count) {
    __syncwarp();
    for (int tap = lane; tap < count; tap += F::lanes)
      corners[tap].set(token.point(base + tap), int(a.width), I(0), I(1), T(1));
    __syncwarp();
    for (int tap = 0; tap < count; ++tap) {
      const Corners<F> corner = corners[tap];
      T dot[8] = {};
      if (corner.inside())
        for_channels<F>(d, [&](I c) {
          const Four<F> key(opaque(values.b + token.map + c), corner.offset, stride);
          const Four<F> value(opaque(values.c + token.map + c), corner.offset, stride);
          if constexpr (!F::exact) load_rows(c);
          key.dots(dot, query);
          value.dots(dot + 4, g);
        });
      sums_over_lanes<F::lanes, 8>(dot, dots[tap]);
    }
    __syncwarp();
  };
  const auto weighted = [&](int tap, const T* dot) {  // the dot with the sample
    T sum = 0;
    if (corners[tap].inside())
      for (int i = 0; i < 4; ++i) sum += corners[tap].weight[i] * dot[i];
    return sum;
  };

  Running<T> softmax;  // of this lane's taps, then of all
  T mean = 0;
  for (int base = 0; base < token.taps; base += taps_at_once) {
    const int count = token.taps - base < taps_at_once ? token.taps - base : taps_at_once;
    look_at(base, count);
    for (int tap = lane; tap < count; tap += F::lanes) {
      const T logit = token.biased(base + tap, weighted(tap, dots[tap]));
      softmax.raise(logit);
      const T weight = softmax.weight(logit);
      softmax.total += weight;
      mean = mean * softmax.rescale + weight * weighted(tap, dots[tap] + 4);
    }
  }
  softmax.raise(largest_over_lanes<F::lanes>(softmax.largest));
  softmax.total = sum_over_lanes<F::lanes>(softmax.total);
  mean = sum_over_lanes<F::lanes>(mean * softmax.rescale) / softmax.total;

  for (int base = 0; base < token.taps; base += taps_at_once) {
    const int count = token.taps - base < taps_at_once ? token.taps - base : taps_at_once;
    if (token.taps > taps_at_once) look_at(base, count);
    for (int tap = lane; tap < count; tap += F::lanes) {
      T* dot = dots[tap];
      const T logit = token.biased(base + tap, weighted(tap, dot));
      const T attention = exponential(logit - softmax.largest) / softmax.total;
      const T by_logit = attention * (weighted(tap, dot + 4) - mean), to_key = by_logit * a.scale;
      for (int i = 0; i < 4; ++i) dot[i] = dot[i] * to_key + dot[4 + i] * attention;
      T value, d_y, d_x;
      derive(token.point(base + tap), dot, value, d_y, d_x);
      dot[0] = to_key, dot[1] = attention;
      if (!token.at.active) continue;
      a.grad_offset[token.offset + 2 * (base + tap)] = d_y;
      a.grad_offset[token.offset + 2 * (base + tap) + 1] = d_x;
      if (a.grad_bias) a.grad_bias[token.bias + base + tap] = by_logit;
    }
    __syncwarp();
    for_channels<F>(d, [&](I c) {
      if constexpr (!F::exact) load_rows(c);
      T grad_q[F::vec] = {}, *grad_k = opaque(a.grad_k + token.grad + c), *grad_v = opaque(a.grad_v + token.grad + c);
      for (int tap = 0; tap < count; ++tap) {
        const Corners<F> corner = corners[tap];
        if (!corner.inside()) continue;
        const T to_key = dots[tap][0], attention = dots[tap][1];
        const Four<F> key(opaque(values.b + token.map + c), corner.offset, stride);
        T weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weight[i] = to_key * corner.weight[i];
          if (!token.at.active || corner.weight[i] == T(0)) continue;
          const I at = corner.offset[i] * grad_stride;
          add_to<F::vec>(grad_k + at, weight[i], query);
          add_to<F::vec>(grad_v + at, attention * corner.weight[i], g);
        }
        key.add_to(grad_q, weight);
      }
      if (!token.at.active) return;
      if (base > 0) {
        T before[F::vec];
        load<F::vec>(a.grad_q + token.row + c, before);
        for (int i = 0; i < F::vec; ++i) grad_q[i] += before[i];
      }
      store<F::vec>(a.grad_q + token.row + c, grad_q);
    });
  }
}

}  // namespace
