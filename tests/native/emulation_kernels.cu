// Small kernels, right and wrong, for tests/native/test_emulation.py: `emulation_kernels CASE [SEED [POISON [RESIDENT
// [STRICT [IDENTITIES]]]]]` prints what the case computes, or the error; the case `right` is all the right ones. Those
// also compile for a GPU, and must print the same there.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <type_traits>

#include "common/device.cuh"

namespace {

using moeyard::cuda::cu_launch;
constexpr unsigned kAll = 0xffffffffu;

// ---- memory that both worlds read -------------------------------------------------------------------------------

template <class T>
class Array {
 public:
  explicit Array(size_t n) : n_(n) {
    void* p = nullptr;
#ifdef __CUDACC__
    moeyard::cuda::check(cudaMallocManaged(&p, n * sizeof(T)), "cudaMallocManaged");
#else
    if (posix_memalign(&p, 256, n * sizeof(T)) != 0) std::abort();
#endif
    data_ = static_cast<T*>(p);
    std::memset(p, 0, n * sizeof(T));
  }
  Array(const Array&) = delete;
  operator T*() { return data_; }

  void print(const char* name, size_t first, size_t count) {
#ifdef __CUDACC__
    moeyard::cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
#endif
    std::printf("%s:", name);
    for (size_t i = first; i < first + count; ++i) std::printf(" %lld", static_cast<long long>(data_[i]));
    std::printf("\n");
  }
  void print(const char* name) { print(name, 0, n_); }

 private:
  size_t n_;
  T* data_ = nullptr;
};

template <class... P, class... A>
void launch(void (*kernel)(P...), unsigned blocks, unsigned threads, A&&... arguments) {
  cu_launch(kernel, dim3(blocks), dim3(threads), 0, moeyard::cuda::Stream(nullptr), std::forward<A>(arguments)...);
}

// ---- warps ------------------------------------------------------------------------------------------------------

__global__ void shuffles(int* out) {
  const int lane = int(threadIdx.x);
  int row = 0;
  const auto put = [&](int value) { out[32 * row++ + lane] = value; };
  put(__shfl_sync(kAll, lane * 10, lane + 3));
  put(__shfl_sync(kAll, lane * 10, 5, 8));
  put(__shfl_xor_sync(kAll, lane, 1));
  put(__shfl_xor_sync(kAll, lane, 12, 8));
  put(__shfl_up_sync(kAll, lane, 3));
  put(__shfl_up_sync(kAll, lane, 2, 8));
  put(__shfl_down_sync(kAll, lane, 5));
  put(__shfl_down_sync(kAll, lane, 3, 8));
  put(int(__shfl_xor_sync(kAll, lane + 0.5, 2) * 2));
  put(int(__shfl_sync(kAll, (1ll << 40) + lane, 7) >> 38));
  put(int(__shfl_sync(kAll, -float(lane), 31)));
  if (lane % 2 == 0) out[32 * row + lane] = __shfl_xor_sync(0x55555555u, lane, 2);
}

__global__ void votes(int* out) {
  const int lane = int(threadIdx.x);
  int row = 0;
  const auto put = [&](unsigned value) { out[32 * row++ + lane] = int(value); };
  put(__ballot_sync(kAll, lane % 3 == 0));
  put(unsigned(__any_sync(kAll, lane == 9)));
  put(unsigned(__any_sync(kAll, lane > 31)));
  put(unsigned(__all_sync(kAll, lane < 32)));
  put(unsigned(__all_sync(kAll, lane != 9)));
  put(__match_any_sync(kAll, lane % 4));
  put(__match_any_sync(kAll, (1ull << 40) * unsigned(lane % 2)));
  put(unsigned(__reduce_add_sync(kAll, lane - 16)));
  put(__reduce_add_sync(kAll, unsigned(lane)));
  put(unsigned(__reduce_min_sync(kAll, lane - 16)));
  put(__reduce_min_sync(kAll, unsigned(lane) - 16u));
  put(unsigned(__reduce_max_sync(kAll, lane - 16)));
  put(__reduce_max_sync(kAll, unsigned(lane) - 16u));
  // Four groups of eight lanes, each with its own mask, at one place.
  const unsigned group = 0xffu << (lane & ~7);
  put(__reduce_add_sync(group, unsigned(lane)));
  put(__ballot_sync(group, lane % 2));
}

// ---- blocks -----------------------------------------------------------------------------------------------------

__global__ void barriers(int* out) {
  CU_SHARED(int, values, [96]);
  const int i = int(threadIdx.x);
  values[i] = i;
  __syncthreads();
  out[i] = values[95 - i];
  out[96 + i] = __syncthreads_count(i % 3 == 0);
  out[192 + i] = __syncthreads_and(i < 96) * 4 + __syncthreads_and(i < 95) * 2 + __syncthreads_or(i == 50);
  out[288 + i] = __syncthreads_or(i > 95);
  for (int step = 1; step < 96; step *= 2) {  // inclusive sums
    const int before = i >= step ? values[i - step] : 0;
    __syncthreads();
    values[i] += before;
    __syncthreads();
  }
  out[384 + i] = values[i];
}

// Every thread tells where it stands: the linear numbers of block and thread, from indices and extents in 3-D.
__global__ void places(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] = int(1000 * block + thread);
}

