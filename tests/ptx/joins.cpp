// Where the two ways of a branch meet again: its immediate post-dominator.
#include "program.h"

namespace ptx {

// The iterative method over a tree (Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm", 2001), on the
// reversed graph of basic blocks.
void find_joins(Program& program) {
  const std::vector<Instruction>& code = program.code;
  const int size = static_cast<int>(code.size());
  std::vector<char> leads(size + 1, 0);
  leads[0] = 1;
  const auto is_branch = [](const Instruction& in) { return in.words[0] == "bra"; };
  const auto ends = [](const Instruction& in) { return in.words[0] == "ret" || in.words[0] == "exit"; };
  for (int i = 0; i < size; ++i) {
    if (is_branch(code[i])) leads[code[i].operands[0].number] = 1;
    if (is_branch(code[i]) || ends(code[i])) leads[i + 1] = 1;
  }
  std::vector<int> begins, block_of(size);
  for (int i = 0; i < size; ++i) {
    if (leads[i]) begins.push_back(i);
    block_of[i] = static_cast<int>(begins.size()) - 1;
  }
  const int blocks = static_cast<int>(begins.size()), exit = blocks;
  std::vector<std::vector<int>> next(blocks), before(blocks + 1);
  for (int b = 0; b < blocks; ++b) {
    const int last = (b + 1 < blocks ? begins[b + 1] : size) - 1;
    const Instruction& in = code[last];
    if (is_branch(in)) next[b].push_back(block_of[in.operands[0].number]);
    if (ends(in)) next[b].push_back(exit);
    if ((!is_branch(in) && !ends(in)) || in.guard >= 0) next[b].push_back(last + 1 < size ? block_of[last + 1] : exit);
    for (const int n : next[b]) before[n].push_back(b);
  }
  // Postorder of the reversed graph from the exit.
  std::vector<int> order, rank(blocks + 1, -1);
  std::vector<std::pair<int, size_t>> walk{{exit, 0}};
  std::vector<char> seen(blocks + 1, 0);
  seen[exit] = 1;
  while (!walk.empty()) {
    auto& [b, i] = walk.back();
    if (i < before[b].size()) {
      const int n = before[b][i++];
      if (!seen[n]) {
        seen[n] = 1;
        walk.push_back({n, 0});
      }
    } else {
      rank[b] = static_cast<int>(order.size());
      order.push_back(b);
      walk.pop_back();
    }
  }
  std::vector<int> up(blocks + 1, -1);
  up[exit] = exit;
  for (bool changed = true; changed;) {
    changed = false;
    for (auto b = order.rbegin(); b != order.rend(); ++b) {
      if (*b == exit) continue;
      int found = -1;
      for (int n : next[*b]) {
        if (rank[n] < 0 || up[n] < 0) continue;
        if (found < 0) {
          found = n;
          continue;
        }
        while (found != n) {
          while (rank[found] < rank[n]) found = up[found];
          while (rank[n] < rank[found]) n = up[n];
        }
      }
      if (found != up[*b]) {
        up[*b] = found;
        changed = true;
      }
    }
  }
  for (Instruction& in : program.code) {
    if (!is_branch(in)) continue;
    const int b = block_of[&in - program.code.data()];
    in.join = up[b] < 0 || up[b] == exit ? size : begins[up[b]];
  }
}

}  // namespace ptx
