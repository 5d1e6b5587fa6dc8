#include "program.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

namespace ptx {
namespace {

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%'; }

// Reads the statements of one entry.
class Parser {
 public:
  Parser(Program& program, const std::string& text, size_t begin, const std::map<std::string, uint32_t>& symbols)
      : program_(program), text_(text), at_(begin), symbols_(symbols) {
    line_ = 1 + static_cast<int>(std::count(text.begin(), text.begin() + static_cast<ptrdiff_t>(begin), '\n'));
  }

  void read() {
    program_.first_line = line_;
    parameters();
    while (peek() == '.') directive_of_entry();
    expect('{');
    open_scope(-1);
    scope_ = 0;
    while (scope_ >= 0) statement();
    resolve_labels();
    Instruction end;  // an entry without a last ret
    end.opcode = "ret", end.words = {"ret"}, end.line = line_, end.execute = meaning_of(end);
    program_.code.push_back(end);
  }

 private:
  struct Scope {
    int outer;
    std::map<std::string, int> registers, labels;
  };
  struct Pending {  // a branch whose label may still come
    size_t instruction;
    std::string label;
    int scope;
  };

  [[noreturn]] void fail(const std::string& what) const {
    throw Fault("PTX line " + std::to_string(line_) + ": " + what);
  }

  char peek() {
    for (; at_ < text_.size(); ++at_) {
      if (text_[at_] == '\n') {
        ++line_;
      } else if (text_.compare(at_, 2, "//") == 0) {
        at_ = text_.find('\n', at_) - 1;
      } else if (!std::isspace(static_cast<unsigned char>(text_[at_]))) {
        return text_[at_];
      }
    }
    fail("the text ends within an entry");
  }
  bool accept(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) fail(std::string("'") + c + "' expected, not '" + text_.substr(at_, 20) + "'");
  }
  std::string word(const char* also = "") {
    peek();
    const size_t begin = at_;
    while (at_ < text_.size() && (is_word(text_[at_]) || std::string(also).find(text_[at_]) != std::string::npos))
      ++at_;
    if (begin == at_) fail("a word expected, not '" + text_.substr(at_, 20) + "'");
    return text_.substr(begin, at_ - begin);
  }
  int number() { return std::atoi(word().c_str()); }

  void parameters() {
    expect('(');
    uint32_t offset = 0;
    while (!accept(')')) {
      uint32_t alignment = 0, bytes = 0, count = 1;
      if (word(".") != ".param") fail(".param expected");
      std::string next = word(".");
      for (; next[0] == '.'; next = word(".")) {
        if (next == ".align") {
          alignment = number();
        } else if (next == ".ptr" || next == ".global") {
        } else {
          bytes = type_of(next.substr(1)).bytes();
          if (!bytes) fail("unknown parameter type " + next);
        }
      }
      if (accept('[')) {
        count = number();
        expect(']');
      }
      alignment = std::max(alignment, bytes);
      offset = (offset + alignment - 1) / alignment * alignment;
      symbol_here_[next] = offset;
      program_.parameters.push_back({offset, bytes * count});
      offset += bytes * count;
      accept(',');
    }
    program_.parameter_bytes = offset;
  }

  void directive_of_entry() {
    const std::string name = word(".");
    if (name == ".maxntid") {
      program_.most_threads = number();
      while (accept(',')) program_.most_threads *= number();
    } else if (name == ".minnctapersm") {
      program_.least_blocks = number();
    } else if (name == ".maxnreg") {
      number();
    } else {
      fail("unknown directive " + name);
    }
  }

  void open_scope(int outer) { scopes_.push_back({outer, {}, {}}); }

  void statement() {
    if (accept('{')) {
      open_scope(scope_);
      scope_ = static_cast<int>(scopes_.size()) - 1;
    } else if (accept('}')) {
      scope_ = scopes_[scope_].outer;
    } else if (accept(';')) {
    } else if (peek() == '.') {
      declaration();
    } else {
      instruction();
    }
  }

  void declaration() {
    const std::string name = word(".");
    if (name == ".reg") {
      word(".");
      do {
        const std::string prefix = word();
        if (accept('<')) {
          const int count = number();
          expect('>');
          for (int i = 0; i < count; ++i) scopes_[scope_].registers[prefix + std::to_string(i)] = new_register();
        } else {
          scopes_[scope_].registers[prefix] = new_register();
        }
      } while (accept(','));
    } else if (name == ".shared") {
      uint32_t alignment = 1, count = 1;
      std::string type = word(".");
      if (type == ".align") {
        alignment = number();
        type = word(".");
      }
      const uint32_t bytes = type_of(type.substr(1)).bytes();
      const std::string array = word();
      if (accept('[')) {
        count = number();
        expect(']');
      }
      alignment = std::max(alignment, bytes);
      program_.static_shared = (program_.static_shared + alignment - 1) / alignment * alignment;
      symbol_here_[array] = program_.static_shared;
      program_.static_shared += bytes * count;
    } else if (name == ".pragma") {
      expect('"');
      const size_t end = text_.find('"', at_);
      const std::string what = text_.substr(at_, end - at_);
      at_ = end + 1;
      if (what.rfind("used_bytes_mask ", 0) == 0) used_bytes_ = std::strtoull(what.c_str() + 16, nullptr, 0);
    } else if (name == ".loc") {
      at_ = text_.find('\n', at_);
      return;
    } else {
      fail("unknown directive " + name);
    }
    expect(';');
  }

