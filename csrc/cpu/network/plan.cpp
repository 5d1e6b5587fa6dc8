// From a program to a plan: the size of every value, and its place.
//
// Values that live at the same time (views.cpp says which are only parts of others) lie side by side in the arena; the
// largest are placed first, each at the lowest address that is free for its life. A step that may write in place takes
// over the memory of a value that it reads last.
#include <algorithm>
#include <stdexcept>

#include "cpu/network/program.h"

namespace sepconv::cpu::network {

Strides strides_of(const Size& s, int64_t pixel) { return {s.pixels() * pixel, 1, s.W * pixel, pixel}; }

bool InputSize::is_dense() const {
  return (size.C == 1 || strides.c == 1) && (size.W == 1 || strides.w == size.C) &&
         (size.H == 1 || strides.h == size.W * size.C) && (size.N == 1 || strides.n == size.per_image());
}

namespace {

constexpr int64_t kLine = 16;  // floats

ConvShape shape_of(const Step& step, const Size& in, const Strides& x, const Size& out, const Strides& y) {
  ConvShape s;
  s.N = in.N, s.C = in.C, s.H = in.H, s.W = in.W;
  s.K = out.C, s.R = step.R, s.S = step.S, s.P = out.H, s.Q = out.W;
  s.stride_h = step.stride_h, s.stride_w = step.stride_w, s.pad_h = step.top, s.pad_w = step.left;
  s.dilation_h = step.dilation_h, s.dilation_w = step.dilation_w;
  s.groups = step.groups;
  s.x = x, s.y = y;
  return s;
}

// A piece of the arena: one value, or several that follow each other in it.
struct Piece {
  int64_t floats, offset = 0;
  int first, last;  // steps, from the first that writes it to the last that reads it
};

// Gives each piece its offset; returns how much they take together.
int64_t place(std::vector<Piece>& pieces) {
  std::vector<Piece*> order, placed;
  for (Piece& piece : pieces) order.push_back(&piece);
  std::stable_sort(order.begin(), order.end(), [](const Piece* a, const Piece* b) { return a->floats > b->floats; });
  int64_t total = 0;
  for (Piece* piece : order) {
    // `placed` is in the order of offsets.
    for (const Piece* other : placed) {
      if (other->last < piece->first || piece->last < other->first) continue;
      if (piece->offset + piece->floats <= other->offset) break;
      piece->offset = std::max(piece->offset, other->offset + other->floats);
    }
    const auto behind = [](const Piece* a, const Piece* b) { return a->offset < b->offset; };
    placed.insert(std::upper_bound(placed.begin(), placed.end(), piece, behind), piece);
    total = std::max(total, piece->offset + piece->floats);
  }
  return total;
}

class Planner {
 public:
  Planner(const Program& program, const std::vector<InputSize>& inputs, int64_t constants)
      : program_(program), inputs_(inputs), constants_(constants) {}

  Plan run() {
    copy_inputs();
    sizes();
    plan_steps();
    lives();
    places();
    for (const Port& port : program_.outputs) plan_.outputs.push_back(size_[port.value]);
    for (const Port& port : program_.outputs) port_is_matrix(port);
    return std::move(plan_);
  }

 private:
  // Inputs that are not dense get a copy, unless only steps read them that can do without.
  void copy_inputs() {
    size_.resize(program_.values), place_.resize(program_.values);
    std::vector<int> stands_for(program_.values);
    for (int v = 0; v < program_.values; ++v) stands_for[v] = v;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const int value = program_.inputs[i].value;
      size_[value] = inputs_[i].size;
      place_[value] = {Memory::input, static_cast<int64_t>(i)};
      if (inputs_[i].is_dense() || !needs_dense(value)) continue;
      Step copy;
      copy.kind = &kind_of("dense");
      copy.reads = {value}, copy.writes = static_cast<int>(size_.size());
      stands_for[value] = copy.writes;
      steps_.push_back(copy);
      size_.emplace_back(), place_.emplace_back();
    }
    for (Step step : program_.steps) {
      for (int& value : step.reads) value = stands_for[value];
      steps_.push_back(std::move(step));
    }
    fixed_.resize(size_.size());
    for (const Port& port : program_.outputs) fixed_[port.value] = true;
    steps_ = fuse(std::move(steps_), fixed_);
    for (const Port& port : program_.inputs) fixed_[port.value] = true;
  }

  bool needs_dense(int value) const {
    for (const Step& step : program_.steps) {
      for (size_t i = 0; i < step.reads.size(); ++i) {
        if (step.reads[i] == value && !(i == 0 && step.kind->any_strides)) return true;
      }
    }
    return false;
  }

