// Vectors of one instruction set. Read by foreach_isa.h once for each, inside its namespace, where kVectorBytes and
// SEPCONV_ISA_LEVEL (0 baseline, 1 avx2, 2 avx512) are set: hence no include guard and no include.
//
// Vector<A> holds kLanes<A> sums of type A (float or double). +, -, *, /, < and ?: work lane by lane (the compiler's
// vector extensions), and a * b + c becomes a fused multiply-add where there is one. Memory may hold another type T
// (float16 or bfloat16 for A = float): load and store convert. No address needs alignment.

template <typename A>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(kCount * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <typename A>
using Vector = typename VectorOf<A, kLanes<A>>::type;

using Floats = typename VectorOf<float, kLanes<float>>::type;
using Bits = typename VectorOf<uint32_t, kLanes<float>>::type;
using SignedBits = typename VectorOf<int32_t, kLanes<float>>::type;
using Halves = typename VectorOf<uint16_t, kLanes<float>>::type;
using UnalignedHalves = typename VectorOf<uint16_t, kLanes<float>>::unaligned;

template <typename A>
SEPCONV_INLINE Vector<A> broadcast(A value) {
  return value - Vector<A>{};  // not value + 0: that would turn -0 into +0
}

// ---- 16-bit numbers ----

SEPCONV_INLINE Floats widen(Halves h, bfloat16) { return (Floats)(__builtin_convertvector(h, Bits) << 16); }

// Rounds to nearest even; a NaN stays one.
SEPCONV_INLINE Halves narrow(Floats v, bfloat16) {
  const Bits bits = (Bits)v;
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits quiet = bits | 0x400000u;
  return __builtin_convertvector((v == v ? rounded : quiet) >> 16, Halves);
}

#if SEPCONV_ISA_LEVEL == 2  // the zero-masked forms, as the plain ones make GCC 12 warn of an uninitialised register
SEPCONV_INLINE Floats widen(Halves h, float16) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
SEPCONV_INLINE Halves narrow(Floats v, float16) {
  return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif SEPCONV_ISA_LEVEL == 1
SEPCONV_INLINE Floats widen(Halves h, float16) { return (Floats)_mm256_cvtph_ps((__m128i)h); }
SEPCONV_INLINE Halves narrow(Floats v, float16) {
  return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
SEPCONV_INLINE Floats widen(Halves h, float16) {
  const Bits wide = __builtin_convertvector(h, Bits);
  const Bits magnitude = (wide & 0x7fffu) << 13;  // exponent and mantissa at float's places, exponent 112 too small
  const Bits normal = magnitude + (112u << 23);
  const Bits special = magnitude + (224u << 23);  // infinity and NaN: the exponent becomes 255
  const Bits subnormal = (Bits)((Floats)(magnitude + (113u << 23)) - 0x1p-14f);
  const Bits exponent = magnitude & (31u << 23);
  const Bits value = exponent == 0u ? subnormal : (exponent == (31u << 23) ? special : normal);
  return (Floats)(value | ((wide & 0x8000u) << 16));
}
// Rounds to nearest even; too large becomes infinity; a NaN stays one.
SEPCONV_INLINE Halves narrow(Floats v, float16) {
  const Bits sign = (Bits)v & 0x80000000u;
  const Bits bits = (Bits)v ^ sign;
  const SignedBits order = (SignedBits)bits;  // magnitudes compare as signed integers, which every machine can do
  const Bits normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Adding 0.5 puts the last bit of a float16 subnormal (2^-24) at the last bit of a float: the addition rounds.
  const Bits subnormal = (Bits)((Floats)bits + 0.5f) - 0x3f000000u;
  const Bits infinity_or_nan = order > 0x7f800000 ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  const Bits value = order >= (143 << 23) ? infinity_or_nan : (order < (113 << 23) ? subnormal : normal);
  return __builtin_convertvector(value | (sign >> 16), Halves);
}
#endif

// ---- memory ----

template <typename T>
inline constexpr bool kIsHalf = sizeof(T) == 2;

// The kLanes numbers at p.
template <typename T>
SEPCONV_INLINE Vector<accumulate_t<T>> load(const T* p) {
  if constexpr (kIsHalf<T>) {
    return widen(*reinterpret_cast<const UnalignedHalves*>(p), T{});
  } else {
    return *reinterpret_cast<const typename VectorOf<T, kLanes<T>>::unaligned*>(p);
  }
}

template <typename T>
SEPCONV_INLINE void store(T* p, Vector<accumulate_t<T>> v) {
  if constexpr (kIsHalf<T>) {
    *reinterpret_cast<UnalignedHalves*>(p) = narrow(v, T{});
  } else {
    *reinterpret_cast<typename VectorOf<T, kLanes<T>>::unaligned*>(p) = v;
  }
}

#if SEPCONV_ISA_LEVEL == 1
// The masks of the first `count` lanes. A loop over lanes would do, but its branches may part a product from the sum
// that it is added to: they are then rounded apart, and a result would depend on where a line is cut.
SEPCONV_INLINE __m256i first_lanes(int count, float) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SEPCONV_INLINE __m256i first_lanes(int count, double) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
#endif

#if SEPCONV_ISA_LEVEL != 2
// The first `count` 16-bit numbers at `from`, by loads of two or four of them that may overlap: one by one, a row of
// seven would take longer than a copy of it. The first number lies in the lowest bits, in memory as in a register.
template <typename Piece>
SEPCONV_INLINE uint64_t load_piece(const uint16_t* p) {
  Piece piece;
  std::memcpy(&piece, p, sizeof(piece));
  return piece;
}

SEPCONV_INLINE uint64_t load_up_to_four(const uint16_t* p, int count) {
  if (count >= 4) return load_piece<uint64_t>(p);
  if (count >= 2) return load_piece<uint32_t>(p) | load_piece<uint32_t>(p + count - 2) << 16 * (count - 2);
  return count == 1 ? *p : 0;
}

SEPCONV_INLINE Halves load_first_halves(const void* from, int count) {
  const uint16_t* const p = static_cast<const uint16_t*>(from);
  constexpr int kPieces = sizeof(Halves) / sizeof(uint64_t);
  typename VectorOf<uint64_t, kPieces>::type pieces{load_up_to_four(p, count)};
  if constexpr (kPieces > 1) {
    if (count > 4) pieces[kPieces - 1] = load_piece<uint64_t>(p + count - 4) >> 16 * (8 - count);
  }
  return (Halves)pieces;
}

SEPCONV_INLINE void store_first_halves(void* to, Halves v, int count) {
  uint16_t* p = static_cast<uint16_t*>(to);
  constexpr int kPieces = sizeof(Halves) / sizeof(uint64_t);
  uint64_t pieces[kPieces];
  std::memcpy(pieces, &v, sizeof(v));
  uint64_t rest = pieces[0];
  if constexpr (kPieces > 1) {
    if (count >= 4) {
      std::memcpy(p, &rest, sizeof(uint64_t));
      rest = pieces[kPieces - 1], p += 4, count -= 4;
    }
  }
  if (count >= 4) std::memcpy(p, &rest, sizeof(uint64_t));
  if (count & 2) {
    std::memcpy(p, &rest, sizeof(uint32_t));
    rest >>= 32, p += 2;
  }
  if (count & 1) *p = static_cast<uint16_t>(rest);
}
#endif

// The first `count` numbers at p (0 <= count <= kLanes), zero in the other lanes; nothing beyond them is read.
template <typename T>
SEPCONV_INLINE Vector<accumulate_t<T>> load_first(const T* p, int count) {
#if SEPCONV_ISA_LEVEL == 2
  const uint32_t mask = (1u << count) - 1;
  if constexpr (kIsHalf<T>) {
    return widen((Halves)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p), T{});
  } else if constexpr (std::is_same_v<T, float>) {
    return (Floats)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  } else {
    return (Vector<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
  }
#else
  if constexpr (kIsHalf<T>) return widen(load_first_halves(p, count), T{});
#if SEPCONV_ISA_LEVEL == 1
  if constexpr (std::is_same_v<T, float>) return (Floats)_mm256_maskload_ps(p, first_lanes(count, T{}));
  if constexpr (std::is_same_v<T, double>) return (Vector<double>)_mm256_maskload_pd(p, first_lanes(count, T{}));
#endif
  T lanes[kLanes<accumulate_t<T>>] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

// Stores the first `count` lanes only.
template <typename T>
SEPCONV_INLINE void store_first(T* p, Vector<accumulate_t<T>> v, int count) {
#if SEPCONV_ISA_LEVEL == 2
  const uint32_t mask = (1u << count) - 1;
  if constexpr (kIsHalf<T>) {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), (__m256i)narrow(v, T{}));
  } else if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), (__m512d)v);
  }
