// Most of the time of a large output that was never touched goes into page faults, one per 4 KiB: 200 MB cost 80 to
// 100 ms that way and a quarter of it in pages of 2 MiB, which Linux gives on request.
#pragma once
#include <cstdint>

namespace moeyard {

/// Asks for huge pages for what lies whole inside [memory, memory + bytes); small ranges and systems without are left
/// alone. Only a hint: nothing is read, written or made resident.
void advise_huge_pages(void* memory, int64_t bytes);

}  // namespace moeyard