// A tile per block through dynamic shared memory; rows of 33, so that columns meet no bank conflict.
__global__ void transpose(const int* in, int* out, int n) {
  CU_DYN_SHARED(int, tile);
  const int x = int(threadIdx.x), y = int(threadIdx.y), column = int(blockIdx.x) * 8, row = int(blockIdx.y) * 8;
  tile[y * 9 + x] = in[(row + y) * n + column + x];
  __syncthreads();
  out[(column + y) * n + row + x] = tile[x * 9 + y];
}

// ---- atomics and scalars ----------------------------------------------------------------------------------------

__global__ void atomics(int* a, unsigned* u, unsigned long long* w) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&a[0], i);
  atomicSub(&a[1], 2);
  atomicMin(&a[2], 5 - i);
  atomicMax(&a[3], i);
  atomicAdd(&u[0], 0x80000001u);
  atomicOr(&u[1], 1u << (i % 32));
  atomicAnd(&u[2], ~(1u << (i % 5)));
  atomicXor(&u[3], unsigned(i));
  atomicMin(&u[4], 0xffffff00u + unsigned(i));
  if (atomicExch(&u[5], 9u) == 0) atomicAdd(&u[6], 1u);
  if (atomicCAS(&u[7], 0u, unsigned(i) + 1u) == 0u) atomicAdd(&u[8], 1u);
  atomicAdd(&w[0], 1ull << 33);
  atomicMax(&w[1], 1ull << (i % 40));
}

__global__ void scalars(int* out) {
  int* p = out;
  *p++ = __popc(0xf0f0u);
  *p++ = __popcll(0xf0f0f0f0f0ull);
  *p++ = __ffs(0x50);
  *p++ = __ffs(0);
  *p++ = __clz(1);
  *p++ = __clz(0);
  *p++ = int(__brev(6u));
  *p++ = int(__umulhi(0x80000000u, 6u));
  *p++ = __float_as_int(1.0f);
  *p++ = int(__int_as_float(0x40400000));
  *p++ = min(3, -4) + max(3, -4);
  *p++ = int(min(__int_as_float(0x7fc00000), 2.0f));  // a NaN loses
  const uint4 v = make_uint4(1, 2, 3, 4);
  *p++ = int(v.x + 10 * v.y + 100 * v.z + 1000 * v.w);
  const float2 f = make_float2(0.5f, 2.0f);
  *p++ = int(f.x * 4 + f.y);
  *p++ = int(sizeof(uint2) + 100 * sizeof(float3) + 10000 * sizeof(int4));
  *p++ = int(alignof(uint2) + 100 * alignof(float3) + 10000 * alignof(int4));
  *p++ = moeyard::cuda::narrow<moeyard::bf16>(1.00390625f).bits;  // halfway: to even
  *p++ = moeyard::cuda::narrow<moeyard::bf16>(1.01171875f).bits;
  *p++ = moeyard::cuda::narrow<moeyard::f16>(65519.0f).bits;
  *p++ = moeyard::cuda::narrow<moeyard::f16>(1e-7f).bits;
  *p++ = int(moeyard::cuda::widen(moeyard::f16{0x4248}) * 1000);
  *p++ = int(moeyard::cuda::narrow<double>(moeyard::cuda::widen(2.5)) * 2);
}

__global__ void streaming(const uint4* in, uint4* out) {
  const uint4 v = moeyard::cuda::load_streaming(in + threadIdx.x);
  moeyard::cuda::store_streaming(out + threadIdx.x, make_uint4(v.w, v.z, v.y, v.x));
}

// ---- wrong on purpose -------------------------------------------------------------------------------------------

#ifndef __CUDACC__

