// Look-ups of table rows on a CPU: pairs of (token, choice) sorted by row, so that a table is read
// once and in order, and every sum has one order whatever the number of threads.
//
// M tokens, L choices per token, pair = token * L + choice, N rows, D width. A sorted pair is
// row << 32 | pair. Callers split tokens (or rows) into ranges, one thread each.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t kPrefetch = 8;  // pairs ahead: about the latency of memory over the work of a pair

template <typename T> inline T dot(const T* a, const T* b, int64_t width) {
  constexpr int64_t W = Lanes<T>::count;
  typename Lanes<T>::type s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t d = 0;
  for (; d + 4 * W <= width; d += 4 * W) {
    s0 += load(a + d) * load(b + d);
    s1 += load(a + d + W) * load(b + d + W);
    s2 += load(a + d + 2 * W) * load(b + d + 2 * W);
    s3 += load(a + d + 3 * W) * load(b + d + 3 * W);
  }
  for (; d + W <= width; d += W) s0 += load(a + d) * load(b + d);
  s0 += s1 + (s2 + s3);
  T lane[W];
  std::memcpy(lane, &s0, sizeof lane);
  for (int64_t half = W / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  T sum = lane[0];
  for (; d < width; ++d) sum += a[d] * b[d];
  return sum;
}

template <typename T> inline void add_scaled(T* out, T scale, const T* a, int64_t width) {
  constexpr int64_t W = Lanes<T>::count;
  int64_t d = 0;
  for (; d + W <= width; d += W) store(out + d, load(out + d) + scale * load(a + d));
  for (; d < width; ++d) out[d] += scale * a[d];
}

template <typename T> inline void set_scaled(T* out, T scale, const T* a, int64_t width) {
  for (int64_t d = 0; d < width; ++d) out[d] = scale * a[d];
}

template <typename T> inline void prefetch(const T* p, int64_t width) {
  for (int64_t d = 0; d < width; d += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + d);
}

inline int64_t row_of(uint64_t sorted) { return (int64_t)(sorted >> 32); }
inline int64_t pair_of(uint64_t sorted) { return (int64_t)(sorted & 0xffffffffu); }

// The token of a pair: a division by a constant of the call, as a product with its reciprocal, which
// is exact for numerators of 32 bits.
struct TokenOf {
  const uint64_t choices, reciprocal;
  explicit TokenOf(int64_t n) : choices((uint64_t)n), reciprocal(UINT64_MAX / (uint64_t)n + 1) {}
  int64_t operator()(int64_t pair) const {
    if (choices == 1) return pair;
    return (int64_t)((unsigned __int128)reciprocal * (uint64_t)pair >> 64);
  }
};

template <typename T>
void dots(const uint64_t* sorted, int64_t begin, int64_t end, int64_t choices, int64_t width,
          const T* table, const T* token, T* out) {
  const TokenOf token_of(choices);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kPrefetch < end) {
      prefetch(table + row_of(sorted[i + kPrefetch]) * width, width);
      prefetch(token + token_of(pair_of(sorted[i + kPrefetch])) * width, width);
    }
    const int64_t pair = pair_of(sorted[i]);
    out[pair] = dot(table + row_of(sorted[i]) * width, token + token_of(pair) * width, width);
  }
}

template <typename T>
void bag(const uint64_t* sorted, int64_t begin, int64_t end, int64_t choices, int64_t width,
         const T* table, const T* weight, T* out) {
  const TokenOf token_of(choices);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kPrefetch < end) {
      prefetch(table + row_of(sorted[i + kPrefetch]) * width, width);
      prefetch(out + token_of(pair_of(sorted[i + kPrefetch])) * width, width);
    }
    const int64_t pair = pair_of(sorted[i]);
    add_scaled(out + token_of(pair) * width, weight[pair], table + row_of(sorted[i]) * width, width);
  }
}

