// AdamW (Loshchilov and Hutter 2019, 1711.05101) on the rows of a table, from a gradient that has
// some of the rows: one pass, and no gradient the size of the table.

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

template <typename T> struct Numbers {
  T keep;    // 1 - rate * decay
  T rate;    // rate / (1 - beta1^t)
  T beta1, beta2, eps;
  T unbias;  // 1 / sqrt(1 - beta2^t)
};

template <typename T>
inline void update(T* __restrict w, T* __restrict m, T* __restrict v, const T* __restrict g,
                   int64_t width, const Numbers<T> n) {
  for (int64_t d = 0; d < width; ++d) {
    m[d] = n.beta1 * m[d] + (1 - n.beta1) * g[d];
    v[d] = n.beta2 * v[d] + (1 - n.beta2) * g[d] * g[d];
    w[d] = w[d] * n.keep - n.rate * m[d] / (std::sqrt(v[d]) * n.unbias + n.eps);
  }
}

template <typename T>
inline void coast(T* __restrict w, T* __restrict m, T* __restrict v, int64_t width,
                  const Numbers<T> n) {
  for (int64_t d = 0; d < width; ++d) {
    m[d] = n.beta1 * m[d];
    v[d] = n.beta2 * v[d];
    w[d] = w[d] * n.keep - n.rate * m[d] / (std::sqrt(v[d]) * n.unbias + n.eps);
  }
}

// Rows first <= row < last; those that are not among `picked` (ascending) coast, or rest if `lazy`.
template <typename T>
void adamw(T* w, T* m, T* v, int64_t width, int64_t first, int64_t last, const int64_t* picked,
           int64_t count, const T* grad, const double* numbers, int64_t lazy) {
  const Numbers<T> n = {(T)numbers[0], (T)numbers[1], (T)numbers[2],
                        (T)numbers[3], (T)numbers[4], (T)numbers[5]};
  int64_t slot = std::lower_bound(picked, picked + count, first) - picked, row = first;
  while (row < last) {
    const int64_t next = slot < count ? std::min(picked[slot], last) : last;
    if (!lazy && row < next)
      coast(w + row * width, m + row * width, v + row * width, (next - row) * width, n);
    row = next;
    if (row == last) return;
    update(w + row * width, m + row * width, v + row * width, grad + slot * width, width, n);
    ++row, ++slot;
  }
}

}  // namespace

extern "C" {

#define EXPORT(T, NAME)                                                                            \
  void adamw_##NAME(T* w, T* m, T* v, int64_t width, int64_t first, int64_t last,                  \
                    const int64_t* picked, int64_t count, const T* grad, const double* numbers,    \
                    int64_t lazy) {                                                                \
    adamw(w, m, v, width, first, last, picked, count, grad, numbers, lazy);                        \
  }

EXPORT(float, float32)
EXPORT(double, float64)

}  // extern "C"