__global__ void shared_at_first(unsigned* out) {
  CU_SHARED(unsigned, fixed, [2]);
  CU_DYN_SHARED(unsigned, dynamic);
  if (threadIdx.x == 0) {
    out[2 * blockIdx.x] = fixed[1];
    out[2 * blockIdx.x + 1] = dynamic[0];
    fixed[1] = dynamic[0] = 7;
  }
}

__global__ void missing_barrier(int* out) {
  CU_SHARED(int, value);
  if (threadIdx.x == 0) value = 5;
  out[threadIdx.x] = value;
}

__global__ void missing_syncwarp(int* out) {
  CU_SHARED(int, values, [32]);
  values[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void plain_add(int* out) {
  CU_SHARED(int, sum);
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  sum += 1;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__global__ void plain_add_between_blocks(int* out) {
  if (threadIdx.x == 0) *out += 1;
}

__global__ void wrong_mask(int* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, int(threadIdx.x), 1); }

__global__ void divergent_collective(int* out) {
  if (threadIdx.x < 20) out[threadIdx.x] = int(__ballot_sync(kAll, 1));
}

__global__ void divergent_branches(int* out) {
  if (threadIdx.x % 2)
    out[0] = __any_sync(kAll, 1);
  else
    out[1] = __any_sync(kAll, 0);
}

__global__ void divergent_barriers(int*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void barrier_after_exit(int*) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
}

__global__ void barrier_against_collective(int*) {
  if (threadIdx.x == 7)
    __syncthreads();
  else
    __syncwarp();
}

__global__ void static_out_of_bounds(int* out) {
  CU_SHARED(int, values, [32]);
  values[threadIdx.x + 1] = 1;
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void dynamic_out_of_bounds(int* out) {
  CU_DYN_SHARED(int, values);
  values[threadIdx.x] = 1;
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void global_out_of_bounds(int* out) { out[threadIdx.x * 2] = 1; }

__global__ void misaligned(char* out) {
  *reinterpret_cast<uint4*>(out + 16 * threadIdx.x + 4) = make_uint4(1, 2, 3, 4);
}

__global__ void misaligned_streaming(const char* in, uint4* out) {
  *out = moeyard::cuda::load_streaming(reinterpret_cast<const uint4*>(in + 8));
}

__global__ void undefined_shuffle(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, int(threadIdx.x), 20);
}

__global__ void much_static(int* out) {
  CU_SHARED(int, fixed, [4097]);
  fixed[threadIdx.x] = 1;
  out[threadIdx.x] = fixed[threadIdx.x];
}

__global__ void trap(int*) {
  if (threadIdx.x == 33) __trap();
}

__global__ void throws(int*) {
  if (threadIdx.x == 2) moeyard::fail_value("thrown by lane ", threadIdx.x);
}

__global__ void launches(int* out) { launch(trap, 1, 64, out); }

#endif

// ---- cases ------------------------------------------------------------------------------------------------------

const std::map<std::string, std::function<void()>> right_cases = {
    {"shuffles",
     [] {
       Array<int> out(12 * 32);
       launch(shuffles, 1, 32, out);
       for (size_t row = 0; row < 12; ++row) out.print(std::to_string(row).c_str(), 32 * row, 32);
     }},
    {"votes",
     [] {
       Array<int> out(15 * 32);
       launch(votes, 1, 32, out);
       for (size_t row = 0; row < 15; ++row) out.print(std::to_string(row).c_str(), 32 * row, 32);
     }},
    {"barriers",
     [] {
       Array<int> out(5 * 96);
       launch(barriers, 1, 96, out);
       for (size_t row = 0; row < 5; ++row) out.print(std::to_string(row).c_str(), 96 * row, 96);
     }},
    {"places",
     [] {
       Array<int> out(2 * 3 * 4 * 5 * 7 * 2);
       cu_launch(places, dim3(2, 3, 4), dim3(5, 7, 2), 0, moeyard::cuda::Stream(nullptr), out);
       out.print("places");
     }},
    {"transpose",
     [] {
       Array<int> in(32 * 32), out(32 * 32);
       for (int i = 0; i < 32 * 32; ++i) in[i] = i;
       cu_launch(transpose, dim3(4, 4), dim3(8, 8), 9 * 8 * sizeof(int), moeyard::cuda::Stream(nullptr), in, out, 32);
       out.print("transpose");
     }},
    {"atomics",
     [] {
       Array<int> a(4);
       Array<unsigned> u(9);
       Array<unsigned long long> w(2);
       u[2] = u[4] = 0xffffffffu;
       launch(atomics, 3, 64, a, u, w);
       a.print("int");
       u.print("unsigned", 0, 7);  // which thread comes first in u[7] is nobody's business
       u.print("swapped", 8, 1);
       w.print("wide");
     }},
    {"scalars",
     [] {
       Array<int> out(22);
       launch(scalars, 1, 1, out);
       out.print("scalars");
     }},
    {"streaming",
     [] {
       Array<unsigned> in(16), out(16);
       for (unsigned i = 0; i < 16; ++i) in[i] = i;
       launch(streaming, 1, 4, reinterpret_cast<uint4*>(static_cast<unsigned*>(in)),
              reinterpret_cast<uint4*>(static_cast<unsigned*>(out)));
       out.print("streaming");
     }},
};

#ifndef __CUDACC__

template <class Kernel>
std::function<void()> case_of(Kernel kernel, unsigned blocks, unsigned threads, size_t outputs, size_t shared = 0) {
  return [=] {
    Array<int> out(outputs);
    cu_launch(kernel, dim3(blocks), dim3(threads), shared, nullptr, out);
    out.print("out");
  };
}

const std::map<std::string, std::function<void()>> wrong_cases = {
    {"missing_barrier", case_of(missing_barrier, 1, 64, 64)},
    {"missing_syncwarp", case_of(missing_syncwarp, 1, 32, 32)},
    {"plain_add", case_of(plain_add, 2, 64, 2)},
    {"plain_add_between_blocks", case_of(plain_add_between_blocks, 8, 32, 1)},
    {"wrong_mask", case_of(wrong_mask, 1, 32, 32)},
    {"divergent_collective", case_of(divergent_collective, 1, 32, 32)},
    {"divergent_branches", case_of(divergent_branches, 1, 32, 32)},
    {"divergent_barriers", case_of(divergent_barriers, 1, 64, 1)},
    {"barrier_after_exit", case_of(barrier_after_exit, 1, 64, 1)},
    {"barrier_against_collective", case_of(barrier_against_collective, 3, 32, 1)},
    {"static_out_of_bounds", case_of(static_out_of_bounds, 1, 32, 32)},
    {"dynamic_out_of_bounds", case_of(dynamic_out_of_bounds, 1, 32, 32, 31 * sizeof(int))},
    {"global_out_of_bounds", case_of(global_out_of_bounds, 1, 32, 32)},
    {"undefined_shuffle", case_of(undefined_shuffle, 1, 32, 16)},
    {"trap", case_of(trap, 3, 64, 1)},
    {"throws", case_of(throws, 1, 32, 1)},
    {"launches", case_of(launches, 1, 32, 1)},
    {"too_many_threads", case_of(trap, 1, 1025, 1)},
    {"no_blocks", case_of(trap, 0, 32, 1)},
    {"too_much_shared", case_of(trap, 1, 32, 1, 228 * 1024)},
    {"much_static", case_of(much_static, 1, 32, 32, 4)},
    {"shared_at_first",
     [] {
       Array<unsigned> out(8);
       cu_launch(shared_at_first, dim3(4), dim3(32), 4, nullptr, out);
       out.print("out");
     }},
    {"misaligned",
     [] {
       Array<char> out(1024);
       launch(misaligned, 1, 4, out);
     }},
    {"misaligned_streaming",
     [] {
       Array<char> in(64);
       Array<uint4> out(1);
       launch(misaligned_streaming, 1, 1, in, out);
     }},
};
#endif

}  // namespace

#ifndef __CUDACC__
extern "C" void moeyard_emulation_set_options(unsigned seed, unsigned poison, unsigned resident_blocks, int strict_exit,
                                              unsigned identities);
#endif

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "";
  auto cases = right_cases;
#ifndef __CUDACC__
  cases.insert(wrong_cases.begin(), wrong_cases.end());
  const auto number = [&](int i, int otherwise) { return count > i ? std::atoi(arguments[i]) : otherwise; };
  moeyard_emulation_set_options(unsigned(number(2, 0)), unsigned(number(3, 255)), unsigned(number(4, 0)), number(5, 1),
                                unsigned(number(6, 0)));
#endif
  cases["right"] = [] {
    for (const auto& [title, run] : right_cases) {
      std::printf("%s\n", title.c_str());
      run();
    }
  };
  if (!cases.contains(name)) {
    for (const auto& [known, run] : cases) std::printf("%s\n", known.c_str());
    return 2;
  }
  try {
    cases.at(name)();
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  return 0;
}
