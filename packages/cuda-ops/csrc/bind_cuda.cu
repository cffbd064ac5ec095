// The module seg_cuda_ops._cuda: launches, on the caller's stream. A launch that fails raises, with CUDA's own words.
// It has a CUDA runtime of its own; the caller makes the tensors' device torch's current one, and this module its own.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.cuh"

namespace py = pybind11;

namespace {

template <>
constexpr bool upper_half_of_float<__nv_bfloat16> = true;

using Pointers = std::vector<std::uintptr_t>;
using Sizes = std::vector<int64_t>;

bool general_forms = false;  // whether only those are launched

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("seg_cuda_ops: ") + cudaGetErrorString(status));
}

struct Target {
  int64_t device;
  std::uintptr_t stream;
};

template <typename T>
T* at(const Pointers& p, int i) {
  return reinterpret_cast<T*>(p[i]);
}

template <typename... Parameters, typename... Args>
void launch(void (*kernel)(Parameters...), const Target& target, int64_t blocks, dim3 block, const Args&... args) {
  if (blocks <= 0) return;
  if (blocks >= int64_t(1) << 31) throw std::invalid_argument("seg_cuda_ops: too many items for a launch");
  check(cudaSetDevice(int(target.device)));
  kernel<<<unsigned(blocks), block, 0, reinterpret_cast<cudaStream_t>(target.stream)>>>(args...);
  check(cudaGetLastError());
}

template <typename V>
constexpr int vec = 16 / sizeof(V);

// Calls run(form) with the best form: an exact one of one of the numbers of lanes if `lanes` is that, else the general
// one for 16 bytes at a time, if they may be read so, else value by value.
template <typename V, int... LANES, typename Run>
void choose(bool wide, int64_t lanes, Run run) {
  bool done = false;
  if constexpr (sizeof(V) < 8)
    if (wide && !general_forms) ((!done && lanes == LANES ? (run(Form<V, vec<V>, LANES, true>{}), done = true) : done), ...);
  if (done) return;
  if (wide) run(Form<V, vec<V>, 8, false>{});
  else run(Form<V, 1, 8, false>{});
}

// Whether arrays of these pointers, with rows of these numbers, may be read and written 16 bytes at a time.
template <typename V>
bool aligned(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> rows) {
  return std::all_of(pointers.begin(), pointers.end(), [](auto p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }) &&
         std::all_of(rows.begin(), rows.end(), [](int64_t row) { return row % vec<V> == 0; });
}

// Whether numbers up to the product of these fit 31 bits.
bool small(std::initializer_list<int64_t> sizes) {
  double product = 1;
  for (const int64_t size : sizes) product *= double(size);
  return product < double(int64_t(1) << 31);
}

template <typename V>
void ms_deform_attn_any(bool backward, const Pointers& p, const Sizes& shapes, const Sizes& s, const Target& target) {
  using T = exact_t<V>;
  const MsDeformAttn<T> a = {nullptr,  at<T>(p, 1), at<T>(p, 2), nullptr, nullptr, at<T>(p, 5), at<T>(p, 6), at<T>(p, 7),
                             nullptr, s[0],        s[1],        s[2],    s[3],    s[4],        s[5],        s[6]};
  const Values<V> values = {at<V>(p, 0), nullptr, nullptr, at<V>(p, 3), at<V>(p, 4)};
  if (a.levels > max_levels) throw std::invalid_argument("seg_cuda_ops: more than 16 levels");
  const Levels levels(a, shapes.data());
  const bool map = a.levels == 1 && levels.pixels == a.q;  // every pixel is a query, as in DDP; else queries are taken as a row
  const bool wide = aligned<V>({values.a, values.grad, values.out, a.grad_value}, {a.d});
  const bool fits = small({a.s, a.m, a.d}) && small({a.n, a.q + 64, a.m, a.d}) &&
                    small({a.n, a.q + 64, a.m, a.levels, a.points, 2});
  choose<V, 4, 8, 16>(wide, fits && a.d % vec<V> == 0 ? a.d / vec<V> : 0, [&](auto form) {
    using F = decltype(form);
    const Tiles<typename F::I> tiles(a.m, map ? levels.height[0] : 1, map ? levels.width[0] : a.q, attn_items<F>);
    launch(backward ? ms_deform_attn_backward<F> : ms_deform_attn<F>, target, a.q * a.m > 0 ? tiles.blocks(a.n) : 0,
           {F::lanes, attn_items<F>}, a, values, tiles, levels);
  });
}

