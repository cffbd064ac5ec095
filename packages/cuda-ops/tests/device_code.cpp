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

// Shapes of blocks as they are launched: lanes for the channels, and items up to a warp; fewer blocks than items.
template <int VEC>
dim3 block_of(int64_t d) {
  unsigned lanes = 1;
  while (lanes < 32 && lanes * VEC < d) lanes *= 2;
  return {lanes, 32 / lanes};
}
const dim3 grid = {2};

template <typename V, int VEC>
int ms_deform_attn_differs(const Kernels<exact_t<V>>& kernels, int64_t d) {
  using T = exact_t<V>;
  const int64_t n = 2, m = 2, q = 5, points = 3, shapes[] = {4, 5, 1, 3}, s = 23, count = 2, items = n * q * m;
  const Levels levels = {{4, 1}, {5, 3}};
  const Inputs<V> value(n * s * m * d), grad(items * d);
  const auto loc = wild<T>(items * count * points * 2), attn = normal<T>(items * count * points);
  std::vector<V> ours(items * d, V(T(NAN)));
  std::vector<T> expected(items * d);
  Pair<T> g_value(n * s * m * d, true), g_loc(loc.size(), false), g_attn(attn.size(), false);
  const auto arguments = [&](std::vector<T> Pair<T>::* side) -> MsDeformAttn<T> {
    return {value.exact.data(), loc.data(), attn.data(), grad.exact.data(), expected.data(), (g_value.*side).data(),
            (g_loc.*side).data(), (g_attn.*side).data(), shapes, n, s, m, d, q, count, points};
  };
  const auto a = arguments(&Pair<T>::ours), e = arguments(&Pair<T>::expected);
  const Values<V> values = {value.values.data(), nullptr, nullptr, grad.values.data(), ours.data()};
  launch(grid, block_of<VEC>(d), [&] { ms_deform_attn<V, VEC>(a, values, levels); });
  launch(grid, block_of<VEC>(d), [&] { ms_deform_attn_backward<V, VEC>(a, values, levels); });
  kernels.ms_deform_attn(e, 0, items);
  kernels.ms_deform_attn_backward(e, 1, 0, n);
  int wrong = differ("ms_deform_attn", d, ours, expected);
  for (const Pair<T>* pair : {&g_value, &g_loc, &g_attn})
    wrong += differ("ms_deform_attn's gradients", d, pair->ours, pair->expected);
  return wrong;
}

template <typename V, int VEC>
int columns_differ(const Kernels<exact_t<V>>& kernels, int64_t d) {
  using T = exact_t<V>;
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
    launch(grid, block_of<VEC>(d), [&] { columns<V, VEC>(a, values); });
    launch(grid, block_of<VEC>(d), [&] { columns_backward<V, VEC>(a, values); });
  }
  const auto e = arguments(&Pair<T>::expected, 0, n * l);
  kernels.columns(e, 0, n * l);
  kernels.columns_points(e, 0, n * l);
  kernels.columns_maps(e, {2, d, 2, true}, 0, 2);
  int wrong = differ("columns", d, ours, expected);
  for (const Pair<T>* pair : {&g_input, &g_offset, &g_mask})
    wrong += differ("columns' gradients", d, pair->ours, pair->expected);
  return wrong;
}

template <typename V, int VEC>
int local_attn_differs(const Kernels<exact_t<V>>& kernels, int64_t d, bool with_bias) {
  using T = exact_t<V>;
  const int64_t b = 2, h = 2, w = 3, m = 2, taps = 9, items = b * h * w * m;
  const Inputs<V> q(items * d), k(items * d), v(items * d), grad(items * d);
  const auto offset = wild<T>(items * taps * 2);
  auto bias = normal<T>(items * taps);
  for (int64_t i = 0; i < items; ++i) bias[i * taps + i % (taps - 1)] = -INFINITY;  // a tap that is masked, some first
  std::vector<V> ours(items * d, V(T(NAN)));
  std::vector<T> expected(items * d);
  Pair<T> g_q(items * d, true), g_k(items * d, true), g_v(items * d, true);
  Pair<T> g_offset(offset.size(), false), g_bias(bias.size(), !with_bias), factors(offset.size(), false);
  const auto arguments = [&](std::vector<T> Pair<T>::* side) -> LocalAttn<T> {
    return {q.exact.data(), k.exact.data(), v.exact.data(), offset.data(), with_bias ? bias.data() : nullptr,
            grad.exact.data(), expected.data(), (g_q.*side).data(), (g_k.*side).data(), (g_v.*side).data(),
            (g_offset.*side).data(), with_bias ? (g_bias.*side).data() : nullptr, (factors.*side).data(), b, h, w, m, d,
            {3, 3}, T(0.3)};
  };
  const auto a = arguments(&Pair<T>::ours), e = arguments(&Pair<T>::expected);
  const Values<V> values = {q.values.data(), k.values.data(), v.values.data(), grad.values.data(), ours.data()};
  launch(grid, block_of<VEC>(d), [&] { local_attn<V, VEC>(a, values); });
  launch(grid, block_of<VEC>(d), [&] { local_attn_backward<V, VEC>(a, values); });
  kernels.local_attn(e, 0, items);
  kernels.local_attn_maps(e, {2, d, 2, true}, 0, 2);
  int wrong = differ("local_attn", d, ours, expected);
  for (const Pair<T>* pair : {&g_q, &g_k, &g_v, &g_offset, &g_bias})
    wrong += differ("local_attn's gradients", d, pair->ours, pair->expected);
  return wrong;
}

template <typename V, int VEC>
int run(const Kernels<exact_t<V>>& kernels, int64_t d) {
  return ms_deform_attn_differs<V, VEC>(kernels, d) + columns_differ<V, VEC>(kernels, d) +
         local_attn_differs<V, VEC>(kernels, d, true) + local_attn_differs<V, VEC>(kernels, d, false);
}

int main() {
  const auto& f32 = kernels_under_test.f32;
  int wrong = run<float, 1>(f32, 1) + run<float, 1>(f32, 7) + run<float, 1>(f32, 70);
  wrong += run<float, 4>(f32, 8) + run<float, 4>(f32, 32) + run<float, 4>(f32, 132);
  wrong += run<Bfloat16, 1>(f32, 3) + run<Bfloat16, 8>(f32, 32) + run<Bfloat16, 8>(f32, 64);
  wrong += run<double, 1>(kernels_under_test.f64, 3) + run<double, 2>(kernels_under_test.f64, 80);
  return wrong ? 1 : 0;
}
