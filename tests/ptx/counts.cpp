#include "counts.h"

#include <algorithm>
#include <set>

namespace ptx {

void Counts::global(const std::string& opcode, const std::vector<Access>& lanes) {
  Count& count = memory[opcode];
  std::set<uint64_t> sectors;
  for (const Access& a : lanes) {
    for (uint64_t sector = a.address / 32; sector <= (a.address + a.bytes - 1) / 32; ++sector) sectors.insert(sector);
    count.bytes += a.bytes;
  }
  ++count.requests;
  count.sectors += sectors.size();
  count.ideal += (lanes.size() * lanes[0].bytes + 31) / 32;
}

void Counts::shared(const std::string& opcode, const std::vector<Access>& lanes) {
  Count& count = memory[opcode];
  const uint32_t bytes = lanes[0].bytes;
  const size_t group = bytes >= 16 ? 8 : bytes >= 8 ? 16 : 32;
  ++count.requests;
  for (size_t begin = 0; begin < lanes.size(); begin += group) {
    std::set<uint64_t> banks[32];
    for (size_t i = begin; i < std::min(begin + group, lanes.size()); ++i) {
      for (uint64_t word = lanes[i].address / 4; word <= (lanes[i].address + lanes[i].bytes - 1) / 4; ++word) {
        banks[word % 32].insert(word);
      }
      count.bytes += lanes[i].bytes;
    }
    size_t most = 0;
    for (const auto& bank : banks) most = std::max(most, bank.size());
    count.wavefronts += most;
    ++count.ideal;
  }
}

}  // namespace ptx
