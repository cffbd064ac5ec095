// Runs every CPU kernel on arrays of exactly their size with coordinates of every kind, to be built with sanitizers:
// a read or write outside an array, or an undefined conversion, ends the program. The answers must be finite.
#include <array>

#include "../csrc/arguments.h"
#include "arrays.h"

namespace seg {
extern const AllKernels kernels_under_test;
}
using namespace seg;

template <typename T>
int not_finite(const char* name, const std::vector<std::vector<T>*>& arrays) {
  for (const auto* array : arrays)
    for (T x : *array)
      if (!std::isfinite(x)) return std::printf("%s: an answer is not finite\n", name), 1;
  return 0;
}

template <typename T>
int run(const Kernels<T>& kernels, int64_t d) {
  int wrong = 0;
  const T poison = T(NAN);
  const Division divisions[] = {{2, d, 2, true}, {1, d, 4, true}, {1, (d + 1) / 2, 2 * 2 * (d > 1 ? 2 : 1), false}};
  {
    const int64_t n = 2, m = 2, q = 7, points = 3, shapes[] = {4, 5, 1, 3, 1, 1}, s = 24, levels = 3;
    auto value = normal<T>(n * s * m * d), loc = wild<T>(n * q * m * levels * points * 2);
    auto attn = normal<T>(n * q * m * levels * points), grad = normal<T>(n * q * m * d);
    for (const int64_t strips : {1, 3, 30}) {  // also more than a map has pixels
      std::vector<T> out(grad.size(), poison), g_value(value.size()), g_loc(loc.size(), poison), g_attn(attn.size(), poison);
      const MsDeformAttn<T> a = {value.data(),   loc.data(),   attn.data(), grad.data(), out.data(), g_value.data(),
                                 g_loc.data(), g_attn.data(), shapes,      n,           s,          m, d, q, levels, points};
      kernels.ms_deform_attn(a, 0, n * q * m);
      kernels.ms_deform_attn_backward(a, strips, 0, n * strips);
      wrong += not_finite<T>("ms_deform_attn", {&out, &g_value, &g_loc, &g_attn});
    }
  }
  {
    const int64_t n = 2, h = 4, w = 5, groups = 2, oh = 3, ow = 6, taps = 6, l = oh * ow;
    auto input = normal<T>(n * h * w * groups * d), offset = wild<T>(n * groups * taps * 2 * l);
    auto mask = normal<T>(n * groups * taps * l), grad = normal<T>(n * l * taps * groups * d);
    for (const Division& cut : divisions) {
      std::vector<T> out(grad.size(), poison), g_input(input.size()), g_offset(offset.size(), poison);
      std::vector<T> g_mask(mask.size(), poison);
      for (const int64_t first : {0, 20}) {  // the places in two parts
        const int64_t count = first ? n * l - first : 20, start = first * taps * groups * d;
        const Columns<T> a = {input.data(), offset.data(), mask.data(), grad.data() + start, out.data() + start,
                              g_input.data(), g_offset.data(), g_mask.data(), n, h, w, groups, d, oh, ow, first, count,
                              {3, 2}, {1, 1}, {0, 1}, {1, 1}};
        kernels.columns(a, 0, count);
        kernels.columns_points(a, 0, count);
        kernels.columns_maps(a, cut, 0, cut.units);
      }
      wrong += not_finite<T>("columns", {&out, &g_input, &g_offset, &g_mask});
    }
  }
  {
    const int64_t b = 2, h = 4, w = 3, m = 2, taps = 9, tokens = h * w;
    auto q = normal<T>(b * tokens * m * d), k = normal<T>(q.size()), v = normal<T>(q.size()), grad = normal<T>(q.size());
    auto offset = wild<T>(b * tokens * m * taps * 2), bias = normal<T>(b * tokens * m * taps);
    for (const Division& cut : divisions) {
      std::vector<T> out(q.size(), poison), g_q(q.size(), poison), g_k(q.size()), g_v(q.size());
      std::vector<T> g_offset(offset.size(), poison), g_bias(bias.size(), poison), factors(offset.size(), poison);
      const LocalAttn<T> a = {q.data(),   k.data(),   v.data(),        offset.data(), bias.data(),    grad.data(), out.data(),
                              g_q.data(), g_k.data(), g_v.data(),      g_offset.data(), g_bias.data(), factors.data(),
                              b, h, w, m, d, {3, 3}, m * d, T(0.3)};
      kernels.local_attn(a, 0, b * tokens * m);
      kernels.local_attn_points(a, 0, b * tokens * m);
      kernels.local_attn_maps(a, cut, 0, cut.units);
      wrong += not_finite<T>("local_attn", {&out, &g_q, &g_k, &g_v, &g_offset, &g_bias});
    }
  }
  for (const int64_t columns : {int64_t(1), int64_t(16), 2 * d}) {
    const auto in = normal<T>(2 * 19 * 3 * columns);
    std::vector<T> out(in.size(), poison);
    kernels.transpose({in.data(), out.data(), 2, 19, 3, columns}, 0, 2 * 2);
    wrong += not_finite<T>("transpose", {&out});
  }
  return wrong;
}

// Blocks of few rows and columns, of which the last ones are cut; up and down, and the size as it is.
int run_resize_argmax() {
  int wrong = 0;
  for (const int64_t k : {2, 19, 300})
    for (const bool corners : {false, true})
      for (const auto& [h, w, full_h, full_w] : {std::array<int64_t, 4>{5, 7, 21, 40}, {9, 50, 4, 33}, {6, 35, 6, 35}}) {
        const int64_t n = 2, out_h = full_h - 1, out_w = full_w - 2;
        auto logits = normal<float>(n * k * h * w);
        logits[0] = -std::numeric_limits<float>::infinity();
        std::vector<uint8_t> small(k <= 256 ? n * out_h * out_w : 0, 255);
        std::vector<int32_t> large(k <= 256 ? 0 : n * out_h * out_w, -1);
        std::vector<float> confidence(n * out_h * out_w, NAN);
        void* classes = k <= 256 ? static_cast<void*>(small.data()) : large.data();
        const ResizeArgmax a = {logits.data(), classes, confidence.data(), n, k, h, w, full_h, full_w, out_h, out_w,
                                corners, 8, 16};
        kernels_under_test.resize_argmax(a, 0, n * ((out_h + 7) / 8) * ((out_w + 15) / 16));
        wrong += not_finite<float>("resize_argmax", {&confidence});
        for (const uint8_t x : small) wrong += x >= k;
        for (const int32_t x : large) wrong += x < 0 || x >= k;
      }
  return wrong;
}

int main() {
  int wrong = run_resize_argmax();
  for (int64_t d : {1, 3, 8, 20, 67}) wrong += run(kernels_under_test.f32, d) + run(kernels_under_test.f64, d);
  return wrong ? 1 : 0;
}