  void sizes() {
    for (const Step& step : steps_) {
      Size in[kMostReads];
      for (size_t i = 0; i < step.reads.size(); ++i) in[i] = size_[step.reads[i]];
      size_[step.writes] = step.kind->size(step, in);
      if (step.kind->constants(step, in) > constants_) {
        throw std::invalid_argument(std::string("the constants are too few for a step: ") + step.kind->name);
      }
    }
    view_ = make_views(steps_, size_, fixed_);
    place_.resize(size_.size());
  }

  void plan_steps() {
    for (const Step& step : steps_) {
      PlannedStep planned{step, {}, {}, {}, 0, {}, {}, {}};
      for (size_t i = 0; i < step.reads.size(); ++i) {
        planned.in[i] = size_[step.reads[i]], planned.pitch[i] = view_[step.reads[i]].pitch;
      }
      planned.out = size_[step.writes], planned.out_pitch = view_[step.writes].pitch;
      const int first = step.reads[0];
      const bool is_input = place_[first].memory == Memory::input;
      const Strides x = is_input ? inputs_[place_[first].at].strides : strides_of(planned.in[0], planned.pitch[0]);
      planned.shape = shape_of(step, planned.in[0], x, planned.out, strides_of(planned.out, planned.out_pitch));
      plan_.steps.push_back(std::move(planned));
    }
  }

  int root(int value) const { return view_[value].root; }

  void lives() {
    last_use_.assign(size_.size(), -1);
    for (size_t i = 0; i < steps_.size(); ++i) {
      for (const int value : steps_[i].reads) last_use_[root(value)] = static_cast<int>(i);
      last_use_[root(steps_[i].writes)] = static_cast<int>(i);
    }
    for (size_t i = 0; i < program_.outputs.size(); ++i) {
      Place& place = place_[program_.outputs[i].value];
      if (place.memory != Memory::arena) {
        throw std::invalid_argument("an input, or a value that is returned already, is returned");
      }
      place = {Memory::output, static_cast<int64_t>(i)};
    }
  }

  // The value whose memory a step may take over, or none.
  int taken_over(int step) const {
    const PlannedStep& planned = plan_.steps[step];
    if (root(planned.step.writes) != planned.step.writes) return -1;
    for (size_t i = 0; i < planned.step.reads.size(); ++i) {
      const int value = planned.step.reads[i];
      const bool free = root(value) == value && place_[value].memory == Memory::arena && last_use_[value] == step;
      if (free && planned.in[i] == planned.out && every_read_allows(planned.step, value)) return value;
    }
    return -1;
  }

  // A value may be read twice: as a product's input and as its residual; or in part.
  bool every_read_allows(const Step& step, int value) const {
    for (size_t i = 0; i < step.reads.size(); ++i) {
      if (root(step.reads[i]) != value) continue;
      if (step.reads[i] != value || (step.kind->in_place >> i & 1) == 0) return false;
    }
    return true;
  }

  void places() {
    std::vector<Piece> pieces;
    std::vector<int> piece_of(size_.size(), -1);
    for (int i = 0; i < static_cast<int>(steps_.size()); ++i) {
      const int value = root(steps_[i].writes);
      if (place_[value].memory != Memory::arena || piece_of[value] >= 0) continue;
      const int last = last_use_[value], former = taken_over(i);
      if (former >= 0) {
        piece_of[value] = piece_of[former];
        pieces[piece_of[value]].last = last;
      } else {
        piece_of[value] = static_cast<int>(pieces.size());
        pieces.push_back({(size_[value].elements() + kLine - 1) / kLine * kLine, 0, i, last});
      }
    }
    plan_.arena = place(pieces);
    for (size_t value = 0; value < size_.size(); ++value) {
      if (piece_of[value] >= 0) place_[value].at = pieces[piece_of[value]].offset;
    }
    for (PlannedStep& planned : plan_.steps) {
      for (size_t i = 0; i < planned.step.reads.size(); ++i) planned.read[i] = place_of(planned.step.reads[i]);
      planned.write = place_of(planned.step.writes);
    }
  }

  Place place_of(int value) const {
    Place place = place_[root(value)];
    (place.memory == Memory::arena ? place.at : place.offset) += view_[value].offset;
    return place;
  }

  void port_is_matrix(const Port& port) const {
    if (port.is_matrix && size_[port.value].pixels() != 1) {
      throw std::invalid_argument("an image of more than one pixel is returned as a matrix");
    }
  }

  const Program& program_;
  const std::vector<InputSize>& inputs_;
  const int64_t constants_;
  std::vector<Step> steps_;
  std::vector<Size> size_;  // of each value, as all of these
  std::vector<View> view_;
  std::vector<Place> place_;
  std::vector<bool> fixed_;    // whose memory is the caller's
  std::vector<int> last_use_;  // of the roots
  Plan plan_;
};

}  // namespace

Plan make_plan(const Program& program, const std::vector<InputSize>& inputs, int64_t constants) {
  return Planner(program, inputs, constants).run();
}

}  // namespace sepconv::cpu::network
