// Loaded by NVTX in place of a profiler: prints the names of the ranges that are pushed, and a line per pop.
#include <nvtx3/nvToolsExt.h>

#include <cstdio>

namespace {
int push(const char* name) {
  std::printf("push %s\n", name);
  std::fflush(stdout);
  return 0;
}
int pop() {
  std::puts("pop");
  std::fflush(stdout);
  return 0;
}
}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table) {
  const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(get_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable functions = nullptr;
  unsigned count = 0;
  if (!callbacks || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &functions, &count)) return 0;
  if (count <= NVTX_CBID_CORE_RangePop) return 0;
  *functions[NVTX_CBID_CORE_RangePushA] = reinterpret_cast<NvtxFunctionPointer>(&push);
  *functions[NVTX_CBID_CORE_RangePop] = reinterpret_cast<NvtxFunctionPointer>(&pop);
  return 1;
}
