// What stands for the CUDA runtime beyond launches, and how tests set the engine's options.
#include "common/device_errors.hpp"
#include "emulation/engine.hpp"

namespace moeyard::cuda {

static unsigned error_word;

unsigned* device_errors(int) { return &error_word; }
unsigned take_device_errors(int) { return __atomic_exchange_n(&error_word, 0u, __ATOMIC_RELAXED); }

}  // namespace moeyard::cuda

// Called through ctypes: the bindings stay those of the shipped module.
extern "C" __attribute__((visibility("default"))) void moeyard_emulation_set_options(unsigned seed, unsigned poison,
                                                                                     unsigned resident_blocks,
                                                                                     int strict_exit,
                                                                                     unsigned identities) {
  moeyard::emulation::options = {seed, static_cast<unsigned char>(poison), resident_blocks, strict_exit != 0,
                                 identities};
}
