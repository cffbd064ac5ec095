// The operators on the CPU. Compiled once per instruction set, under the name that KERNELS_NAME gives; everything else
// has internal linkage and nothing of the standard library is instantiated, so that no function compiled for a newer
// instruction set can take the place of another one.
#include <math.h>
#include <stdlib.h>

#include "arguments.h"
#include "rows.h"
#include "sampling.h"

namespace {

using namespace seg;

template <typename T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t count) : data(static_cast<T*>(malloc(sizeof(T) * (count > 0 ? count : 1)))) {
    if (!data) abort();  // a few hundred bytes
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// A list of rows with weights, summed when it is full: what is added up stays in registers for many corners.
template <typename T>
struct Corners {
  static constexpr int capacity = 64;
  const T* rows[capacity];
  T weights[capacity];
  int count = 0;
  bool added = false;

  INLINE void push(const T* map, int64_t stride, const Point<T>& p, int width, T factor, T* out, int64_t d,
                   bool prefetch = false) {
    T weight[4];
    int64_t pixel[4];
    corners(p, width, weight, pixel);
    if (count + 4 > capacity) flush(out, d);
    for (int i = 0; i < 4; ++i) {
      rows[count + i] = map + pixel[i] * stride;
      weights[count + i] = weight[i] * factor;
      if (prefetch)
        for (int64_t c = 0; c < d; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(rows[count + i] + c);
    }
    count += 4;
  }
  INLINE void flush(T* out, int64_t d) {
    weighted_sum(out, rows, weights, count, d, added);
    added = true, count = 0;
  }
};

template <typename T>
INLINE void corner_rows(const T* map, int64_t stride, const Point<T>& p, int width, T weight[4], const T* rows[4]) {
  int64_t pixel[4];
  corners(p, width, weight, pixel);
  for (int i = 0; i < 4; ++i) rows[i] = map + pixel[i] * stride;
}

// map[corner] += factor * weight * g, from channel `first` of rows that are `stride` apart.
template <typename T>
INLINE void scatter(T* map, int64_t stride, const Point<T>& p, int width, T factor, const T* g, int64_t d) {
  T weight[4];
  int64_t pixel[4];
  corners(p, width, weight, pixel);
  for (int i = 0; i < 4; ++i)
    if (weight[i] != T(0)) add_scaled(map + pixel[i] * stride, factor * weight[i], g, d);
}

}  // namespace

#include "resize_argmax.h"

namespace {

// What unit `i` of a division works on.
struct Part {
  int64_t n, head, last_head, first, d;  // image, heads from `head` to before `last_head`, d channels from `first`
  Part(const Division& cut, int64_t i, int64_t heads, int64_t channels) {
    const int64_t chunks = (channels + cut.channels - 1) / cut.channels, groups = (heads + cut.heads - 1) / cut.heads;
    n = i / chunks / groups, head = i / chunks % groups * cut.heads, first = i % chunks * cut.channels;
    last_head = head + cut.heads < heads ? head + cut.heads : heads;
    d = channels - first < cut.channels ? channels - first : cut.channels;
  }
};

// ---- ms_deform_attn -------------------------------------------------------------------------------------------------

template <typename T>
INLINE Point<T> attn_point(const MsDeformAttn<T>& a, int64_t point, int height, int width) {
  return locate(a.loc[2 * point + 1] * height - T(0.5), a.loc[2 * point] * width - T(0.5), height, width);
}

template <typename T>
void ms_deform_attn(const MsDeformAttn<T>& a, int64_t begin, int64_t end) {
  constexpr int64_t group = 8;  // rows of so many items are on their way into the cache at once
  const int64_t stride = a.m * a.d;
  Corners<T> lists[group];
  for (int64_t first = begin; first < end; first += group) {
    const int64_t last = first + group < end ? first + group : end;
    for (int64_t i = first; i < last; ++i) {  // (n, q, m)
      Corners<T>& list = lists[i - first];
      list.added = false;
      const T* map = a.value + i / (a.q * a.m) * a.s * stride + i % a.m * a.d;
      for (int64_t level = 0; level < a.levels; ++level) {
        const int height = int(a.shapes[2 * level]), width = int(a.shapes[2 * level + 1]);
        for (int64_t j = 0; j < a.points; ++j) {
          const int64_t point = (i * a.levels + level) * a.points + j;
          const Point<T> p = attn_point(a, point, height, width);
          if (p.inside) list.push(map, stride, p, width, a.attn[point], a.out + i * a.d, a.d, true);
        }
        map += int64_t(height) * width * stride;
      }
    }
    for (int64_t i = first; i < last; ++i) lists[i - first].flush(a.out + i * a.d, a.d);
  }
}

// Points whose rows are on their way into the cache while others of the same list are worked on.
template <typename T>
struct Pending {
  static constexpr int capacity = 32;
  struct Entry {
    Point<T> p;
    T weight[4];
    int64_t start[4];  // of the corners' rows
    int64_t item, point;
    T height, width;
    bool own;  // whether the gradients of the point itself are computed here
  };
  Entry entries[capacity];
  int count = 0;

  // Adds a point of the level whose map begins at `map`, if one of its corners is a pixel from `first` to before `last`.
  INLINE void add(const MsDeformAttn<T>& a, const Point<T>& p, int64_t map, int64_t item, int64_t point, int height,
                  int width, int64_t first, int64_t last) {
    const int64_t corner = int64_t(p.y0) * width + p.x0;  // not yet moved into the map
    if (corner + width + 1 < first || corner >= last) return;
    Entry& e = entries[count];
    int64_t pixel[4];
    corners(p, width, e.weight, pixel);
    e.p = p, e.item = item, e.point = point, e.height = T(height), e.width = T(width);
    e.own = pixel[0] >= first && pixel[0] < last;
    for (int i = 0; i < 4; ++i) {
      e.start[i] = map + pixel[i] * a.m * a.d;
      const bool here = pixel[i] >= first && pixel[i] < last;
      if (!here) e.weight[i] = 0;
      for (int64_t c = 0; c < a.d; c += 64 / int64_t(sizeof(T))) {
        if (e.own) __builtin_prefetch(a.value + e.start[i] + c, 0);
        if (here) __builtin_prefetch(a.grad_value + e.start[i] + c, 1);
      }
    }
    if (++count == capacity) flush(a);
  }

  INLINE void flush(const MsDeformAttn<T>& a) {
    for (const Entry* e = entries; e < entries + count; ++e) {
      const T *g = a.grad + e->item * a.d, factor = a.attn[e->point];
      T *maps[4], weight[4];
      for (int i = 0; i < 4; ++i) maps[i] = a.grad_value + e->start[i], weight[i] = factor * e->weight[i];
      if (e->own) {
        const T* rows[4];
        T dots[4], value, d_y, d_x;
        for (int i = 0; i < 4; ++i) rows[i] = a.value + e->start[i];
        dots_and_add_scaled(g, rows, maps, weight, a.d, dots);
        derivatives(e->p, dots, value, d_y, d_x);
        a.grad_attn[e->point] = value;
        a.grad_loc[2 * e->point] = d_x * factor * e->width;
        a.grad_loc[2 * e->point + 1] = d_y * factor * e->height;
      } else {
        for (int i = 0; i < 4; ++i)
          if (weight[i] != T(0)) add_scaled(maps[i], weight[i], g, a.d);
      }
    }
    count = 0;
  }
};

// A unit is a strip of each of an image's maps. Every thread looks at all points, which costs little, and works on those
// that touch its strip; so the sums of every pixel keep the order of the queries.
template <typename T>
void ms_deform_attn_backward(const MsDeformAttn<T>& a, int64_t strips, int64_t begin, int64_t end) {
  const int64_t stride = a.m * a.d;
  Scratch<int64_t> edges(2 * a.levels);  // of the strip: its first pixel in each level, and the one after its last
  for (int64_t i = begin; i < end; ++i) {  // (n, strip)
    const int64_t n = i / strips, strip = i % strips;
    for (int64_t j = 0; j < 2 * a.levels; ++j)
      edges.data[j] = a.shapes[j / 2 * 2] * a.shapes[j / 2 * 2 + 1] * (strip + j % 2) / strips;
    Pending<T> list;
    for (int64_t query = n * a.q; query < (n + 1) * a.q; ++query)
      for (int64_t head = 0; head < a.m; ++head) {
        const int64_t item = query * a.m + head;
        int64_t map = n * a.s * stride + head * a.d;
        for (int64_t level = 0; level < a.levels; ++level) {
          const int height = int(a.shapes[2 * level]), width = int(a.shapes[2 * level + 1]);
          const int64_t first = edges.data[2 * level], last = edges.data[2 * level + 1];
          for (int64_t j = 0; j < a.points; ++j) {
            const int64_t point = (item * a.levels + level) * a.points + j;
            const Point<T> p = attn_point(a, point, height, width);
            if (p.inside) list.add(a, p, map, item, point, height, width, first, last);
            else if (strip == 0) a.grad_attn[point] = a.grad_loc[2 * point] = a.grad_loc[2 * point + 1] = 0;
          }
          map += int64_t(height) * width * stride;
        }
      }
    list.flush(a);
  }
}

// ---- deform_unfold and deform_conv2d --------------------------------------------------------------------------------

// Calls body(group, tap, point, mask, index of the first offset) for every sample at a place, group by group.
template <typename T, typename Body>
INLINE void at_place(const Columns<T>& a, int64_t n, int64_t place, int64_t group, Body body) {
  const int64_t taps = a.kernel[0] * a.kernel[1], places = a.out_height * a.out_width;
  const int64_t top = place / a.out_width * a.stride[0] - a.padding[0];
  const int64_t left = place % a.out_width * a.stride[1] - a.padding[1];
  int64_t index = (n * a.groups + group) * taps, tap = 0;
  for (int64_t i = 0; i < a.kernel[0]; ++i)  // in two loops: a division costs as much as all the rest
    for (int64_t j = 0; j < a.kernel[1]; ++j, ++tap, ++index) {
      const T* offset = a.offset + index * 2 * places + place;
      const T y = T(top + i * a.dilation[0]) + offset[0], x = T(left + j * a.dilation[1]) + offset[places];
      const Point<T> p = locate(y, x, int(a.height), int(a.width));
      body(tap, p, a.mask ? a.mask[index * places + place] : T(1), index * places + place);
    }
}

template <typename T>
void columns(const Columns<T>& a, int64_t begin, int64_t end) {
  const int64_t taps = a.kernel[0] * a.kernel[1], places = a.out_height * a.out_width, stride = a.groups * a.d;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = (a.first + i) / places, place = (a.first + i) % places;
    for (int64_t group = 0; group < a.groups; ++group) {
      const T* map = a.input + n * a.height * a.width * stride + group * a.d;
      at_place(a, n, place, group, [&](int64_t tap, const Point<T>& p, T mask, int64_t) {
        T* out = a.columns + ((i * taps + tap) * a.groups + group) * a.d;
        Corners<T> list;
        if (p.inside) list.push(map, stride, p, int(a.width), mask, out, a.d);
        list.flush(out, a.d);
      });
    }
  }
}

template <typename T>
void columns_points(const Columns<T>& a, int64_t begin, int64_t end) {
  const int64_t taps = a.kernel[0] * a.kernel[1], places = a.out_height * a.out_width, stride = a.groups * a.d;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = (a.first + i) / places, place = (a.first + i) % places;
    for (int64_t group = 0; group < a.groups; ++group) {
      const T* map = a.input + n * a.height * a.width * stride + group * a.d;
      at_place(a, n, place, group, [&](int64_t tap, const Point<T>& p, T mask, int64_t index) {
        T value = 0, d_y = 0, d_x = 0;
        if (p.inside) {
          T weight[4], dots[4];
          const T* rows[4];
          corner_rows(map, stride, p, int(a.width), weight, rows);
          four_dots(a.grad + ((i * taps + tap) * a.groups + group) * a.d, rows, a.d, dots);
          derivatives(p, dots, value, d_y, d_x);
        }
        T* grad_offset = a.grad_offset + 2 * (index - place) + place;
        grad_offset[0] = d_y * mask;
        grad_offset[places] = d_x * mask;
        if (a.grad_mask) a.grad_mask[index] = value;
      });
    }
  }
}

