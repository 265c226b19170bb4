// Registers of numbers, in the vector extension of GCC and Clang: whatever the processor has.

#pragma once

#include <cstdint>

// 64 bytes: one AVX-512 register, two of AVX2, four of NEON.
typedef float f32x16 __attribute__((vector_size(64), aligned(4)));
typedef double f64x8 __attribute__((vector_size(64), aligned(8)));
typedef int32_t i32x16 __attribute__((vector_size(64), aligned(4)));
typedef int64_t i64x8 __attribute__((vector_size(64), aligned(8)));
template <typename T> struct Lanes;
template <> struct Lanes<float> {
  typedef f32x16 type;
  typedef i32x16 mask;
  typedef int32_t index;
  static constexpr int64_t count = 16;
};
template <> struct Lanes<double> {
  typedef f64x8 type;
  typedef i64x8 mask;
  typedef int64_t index;
  static constexpr int64_t count = 8;
};

template <typename T> inline typename Lanes<T>::type load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::type*>(p);
}
template <typename T> inline void store(T* p, typename Lanes<T>::type v) {
  *reinterpret_cast<typename Lanes<T>::type*>(p) = v;
}
