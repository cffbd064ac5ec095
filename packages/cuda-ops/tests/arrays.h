// Arrays of exactly their size for the test programs, with coordinates of every kind.
#pragma once
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

static std::mt19937 generator(0);

template <typename T>
std::vector<T> normal(int64_t count) {
  std::normal_distribution<double> draw;
  std::vector<T> out(count);
  for (T& x : out) x = T(draw(generator));
  return out;
}

// Coordinates of which many lie on or outside the border, or are no numbers.
template <typename T>
std::vector<T> wild(int64_t count) {
  const T inf = std::numeric_limits<T>::infinity();
  const T special[] = {T(NAN), inf, -inf, T(1e30), T(-1e30), T(-1), T(0), T(1), T(2147483648.0), T(-0.5), T(3), T(1.5)};
  std::vector<T> out = normal<T>(count);
  for (int64_t i = 0; i < count; ++i)
    if (generator() % 2) out[i] = special[generator() % (sizeof(special) / sizeof(T))];
  return out;
}
