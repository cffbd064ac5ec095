// The module seg_cuda_ops._cpu: addresses and sizes in, nothing of torch's headers or libraries needed to build it.
#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"

namespace py = pybind11;
using namespace seg;

namespace {

using Address = std::uintptr_t;
using Sizes = std::vector<int64_t>;

const AllKernels* kernels = &baseline;
std::string instruction_set = "baseline";

// The best set that the processor knows, or the one of that name.
std::string use_instruction_set(const std::string& wanted) {
  struct Set {
    const char* name;
    const AllKernels* kernels;
    bool usable;
  };
  std::vector<Set> sets;
#if defined(SEG_X86)
  sets.push_back({"avx2", &avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
  sets.push_back({"baseline", &baseline, true});
  for (const Set& set : sets) {
    if (!set.usable || (!wanted.empty() && wanted != set.name)) continue;
    kernels = set.kernels;
    return instruction_set = set.name;
  }
  throw std::invalid_argument("this processor has no instruction set named " + wanted);
}

// Torch's own threads, through the one function of its C interface that is needed; without it, one thread.
using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

ParallelFor find_parallel_for() {
#ifdef _WIN32
  if (HMODULE library = GetModuleHandleA("torch_cpu.dll"))
    return reinterpret_cast<ParallelFor>(GetProcAddress(library, "torch_parallel_for"));
#else
  for (const char* name : {"libtorch_cpu.so", "libtorch_cpu.dylib", "@rpath/libtorch_cpu.dylib"})
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD))
      return reinterpret_cast<ParallelFor>(dlsym(library, "torch_parallel_for"));
#endif
  return nullptr;
}

template <typename Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  static const ParallelFor parallel_for = find_parallel_for();
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  if (count <= 0) return;
  if (!parallel_for) return body(0, count);
  if (parallel_for(0, count, grain, call, const_cast<void*>(static_cast<const void*>(&body))))
    throw std::runtime_error("torch_parallel_for failed");
}

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

Division divide(int64_t images, int64_t heads, int64_t channels, int64_t threads) {
  const int64_t per_image = divided(threads, std::max<int64_t>(images, 1));
  const int64_t heads_each = std::max<int64_t>(1, heads / per_image), units = divided(heads, heads_each);
  const int64_t pieces = std::max<int64_t>(1, std::min(divided(per_image, units), channels / 16));
  const int64_t channels_each = std::max<int64_t>(1, divided(channels, pieces));
  return {heads_each, channels_each, images * units * divided(channels, channels_each), channels_each >= channels};
}

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
const Kernels<T>& of();
template <>
const Kernels<float>& of() { return kernels->f32; }
template <>
const Kernels<double>& of() { return kernels->f64; }

constexpr int64_t grain = 32;  // queries that are worth a thread

template <typename T>
MsDeformAttn<T> attn_arguments(const std::vector<Address>& p, const Sizes& shapes, const Sizes& s) {
  return {pointer<T>(p[0]), pointer<T>(p[1]), pointer<T>(p[2]), pointer<T>(p[3]), pointer<T>(p[4]), pointer<T>(p[5]),
          pointer<T>(p[6]), pointer<T>(p[7]), shapes.data(),    s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
}

template <typename T>
void ms_deform_attn(const std::vector<Address>& p, const Sizes& shapes, const Sizes& s) {
  const auto a = attn_arguments<T>(p, shapes, s);
  parallel(a.n * a.q * a.m, grain, [&](int64_t b, int64_t e) { of<T>().ms_deform_attn(a, b, e); });
}

template <typename T>
void ms_deform_attn_backward(const std::vector<Address>& p, const Sizes& shapes, const Sizes& s, int64_t threads) {
  const auto a = attn_arguments<T>(p, shapes, s);
  const int64_t strips = divided(threads, std::max<int64_t>(a.n, 1));
  parallel(a.n * strips, 1, [&](int64_t b, int64_t e) { of<T>().ms_deform_attn_backward(a, strips, b, e); });
}

template <typename T>
Columns<T> columns_arguments(const std::vector<Address>& p, const Sizes& s, const Sizes& w) {
  return {pointer<T>(p[0]), pointer<T>(p[1]), pointer<T>(p[2]), pointer<T>(p[3]), pointer<T>(p[4]), pointer<T>(p[5]),
          pointer<T>(p[6]), pointer<T>(p[7]), s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8],
          {w[0], w[1]},     {w[2], w[3]},     {w[4], w[5]},     {w[6], w[7]}};
}

template <typename T>
void columns(const std::vector<Address>& p, const Sizes& s, const Sizes& window) {
  const auto a = columns_arguments<T>(p, s, window);
  parallel(a.count, grain, [&](int64_t b, int64_t e) { of<T>().columns(a, b, e); });
}

