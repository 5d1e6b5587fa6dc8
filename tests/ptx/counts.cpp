#include "counts.h"

#include <algorithm>
#include <set>

namespace ptx {

void Counts::touch(const std::string& opcode, uint64_t address, uint64_t bytes) {
  if (!traffic) return;
  Sectors& sectors = opcode.rfind("st.", 0) == 0 ? writes : reads;
  for (uint64_t sector = address / 32; sector <= (address + bytes - 1) / 32; ++sector) {
    sectors.launch.insert(sector), sectors.block.insert(sector);
  }
}

void Counts::global(const std::string& opcode, const std::vector<Access>& lanes) {
  Count& count = memory[opcode];
  std::set<uint64_t> sectors;
  for (const Access& a : lanes) {
    for (uint64_t sector = a.address / 32; sector <= (a.address + a.bytes - 1) / 32; ++sector) sectors.insert(sector);
    touch(opcode, a.address, a.bytes);
    count.bytes += a.bytes;
  }
  ++count.requests;
  count.sectors += sectors.size();
  count.ideal += (lanes.size() * lanes[0].bytes + 31) / 32;
}

void Counts::shared(const std::string& opcode, const std::vector<Access>& lanes) {
  Count& count = memory[opcode];
  const int group = lanes[0].bytes >= 16 ? 8 : lanes[0].bytes >= 8 ? 16 : 32;
  ++count.requests;
  for (int begin = 0; begin < 32; begin += group) {
    std::set<uint64_t> banks[32];
    for (const Access& a : lanes) {
      if (a.lane < begin || a.lane >= begin + group) continue;
      for (uint64_t word = a.address / 4; word <= (a.address + a.bytes - 1) / 4; ++word) banks[word % 32].insert(word);
      count.bytes += a.bytes;
    }
    size_t most = 0;
    for (const auto& bank : banks) most = std::max(most, bank.size());
    count.wavefronts += most;
    count.ideal += most > 0;
  }
}

}  // namespace ptx
