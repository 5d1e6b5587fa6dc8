// A kernel as PTX text says it: parameters, shared memory, registers and instructions, each bound to its meaning.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

// What a faulty kernel ends in.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Kind : uint8_t { none, predicate, bits, unsigned_, signed_, floating, bfloat };

// .u32, .f16x2, .pred: what is in a register, and how wide it is.
struct Type {
  Kind kind = Kind::none;
  int bits = 0;
  bool packed = false;  // two of `bits` in one register
  int bytes() const { return bits / 8; }
};

struct Operand {
  enum class Form : uint8_t { absent, reg, immediate, address, vector, sink } form = Form::absent;
  int reg = -1;                // the register; of an address the base, -1 where that is a number
  uint64_t number = 0;         // an immediate's bits, an address's offset, a branch's target
  std::vector<Operand> parts;  // {a, b, c}, d|p, and what stands in an address behind its base
};

struct Step;

struct Instruction {
  std::string opcode;              // ld.global.nc.v4.u32
  std::vector<std::string> words;  // ld, global, nc, v4, u32
  std::vector<Operand> operands;
  Type type, from;  // the last type of the opcode, and of two the last (cvt.f32.f16: f32, f16)
  int vector = 1;   // 4 of .v4
  int guard = -1;   // the predicate before it
  bool guard_negated = false;
  bool aligned = false;         // all threads of the warp execute it together
  uint64_t used_bytes = ~0ull;  // of what a load reads, by .pragma "used_bytes_mask"
  int join = -1;                // of a branch: where its two ways meet again
  int line = 0;                 // in the PTX file
  void (*execute)(Step&) = nullptr;

  bool has(const char* word) const;
};

struct Parameter {
  uint32_t offset, bytes;
};

struct Program {
  std::string name, target;  // the entry's mangled name; sm_90a
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t static_shared = 0;  // bytes of the static arrays, up to where the dynamic ones begin
  int most_threads = 1024;     // .maxntid
  int least_blocks = 0;        // .minnctapersm, 0 where it is not said
  std::vector<Instruction> code;
  std::map<std::string, int> registers;  // by name, the special ones (%tid.x) among them
  int register_count = 0;

  std::string text_of(const Instruction&) const;  // for reports
  std::vector<std::string> lines;                 // of the entry, from first_line on
  int first_line = 1;
};

// True where the text has an entry of this name.
bool has_entry(const std::string& text, const std::string& entry);
// Parses one entry. Throws a Fault for what it does not know: an opcode, a directive, a form of an operand.
Program parse(const std::string& text, const std::string& entry);

Type type_of(const std::string& word);           // Kind::none where it is no type
int architecture_of(const std::string& target);  // 90 of sm_90a

// Finds the join of every branch (joins.cpp).
void find_joins(Program&);

// The meaning of an opcode, null where there is none (access.cpp).
void (*meaning_of(const Instruction&))(Step&);

}  // namespace ptx
