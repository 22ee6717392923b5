// A launch: blocks in the order of the seed, some of them alive at a time, one fibre per thread.
#include "emulation/engine.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>

#include "emulation/state.hpp"

namespace moeyard::emulation {

Options options;
Launch launch;
constinit thread_local const ThreadView* current = nullptr;
dim3 block_dim, grid_dim;

Thread* running() { return const_cast<Thread*>(static_cast<const Thread*>(current)); }

void go_on_with(Thread* thread) {
  Thread* const self = running();
  if (thread == self) return;
  current = thread;
  switch_to(self ? self->fibre : launch.home, thread ? thread->fibre : launch.home, self && self->state == State::left);
}

void stop(const Failure& failure) {
  launch.failure = failure;
  go_on_with(nullptr);
  std::abort();
}

void wait() {
  Thread* const next = next_ready();
  if (!next) stop({.thread = running(), .what = "divergence: no thread can go on", .show_threads = true});
  go_on_with(next);
}

void fail(const char* what, Location where) {
  if (!current) throw std::runtime_error(std::string("outside of a kernel: ") + what);
  stop({.thread = running(), .what = what, .where = where});
}

void check_aligned(const void* pointer, size_t bytes, Location where) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("misaligned access", where);
}

namespace {

void poisoned_array(SharedArray& array, const void* key, size_t bytes) {
  array.key = key;
  if (posix_memalign(&array.data, 16, bytes) != 0) fail("no memory for a shared array", {});
  // Not memset, which ThreadSanitizer would see.
  for (volatile char* p = static_cast<char*>(array.data); p < static_cast<char*>(array.data) + bytes; ++p)
    *p = char(options.poison);
}

// An exception of the kernel ends here: nothing unwinds past the foot of a stack.
void call_kernel() {
  static thread_local char text[256];
  try {
    launch.kernel(launch.arguments);
    return;
  } catch (const std::exception& e) {
    std::strncpy(text, e.what(), sizeof text - 1);
  } catch (...) {
    std::strncpy(text, "an exception", sizeof text - 1);
  }
  fail(text, {});
}

// The foot of every fibre.
void run_thread() {
  entered(launch.home);
  acquire(&launch.begin_sync);
  call_kernel();
  release(&launch.end_sync);
  Thread* const self = running();
  leave(self);
  if (self->block->alive == 0) go_on_with(nullptr);
  wait();
  std::abort();
}

/// As whom ThreadSanitizer sees thread `i` of `n`. Threads that work with each other are often a power of two apart:
/// those do not share an identity.
void identify(Thread* const* slots, unsigned i, unsigned n) {
  const unsigned identities = options.identities ? options.identities : n;
  const std::string name = identities < n ? name_of_block(*slots[i]) : name_of(*slots[i]);
  run_as(slots[i]->fibre, slots[(i + i / identities) % identities]->fibre, name.c_str());
}

void start_block(Block& block, uint64_t number, Thread* const* slots) {
  const unsigned n = block_dim.x * block_dim.y * block_dim.z;
  block = Block();
  block.alive = n;
  block.threads.assign(slots, slots + n);
  block.warps.resize((n + kLanes - 1) / kLanes);
  for (unsigned i = 0; i < n; ++i) {
    Thread& thread = *slots[i];
    thread.block = &block;
    thread.block_index = {unsigned(number % grid_dim.x), unsigned(number / grid_dim.x % grid_dim.y),
                          unsigned(number / grid_dim.x / grid_dim.y)};
    thread.index = {i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y};
    thread.lane = i % kLanes;
    thread.warp = i / kLanes;
    Warp& warp = block.warps[thread.warp];
    warp.lanes[thread.lane] = &thread;
    warp.born = warp.alive |= 1u << thread.lane;
    if (has_identities()) identify(slots, i, n);
    prepare(thread.fibre, &run_thread, (i * 5 % 61) * 64 + (i / 61 % 4) * 4096);
  }
  for (unsigned i = 0; i < n; ++i) make_ready(slots[is_backward() ? n - 1 - i : i]);
}

// Sanitizers name the line; this names the thread.
void tell_where() {
  if (current) std::fprintf(stderr, "in %s of a kernel\n", name_of(*current).c_str());
}

void free_arrays(Block& block) {
  for (SharedArray& array : block.arrays) std::free(array.data);
}

std::vector<uint64_t> block_order(uint64_t blocks) {
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = is_backward() ? blocks - 1 - i : i;
  if (is_shuffled())
    for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_below(unsigned(i))]);
  return order;
}