  int new_register() { return program_.register_count++; }

  int find_register(const std::string& name) {
    for (int s = scope_; s >= 0; s = scopes_[s].outer) {
      if (const auto found = scopes_[s].registers.find(name); found != scopes_[s].registers.end()) return found->second;
    }
    static const char* const kSpecial[] = {"%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%laneid", "%warpid", "%nwarpid"};
    for (const char* special : kSpecial) {
      if (name.rfind(special, 0) == 0) {
        const auto [entry, fresh] = program_.registers.try_emplace(name, program_.register_count);
        if (fresh) ++program_.register_count;
        return entry->second;
      }
    }
    return -1;
  }

  void instruction() {
    Instruction in;
    in.line = line_;
    if (accept('@')) {
      in.guard_negated = accept('!');
      in.guard = find_register(word());
      if (in.guard < 0) fail("unknown predicate");
    }
    in.line = line_;
    in.opcode = word(".:");
    if (in.opcode.back() == ':' && in.opcode.find('.') == std::string::npos) {  // a label
      scopes_[scope_].labels[in.opcode.substr(0, in.opcode.size() - 1)] = static_cast<int>(program_.code.size());
      return;
    }
    split_opcode(in);
    while (!accept(';')) {
      in.operands.push_back(operand(in));
      accept(',');
    }
    if (in.words[0] == "ld") {
      in.used_bytes = used_bytes_;
      used_bytes_ = ~0ull;
    }
    in.execute = meaning_of(in);
    if (!in.execute) fail("unknown instruction " + in.opcode);
    program_.code.push_back(std::move(in));
  }

  static void split_opcode(Instruction& in) {
    for (size_t begin = 0; begin <= in.opcode.size();) {
      const size_t end = std::min(in.opcode.find('.', begin), in.opcode.size());
      in.words.push_back(in.opcode.substr(begin, end - begin));
      begin = end + 1;
    }
    for (const std::string& w : in.words) {
      if (const Type t = type_of(w); t.kind != Kind::none) {
        if (in.type.kind == Kind::none) in.type = t;
        in.from = t;
      }
      if (w == "v2" || w == "v4" || w == "v8") in.vector = w[1] - '0';
      if (w == "aligned") in.aligned = true;
    }
    if (in.words[0] == "bar" && in.words[1] == "sync") in.aligned = true;  // "bar.sync is barrier.sync.aligned"
  }

  Operand operand(const Instruction& in) {
    Operand o;
    if (accept('{')) {
      o.form = Operand::Form::vector;
      while (!accept('}')) {
        o.parts.push_back(operand(in));
        accept(',');
      }
      return o;
    }
    if (accept('[')) return address(in);
    if (accept('-')) {
      o.form = Operand::Form::immediate;
      o.number = -literal(word());
      return o;
    }
    const std::string name = word(".");
    if (name == "_") {
      o.form = Operand::Form::sink;
    } else if (std::isdigit(static_cast<unsigned char>(name[0]))) {
      o.form = Operand::Form::immediate;
      o.number = literal(name);
    } else if (const int reg = find_register(name); reg >= 0) {
      o.form = Operand::Form::reg;
      o.reg = reg;
    } else if (const uint32_t* symbol = find_symbol(name)) {
      o.form = Operand::Form::immediate;
      o.number = *symbol;
    } else if (in.words[0] == "bra") {
      o.form = Operand::Form::immediate;
      pending_.push_back({program_.code.size(), name, scope_});
    } else {
      fail("unknown name " + name);
    }
    if (accept('|')) {  // d|p
      Operand pair;
      pair.form = Operand::Form::vector;
      pair.parts = {o, operand(in)};
      return pair;
    }
    return o;
  }

  // Behind the bracket: base, base+offset, or a base and coordinates.
  Operand address(const Instruction& in) {
    Operand base = operand(in);
    if (base.form == Operand::Form::immediate) base.reg = -1;
    base.form = Operand::Form::address;
    if (accept('+')) {
      const bool negative = accept('-');
      const uint64_t offset = literal(word());
      base.number += negative ? -offset : offset;
    }
    if (accept(',')) base.parts = operand(in).parts;
    expect(']');
    return base;
  }

  uint64_t literal(const std::string& word) const {
    if (word[0] == '0' && (word[1] == 'f' || word[1] == 'F' || word[1] == 'd' || word[1] == 'D')) {
      return std::strtoull(word.c_str() + 2, nullptr, 16);
    }
    char* end = nullptr;
    const uint64_t value = std::strtoull(word.c_str(), &end, 0);
    if (*end && std::string(end) != "U") fail("unknown number " + word);
    return value;
  }