template <typename V>
void columns_any(const std::string& name, const Pointers& p, const Sizes& s, const Sizes& w, const Target& target) {
  using T = exact_t<V>;
  const Columns<T> a = {nullptr,      at<T>(p, 1), at<T>(p, 2), nullptr, nullptr, at<T>(p, 5), at<T>(p, 6), at<T>(p, 7),
                        s[0],         s[1],        s[2],        s[3],    s[4],    s[5],        s[6],       s[7],       s[8],
                        {w[0], w[1]}, {w[2], w[3]}, {w[4], w[5]}, {w[6], w[7]}};
  const Values<V> values = {at<V>(p, 0), nullptr, nullptr, at<V>(p, 3), at<V>(p, 4)};
  const int64_t taps = a.kernel[0] * a.kernel[1], places = a.out_height * a.out_width;
  const bool unfolded = name == "unfold";
  const bool wide = aligned<V>({values.a, values.grad, unfolded ? nullptr : values.out, a.grad_input}, {a.d});
  const bool fits = small({a.n, a.height, a.width, a.groups, a.d}) && small({a.n, places + 1024, a.groups, taps, 2}) &&
                    small({places, taps, a.d}) && small({a.padding[0] + a.height + a.dilation[0] * a.kernel[0]}) &&
                    small({a.padding[1] + a.width + a.dilation[1] * a.kernel[1]});
  const int64_t pieces = fits ? a.d / vec<V> : 0;
  if (unfolded)
    return choose<V, 1>(wide, fits, [&](auto form) {
      using F = Form<V, decltype(form)::vec, 1, decltype(form)::exact>;
      launch(unfold<F>, target, (a.n * a.groups * taps * places + 127) / 128, 128, a, values, Window<typename F::I>(a));
    });
  choose<V, 8, 32>(wide, pieces % 32 == 0 && pieces ? 32 : pieces % 8 == 0 && pieces ? 8 : 0, [&](auto form) {
    using F = decltype(form);
    const int64_t items = (a.count + together - 1) / together * taps * a.groups;
    launch(name == "columns" ? columns<F> : columns_backward<F>, target,
           (items + columns_items<F> - 1) / columns_items<F>, {F::lanes, columns_items<F>}, a, values,
           Window<typename F::I>(a));
  });
}

template <typename V>
void local_attn_any(bool backward, const Pointers& p, const Sizes& s, double scale, const Target& target) {
  using T = exact_t<V>;
  const LocalAttn<T> a = {nullptr,      nullptr,      nullptr,      at<T>(p, 3),  at<T>(p, 4), nullptr, nullptr,
                          at<T>(p, 7),  at<T>(p, 8),  at<T>(p, 9),  at<T>(p, 10), at<T>(p, 11), nullptr,
                          s[0],         s[1],         s[2],         s[3],         s[4],        {s[5], s[6]}, s[7], T(scale)};
  const Values<V> values = {at<V>(p, 0), at<V>(p, 1), at<V>(p, 2), at<V>(p, 5), at<V>(p, 6)};
  const int64_t tokens = a.height * a.width;
  const bool wide = aligned<V>({values.a, values.b, values.c, values.grad, values.out, a.grad_q, a.grad_k, a.grad_v},
                               {a.d, a.stride});
  const bool fits = small({tokens, a.stride}) && small({a.b, tokens + 64, a.m, a.d}) &&
                    small({a.b, tokens + 64, a.m, a.kernel[0], a.kernel[1], 2});
  choose<V, 4, 8, 16>(wide, fits && a.d % vec<V> == 0 ? a.d / vec<V> : 0, [&](auto form) {
    using F = decltype(form);
    const Tiles<typename F::I> tiles(a.m, a.height, a.width, local_items<F>);
    launch(backward ? local_attn_backward<F> : local_attn<F>, target, a.m > 0 ? tiles.blocks(a.b) : 0,
           {F::lanes, local_items<F>}, a, values, tiles);
  });
}

// "" if this build's kernels run on a device, else why not.
std::string probe(int device) {
  try {
    check(cudaSetDevice(device));
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, ms_deform_attn<Form<float, 1, 8, false>>));
    return "";
  } catch (const std::exception& error) {
    cudaGetLastError();  // or the next call would report it again
    return error.what();
  }
}

template <typename V>
void define(py::module_& module, const std::string& suffix) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  for (const bool backward : {false, true}) {
    const std::string end = (backward ? "_backward_" : "_") + suffix;
    module.def(("ms_deform_attn" + end).c_str(),
               [backward](const Pointers& p, const Sizes& shapes, const Sizes& s, int64_t device, std::uintptr_t stream) {
                 ms_deform_attn_any<V>(backward, p, shapes, s, {device, stream});
               },
               Unlocked());
    module.def(("local_attn" + end).c_str(),
               [backward](const Pointers& p, const Sizes& s, double scale, int64_t device, std::uintptr_t stream) {
                 local_attn_any<V>(backward, p, s, scale, {device, stream});
               },
               Unlocked());
  }
  for (const std::string name : {"columns", "columns_backward", "unfold"})
    module.def((name + "_" + suffix).c_str(),
               [name](const Pointers& p, const Sizes& s, const Sizes& w, int64_t device, std::uintptr_t stream) {
                 columns_any<V>(name, p, s, w, {device, stream});
               },
               Unlocked());
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Kernels for CUDA: addresses on a device, in the order of csrc/arguments.h, sizes, device and stream.";
  define<float>(module, "f32");
  define<double>(module, "f64");
  define<__half>(module, "f16");
  define<__nv_bfloat16>(module, "bf16");
  module.def("use_general_forms", [](bool only) { general_forms = only; },
             "Launch only the forms for arrays of any size and rows of any length, or again the best ones.");
  module.def("probe", &probe, "Return \"\" if the kernels run on the device of that number, else why not.");
  module.def("driver_version", [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  }, "Return the newest CUDA that the installed driver knows, such as 13000; 0 without a driver.");
  module.attr("built_for") = CUDART_VERSION;
}
