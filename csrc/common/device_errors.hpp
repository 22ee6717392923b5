// What a kernel cannot throw: it treats a bad value as absent, adds its kind to one sticky word of the device, and
// moeyard.check_device_errors() tells of it later (python/moeyard/ops/_device_errors.py holds the texts).
#pragma once

namespace moeyard::cuda {

enum DeviceError : unsigned {
  kBadForcedId = 1,
  kRepeatedForcedId = 2,
  kNanBias = 4,
  kBadExpertId = 8,
  kBadPlan = 16,
  kBadGatingId = 32,
  kBadSegmentId = 64,
  kBadSegmentPtr = 128,
  kShortTotal = 256,
  kSegmentsOverlap = 512,
  kBadBatch = 1024,
  kBadGraphPtr = 2048,
  kPointNotFinite = 4096,
  kBadCell = 8192,
  kPointTooFar = 16384,
  kTooManyImages = 32768,
  kPointsTooDistant = 65536,
  kUnsortedEdges = 131072,
};

/// The word of `device`, for kernels to atomicOr into. Zero at first; asking for it allocates nothing.
unsigned* device_errors(int device);
/// Waits for `device`, then gives its word and clears it; 0 without waiting where nobody has asked for the word.
unsigned take_device_errors(int device);

}  // namespace moeyard::cuda
