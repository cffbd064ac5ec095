// What the kernels take: contiguous arrays and sizes. Values and gradients are float or double, coordinates too.
#pragma once
#include <cstdint>

namespace seg {

// ms_deform_attn. value (N, S, M, D), loc (N, Q, M, L, P, 2), attn (N, Q, M, L, P), out and grad (N, Q, M, D).
template <typename T>
struct MsDeformAttn {
  const T *value, *loc, *attn, *grad;
  T *out, *grad_value, *grad_loc, *grad_attn;
  const int64_t* shapes;  // H_1, W_1, H_2, W_2 …
  int64_t n, s, m, d, q, levels, points;
};

// The samples of a deformable convolution. input (N, H, W, G, D), offset (N, G, K, 2, L), mask (N, G, K, L) or null,
// columns and grad (count, K, G, D) for `count` of the N * L places.
template <typename T>
struct Columns {
  const T *input, *offset, *mask, *grad;
  T *columns, *grad_input, *grad_offset, *grad_mask;
  int64_t n, height, width, groups, d, out_height, out_width, first, count;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// deform_local_attn. q, k, v, out and grad (B, H * W, M, D), offset (B, H * W, M, K, 2), bias (B, M, H * W, K) or null.
// From token to token q, k and v have `stride` numbers, all others M * D.
template <typename T>
struct LocalAttn {
  const T *q, *k, *v, *offset, *bias, *grad;
  T *out, *grad_q, *grad_k, *grad_v, *grad_offset, *grad_bias;
  T* factors;  // (B, H * W, M, 2, K) from the first half of the backward pass to the second: of keys and of values
  int64_t b, height, width, m, d, kernel[2], stride;
  T scale;
};

// out (N, columns, middle, rows) from in (N, rows, middle, columns).
template <typename T>
struct Transpose {
  const T* in;
  T* out;
  int64_t n, rows, middle, columns;
  static constexpr int64_t block = 16;
};

// resize_argmax. logits (N, K, h, w), which are resized to full_h x full_w; classes (N, out_h, out_w), uint8 up to 256
// classes and int32 above, and confidence of the first rows and columns, or null.
struct ResizeArgmax {
  const float* logits;
  void* classes;
  float* confidence;
  int64_t n, k, h, w, full_h, full_w, out_h, out_w;
  bool corners;
  int64_t rows, columns;  // of a block; columns in groups of 16
};

// How the gradients of maps are divided among threads, so that every element has one thread and a fixed order of its
// sums: a unit is some heads of an image, or some channels of one head. Heads lie beside each other in memory, so few
// threads want many heads each. When a unit has `whole` heads, it computes the gradients of the points on its way, while
// the rows are in the cache.
struct Division {
  int64_t heads, channels, units;
  bool whole;
};

// Forward passes and the gradients of points take a range of queries, those of maps a range of units; all gradients of
// ms_deform_attn a range of images times strips.
template <typename T>
struct Kernels {
  void (*ms_deform_attn)(const MsDeformAttn<T>&, int64_t begin, int64_t end);
  void (*ms_deform_attn_backward)(const MsDeformAttn<T>&, int64_t strips, int64_t begin, int64_t end);
  void (*columns)(const Columns<T>&, int64_t begin, int64_t end);
  void (*columns_points)(const Columns<T>&, int64_t begin, int64_t end);
  void (*columns_maps)(const Columns<T>&, const Division&, int64_t begin, int64_t end);
  void (*local_attn)(const LocalAttn<T>&, int64_t begin, int64_t end);
  void (*local_attn_points)(const LocalAttn<T>&, int64_t begin, int64_t end);
  void (*local_attn_maps)(const LocalAttn<T>&, const Division&, int64_t begin, int64_t end);
  void (*transpose)(const Transpose<T>&, int64_t begin, int64_t end);
};

struct AllKernels {
  Kernels<float> f32;
  Kernels<double> f64;
  void (*resize_argmax)(const ResizeArgmax&, int64_t begin, int64_t end);
};

// The same source compiled for several instruction sets.
extern const AllKernels baseline;
#if defined(SEG_X86)
extern const AllKernels avx2;
#endif

}  // namespace seg