/// Runs until a block has ended, and gives it; nullptr when something has failed.
Block* run_until_one_ends(std::vector<Block>& resident) {
  if (Thread* const next = next_ready()) {
    go_on_with(next);
  } else {  // one block has ended, and all others are stuck
    for (const Block& block : resident)
      if (block.alive) launch.failure = {block.threads[0], "divergence: no thread can go on", "", true};
  }
  if (launch.failure.thread) return nullptr;
  return &*std::find_if(resident.begin(), resident.end(),
                        [](const Block& b) { return !b.threads.empty() && !b.alive; });
}

/// Several cost ThreadSanitizer too much, unless each is one thread to it: a barrier takes it time for every identity.
unsigned blocks_at_a_time() {
  if (options.resident_blocks) return options.resident_blocks;
  return (has_identities() ? options.identities == 1 : is_shuffled()) ? 3 : 1;
}

void run_blocks(uint64_t blocks) {
  const unsigned n = block_dim.x * block_dim.y * block_dim.z;
  const auto order = block_order(blocks);
  std::vector<Block> resident(size_t(std::min<uint64_t>({blocks_at_a_time(), kMaxResident, blocks})));
  while (launch.slots.size() < n * resident.size()) {
    launch.slots.push_back(new Thread());
    launch.slots.back()->fibre = make_fibre();
  }
  release(&launch.begin_sync);  // here, where the slots are there: kernels read their indices
  uint64_t started = 0, ended = 0;
  for (Block& block : resident) {
    start_block(block, order[started], &launch.slots[started * n]);
    ++started;
  }
  while (ended < blocks) {
    Block* const block = run_until_one_ends(resident);
    if (!block) break;
    ++ended;
    acquire(&launch.end_sync);
    free_arrays(*block);
    const size_t at = size_t(block - resident.data());
    *block = Block();
    if (started < blocks) start_block(*block, order[started++], &launch.slots[at * n]);
  }
  if (!launch.failure.thread) return;
  const std::string text = describe(launch.failure);
  acquire(&launch.end_sync);
  for (Block& block : resident) free_arrays(block);
  // Their fibres stand in the middle of the kernel.
  for (Thread* thread : launch.slots) {
    destroy(thread->fibre);
    delete thread;
  }
  launch.slots.clear();
  throw std::runtime_error(text);
}

}  // namespace

void* shared_array(const void* key, size_t bytes) {
  Block& block = *running()->block;
  for (unsigned i = 0; i < block.array_count; ++i) {
    if (block.arrays[i].key != key) continue;
    acquire(&block.shared_sync);
    return block.arrays[i].data;
  }
  if (block.array_count == kMaxSharedArrays) fail("more than 16 shared arrays", {});
  // cu_launch asks CUDA for more than 48 KiB by the dynamic part alone, from 32 KiB on.
  if (key != &launch.shared_bytes) block.static_bytes += bytes;
  if (launch.shared_bytes > 0 && block.static_bytes > 16 * 1024)
    fail("more than 16 KiB of static arrays beside dynamic shared memory", {});
  SharedArray& array = block.arrays[block.array_count++];
  poisoned_array(array, key, bytes);
  release(&block.shared_sync);
  return array.data;
}

void* dynamic_shared() { return shared_array(&launch.shared_bytes, launch.shared_bytes); }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(void*), void* arguments) {
  static std::mutex one_at_a_time;
  if (current) throw std::runtime_error("a launch inside a kernel");
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMaxBlockThreads || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("kernel launch: invalid configuration");
  if (shared_bytes > 227 * 1024) throw std::runtime_error("kernel launch: more than 227 KiB of dynamic shared memory");
  const std::lock_guard lock(one_at_a_time);
  launch.kernel = kernel;
  launch.arguments = arguments;
  launch.shared_bytes = shared_bytes;
  launch.failure = {};
  block_dim = block;
  grid_dim = grid;
  adopt_thread(launch.home);
  on_death(&tell_where);
  start_schedule();
  run_blocks(blocks);
}

}  // namespace moeyard::emulation