#else
  if constexpr (kIsHalf<T>) return store_first_halves(p, narrow(v, T{}), count);
#if SEPCONV_ISA_LEVEL == 1
  if constexpr (std::is_same_v<T, float>) return _mm256_maskstore_ps(p, first_lanes(count, T{}), (__m256)v);
  if constexpr (std::is_same_v<T, double>) return _mm256_maskstore_pd(p, first_lanes(count, T{}), (__m256d)v);
#endif
  T lanes[kLanes<accumulate_t<T>>];
  store(lanes, v);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
#endif
}

// One number, converted (slow: for set-up code and single leftovers).
template <typename T>
SEPCONV_INLINE accumulate_t<T> load_one(const T* p) {
  if constexpr (kIsHalf<T>) {
    Halves h{};
    h[0] = p->bits;
    return widen(h, T{})[0];
  } else {
    return *p;
  }
}

template <typename T>
SEPCONV_INLINE void store_one(T* p, accumulate_t<T> value) {
  if constexpr (kIsHalf<T>) {
    p->bits = narrow(broadcast<float>(value), T{})[0];
  } else {
    *p = value;
  }
}

// ---- arithmetic ----

// The sum of all lanes, in a fixed order: the upper half is added to the lower one until one lane is left.
template <typename A, int kCount, int... kI>
SEPCONV_INLINE A sum_halves(typename VectorOf<A, kCount>::type v, std::integer_sequence<int, kI...>) {
  const auto sum = __builtin_shufflevector(v, v, kI...) + __builtin_shufflevector(v, v, (kI + kCount / 2)...);
  if constexpr (kCount == 2) {
    return sum[0];
  } else {
    return sum_halves<A, kCount / 2>(sum, std::make_integer_sequence<int, kCount / 4>());
  }
}
template <typename A>
SEPCONV_INLINE A sum_lanes(Vector<A> v) {
  return sum_halves<A, kLanes<A>>(v, std::make_integer_sequence<int, kLanes<A> / 2>());
}