// Visits the pairs of several sorted blocks with first_row <= row < last_row: by row, within a row
// by block. Blocks hold ascending tokens, so the order is that of one sort over all of them.
template <typename Visit>
void merge_rows(const uint64_t* sorted, const int64_t* start, int64_t blocks, int64_t first_row,
                int64_t last_row, Visit visit) {
  std::vector<const uint64_t*> at(blocks), stop(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    const uint64_t *begin = sorted + start[b], *end = sorted + start[b + 1];
    at[b] = std::lower_bound(begin, end, (uint64_t)first_row << 32);
    stop[b] = std::lower_bound(begin, end, (uint64_t)last_row << 32);
  }
  for (;;) {
    int64_t row = last_row;
    for (int64_t b = 0; b < blocks; ++b)
      if (at[b] != stop[b]) row = std::min(row, row_of(*at[b]));
    if (row == last_row) return;
    bool first = true;
    for (int64_t b = 0; b < blocks; ++b)
      for (; at[b] != stop[b] && row_of(*at[b]) == row; ++at[b]) {
        visit(row, pair_of(*at[b]), first, stop[b] - at[b] > kPrefetch ? pair_of(at[b][kPrefetch]) : -1);
        first = false;
      }
  }
}

template <typename T>
void row_sums(const uint64_t* sorted, const int64_t* start, int64_t blocks, int64_t first_row,
              int64_t last_row, int64_t choices, int64_t width, const T* weight, const T* token,
              int64_t first_slot, T* out) {
  const TokenOf token_of(choices);
  int64_t slot = first_slot - 1;
  merge_rows(sorted, start, blocks, first_row, last_row,
             [&](int64_t, int64_t pair, bool first, int64_t next) {
               if (next >= 0) prefetch(token + token_of(next) * width, width);
               if (first) ++slot;
               T* target = out + slot * width;
               const T* vector = token + token_of(pair) * width;
               if (first) set_scaled(target, weight[pair], vector, width);
               else add_scaled(target, weight[pair], vector, width);
             });
}

}  // namespace

extern "C" {

// Sorts the pairs begin <= pair < end of `index` by row, stably: radix sort, 11 bits at a time.
void sort_pairs(const int64_t* index, int64_t begin, int64_t end, int64_t num_rows, uint64_t* out,
                uint64_t* scratch) {
  int passes = 0;
  while (passes == 0 || (num_rows - 1) >> (11 * passes)) ++passes;
  uint64_t *from = passes % 2 ? scratch : out, *to = passes % 2 ? out : scratch;
  for (int64_t pair = begin; pair < end; ++pair)
    from[pair] = (uint64_t)index[pair] << 32 | (uint64_t)pair;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = 32 + 11 * pass;
    int64_t place[2049] = {begin};
    for (int64_t i = begin; i < end; ++i) ++place[(from[i] >> shift & 2047) + 1];
    for (int digit = 0; digit < 2048; ++digit) place[digit + 1] += place[digit];
    for (int64_t i = begin; i < end; ++i) to[place[from[i] >> shift & 2047]++] = from[i];
    std::swap(from, to);
  }
}

// The distinct rows in a range of rows, ascending, to `out` (unless null); their number.
int64_t list_rows(const uint64_t* sorted, const int64_t* start, int64_t blocks, int64_t first_row,
                  int64_t last_row, int64_t* out) {
  int64_t count = 0;
  merge_rows(sorted, start, blocks, first_row, last_row,
             [&](int64_t row, int64_t, bool first, int64_t) {
               if (first) { if (out) out[count] = row; ++count; }
             });
  return count;
}

#define EXPORT(T, NAME)                                                                            \
  void dots_##NAME(const uint64_t* sorted, int64_t begin, int64_t end, int64_t choices,            \
                   int64_t width, const T* table, const T* token, T* out) {                        \
    dots(sorted, begin, end, choices, width, table, token, out);                                   \
  }                                                                                                \
  void bag_##NAME(const uint64_t* sorted, int64_t begin, int64_t end, int64_t choices,             \
                  int64_t width, const T* table, const T* weight, T* out) {                        \
    bag(sorted, begin, end, choices, width, table, weight, out);                                   \
  }                                                                                                \
  void row_sums_##NAME(const uint64_t* sorted, const int64_t* start, int64_t blocks,               \
                       int64_t first_row, int64_t last_row, int64_t choices, int64_t width,        \
                       const T* weight, const T* token, int64_t first_slot, T* out) {              \
    row_sums(sorted, start, blocks, first_row, last_row, choices, width, weight, token,            \
             first_slot, out);                                                                     \
  }

EXPORT(float, float32)
EXPORT(double, float64)

}  // extern "C"
