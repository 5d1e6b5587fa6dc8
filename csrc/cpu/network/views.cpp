// Which values have no memory of their own: some channels of an image, which its readers find where the image lies, and
// the parts of a concatenation, which their makers write where the whole is to lie. Where a step takes only dense
// images, or a part has its memory elsewhere already, the channels are copied.
#include "cpu/network/program.h"

namespace sepconv::cpu::network {
namespace {

class Viewer {
 public:
  Viewer(std::vector<Step>& steps, std::vector<Size>& sizes, const std::vector<bool>& fixed)
      : steps_(steps), sizes_(sizes), fixed_(fixed), inside_(sizes.size(), View{-1}), writer_(sizes.size(), -1) {
    for (size_t i = 0; i < steps.size(); ++i) writer_[steps[i].writes] = static_cast<int>(i);
  }

  std::vector<View> run() {
    std::vector<Step> left;
    for (const Step& step : steps_) {
      const bool gone = is_slice(step) ? view(step) : step.kind->name == std::string_view("concat") && join(step);
      if (!gone) left.push_back(step);
    }
    std::vector<View> views;
    for (int value = 0; value < static_cast<int>(sizes_.size()); ++value) views.push_back(resolve(value));
    copy_for(left, views);
    steps_ = std::move(left);
    return views;
  }

 private:
  static bool is_slice(const Step& step) { return step.kind->name == std::string_view("slice"); }
  bool is_inside(int value) const { return inside_[value].root >= 0; }

  bool view(const Step& slice) {
    if (fixed_[slice.writes]) return false;
    inside_[slice.writes] = {slice.reads[0], slice.begin, 0};
    return true;
  }

  // Puts the parts in their places that may be there. Whether all are.
  bool join(const Step& concat) {
    bool all = true;
    int64_t offset = 0;
    for (const int part : concat.reads) {
      if (may_lie_anywhere(part)) {
        inside_[part] = {concat.writes, offset, 0};
      } else {
        all = false;
      }
      offset += sizes_[part].C;
    }
    return all;
  }

  bool may_lie_anywhere(int value) const {
    if (fixed_[value] || is_inside(value) || writer_[value] < 0) return false;
    if (!steps_[writer_[value]].kind->writes_pitched) return false;
    for (const Step& step : steps_) {
      for (size_t i = 0; i < step.reads.size(); ++i) {
        if (step.reads[i] == value && !(step.kind->pitched >> i & 1)) return false;
      }
    }
    return true;
  }

  View resolve(int value) const {
    View view{value, 0, 0};
    while (is_inside(view.root)) view.offset += inside_[view.root].offset, view.root = inside_[view.root].root;
    view.pitch = sizes_[view.root].C;
    return view;
  }

  // Dense copies for the steps that need them, one of each value.
  void copy_for(std::vector<Step>& steps, std::vector<View>& views) {
    std::vector<int> copy(sizes_.size(), -1);
    std::vector<Step> all;
    for (Step& step : steps) {
      for (size_t i = 0; i < step.reads.size(); ++i) {
        int& value = step.reads[i];
        if (views[value].pitch == sizes_[value].C || (step.kind->pitched >> i & 1)) continue;
        if (copy[value] < 0) {
          Step dense;
          dense.kind = &kind_of("dense");
          dense.reads = {value}, dense.writes = copy[value] = static_cast<int>(sizes_.size());
          const Size size = sizes_[value];
          sizes_.push_back(size), views.push_back({dense.writes, 0, size.C});
          all.push_back(dense);
        }
        value = copy[value];
      }
      all.push_back(std::move(step));
    }
    steps = std::move(all);
  }

  std::vector<Step>& steps_;
  std::vector<Size>& sizes_;
  const std::vector<bool>& fixed_;
  std::vector<View> inside_;  // root: the value that one is directly a part of, or -1
  std::vector<int> writer_;
};

}  // namespace

std::vector<View> make_views(std::vector<Step>& steps, std::vector<Size>& sizes, const std::vector<bool>& fixed) {
  return Viewer(steps, sizes, fixed).run();
}

}  // namespace sepconv::cpu::network