template <typename T>
void columns_maps(const Columns<T>& a, const Division& cut, int64_t begin, int64_t end) {
  const int64_t taps = a.kernel[0] * a.kernel[1], places = a.out_height * a.out_width, stride = a.groups * a.d;
  for (int64_t i = begin; i < end; ++i) {
    Part part(cut, i, a.groups, a.d);
    part.n += a.first / places;
    const int64_t first = part.n * places, last = first + places, given = a.first + a.count;
    for (int64_t j = first > a.first ? first : a.first; j < (last < given ? last : given); ++j)
      for (int64_t group = part.head; group < part.last_head; ++group) {
        T* map = a.grad_input + part.n * a.height * a.width * stride + group * a.d + part.first;
        at_place(a, part.n, j - first, group, [&](int64_t tap, const Point<T>& p, T mask, int64_t) {
          const T* g = a.grad + (((j - a.first) * taps + tap) * a.groups + group) * a.d + part.first;
          if (p.inside) scatter(map, stride, p, int(a.width), mask, g, part.d);
        });
      }
  }
}

// One block in a buffer, so that only whole cache lines are read and written: rows are often a power of two apart, and
// few lines at such distances have room in the cache together.
template <typename T>
INLINE void transpose_block(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t rows, int64_t columns) {
  constexpr int64_t size = Transpose<T>::block;
  T buffer[size][size];
  if (rows == size && columns == size) {
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j) buffer[j][i] = in[i * in_stride + j];
    for (int64_t j = 0; j < size; ++j) __builtin_memcpy(out + j * out_stride, buffer[j], sizeof(buffer[j]));
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) out[j * out_stride + i] = in[i * in_stride + j];
  }
}

