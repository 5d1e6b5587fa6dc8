// Matrices of a warp: ldmatrix, mma and mma.sp, each lane's share as the PTX manual's fragments have it
// ("Matrix Fragments for mma.m16n8k16 with floating point type", "... for sparse mma.m16n8k32").
#include <memory>

#include "half.h"
#include "meaning.h"

namespace ptx {
namespace {

// Every 16 bits as a number.
struct Table {
  explicit Table(bool bfloat) {
    for (uint32_t bits = 0; bits < 65536; ++bits) value[bits] = from_half(static_cast<uint16_t>(bits), bfloat);
  }
  double value[65536];
};
const double* numbers(bool bfloat) {
  static const auto half = std::make_unique<Table>(false), brain = std::make_unique<Table>(true);
  return bfloat ? brain->value : half->value;
}

// ldmatrix.sync.aligned.m8n8.xN{.trans}.shared.b16: lanes 8 i to 8 i + 7 name the rows of matrix i; a lane gets two
// neighbouring elements, 2 (lane % 4) on, of row lane / 4; with .trans of the matrix turned.
void ldmatrix(Step& s) {
  const std::vector<Operand>& to = s.in.operands.at(0).parts;
  const Addresses rows(s, s.in.operands.at(1));
  const bool turned = s.in.has("trans");
  std::vector<Access> lanes;
  uint16_t element[4][8][8];
  for (size_t m = 0; m < to.size(); ++m) {
    for (size_t r = 0; r < 8; ++r) {
      const int lane = s.lane = static_cast<int>(8 * m + r);
      const auto at = static_cast<uint32_t>(rows[lane]);
      const uint8_t* row = s.block.shared.read(at, 16, 16, ~0ull, s.toucher(lane));
      for (size_t i = 0; i < 8; ++i) element[m][r][i] = static_cast<uint16_t>(row[2 * i] | row[2 * i + 1] << 8);
      lanes.push_back({lane, at, 16});
    }
  }
  s.machine.counts.shared(s.in.opcode, lanes);
  for (size_t m = 0; m < to.size(); ++m) {
    uint64_t* d = result(s, to[m]);
    for_lanes(s, [&](int lane) {
      const int group = lane / 4, first = 2 * (lane % 4);
      const uint32_t low = turned ? element[m][first][group] : element[m][group][first];
      const uint32_t high = turned ? element[m][first + 1][group] : element[m][group][first + 1];
      d[lane] = low | high << 16;
    });
  }
}

void check_ldmatrix(Step& s) {
  if (s.in.operands.at(0).parts.size() != static_cast<size_t>(s.in.words[4][1] - '0'))
    throw Fault("registers of ldmatrix");
  ldmatrix(s);
}

constexpr int kRows = 16, kColumns = 8;

// b0, b1, ...: column lane / 4, rows 2 (lane % 4) and the next, eight more for every further register.
template <int kDepth>
void read_b(Step& s, double (&b)[kDepth][kColumns]) {
  const double* number = numbers(s.in.has("bf16"));
  const std::vector<Operand>& from = s.in.operands.at(2).parts;
  if (from.size() != kDepth / 8) throw Fault("registers of b");
  for (size_t r = 0; r < from.size(); ++r) {
    const Values v(s, from[r]);
    for_lanes(s, [&](int lane) {
      for (int i = 0; i < 2; ++i) {
        b[lane % 4 * 2 + i + 8 * static_cast<int>(r)][lane / 4] = number[v[lane] >> (16 * i) & 0xFFFF];
      }
    });
  }
}

// c and d: row lane / 4 and, in c2 and c3, eight more; columns 2 (lane % 4) and the next.
void add_to_c(Step& s, const double (&product)[kRows][kColumns]) {
  const std::vector<Operand>&d = s.in.operands.at(0).parts, &c = s.in.operands.at(3).parts;
  if (d.size() != 4 || c.size() != 4) throw Fault("registers of c and d");
  float sums[4][32];
  for (size_t r = 0; r < 4; ++r) {
    const Values v(s, c[r]);
    for_lanes(s, [&](int lane) {
      const double p = product[lane / 4 + (r < 2 ? 0 : 8)][lane % 4 * 2 + static_cast<int>(r % 2)];
      sums[r][lane] = static_cast<float>(p + static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(v[lane]))));
    });
  }
  for (size_t r = 0; r < 4; ++r) {
    uint64_t* to = result(s, d[r]);
    for_lanes(s, [&](int lane) { to[lane] = std::bit_cast<uint32_t>(sums[r][lane]); });
  }
}

