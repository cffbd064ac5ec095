// Bilinear sampling, for host and device: the one place that knows the rules of the border.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define HD __host__ __device__ __forceinline__
#else
#define HD inline __attribute__((always_inline))
#endif

namespace {

// A point between the pixels (y0, x0) and (y0 + 1, x0 + 1), of which some may lie outside the map.
template <typename T>
struct Point {
  bool inside;  // -1 < y < H and -1 < x < W; false for NaN and empty maps. If not, nothing below is set.
  bool top, bottom, left, right;  // whether the upper row, lower row, left column, right column is in the map
  int y0, x0;
  T ly, lx;  // distance to the upper row and to the left column, in [0, 1)
};

template <typename T>
HD Point<T> locate(T y, T x, int height, int width) {
  Point<T> p{};
  p.inside = height > 0 && width > 0 && y > T(-1) && x > T(-1) && y < T(height) && x < T(width);
  if (!p.inside) return p;
  // Only now are the coordinates small enough to be converted. Truncation, corrected, is the floor.
  p.y0 = int(y), p.x0 = int(x);
  p.y0 -= y < T(p.y0), p.x0 -= x < T(p.x0);
  p.ly = y - T(p.y0), p.lx = x - T(p.x0);
  p.top = p.y0 >= 0, p.bottom = p.y0 + 1 < height, p.left = p.x0 >= 0, p.right = p.x0 + 1 < width;
  return p;
}

// Weights of the corners (y0, x0) (y0, x1) (y1, x0) (y1, x1), zero outside the map, and the index of their pixels,
// which is moved into the map where they lie outside, so that it can be read without a test.
template <typename T, typename I>
HD void corners(const Point<T>& p, int width, T weight[4], I pixel[4]) {
  const T y[2] = {p.top ? T(1) - p.ly : T(0), p.bottom ? p.ly : T(0)};
  const T x[2] = {p.left ? T(1) - p.lx : T(0), p.right ? p.lx : T(0)};
  const int rows[2] = {p.top ? p.y0 : 0, p.bottom ? p.y0 + 1 : p.y0};
  const int columns[2] = {p.left ? p.x0 : 0, p.right ? p.x0 + 1 : p.x0};
  for (int i = 0; i < 4; ++i) {
    weight[i] = y[i / 2] * x[i % 2];
    pixel[i] = I(rows[i / 2]) * width + columns[i % 2];
  }
}

// Value and derivatives of a sample whose corners have the given values (anything where they lie outside).
template <typename T>
HD void derivatives(const Point<T>& p, const T corner[4], T& value, T& d_y, T& d_x) {
  const T c00 = p.top && p.left ? corner[0] : T(0), c01 = p.top && p.right ? corner[1] : T(0);
  const T c10 = p.bottom && p.left ? corner[2] : T(0), c11 = p.bottom && p.right ? corner[3] : T(0);
  const T upper = (T(1) - p.lx) * c00 + p.lx * c01, lower = (T(1) - p.lx) * c10 + p.lx * c11;
  value = (T(1) - p.ly) * upper + p.ly * lower;
  d_y = lower - upper;
  d_x = (T(1) - p.ly) * (c01 - c00) + p.ly * (c11 - c10);
}

}  // namespace
