// The text of an error: block, thread, line, and what the other threads of the block do.
#include <cstdio>
#include <map>

#include "emulation/state.hpp"

namespace moeyard::emulation {
namespace {

std::string at(const Location& where) { return std::string(where.file) + ":" + std::to_string(where.line); }

std::string coordinates(uint3 i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

std::string doing(const Thread& thread) {
  if (thread.state == State::left) return "left the kernel";
  if (thread.state == State::ready) return "ready";
  std::string text = std::string("waits in ") + thread.waits_in;
  if (thread.state == State::in_collective) {
    char mask[32];
    std::snprintf(mask, sizeof mask, "(mask 0x%08x)", thread.mask);
    text += mask;
  }
  return text + " at " + at(thread.where);
}

/// "0-31 40": numbers of threads, ascending.
class Ranges {
 public:
  void add(unsigned i) {
    if (!ranges_.empty() && ranges_.back().second + 1 == i)
      ranges_.back().second = i;
    else
      ranges_.push_back({i, i});
  }
  std::string text() const {
    std::string text;
    for (size_t i = 0; i < ranges_.size() && i < 12; ++i) {
      text += " " + std::to_string(ranges_[i].first);
      if (ranges_[i].second != ranges_[i].first) text += "-" + std::to_string(ranges_[i].second);
    }
    return ranges_.size() > 12 ? text + " ..." : text;
  }

 private:
  std::vector<std::pair<unsigned, unsigned>> ranges_;
};

}  // namespace

std::string name_of_block(const ThreadView& thread) { return "block " + coordinates(thread.block_index); }
std::string name_of(const ThreadView& thread) { return name_of_block(thread) + " thread " + coordinates(thread.index); }

std::string describe(const Failure& failure) {
  const Thread& thread = *failure.thread;
  std::string text = name_of(thread) + ": " + failure.what + failure.name;
  if (failure.where.line != 0) text += " at " + at(failure.where);
  if (!failure.show_threads) return text;
  std::map<std::string, Ranges> threads;
  for (unsigned i = 0; i < thread.block->threads.size(); ++i) threads[doing(*thread.block->threads[i])].add(i);
  for (const auto& [what, who] : threads) text += "\n  threads" + who.text() + ": " + what;
  return text;
}

}  // namespace moeyard::emulation