void mma_m16n8k16(Step& s) {
  const double* number = numbers(s.in.has("bf16"));
  const std::vector<Operand>& from = s.in.operands.at(1).parts;
  if (from.size() != 4) throw Fault("registers of a");
  double a[kRows][16], b[16][kColumns], product[kRows][kColumns] = {};
  // a0..a7: rows lane / 4, or eight more for a2, a3, a6, a7; columns 2 (lane % 4) and the next, eight more from a4 on.
  for (int i = 0; i < 8; ++i) {
    const Values v(s, from[static_cast<size_t>(i / 2)]);
    const bool upper = (i >= 0 && i < 2) || (i >= 4 && i < 6);
    for_lanes(s, [&](int lane) {
      const int row = lane / 4 + (upper ? 0 : 8), column = lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a[row][column] = number[v[lane] >> (16 * (i & 1)) & 0xFFFF];
    });
  }
  read_b(s, b);
  for (int row = 0; row < kRows; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < kColumns; ++column) product[row][column] += a[row][k] * b[k][column];
  add_to_c(s, product);
}

// Of every four neighbouring columns of a row of a, two are there. Which, says the metadata: four bits for each four,
// two for each number, the first the lower and the smaller one. The lanes that hold it are a pair of each four, which
// the selector names: the first for columns 0 to 15, the second for 16 to 31, each in its lower half for row lane / 4
// and in its upper half for the row eight below.
void mma_sp_m16n8k32(Step& s) {
  const double* number = numbers(s.in.has("bf16"));
  const std::vector<Operand>& from = s.in.operands.at(1).parts;
  const Values metadata(s, s.in.operands.at(4));
  const uint64_t selector = s.in.operands.at(5).number;
  if (from.size() != 4) throw Fault("registers of a");
  if (selector > 1) throw Fault("a sparsity selector of more than 1");
  double b[32][kColumns], product[kRows][kColumns] = {};
  read_b(s, b);
  for (int r = 0; r < 4; ++r) {
    const Values v(s, from[static_cast<size_t>(r)]);
    for_lanes(s, [&](int lane) {
      const int row = lane / 4 + (r % 2 ? 8 : 0), four = lane % 4 + (r < 2 ? 0 : 4);  // columns 4 four to 4 four + 3
      const int holder = lane / 4 * 4 + 2 * static_cast<int>(selector) + four / 4;
      const uint64_t which = metadata[holder] >> (row / 8 * 16 + four % 4 * 4) & 15;
      const uint64_t first = which & 3, second = which >> 2;
      if (first >= second) throw Fault("metadata of mma.sp that names no two columns in order");
      for (int i = 0; i < 2; ++i) {
        const double value = number[v[lane] >> (16 * i) & 0xFFFF];
        const auto k = static_cast<size_t>(four) * 4 + (i ? second : first);
        for (int column = 0; column < kColumns; ++column) product[row][column] += value * b[k][column];
      }
    });
  }
  add_to_c(s, product);
}

}  // namespace

Meaning products(const Instruction& in) {
  const auto is = [&](const std::string& shape, const std::string& name) {
    return in.opcode == name + ".sync.aligned." + shape + ".row.col.f32.f16.f16.f32" ||
           in.opcode == name + ".sync.aligned." + shape + ".row.col.f32.bf16.bf16.f32";
  };
  if (is("m16n8k16", "mma")) return mma_m16n8k16;
  if (is("m16n8k32", "mma.sp::ordered_metadata")) return mma_sp_m16n8k32;
  for (const char* number : {"x1", "x2", "x4"}) {
    const std::string head = std::string("ldmatrix.sync.aligned.m8n8.") + number;
    if (in.opcode == head + ".shared.b16" || in.opcode == head + ".trans.shared.b16") return check_ldmatrix;
  }
  return nullptr;
}

}  // namespace ptx