  const uint32_t* find_symbol(const std::string& name) const {
    if (const auto here = symbol_here_.find(name); here != symbol_here_.end()) return &here->second;
    if (const auto outside = symbols_.find(name); outside != symbols_.end()) {
      // The dynamic array begins behind the static ones, which all stand before the first instruction.
      program_.static_shared = (program_.static_shared + outside->second - 1) / outside->second * outside->second;
      return &program_.static_shared;
    }
    return nullptr;
  }

  void resolve_labels() {
    for (const Pending& p : pending_) {
      int target = -1;
      for (int s = p.scope; s >= 0 && target < 0; s = scopes_[s].outer) {
        if (const auto found = scopes_[s].labels.find(p.label); found != scopes_[s].labels.end())
          target = found->second;
      }
      if (target < 0) fail("no label " + p.label);
      program_.code[p.instruction].operands[0].number = static_cast<uint64_t>(target);
    }
  }

  Program& program_;
  const std::string& text_;
  size_t at_;
  int line_ = 1, scope_ = -1;
  uint64_t used_bytes_ = ~0ull;
  std::vector<Scope> scopes_;
  std::vector<Pending> pending_;
  std::map<std::string, uint32_t> symbol_here_;
  const std::map<std::string, uint32_t>& symbols_;
};

}  // namespace

bool Instruction::has(const char* word) const { return std::find(words.begin(), words.end(), word) != words.end(); }

std::string Program::text_of(const Instruction& in) const {
  const size_t i = static_cast<size_t>(in.line - first_line);
  std::string text = i < lines.size() ? lines[i] : in.opcode;
  text.erase(0, text.find_first_not_of(" \t"));
  return "line " + std::to_string(in.line) + ": " + text;
}

Type type_of(const std::string& word) {
  static const std::map<std::string, Type> kTypes = {{"pred", {Kind::predicate, 1}},
                                                     {"b8", {Kind::bits, 8}},
                                                     {"b16", {Kind::bits, 16}},
                                                     {"b32", {Kind::bits, 32}},
                                                     {"b64", {Kind::bits, 64}},
                                                     {"u8", {Kind::unsigned_, 8}},
                                                     {"u16", {Kind::unsigned_, 16}},
                                                     {"u32", {Kind::unsigned_, 32}},
                                                     {"u64", {Kind::unsigned_, 64}},
                                                     {"s8", {Kind::signed_, 8}},
                                                     {"s16", {Kind::signed_, 16}},
                                                     {"s32", {Kind::signed_, 32}},
                                                     {"s64", {Kind::signed_, 64}},
                                                     {"f16", {Kind::floating, 16}},
                                                     {"f32", {Kind::floating, 32}},
                                                     {"f64", {Kind::floating, 64}},
                                                     {"bf16", {Kind::bfloat, 16}},
                                                     {"f16x2", {Kind::floating, 16, true}},
                                                     {"bf16x2", {Kind::bfloat, 16, true}},
                                                     {"f32x2", {Kind::floating, 32, true}}};
  const auto found = kTypes.find(word);
  return found == kTypes.end() ? Type{} : found->second;
}

int architecture_of(const std::string& target) {
  return std::atoi(target.c_str() + target.find_first_of("0123456789"));
}

static size_t find_entry(const std::string& text, const std::string& entry) {
  for (size_t at = text.find(entry); at != std::string::npos; at = text.find(entry, at + 1)) {
    const size_t end = at + entry.size();
    if (at >= 7 && text.compare(at - 7, 7, ".entry ") == 0 && !is_word(text[end])) return end;
  }
  return std::string::npos;
}

bool has_entry(const std::string& text, const std::string& entry) {
  return find_entry(text, entry) != std::string::npos;
}

Program parse(const std::string& text, const std::string& entry) {
  const size_t begin = find_entry(text, entry);
  if (begin == std::string::npos) throw Fault("no entry " + entry);
  Program program;
  program.name = entry;
  const size_t target = text.find(".target ");
  if (target != std::string::npos) program.target = text.substr(target + 8, text.find('\n', target) - target - 8);
  // .extern .shared .align 1024 .b8 name[]; by name its alignment.
  std::map<std::string, uint32_t> dynamic;
  for (size_t at = text.find(".extern .shared .align "); at != std::string::npos;
       at = text.find(".extern .shared .align ", at + 1)) {
    const size_t name = text.find(".b8 ", at) + 4;
    dynamic[text.substr(name, text.find('[', name) - name)] = std::atoi(text.c_str() + at + 23);
  }
  Parser(program, text, begin, dynamic).read();
  find_joins(program);
  size_t at = begin;
  for (int i = program.first_line; at != std::string::npos && i <= program.code.back().line; ++i) {
    const size_t end = text.find('\n', at);
    program.lines.push_back(text.substr(at, end - at));
    at = end == std::string::npos ? end : end + 1;
  }
  return program;
}

}  // namespace ptx