template <typename T>
void transpose(const Transpose<T>& a, int64_t begin, int64_t end) {
  constexpr int64_t size = Transpose<T>::block;
  const int64_t blocks = (a.rows + size - 1) / size;
  for (int64_t i = begin; i < end; ++i) {  // (n, rows of a block)
    const int64_t start = i / blocks * a.rows * a.middle * a.columns, top = i % blocks * size;
    const int64_t rows = a.rows - top < size ? a.rows - top : size;
    for (int64_t middle = 0; middle < a.middle; ++middle)
      for (int64_t left = 0; left < a.columns; left += size)
        transpose_block(a.in + start + (top * a.middle + middle) * a.columns + left, a.middle * a.columns,
                        a.out + start + (left * a.middle + middle) * a.rows + top, a.middle * a.rows, rows,
                        a.columns - left < size ? a.columns - left : size);
  }
}

// ---- deform_local_attn ----------------------------------------------------------------------------------------------

// Where q of an item begins, (b, token, m), and where the maps of k and v do.
template <typename T>
INLINE int64_t query_start(const LocalAttn<T>& a, int64_t item) {
  return item / a.m * a.stride + item % a.m * a.d;
}
template <typename T>
INLINE int64_t map_start(const LocalAttn<T>& a, int64_t item) {
  return item / (a.height * a.width * a.m) * a.height * a.width * a.stride + item % a.m * a.d;
}