template <typename T>
void columns_backward(const std::vector<Address>& p, const Sizes& s, const Sizes& window, int64_t threads) {
  const auto a = columns_arguments<T>(p, s, window);
  if (!a.count) return;
  const int64_t places = a.out_height * a.out_width;  // only the images that the given places belong to are divided
  const Division cut = divide((a.first + a.count - 1) / places - a.first / places + 1, a.groups, a.d, threads);
  parallel(a.count, grain, [&](int64_t b, int64_t e) { of<T>().columns_points(a, b, e); });
  parallel(cut.units, 1, [&](int64_t b, int64_t e) { of<T>().columns_maps(a, cut, b, e); });
}

template <typename T>
void transpose(const std::vector<Address>& p, const Sizes& s) {
  const Transpose<T> a = {pointer<T>(p[0]), pointer<T>(p[1]), s[0], s[1], s[2], s[3]};
  parallel(a.n * divided(a.rows, Transpose<T>::block), 1, [&](int64_t b, int64_t e) { of<T>().transpose(a, b, e); });
}

template <typename T>
LocalAttn<T> local_arguments(const std::vector<Address>& p, const Sizes& s, double scale) {
  return {pointer<T>(p[0]), pointer<T>(p[1]),  pointer<T>(p[2]),  pointer<T>(p[3]),  pointer<T>(p[4]), pointer<T>(p[5]),
          pointer<T>(p[6]), pointer<T>(p[7]),  pointer<T>(p[8]),  pointer<T>(p[9]),  pointer<T>(p[10]),
          pointer<T>(p[11]), pointer<T>(p[12]), s[0], s[1], s[2], s[3], s[4], {s[5], s[6]}, s[7], T(scale)};
}

template <typename T>
void local_attn(const std::vector<Address>& p, const Sizes& s, double scale) {
  const auto a = local_arguments<T>(p, s, scale);
  parallel(a.b * a.height * a.width * a.m, grain, [&](int64_t b, int64_t e) { of<T>().local_attn(a, b, e); });
}

template <typename T>
void local_attn_backward(const std::vector<Address>& p, const Sizes& s, double scale, int64_t threads) {
  const auto a = local_arguments<T>(p, s, scale);
  const Division cut = divide(a.b, a.m, a.d, threads);
  if (!cut.whole)
    parallel(a.b * a.height * a.width * a.m, grain, [&](int64_t b, int64_t e) { of<T>().local_attn_points(a, b, e); });
  parallel(cut.units, 1, [&](int64_t b, int64_t e) { of<T>().local_attn_maps(a, cut, b, e); });
}

void resize_argmax(const std::vector<Address>& p, const Sizes& s, bool corners) {
  constexpr int64_t rows = 64, group = 16, values = 24576;  // two lines of a block have 192 KiB at most, or one group
  const int64_t fit = std::clamp<int64_t>(values / std::max<int64_t>(s[1], 1), group, 512) / group * group;
  const ResizeArgmax a = {pointer<const float>(p[0]), pointer<void>(p[1]), pointer<float>(p[2]), s[0], s[1], s[2],
                          s[3], s[4], s[5], s[6], s[7], corners, rows, fit};
  parallel(a.n * divided(a.out_h, rows) * divided(a.out_w, fit), 1,
           [&](int64_t b, int64_t e) { kernels->resize_argmax(a, b, e); });
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Kernels for the CPU: addresses of contiguous arrays, in the order of csrc/arguments.h, and sizes.";
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  use_instruction_set("");
  module.def("use_instruction_set", &use_instruction_set, "Use the instruction set of that name, or the best one; returns its name.");
  module.def("instruction_set", [] { return instruction_set; });
#define DEFINE(type, suffix)                                                                 \
  module.def("ms_deform_attn_" suffix, &ms_deform_attn<type>, Unlocked());                   \
  module.def("ms_deform_attn_backward_" suffix, &ms_deform_attn_backward<type>, Unlocked()); \
  module.def("columns_" suffix, &columns<type>, Unlocked());                                 \
  module.def("columns_backward_" suffix, &columns_backward<type>, Unlocked());               \
  module.def("transpose_" suffix, &transpose<type>, Unlocked());                             \
  module.def("local_attn_" suffix, &local_attn<type>, Unlocked());                           \
  module.def("local_attn_backward_" suffix, &local_attn_backward<type>, Unlocked());
  DEFINE(float, "f32")
  DEFINE(double, "f64")
  module.def("resize_argmax_f32", &resize_argmax, Unlocked());
}
