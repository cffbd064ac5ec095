// Runs the CUDA kernels on the CPU, with coordinates of every kind, and compares them with the CPU kernels. Built with
// sanitizers: a read or write outside an array ends the program.
#include "host_shim.h"

#include "../csrc/kernels.cuh"
#include "arrays.h"

namespace seg {
extern const AllKernels kernels_under_test;
}
using namespace seg;

// Values of 16 bits, of which eight are read at once, as the kernels use CUDA's own types.
struct Bfloat16 {
  uint16_t bits;
  Bfloat16() = default;
  explicit Bfloat16(float value) : bits(0) {
    uint32_t all;
    std::memcpy(&all, &value, 4);
    bits = uint16_t((all + 0x7fff + (all >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t all = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &all, 4);
    return value;
  }
};

namespace {
template <>
constexpr bool upper_half_of_float<Bfloat16> = true;
}

// Numbers that are the same in both types.
template <typename V>
struct Inputs {
  std::vector<V> values;
  std::vector<exact_t<V>> exact;
  explicit Inputs(int64_t count) {
    for (const auto x : normal<exact_t<V>>(count)) {
      values.push_back(V(x));
      exact.push_back(exact_t<V>(values.back()));
    }
  }
};

// An array that one side fills, and the other, starting from zero or from a number that must be overwritten.
template <typename T>
struct Pair {
  std::vector<T> ours, expected;
  Pair(size_t size, bool zero) : ours(size, zero ? T(0) : T(NAN)), expected(ours) {}
};

template <typename V, typename T>
int differ(const char* name, int64_t d, const std::vector<V>& ours, const std::vector<T>& expected) {
  const double tolerance = sizeof(V) == 2 ? 5e-3 : sizeof(V) == 4 ? 1e-5 : 1e-12;
  double largest = 0, difference = 0;
  for (size_t i = 0; i < ours.size(); ++i) {
    const double x = double(T(ours[i])), y = double(expected[i]);
    largest = std::fmax(largest, std::fabs(y));
    difference = std::fmax(difference, std::isfinite(x) ? std::fabs(x - y) : INFINITY);
  }
  if (difference <= largest * tolerance) return 0;
  return std::printf("%s, %lld channels: off by %g of %g\n", name, (long long)d, difference, largest), 1;
}

constexpr int items_at_once = 16;  // of a block, in tiles of 8x2: fewer than on a GPU, for fewer threads without an item

// Two levels and a row of queries, or one level of which every pixel is a query.
template <typename F>
int ms_deform_attn_differs(const Kernels<typename F::T>& kernels, int64_t d, bool map) {
  using V = typename F::V;
  using T = typename F::T;
  const int64_t n = 2, m = 2, q = map ? 3 * 9 : 5, points = 3, s = map ? q : 23, count = map ? 1 : 2, items = n * q * m;
  const std::vector<int64_t> shapes = map ? std::vector<int64_t>{3, 9} : std::vector<int64_t>{4, 5, 1, 3};
  const Inputs<V> value(n * s * m * d), grad(items * d);
  const auto loc = wild<T>(items * count * points * 2), attn = normal<T>(items * count * points);
  std::vector<V> ours(items * d, V(T(NAN)));
  std::vector<T> expected(items * d);
  Pair<T> g_value(n * s * m * d, true), g_loc(loc.size(), false), g_attn(attn.size(), false);
  const auto arguments = [&](std::vector<T> Pair<T>::* side) -> MsDeformAttn<T> {
    return {value.exact.data(), loc.data(), attn.data(), grad.exact.data(), expected.data(), (g_value.*side).data(),
            (g_loc.*side).data(), (g_attn.*side).data(), shapes.data(), n, s, m, d, q, count, points};
  };
  const auto a = arguments(&Pair<T>::ours), e = arguments(&Pair<T>::expected);
  const Values<V> values = {value.values.data(), nullptr, nullptr, grad.values.data(), ours.data()};
  const Levels levels(a, shapes.data());
  const Tiles<typename F::I> tiles(m, map ? 3 : 1, map ? 9 : q, items_at_once);
  const dim3 grid = {unsigned(tiles.blocks(n))}, block = {F::lanes, items_at_once};
  launch(grid, block, [&] { ms_deform_attn<F>(a, values, tiles, levels); });
  launch(grid, block, [&] { ms_deform_attn_backward<F>(a, values, tiles, levels); });
  kernels.ms_deform_attn(e, 0, items);
  kernels.ms_deform_attn_backward(e, 1, 0, n);
  int wrong = differ("ms_deform_attn", d, ours, expected);
  for (const Pair<T>* pair : {&g_value, &g_loc, &g_attn})
    wrong += differ("ms_deform_attn's gradients", d, pair->ours, pair->expected);
  return wrong;
}

template <typename F>
int columns_differ(const Kernels<typename F::T>& kernels, int64_t d) {
  using V = typename F::V;
  using T = typename F::T;
  const int64_t n = 2, h = 4, w = 3, groups = 2, oh = 2, ow = 3, taps = 4, l = oh * ow, row = taps * groups * d;
  const Inputs<V> input(n * h * w * groups * d), grad(n * l * row);
  const auto offset = wild<T>(n * groups * taps * 2 * l), mask = normal<T>(n * groups * taps * l);
  std::vector<V> ours(n * l * row, V(T(NAN)));
  std::vector<T> expected(n * l * row);
  Pair<T> g_input(n * h * w * groups * d, true), g_offset(offset.size(), false), g_mask(mask.size(), false);
  const auto arguments = [&](std::vector<T> Pair<T>::* side, int64_t first, int64_t count) -> Columns<T> {
    return {input.exact.data(), offset.data(), mask.data(), grad.exact.data(), expected.data(), (g_input.*side).data(),
            (g_offset.*side).data(), (g_mask.*side).data(), n, h, w, groups, d, oh, ow, first, count,
            {2, 2}, {2, 1}, {0, 1}, {1, 2}};
  };
  for (const int64_t first : {0, 7}) {  // the places in two parts
    const auto a = arguments(&Pair<T>::ours, first, first ? n * l - first : 7);
    const Values<V> values = {input.values.data(), nullptr, nullptr, grad.values.data() + first * row,
                              ours.data() + first * row};
    const Window<typename F::I> window(a);
    const int64_t tapped = (a.count + together - 1) / together * taps * groups;
    const dim3 grid = {unsigned((tapped + columns_items<F> - 1) / columns_items<F>)}, block = {F::lanes, columns_items<F>};
    launch(grid, block, [&] { columns<F>(a, values, window); });
    launch(grid, block, [&] { columns_backward<F>(a, values, window); });
  }
  const auto e = arguments(&Pair<T>::expected, 0, n * l);
  kernels.columns(e, 0, n * l);
  kernels.columns_points(e, 0, n * l);
  kernels.columns_maps(e, {2, d, 2, true}, 0, 2);
  int wrong = differ("columns", d, ours, expected);

  std::vector<V> unfolded(n * l * row, V(T(NAN)));
  std::vector<T> transposed(n * l * row);
  const Values<V> values = {input.values.data(), nullptr, nullptr, nullptr, unfolded.data()};
  using One = Form<V, F::vec, 1, F::exact>;
  launch({unsigned((n * groups * taps * l + 127) / 128)}, {128}, [&] { unfold<One>(e, values, Window<typename F::I>(e)); });
  for (int64_t i = 0; i < n * l; ++i)  // (n, place, tap, channel) is (n, channel, tap, place) there
    for (int64_t j = 0; j < row; ++j)
      transposed[((i / l * groups * d + j % (groups * d)) * taps + j / (groups * d)) * l + i % l] = expected[i * row + j];
  wrong += differ("unfold", d, unfolded, transposed);
  for (const Pair<T>* pair : {&g_input, &g_offset, &g_mask})
    wrong += differ("columns' gradients", d, pair->ours, pair->expected);
  return wrong;
}

// The window has `length` rows. q, k and v come apart, or from token to token as parts of one array.
template <typename F>
int local_attn_differs(const Kernels<typename F::T>& kernels, int64_t d, int64_t length, bool with_bias, bool strided) {
  using V = typename F::V;
  using T = typename F::T;
  const int64_t b = 2, h = 5, w = 3, m = 2, taps = length * length, items = b * h * w * m, stride = (strided ? 3 : 1) * m * d;
  const Inputs<V> qkv(3 * items * d), grad(items * d);
  const int64_t k = strided ? m * d : items * d, v = 2 * k;
  const auto offset = wild<T>(items * taps * 2);
  auto bias = normal<T>(items * taps);
  for (int64_t i = 0; i < items; ++i) bias[i * taps + i % (taps - 1)] = -INFINITY;  // a tap that is masked, some first
  std::vector<V> ours(items * d, V(T(NAN)));
  std::vector<T> expected(items * d);
  Pair<T> g_q(items * d, false), g_k(items * d, true), g_v(items * d, true);
  Pair<T> g_offset(offset.size(), false), g_bias(bias.size(), !with_bias), factors(offset.size(), false);
  const auto arguments = [&](std::vector<T> Pair<T>::* side) -> LocalAttn<T> {
    return {qkv.exact.data(), qkv.exact.data() + k, qkv.exact.data() + v, offset.data(), with_bias ? bias.data() : nullptr,
            grad.exact.data(), expected.data(), (g_q.*side).data(), (g_k.*side).data(), (g_v.*side).data(),
            (g_offset.*side).data(), with_bias ? (g_bias.*side).data() : nullptr, (factors.*side).data(), b, h, w, m, d,
            {length, length}, stride, T(0.3)};
  };
  const auto a = arguments(&Pair<T>::ours), e = arguments(&Pair<T>::expected);
  const V* in = qkv.values.data();
  const Values<V> values = {in, in + k, in + v, grad.values.data(), ours.data()};
  const Tiles<typename F::I> tiles(m, h, w, items_at_once);
  const dim3 grid = {unsigned(tiles.blocks(b))}, block = {F::lanes, items_at_once};
  launch(grid, block, [&] { local_attn<F>(a, values, tiles); });
  launch(grid, block, [&] { local_attn_backward<F>(a, values, tiles); });
  kernels.local_attn(e, 0, items);
  kernels.local_attn_maps(e, {2, d, 2, true}, 0, 2);
  int wrong = differ("local_attn", d, ours, expected);
  for (const Pair<T>* pair : {&g_q, &g_k, &g_v, &g_offset, &g_bias})
    wrong += differ("local_attn's gradients", d, pair->ours, pair->expected);
  return wrong;
}

template <typename F>
int run(const Kernels<typename F::T>& kernels, int64_t d) {
  return ms_deform_attn_differs<F>(kernels, d, false) + ms_deform_attn_differs<F>(kernels, d, true) +
         local_attn_differs<F>(kernels, d, 3, false, true) + local_attn_differs<F>(kernels, d, 5, true, false);
}

// The forms that are launched: general ones for any number of channels, exact ones for those of their lanes.
int main() {
  const auto &f32 = kernels_under_test.f32;
  const auto &f64 = kernels_under_test.f64;
  int wrong = 0;
  for (int64_t d : {1, 70}) wrong += run<Form<float, 1, 8, false>>(f32, d);
  wrong += run<Form<float, 4, 8, false>>(f32, 36) + run<Form<Bfloat16, 8, 8, false>>(f32, 72);
  wrong += run<Form<Bfloat16, 1, 8, false>>(f32, 3) + run<Form<double, 2, 8, false>>(f64, 20);
  wrong += run<Form<float, 4, 4, true>>(f32, 16) + run<Form<float, 4, 8, true>>(f32, 32);
  wrong += run<Form<float, 4, 16, true>>(f32, 64) + run<Form<Bfloat16, 8, 4, true>>(f32, 32);
  wrong += run<Form<Bfloat16, 8, 8, true>>(f32, 64) + run<Form<Bfloat16, 8, 16, true>>(f32, 128);
  for (int64_t d : {1, 7, 70}) wrong += columns_differ<Form<float, 1, 8, false>>(f32, d);
  wrong += columns_differ<Form<float, 4, 8, false>>(f32, 36) + columns_differ<Form<Bfloat16, 8, 8, false>>(f32, 72);
  wrong += columns_differ<Form<Bfloat16, 1, 8, false>>(f32, 3) + columns_differ<Form<double, 2, 8, false>>(f64, 20);
  wrong += columns_differ<Form<float, 4, 8, true>>(f32, 96) + columns_differ<Form<float, 4, 32, true>>(f32, 128);
  wrong += columns_differ<Form<Bfloat16, 8, 8, true>>(f32, 64) + columns_differ<Form<Bfloat16, 8, 32, true>>(f32, 256);
  return wrong ? 1 : 0;
}