// Sets the points of an item, one per tap.
template <typename T>
INLINE void tap_points(const LocalAttn<T>& a, int64_t item, Point<T>* points) {
  const int64_t token = item / a.m % (a.height * a.width);
  const int64_t top = token / a.width - a.kernel[0] / 2, left = token % a.width - a.kernel[1] / 2;
  const T* offset = a.offset + item * a.kernel[0] * a.kernel[1] * 2;
  for (int64_t i = 0; i < a.kernel[0]; ++i)
    for (int64_t j = 0; j < a.kernel[1]; ++j, offset += 2)
      *points++ = locate(T(top + i) + offset[0], T(left + j) + offset[1], int(a.height), int(a.width));
}

INLINE float exponential(float x) { return expf(x); }
INLINE double exponential(double x) { return exp(x); }

// Turns logits without scale and bias into attention.
template <typename T>
INLINE void softmax(const LocalAttn<T>& a, int64_t item, T* logits, int64_t taps) {
  const int64_t tokens = a.height * a.width, token = item / a.m % tokens;
  const T* bias = a.bias ? a.bias + ((item / a.m / tokens * a.m + item % a.m) * tokens + token) * taps : nullptr;
  T largest = -INFINITY, total = 0;
  for (int64_t tap = 0; tap < taps; ++tap) {
    logits[tap] = logits[tap] * a.scale + (bias ? bias[tap] : T(0));
    largest = logits[tap] > largest ? logits[tap] : largest;
  }
  for (int64_t tap = 0; tap < taps; ++tap) total += logits[tap] = exponential(logits[tap] - largest);
  for (int64_t tap = 0; tap < taps; ++tap) logits[tap] /= total;
}

template <typename T>
void local_attn(const LocalAttn<T>& a, int64_t begin, int64_t end) {
  const int64_t taps = a.kernel[0] * a.kernel[1], stride = a.stride;
  Scratch<T> attention(taps);
  Scratch<Point<T>> points(taps);
  for (int64_t i = begin; i < end; ++i) {  // (b, token, m)
    const int64_t start = map_start(a, i);
    tap_points(a, i, points.data);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Point<T>& p = points.data[tap];
      T weight[4], product = 0;
      const T* rows[4];
      if (p.inside) {
        corner_rows(a.k + start, stride, p, int(a.width), weight, rows);
        product = dot_of_sum(a.q + query_start(a, i), rows, weight, a.d);
      }
      attention.data[tap] = product;
    }
    softmax(a, i, attention.data, taps);
    Corners<T> list;
    T* out = a.out + i * a.d;
    for (int64_t tap = 0; tap < taps; ++tap)
      if (points.data[tap].inside)
        list.push(a.v + start, stride, points.data[tap], int(a.width), attention.data[tap], out, a.d);
    list.flush(out, a.d);
  }
}

