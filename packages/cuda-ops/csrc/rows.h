// Arithmetic on rows of D numbers, in vectors as wide as the instruction set this file is compiled for.
#pragma once
#include <cstdint>

#if defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

template <typename T>
struct Vector {
  static constexpr int size = VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static INLINE type load(const T* p) { return *reinterpret_cast<const unaligned*>(p); }
  static INLINE void store(T* p, type v) { *reinterpret_cast<unaligned*>(p) = v; }
  // Halves are added first: one after the other, the numbers would wait for each other.
  static INLINE T sum(type v) {
    typedef T part __attribute__((vector_size(16)));
    part parts[VECTOR_BYTES / 16];
    __builtin_memcpy(parts, &v, VECTOR_BYTES);
    for (int half = VECTOR_BYTES / 32; half; half /= 2)
      for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    if constexpr (sizeof(T) == 8) return parts[0][0] + parts[0][1];
    else return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
  }
};

// out[c …] (+)= sum of weight * row over `count` rows, for U vectors from c on, which stay in registers meanwhile.
template <typename T, int U>
INLINE void sum_block(T* out, const T* const* rows, const T* weights, int count, int64_t c, bool add) {
  using V = Vector<T>;
  typename V::type total[U];
  for (int u = 0; u < U; ++u) total[u] = add ? V::load(out + c + u * V::size) : typename V::type{};
  for (int i = 0; i < count; ++i)
    for (int u = 0; u < U; ++u) total[u] += weights[i] * V::load(rows[i] + c + u * V::size);
  for (int u = 0; u < U; ++u) V::store(out + c + u * V::size, total[u]);
}

template <typename T>
INLINE void weighted_sum(T* out, const T* const* rows, const T* weights, int count, int64_t d, bool add) {
  constexpr int size = Vector<T>::size;
  int64_t c = 0;
  for (; c + 4 * size <= d; c += 4 * size) sum_block<T, 4>(out, rows, weights, count, c, add);
  for (; c + 2 * size <= d; c += 2 * size) sum_block<T, 2>(out, rows, weights, count, c, add);
  for (; c + size <= d; c += size) sum_block<T, 1>(out, rows, weights, count, c, add);
  for (; c < d; ++c) {
    T total = add ? out[c] : T(0);
    for (int i = 0; i < count; ++i) total += weights[i] * rows[i][c];
    out[c] = total;
  }
}

// result[i] = <g, rows[i]> of four rows.
template <typename T>
INLINE void four_dots(const T* g, const T* const rows[4], int64_t d, T result[4]) {
  using V = Vector<T>;
  typename V::type total[4] = {};
  int64_t c = 0;
  for (; c + V::size <= d; c += V::size) {
    const typename V::type v = V::load(g + c);
    for (int i = 0; i < 4; ++i) total[i] += v * V::load(rows[i] + c);
  }
  for (int i = 0; i < 4; ++i) result[i] = c ? V::sum(total[i]) : T(0);
  for (; c < d; ++c)
    for (int i = 0; i < 4; ++i) result[i] += g[c] * rows[i][c];
}

// <g, sum of weight * row> of four rows, which is cheaper than their four products with g.
template <typename T>
INLINE T dot_of_sum(const T* g, const T* const rows[4], const T weights[4], int64_t d) {
  using V = Vector<T>;
  typename V::type total = {};
  int64_t c = 0;
  for (; c + V::size <= d; c += V::size) {
    typename V::type sample = weights[0] * V::load(rows[0] + c);
    for (int i = 1; i < 4; ++i) sample += weights[i] * V::load(rows[i] + c);
    total += sample * V::load(g + c);
  }
  T result = c ? V::sum(total) : T(0);
  for (; c < d; ++c) {
    T sample = 0;
    for (int i = 0; i < 4; ++i) sample += weights[i] * rows[i][c];
    result += sample * g[c];
  }
  return result;
}

// row += weight * g.
template <typename T>
INLINE void add_scaled(T* row, T weight, const T* g, int64_t d) {
  using V = Vector<T>;
  int64_t c = 0;
  for (; c + V::size <= d; c += V::size) V::store(row + c, V::load(row + c) + weight * V::load(g + c));
  for (; c < d; ++c) row[c] += weight * g[c];
}

// result[i] = <g, rows[i]> and maps[i] += weights[i] * g, of four rows and four maps.
template <typename T>
INLINE void dots_and_add_scaled(const T* g, const T* const rows[4], T* const maps[4], const T weights[4], int64_t d,
                                T result[4]) {
  using V = Vector<T>;
  typename V::type total[4] = {};
  int64_t c = 0;
  for (; c + V::size <= d; c += V::size) {
    const typename V::type v = V::load(g + c);
    for (int i = 0; i < 4; ++i) total[i] += v * V::load(rows[i] + c);
    for (int i = 0; i < 4; ++i)
      if (weights[i] != T(0)) V::store(maps[i] + c, V::load(maps[i] + c) + weights[i] * v);
  }
  for (int i = 0; i < 4; ++i) result[i] = c ? V::sum(total[i]) : T(0);
  for (; c < d; ++c)
    for (int i = 0; i < 4; ++i) {
      result[i] += g[c] * rows[i][c];
      if (weights[i] != T(0)) maps[i][c] += weights[i] * g[c];
    }
}

}  // namespace
