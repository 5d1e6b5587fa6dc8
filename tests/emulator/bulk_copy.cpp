#include "bulk_copy.h"

#include <algorithm>
#include <cstring>

#include "async_copy.h"
#include "race.h"
#include "shared_memory.h"

namespace emulator {
namespace {

// What is in a TensorMap here. Dimensions are c, w, h, n; strides are those of w, h and n.
struct Map {
  const unsigned char* base;
  int64_t sizes[4], strides[3];
  int box[4];
  int element_bytes;
};
static_assert(sizeof(Map) <= sizeof(sepconv::cuda::TensorMap));

Map read_map(const sepconv::cuda::TensorMap& map) {
  Map m;
  memcpy(&m, &map, sizeof m);
  return m;
}

// Calls f(offset in the box, address or null where outside, bytes) for every run of channels, zeros after it included.
template <typename F>
void for_each_run(const BulkCopy& copy, F&& f) {
  const Map m = read_map(copy.map);
  const int64_t run_bytes = int64_t{m.box[0]} * m.element_bytes;
  int64_t offset = 0;
  for (int64_t n = copy.at[3]; n < copy.at[3] + m.box[3]; ++n)
    for (int64_t h = copy.at[2]; h < copy.at[2] + m.box[2]; ++h)
      for (int64_t w = copy.at[1]; w < copy.at[1] + m.box[1]; ++w, offset += run_bytes) {
        const bool inside = n >= 0 && n < m.sizes[3] && h >= 0 && h < m.sizes[2] && w >= 0 && w < m.sizes[1];
        const int64_t begin = std::clamp<int64_t>(copy.at[0], 0, m.sizes[0]);
        const int64_t end = std::clamp<int64_t>(copy.at[0] + m.box[0], 0, m.sizes[0]);
        if (!inside || begin == end) continue;
        f(offset + (begin - copy.at[0]) * m.element_bytes,
          m.base + n * m.strides[2] + h * m.strides[1] + w * m.strides[0] + begin * m.element_bytes,
          (end - begin) * m.element_bytes);
      }
}

Mbarrier& find(void* barrier, const char* what, Location at) {
  Thread& me = current();
  me.doing = what;
  me.at = at;
  shared_memory::check_range(barrier, 8, 8, what);
  race::access(me.linear, barrier, 8, false);  // ordered behind its initialisation?
  const auto found = block().mbarriers.find(barrier);
  if (found == block().mbarriers.end()) die(std::string(what) + ": nobody has initialised the mbarrier");
  return found->second;
}

void end_phase_if_complete(Mbarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.arrivals;
  b.ended = b.running;
  b.running = ++block().phases;
  wake_all(&b);
}

void land(Mbarrier& b) {
  for (const BulkCopy& copy : b.in_flight) {
    shared_memory::unpoison(copy.destination, copy.bytes);
    race::bulk_copy_ends(copy.destination, copy.bytes, b.running);
    memset(copy.destination, 0, copy.bytes);
    for_each_run(copy, [&](int64_t offset, const unsigned char* from, int64_t bytes) {
      memcpy(copy.destination + offset, from, bytes);
    });
    b.bytes -= copy.bytes;
  }
  b.in_flight.clear();
}

}  // namespace

void init_mbarrier(void* barrier, int arrivals, Location at) {
  current().doing = "mbarrier.init";
  current().at = at;
  shared_memory::check_range(barrier, 8, 8, "mbarrier.init");
  race::access(current().linear, barrier, 8, true);
  if (arrivals < 1) die("an mbarrier for no arrivals");
  Mbarrier& b = block().mbarriers[barrier];
  if (b.arrivals) die("an mbarrier is initialised twice");
  b.arrivals = b.pending = arrivals;
  b.running = ++block().phases;
  b.maker = current().linear;
}

void fence_mbarriers(Location) {
  for (auto& [_, b] : block().mbarriers) b.fenced |= b.maker == current().linear;
}

void fence_bulk_copies() {
  for (auto& [_, b] : block().mbarriers) b.readers.erase(current().linear);
}

void expect_bytes(void* barrier, int bytes, Location at) {
  Mbarrier& b = find(barrier, "mbarrier.arrive.expect_tx", at);
  if (b.pending == 0) die("more arrivals at an mbarrier than its phase has");
  --b.pending;
  b.bytes += bytes;
  end_phase_if_complete(b);
}

void wait_for_phase(void* barrier, int parity, Location at) {
  give_way();
  Mbarrier& b = find(barrier, "mbarrier.try_wait", at);
  while (static_cast<int>(b.phase & 1) == parity) {
    if (b.in_flight.empty()) {
      wait(&b, "waits for a phase of an mbarrier", at);
    } else {
      land(b);
      end_phase_if_complete(b);
    }
  }
  current().phases_seen.insert(b.ended);
  b.readers.insert(current().linear);
}

void copy_box(void* destination, const sepconv::cuda::TensorMap& map, int c, int w, int h, int n, void* barrier,
              Location at) {
  Mbarrier& b = find(barrier, "cp.async.bulk.tensor", at);
  if (!b.fenced) die("cp.async.bulk.tensor: no fence stands between the mbarrier's initialisation and this");
  if (!b.readers.empty()) die("cp.async.bulk.tensor: no fence.proxy.async stands between a thread's reads and this");
  const Map m = read_map(map);
  const auto bytes = static_cast<uint32_t>(m.box[0] * m.box[1] * m.box[2] * m.box[3] * m.element_bytes);
  const BulkCopy copy{static_cast<unsigned char*>(destination), map, {c, w, h, n}, bytes};
  shared_memory::check_range(destination, bytes, 128, "cp.async.bulk.tensor");
  for_each_run(copy, [](int64_t, const unsigned char* from, int64_t run) {
    check_global_read(from, static_cast<uint32_t>(run), 1);
  });
  race::access(current().linear, destination, bytes, true);
  race::copy_begins(destination, bytes);
  memset(destination, 0xFF, bytes);
  shared_memory::poison(destination, bytes);
  b.in_flight.push_back(copy);
}

}  // namespace emulator

// In the place of csrc/cuda/device/tensor_map.cpp, with the demands of the driver's manual.
namespace sepconv::cuda {

bool has_tensor_maps() { return true; }

cudaError_t make_tensor_map(TensorMap& map, DType dtype, const ImageBoxes& image) {
  emulator::Map m{};
  m.element_bytes = dtype == DType::float32 ? 4 : 2;
  m.base = static_cast<const unsigned char*>(image.data);
  const int64_t sizes[] = {image.C, image.W, image.H, image.N};
  const int64_t strides[] = {image.strides.w, image.strides.h, image.strides.n};
  bool fits = dtype != DType::float64 && reinterpret_cast<uintptr_t>(m.base) % 16 == 0 &&
              image.box_channels * m.element_bytes % 16 == 0 && image.box_channels <= 256 && image.box_columns <= 256;
  for (int i = 0; i < 4; ++i) {
    m.sizes[i] = sizes[i];
    fits &= sizes[i] > 0 && sizes[i] < int64_t{1} << 32;
    if (i == 0 || sizes[i] == 1) continue;
    m.strides[i - 1] = strides[i - 1] * m.element_bytes;
    fits &= m.strides[i - 1] > 0 && m.strides[i - 1] % 16 == 0 && m.strides[i - 1] < int64_t{1} << 40;
  }
  m.box[0] = image.box_channels, m.box[1] = image.box_columns, m.box[2] = m.box[3] = 1;
  memcpy(&map, &m, sizeof m);
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace sepconv::cuda
