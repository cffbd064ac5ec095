// Bilinear resize and argmax in one pass, included by cpu_kernels.cpp only.
#pragma once
#include "arguments.h"
#include "rows.h"

namespace {

using seg::ResizeArgmax;

// Where a row or column of the resized map lies between two of the given one, as in torch's upsample_bilinear2d.
struct Between {
  int64_t first, second;
  float weight;  // of the second
};

INLINE Between between(int64_t i, int64_t in, int64_t out, bool corners) {
  if (in == out) return {i, i, 0};
  const float scale = corners ? (out > 1 ? float(in - 1) / float(out - 1) : 0) : float(in) / float(out);
  float place = corners ? scale * float(i) : scale * (float(i) + 0.5f) - 0.5f;
  if (place < 0) place = 0;
  const int64_t floor = int64_t(place), first = floor < in - 1 ? floor : in - 1;
  return {first, first < in - 1 ? first + 1 : first, place - float(first)};
}

// exp(x) for x <= 0 within 2 units in the last place; from -87 down it stays at 1.6e-38. NaN stays NaN.
INLINE Vector<float>::type exp_of(Vector<float>::type x) {
  typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
  x = x < -87.0f ? -87.0f + Vector<float>::type{} : x;
  const auto n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds: no digits are left behind the point
  const auto r = x - n * 0.693359375f + n * 2.12194440e-4f;
  auto p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return p * reinterpret_cast<const Vector<float>::type&>(power);
}

// Pixels are worked on in groups: the values of all classes for one lie together, (K, group), and a line holds those of
// a row of the given map, resized to the columns of a block.
struct Lines {
  static constexpr int64_t group = 16;
  static constexpr int vectors = group / Vector<float>::size;
  using V = Vector<float>::type;
  typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));

  // line[g][k][x] of row y of an image, for the columns `count` of which `between` describes.
  static void resize(const ResizeArgmax& a, const float* image, int64_t y, const Between* columns, int64_t count,
                     float* line) {
    for (int64_t k = 0; k < a.k; ++k) {
      const float* row = image + (k * a.h + y) * a.w;
      for (int64_t x = 0; x < count; x += group) {
        float* out = line + x * a.k + k * group;
        const int64_t width = count - x < group ? count - x : group;
        for (int64_t i = 0; i < width; ++i) {
          const Between& c = columns[x + i];
          out[i] = (1 - c.weight) * row[c.first] + (c.weight ? c.weight * row[c.second] : 0);
        }
        for (int64_t i = width; i < group; ++i) out[i] = 0;
      }
    }
  }

  // One group of pixels between two lines; without a second one the first alone, so that 0 * infinity does not occur.
  template <bool two>
  static INLINE V value(const float* first, const float* second, float weight, int64_t at) {
    const V above = Vector<float>::load(first + at);
    if constexpr (!two) return above;
    return (1 - weight) * above + weight * Vector<float>::load(second + at);
  }

  template <bool two>
  static void best(int64_t classes, const float* first, const float* second, float weight, int32_t* index,
                   float* confidence) {
    V most[vectors];
    Ints which[vectors];
    for (int v = 0; v < vectors; ++v)
      most[v] = value<two>(first, second, weight, v * Vector<float>::size), which[v] = Ints{};
    for (int64_t k = 1; k < classes; ++k)
      for (int v = 0; v < vectors; ++v) {
        const V x = value<two>(first, second, weight, k * group + v * Vector<float>::size);
        const Ints more = x > most[v];
        most[v] = more ? x : most[v];
        which[v] = more ? Ints{} + int32_t(k) : which[v];
      }
    __builtin_memcpy(index, which, sizeof(which));
    if (!confidence) return;
    V sums[vectors] = {};
    for (int64_t k = 0; k < classes; ++k)
      for (int v = 0; v < vectors; ++v)
        sums[v] += exp_of(value<two>(first, second, weight, k * group + v * Vector<float>::size) - most[v]);
    for (int v = 0; v < vectors; ++v) Vector<float>::store(confidence + v * Vector<float>::size, 1.0f / sums[v]);
  }
};

// A unit is a block of the output: some rows by as many columns as have room in the cache for all classes.
void resize_argmax(const ResizeArgmax& a, int64_t begin, int64_t end) {
  constexpr int64_t group = Lines::group;
  const int64_t across = (a.out_w + a.columns - 1) / a.columns, down = (a.out_h + a.rows - 1) / a.rows;
  Scratch<float> memory(2 * a.k * a.columns);
  Scratch<Between> columns(a.columns);
  for (int64_t unit = begin; unit < end; ++unit) {  // (n, rows, columns)
    const int64_t n = unit / across / down, top = unit / across % down * a.rows, left = unit % across * a.columns;
    const int64_t bottom = top + a.rows < a.out_h ? top + a.rows : a.out_h;
    const int64_t count = left + a.columns < a.out_w ? a.columns : a.out_w - left;
    for (int64_t x = 0; x < count; ++x) columns.data[x] = between(left + x, a.w, a.full_w, a.corners);
    float* lines[2] = {memory.data, memory.data + a.k * a.columns};
    int64_t held[2] = {-1, -1};  // the rows that are in them
    for (int64_t y = top; y < bottom; ++y) {
      const Between place = between(y, a.h, a.full_h, a.corners);
      const int64_t wanted[2] = {place.first, place.second};
      if (held[1] == place.first) {
        float* const line = lines[0];
        lines[0] = lines[1], lines[1] = line, held[1] = held[0], held[0] = place.first;
      }
      for (int i = 0; i < (place.weight ? 2 : 1); ++i)
        if (held[i] != wanted[i]) {
          Lines::resize(a, a.logits + n * a.k * a.h * a.w, wanted[i], columns.data, count, lines[i]);
          held[i] = wanted[i];
        }
      for (int64_t x = 0; x < count; x += group) {
        int32_t index[group];
        float confidence[group];
        const float *first = lines[0] + x * a.k, *second = lines[1] + x * a.k;
        (place.weight ? Lines::best<true> : Lines::best<false>)(a.k, first, second, place.weight, index,
                                                                 a.confidence ? confidence : nullptr);
        const int64_t at = (n * a.out_h + y) * a.out_w + left + x, width = count - x < group ? count - x : group;
        if (a.k <= 256)
          for (int64_t i = 0; i < width; ++i) static_cast<uint8_t*>(a.classes)[at + i] = uint8_t(index[i]);
        else
          for (int64_t i = 0; i < width; ++i) static_cast<int32_t*>(a.classes)[at + i] = index[i];
        if (a.confidence)
          for (int64_t i = 0; i < width; ++i) a.confidence[at + i] = confidence[i];
      }
    }
  }
}

}  // namespace