template <typename T>
void local_attn_points(const LocalAttn<T>& a, int64_t begin, int64_t end) {
  const int64_t taps = a.kernel[0] * a.kernel[1], stride = a.stride;
  Scratch<Point<T>> points(taps);
  Scratch<T> dots(8 * taps);  // per tap <q, corner of k> and <grad, corner of v>
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tokens = a.height * a.width, start = map_start(a, i);
    T *of_key = a.factors + i * 2 * taps, *of_value = of_key + taps;  // logits, then attention; then their gradients
    tap_points(a, i, points.data);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Point<T>& p = points.data[tap];
      T weight[4], *dot = dots.data + 8 * tap;
      const T* rows[4];
      for (int j = 0; j < 8; ++j) dot[j] = 0;
      of_value[tap] = of_key[tap] = 0;
      if (!p.inside) continue;
      corner_rows(a.k + start, stride, p, int(a.width), weight, rows);
      four_dots(a.q + query_start(a, i), rows, a.d, dot);
      corner_rows(a.v + start, stride, p, int(a.width), weight, rows);
      four_dots(a.grad + i * a.d, rows, a.d, dot + 4);
      for (int j = 0; j < 4; ++j) of_value[tap] += weight[j] * dot[j], of_key[tap] += weight[j] * dot[4 + j];
    }
    softmax(a, i, of_value, taps);  // now attention; of_key is still the attention's gradient
    T mean = 0;
    for (int64_t tap = 0; tap < taps; ++tap) mean += of_value[tap] * of_key[tap];
    T* grad_bias = a.grad_bias ? a.grad_bias + ((i / a.m / tokens * a.m + i % a.m) * tokens + i / a.m % tokens) * taps
                               : nullptr;
    Corners<T> list;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const T by_logit = of_value[tap] * (of_key[tap] - mean);
      if (grad_bias) grad_bias[tap] = by_logit;
      of_key[tap] = by_logit * a.scale;
      const Point<T>& p = points.data[tap];
      T value = 0, d_y = 0, d_x = 0, *dot = dots.data + 8 * tap;
      if (p.inside) {
        for (int j = 0; j < 4; ++j) dot[j] = dot[j] * of_key[tap] + dot[4 + j] * of_value[tap];
        derivatives(p, dot, value, d_y, d_x);
        list.push(a.k + start, stride, p, int(a.width), of_key[tap], a.grad_q + i * a.d, a.d);
      }
      a.grad_offset[(i * taps + tap) * 2] = d_y;
      a.grad_offset[(i * taps + tap) * 2 + 1] = d_x;
    }
    list.flush(a.grad_q + i * a.d, a.d);
  }
}

template <typename T>
void local_attn_maps(const LocalAttn<T>& a, const Division& cut, int64_t begin, int64_t end) {
  const int64_t taps = a.kernel[0] * a.kernel[1], stride = a.m * a.d, tokens = a.height * a.width;
  Scratch<Point<T>> points(taps);
  for (int64_t i = begin; i < end; ++i) {
    const Part part(cut, i, a.m, a.d);
    for (int64_t token = part.n * tokens; token < (part.n + 1) * tokens; ++token)
      for (int64_t head = part.head; head < part.last_head; ++head) {
        const int64_t item = token * a.m + head, start = part.n * tokens * stride + head * a.d + part.first;
        if (cut.whole) local_attn_points(a, item, item + 1);
        tap_points(a, item, points.data);
        for (int64_t tap = 0; tap < taps; ++tap) {
          const Point<T>& p = points.data[tap];
          if (!p.inside) continue;
          const T *factor = a.factors + item * 2 * taps + tap, *q = a.q + query_start(a, item), *grad = a.grad + item * a.d;
          scatter(a.grad_k + start, stride, p, int(a.width), factor[0], q + part.first, part.d);
          scatter(a.grad_v + start, stride, p, int(a.width), factor[taps], grad + part.first, part.d);
        }
      }
  }
}

template <typename T>
constexpr Kernels<T> table() {
  return {ms_deform_attn<T>, ms_deform_attn_backward<T>,
          columns<T>,        columns_points<T>,        columns_maps<T>,
          local_attn<T>,     local_attn_points<T>,     local_attn_maps<T>,
          transpose<T>};
}

}  // namespace

namespace seg {
extern const AllKernels KERNELS_NAME = {table<float>(), table<double>(), resize_argmax};
}