// The lower and the higher of two lanes; b where one of them is NaN.
template <typename A>
SEPCONV_INLINE Vector<A> min_lanes(Vector<A> a, Vector<A> b) {
#if SEPCONV_ISA_LEVEL == 2
  if constexpr (std::is_same_v<A, float>) return (Floats)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif SEPCONV_ISA_LEVEL == 1
  if constexpr (std::is_same_v<A, float>) return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#endif
  return a < b ? a : b;
}
template <typename A>
SEPCONV_INLINE Vector<A> max_lanes(Vector<A> a, Vector<A> b) {
#if SEPCONV_ISA_LEVEL == 2
  if constexpr (std::is_same_v<A, float>) return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif SEPCONV_ISA_LEVEL == 1
  if constexpr (std::is_same_v<A, float>) return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

// v within [lowest, highest]; keeps NaN.
template <typename A>
SEPCONV_INLINE Vector<A> limit_lanes(Vector<A> v, A lowest, A highest) {
  return min_lanes<A>(broadcast<A>(highest), max_lanes<A>(broadcast<A>(lowest), v));
}

// relu, and up to 6 relu6.
template <typename A>
SEPCONV_INLINE Vector<A> clamp_lanes(Vector<A> v, A highest) {
  return limit_lanes<A>(v, A(0), highest);
}

// 1 / v within 2 units in the last place, for finite v from 1 on. AVX-512 refines its estimate of 14 bits by one step
// of Newton's, which takes half as long as a division.
SEPCONV_INLINE Floats reciprocal_lanes(Floats v) {
#if SEPCONV_ISA_LEVEL == 2
  const Floats estimate = (Floats)_mm512_maskz_rcp14_ps(0xffff, (__m512)v);
  return estimate * (2.0f - v * estimate);
#else
  return 1.0f / v;
#endif
}

// 1 / (1 + e^-v) of lanes within [-kExponentLimit, kExponentLimit]. With -v log2 e = n + f, |f| <= 1/2: a polynomial of
// least error for 2^f, which is exact at 0 and elsewhere within 1.3e-7, times 2^n.
inline constexpr float kExponentLimit = 87.0f;
SEPCONV_INLINE Floats sigmoid_lanes(Floats v) {
  const Floats slope = broadcast<float>(-1.44269504f);
  const Floats magic =
      broadcast<float>(0x1.8p23f + 127);  // adding it leaves n + 127, a float's exponent, in the lowest bits
  const Floats shifted = v * slope + magic;
  const Floats f = v * slope - (shifted - magic);
  Floats p = broadcast<float>(1.32647273e-3f);
  for (const float c : {9.67151299e-3f, 5.55073358e-2f, 0.240222424f, 0.693147004f, 1.0f}) p = p * f + c;
  return reciprocal_lanes(p * (Floats)((Bits)shifted << 23) + 1.0f);
}

// v (1 + erf(v / sqrt 2)) / 2. Half of the error function is v P(v^2) / Q(v^2) up to |v| = 5.5, fitted for the least
// relative error (2e-8); beyond, it is a half.
SEPCONV_INLINE Floats gelu_lanes(Floats v) {
  const Floats s = min_lanes<float>(broadcast<float>(5.5f * 5.5f), v * v);
  Floats p = broadcast<float>(2.29311006e-08f), q = broadcast<float>(1.19902711e-06f);
  for (const float c : {6.30159593e-06f, 0.000164574492f, 0.00465148687f, 0.033458963f, 0.398942262f}) p = p * s + c;
  for (const float c : {7.21672768e-05f, 0.00186065026f, 0.0284161717f, 0.250535578f, 1.0f}) q = q * s + c;
  const Floats half_erf = limit_lanes<float>(v * p * reciprocal_lanes(q), -0.5f, 0.5f);
  return v * half_erf + v * 0.5f;
}
