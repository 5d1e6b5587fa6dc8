// Activations of lanes, and of several sums at a time. Read like simd.h, after it, by the files that need it, which
// include activation.h.

// activate() of activation.h on every lane. Only tanh, and in double what has an exponential, go lane by lane.
template <typename A>
SEPCONV_INLINE Vector<A> activate_lanes(Activation activation, Vector<A> v) {
  const Vector<A> zero{};
  switch (activation) {
    case Activation::identity: return v;
    case Activation::relu: return max_lanes<A>(zero, v);
    case Activation::relu6: return clamp_lanes<A>(v, A(6));
    case Activation::leaky_relu: return max_lanes<A>(v * A(kLeakySlope), v);
    case Activation::hardswish: return v * limit_lanes<A>(v * A(1.0 / 6.0) + A(0.5), A(0), A(1));
    default: break;
  }
  if constexpr (std::is_same_v<A, float>) {
    const Floats above = max_lanes<float>(broadcast<float>(-kExponentLimit), v);
    const Floats inside = min_lanes<float>(broadcast<float>(kExponentLimit), above);
    if (activation == Activation::silu) return above * sigmoid_lanes(inside);
    if (activation == Activation::sigmoid) return sigmoid_lanes(inside);
    if (activation == Activation::gelu) return gelu_lanes(v);
  }
  A lanes[kLanes<A>];
  store(lanes, v);
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = activate(activation, lanes[i]);
  return load(lanes);
}

template <Activation kActivation, typename A>
SEPCONV_INLINE void activate_each(A* values, int count) {
  for (int i = 0; i < count; i += kLanes<A>) store(values + i, activate_lanes<A>(kActivation, load(values + i)));
}

// Code of its own for each activation, chosen once for all values.
template <typename A, int... kIndex>
SEPCONV_INLINE void activate_each_by_name(Activation activation, A* values, int count,
                                          std::integer_sequence<int, kIndex...>) {
  ((static_cast<int>(activation) == kIndex ? activate_each<static_cast<Activation>(kIndex)>(values, count) : void()),
   ...);
}

template <typename A>
__attribute__((noinline)) void activate_array(Activation activation, A* values, int count) {
  if (activation == Activation::identity) return;
  activate_each_by_name(activation, values, count, std::make_integer_sequence<int, kActivationCount>{});
}

// Sums in registers: the usual ones there, the others by way of memory, as their code would stand in every kernel.
template <typename A, int kCount>
SEPCONV_INLINE void activate_sums(Activation activation, Vector<A> (&sums)[kCount]) {
  if (activation == Activation::identity) return;
  if (activation == Activation::relu || activation == Activation::relu6) {
    const A highest = activation == Activation::relu6 ? A(6) : std::numeric_limits<A>::infinity();
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sums[i] = clamp_lanes<A>(sums[i], highest);
    return;
  }
  A values[kCount * kLanes<A>];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) store(values + i * kLanes<A>, sums[i]);
  activate_array(activation, values, kCount * kLanes<A>);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) sums[i] = load(values + i * kLanes<A>);
}
