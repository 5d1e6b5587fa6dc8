// What runs as one step: inverted residual blocks and pairs of products, whose intermediate images then never leave the
// second-level cache.
#include <algorithm>

#include "core/activation.h"
#include "cpu/network/program.h"

namespace sepconv::cpu::network {
namespace {

class Fuser {
 public:
  Fuser(std::vector<Step> steps, const std::vector<bool>& returned)
      : steps_(std::move(steps)), writer_(returned.size(), -1), readers_(returned.size()), gone_(steps_.size()) {
    for (size_t i = 0; i < steps_.size(); ++i) {
      writer_[steps_[i].writes] = static_cast<int>(i);
      for (const int value : steps_[i].reads) ++readers_[value];
    }
    for (size_t value = 0; value < returned.size(); ++value) readers_[value] += returned[value];  // kept, at least
  }

  std::vector<Step> run() {
    for (Step& step : steps_) {
      if (is_pixel_product(step)) fuse_into(step);
    }
    // Then, as the second of two products may be a block's first.
    for (Step& step : steps_) {
      if (is_pixel_product(step) && !gone_[&step - steps_.data()]) fuse_products_into(step);
    }
    std::vector<Step> left;
    for (size_t i = 0; i < steps_.size(); ++i) {
      if (!gone_[i]) left.push_back(std::move(steps_[i]));
    }
    return left;
  }

 private:
  static bool is(const Step* step, std::string_view name) { return step != nullptr && step->kind->name == name; }

  static bool is_pixel_product(const Step& s) { return is(&s, "product") && s.stride_h == 1 && s.stride_w == 1; }

  // The step that writes a value, if as many others read that as are given.
  const Step* from(int value, int readers) const {
    return writer_[value] >= 0 && readers_[value] == readers ? &steps_[writer_[value]] : nullptr;
  }

  // What a gate is made of, back to the depthwise convolution whose channels it scales.
  bool read_gate(const Step& gate, Block& block, std::vector<const Step*>& inside) const {
    const Step* excite = from(gate.reads[1], 1);
    if (is(excite, "clamp")) {
      const Step& c = *excite;
      if (c.factor != 1.0f / 6 || c.shift != 0.5f || c.low != 0 || c.high != 1) return false;
      block.hard_gate = true, inside.push_back(excite), excite = from(c.reads[0], 1);
    }
    const Activation expected = block.hard_gate ? Activation::identity : Activation::sigmoid;
    if (!is(excite, "product") || excite->activation != expected || excite->reads.size() > 1) return false;
    const Step* squeeze = from(excite->reads[0], 1);
    if (!is(squeeze, "product") || squeeze->reads.size() > 1) return false;
    const Step* mean = from(squeeze->reads[0], 1);
    if (!is(mean, "mean") || mean->reads[0] != gate.reads[0]) return false;
    block.squeeze = std::make_shared<Step>(*squeeze), block.excite = std::make_shared<Step>(*excite);
    inside.insert(inside.end(), {excite, squeeze, mean});
    return true;
  }

  void fuse_into(Step& project) {
    Block block;
    std::vector<const Step*> inside;
    int image = project.reads[0], readers = 1;
    const Step* gate = from(image, 1);
    if (is(gate, "gate") && gate->activation == Activation::identity && read_gate(*gate, block, inside)) {
      inside.push_back(gate);
      image = gate->reads[0], readers = 2;  // the gate and the mean
    }
    const Step* depthwise = from(image, readers);
    if (!is(depthwise, "depthwise") && !is(depthwise, "grouped")) return;
    inside.push_back(depthwise);
    image = depthwise->reads[0];
    const Step* expand = from(image, 1);
    if (expand != nullptr && is_pixel_product(*expand) && expand->reads.size() == 1) {
      inside.push_back(expand);
      image = expand->reads[0];
      block.expand = std::make_shared<Step>(*expand);
    }
    block.depthwise = std::make_shared<Step>(*depthwise), block.project = std::make_shared<Step>(project);
    for (const Step* step : inside) gone_[step - steps_.data()] = true;
    project.kind = &block_kind();
    project.reads[0] = image;
    project.block = std::move(block);
  }

  void fuse_products_into(Step& project) {
    const Step* hidden = from(project.reads[0], 1);
    if (hidden == nullptr || !is_pixel_product(*hidden) || hidden->reads.size() > 1) return;
    Perceptron p;
    int image = hidden->reads[0];
    const Step* norm = from(image, 1);
    if (is(norm, "layer_norm") && norm->weight == kAbsent && norm->bias == kAbsent) {
      image = norm->reads[0];
      p.norm = std::make_shared<Step>(*norm);
      gone_[norm - steps_.data()] = true;
    }
    p.hidden = std::make_shared<Step>(*hidden), p.project = std::make_shared<Step>(project);
    gone_[hidden - steps_.data()] = true;
    project.kind = &perceptron_kind();
    project.reads[0] = image;
    project.perceptron = std::move(p);
  }

  std::vector<Step> steps_;
  std::vector<int> writer_, readers_;
  std::vector<bool> gone_;
};

}  // namespace

std::vector<Step> fuse(std::vector<Step> steps, const std::vector<bool>& returned) {
  return Fuser(std::move(steps), returned).run();
}

}  // namespace sepconv::cpu::network
