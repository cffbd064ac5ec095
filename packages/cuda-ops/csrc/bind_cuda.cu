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

using Pointers = std::vector<std::uintptr_t>;
using Sizes = std::vector<int64_t>;

constexpr int threads = 128;  // of a block

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

template <typename V>
constexpr int vec = 16 / sizeof(V);

// Runs a kernel in its form for 16 bytes at a time where rows of d values allow it, else value by value.
template <typename V, typename... Args>
void launch(void (*wide)(Args...), void (*narrow)(Args...), const Pointers& p, const Target& target, int64_t items,
            int64_t d, Args... args) {
  if (items <= 0) return;
  const bool aligned = d % vec<V> == 0 && std::all_of(p.begin(), p.end(), [](auto pointer) { return pointer % 16 == 0; });
  const int64_t pieces = aligned ? d / vec<V> : d;
  int lanes = 1;
  while (lanes < pieces && lanes < 32) lanes *= 2;
  const dim3 block(lanes, threads / lanes);
  const auto blocks = unsigned(std::min<int64_t>((items + block.y - 1) / block.y, 1 << 30));
  check(cudaSetDevice(int(target.device)));
  (aligned ? wide : narrow)<<<blocks, block, 0, reinterpret_cast<cudaStream_t>(target.stream)>>>(args...);
  check(cudaGetLastError());
}

template <typename V>
void ms_deform_attn_any(bool backward, const Pointers& p, const Sizes& shapes, const Sizes& s, const Target& target) {
  using T = exact_t<V>;
  const MsDeformAttn<T> a = {nullptr,  at<T>(p, 1), at<T>(p, 2), nullptr, nullptr, at<T>(p, 5), at<T>(p, 6), at<T>(p, 7),
                             nullptr, s[0],        s[1],        s[2],    s[3],    s[4],        s[5],        s[6]};
  const Values<V> values = {at<V>(p, 0), nullptr, nullptr, at<V>(p, 3), at<V>(p, 4)};
  if (a.levels > max_levels) throw std::invalid_argument("seg_cuda_ops: more than 16 levels");
  Levels levels = {};
  for (int i = 0; i < a.levels; ++i) levels.height[i] = int(shapes[2 * i]), levels.width[i] = int(shapes[2 * i + 1]);
  const int64_t items = a.n * a.q * a.m;
  if (backward)
    launch<V>(ms_deform_attn_backward<V, vec<V>>, ms_deform_attn_backward<V, 1>, p, target, items, a.d, a, values, levels);
  else
    launch<V>(ms_deform_attn<V, vec<V>>, ms_deform_attn<V, 1>, p, target, items, a.d, a, values, levels);
}

template <typename V>
void columns_any(bool backward, const Pointers& p, const Sizes& s, const Sizes& w, const Target& target) {
  using T = exact_t<V>;
  const Columns<T> a = {nullptr,      at<T>(p, 1), at<T>(p, 2), nullptr, nullptr, at<T>(p, 5), at<T>(p, 6), at<T>(p, 7),
                        s[0],         s[1],        s[2],        s[3],    s[4],    s[5],        s[6],       s[7],       s[8],
                        {w[0], w[1]}, {w[2], w[3]}, {w[4], w[5]}, {w[6], w[7]}};
  const Values<V> values = {at<V>(p, 0), nullptr, nullptr, at<V>(p, 3), at<V>(p, 4)};
  const int64_t items = a.count * a.kernel[0] * a.kernel[1] * a.groups;
  if (backward)
    launch<V>(columns_backward<V, vec<V>>, columns_backward<V, 1>, p, target, items, a.d, a, values);
  else
    launch<V>(columns<V, vec<V>>, columns<V, 1>, p, target, items, a.d, a, values);
}

template <typename V>
void local_attn_any(bool backward, const Pointers& p, const Sizes& s, double scale, const Target& target) {
  using T = exact_t<V>;
  const LocalAttn<T> a = {nullptr,      nullptr,      nullptr,      at<T>(p, 3),  at<T>(p, 4), nullptr, nullptr,
                          at<T>(p, 7),  at<T>(p, 8),  at<T>(p, 9),  at<T>(p, 10), at<T>(p, 11), at<T>(p, 12),
                          s[0],         s[1],         s[2],         s[3],         s[4],        {s[5], s[6]}, T(scale)};
  const Values<V> values = {at<V>(p, 0), at<V>(p, 1), at<V>(p, 2), at<V>(p, 5), at<V>(p, 6)};
  const int64_t items = a.b * a.height * a.width * a.m;
  if (backward)
    launch<V>(local_attn_backward<V, vec<V>>, local_attn_backward<V, 1>, p, target, items, a.d, a, values);
  else
    launch<V>(local_attn<V, vec<V>>, local_attn<V, 1>, p, target, items, a.d, a, values);
}

// "" if this build's kernels run on a device, else why not.
std::string probe(int device) {
  try {
    check(cudaSetDevice(device));
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, ms_deform_attn<float, 4>));
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
    module.def(("columns" + end).c_str(),
               [backward](const Pointers& p, const Sizes& s, const Sizes& w, int64_t device, std::uintptr_t stream) {
                 columns_any<V>(backward, p, s, w, {device, stream});
               },
               Unlocked());
    module.def(("local_attn" + end).c_str(),
               [backward](const Pointers& p, const Sizes& s, double scale, int64_t device, std::uintptr_t stream) {
                 local_attn_any<V>(backward, p, s, scale, {device, stream});
               },
               Unlocked());
  }
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Kernels for CUDA: addresses on a device, in the order of csrc/arguments.h, sizes, device and stream.";
  define<float>(module, "f32");
  define<double>(module, "f64");
  define<__half>(module, "f16");
  define<__nv_bfloat16>(module, "bf16");
  module.def("probe", &probe, "Return \"\" if the kernels run on the device of that number, else why not.");
  module.def("driver_version", [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  }, "Return the newest CUDA that the installed driver knows, such as 13000; 0 without a driver.");
  module.attr("built_for") = CUDART_VERSION;
}
