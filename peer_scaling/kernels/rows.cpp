// Look-ups of table rows on a CPU: pairs of (token, choice) sorted by row, so that a table is read
// once and in order, and every sum has one order whatever the number of threads.
//
// M tokens, L choices per token, pair = token * L + choice, N rows, D width. A sorted pair is
// row << 32 | pair. Callers split tokens (or rows) into ranges, one thread each.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t kPrefetch = 8;  // pairs ahead: about the latency of memory over the work of a pair

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

// rank[i]: how many of `count` values are larger than value i, or equal and before it. Both arrays
// have room for whole registers; what lies behind the values does not matter.
template <typename T>
void rank_all(const T* value, int64_t count, typename Lanes<T>::index* rank) {
  constexpr int64_t W = Lanes<T>::count;
  typedef typename Lanes<T>::mask Mask;
  Mask lane;
  for (int64_t i = 0; i < W; ++i) lane[i] = (typename Lanes<T>::index)i;
  for (int64_t i = 0; i < count; i += W) {
    const auto block = load(value + i);
    const Mask place = lane + (typename Lanes<T>::index)i;
    Mask above = {};
    for (int64_t j = 0; j < count; ++j) {
      const T other = value[j];
      above -= (other > block) | ((other == block) & ((typename Lanes<T>::index)j < place));
    }
    std::memcpy(rank + i, &above, sizeof above);
  }
}

// Room for the search of the k best of `size` scores.
template <typename T> struct Search {
  typedef typename Lanes<T>::index Index;
  static constexpr int64_t W = Lanes<T>::count;
  const int64_t size, k;
  const int64_t groups;  // registers of group maxima; 0: too few scores for that to pay
  std::vector<T> value;
  std::vector<int32_t> place;
  std::vector<Index> rank;

  Search(int64_t size_, int64_t k_)
      : size(size_), k(k_), groups(size_ >= 8 * (k_ + W) ? (2 * k_ + W - 1) / W : 0),
        value(size_ + 2 * W), place(size_ + 2 * W), rank(size_ + 2 * W) {}

  // A number that at least k scores reach: the k-th of the maxima of disjoint groups.
  T bound(const T* score) {
    if (!groups) return -std::numeric_limits<T>::infinity();
    std::copy(score, score + groups * W, value.begin());
    for (int64_t i = groups * W; i + W <= size; i += W) {
      T* maxima = value.data() + i / W % groups * W;
      const auto a = load(score + i), b = load((const T*)maxima);
      store(maxima, a > b ? a : b);
    }
    rank_all(value.data(), groups * W, rank.data());
    for (int64_t i = 0; i < groups * W; ++i)
      if (rank[i] == k - 1) return value[i];
    return -std::numeric_limits<T>::infinity();
  }

  // The scores that reach the bound, in order, to `value` and `place`; how many there are.
  int64_t candidates(const T* score, T least) {
    int64_t count = 0, i = 0;
#ifdef __AVX512F__
    if constexpr (sizeof(T) == 4)
      for (__m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
           i + W <= size; i += W, number = _mm512_add_epi32(number, _mm512_set1_epi32(W))) {
        const __m512 block = _mm512_loadu_ps(score + i);
        const __mmask16 reach = _mm512_cmp_ps_mask(block, _mm512_set1_ps(least), _CMP_GE_OQ);
        _mm512_storeu_ps(value.data() + count, _mm512_maskz_compress_ps(reach, block));
        _mm512_storeu_si512(place.data() + count, _mm512_maskz_compress_epi32(reach, number));
        count += __builtin_popcount(reach);
      }
#endif
    for (; i < size; ++i) {
      value[count] = score[i], place[count] = (int32_t)i;
      count += score[i] >= least;
    }
    return count;
  }

  // Best first; of equal scores the first. False if a score is infinite or not a number.
  bool best(const T* score, T* out, int32_t* out_place) {
    typename Lanes<T>::type zero = {};
    int64_t i = 0;
    for (; i + W <= size; i += W) zero += load(score + i) * T(0);
    T finite = 0;
    for (; i < size; ++i) finite += score[i] * T(0);
    for (int64_t lane = 0; lane < W; ++lane) finite += zero[lane];
    if (finite != 0) {
      for (int64_t j = 0; j < k; ++j) out[j] = finite, out_place[j] = (int32_t)j;
      return false;
    }
    const int64_t count = candidates(score, bound(score));
    if (count > 16 * k + 128) return sort(count, out, out_place);
    rank_all(value.data(), count, rank.data());
    for (int64_t j = 0; j < count; ++j)
      if (rank[j] < k) out[rank[j]] = value[j], out_place[rank[j]] = place[j];
    return true;
  }

  // Many candidates: ranking them all would take their number squared.
  bool sort(int64_t count, T* out, int32_t* out_place) {
    std::vector<int32_t> order(count);
    for (int64_t j = 0; j < count; ++j) order[j] = (int32_t)j;
    std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int32_t a, int32_t b) {
      return value[a] > value[b] || (value[a] == value[b] && a < b);
    });
    for (int64_t j = 0; j < k; ++j) out[j] = value[order[j]], out_place[j] = place[order[j]];
    return true;
  }
};

// Scores at score[token * by_token + head * by_head + half * by_half + sub-key].
template <typename T>
void best_pairs(const T* score, int64_t tokens, int64_t heads, int64_t by_token, int64_t by_head,
                int64_t by_half, int64_t size, int64_t k, T* out_score, int64_t* out_index) {
  std::vector<T> half(2 * k), best(k);
  std::vector<int32_t> place(2 * k), first, second, chosen(k);
  for (int64_t i = 0; i < k; ++i)  // the pairs that can win: candidate_pairs in torch_backend.py
    for (int64_t j = 0; j < k / (i + 1); ++j) {
      first.push_back((int32_t)i);
      second.push_back((int32_t)(k + j));
    }
  std::vector<T> sums(first.size());
  Search<T> halves(size, k), pairs((int64_t)sums.size(), k);
  for (int64_t r = 0; r < tokens * heads; ++r) {
    const T* at = score + r / heads * by_token + r % heads * by_head;
    bool numbers = halves.best(at, half.data(), place.data());
    numbers &= halves.best(at + by_half, half.data() + k, place.data() + k);
    for (size_t p = 0; p < first.size(); ++p) sums[p] = half[first[p]] + half[second[p]];
    numbers &= pairs.best(sums.data(), best.data(), chosen.data());
    for (int64_t i = 0; i < k; ++i) {
      const int32_t c = chosen[i];
      out_index[r * k + i] = (int64_t)place[first[c]] * size + place[second[c]];
      out_score[r * k + i] = numbers ? best[i] : std::numeric_limits<T>::quiet_NaN();
    }
  }
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

// Asks for huge pages behind a buffer that nobody has written to.
void prefer_huge_pages(void* buffer, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = 1 << 21;
  const uintptr_t begin = ((uintptr_t)buffer + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = ((uintptr_t)buffer + (uintptr_t)bytes) / kHuge * kHuge;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
  (void)buffer, (void)bytes;
#endif
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
  }                                                                                                \
  void best_pairs_##NAME(const T* score, int64_t tokens, int64_t heads, int64_t by_token,          \
                         int64_t by_head, int64_t by_half, int64_t size, int64_t k, T* out_score,  \
                         int64_t* out_index) {                                                     \
    best_pairs(score, tokens, heads, by_token, by_head, by_half, size, k, out_score, out_index);   \
  }

EXPORT(float, float32)
EXPORT(double, float64)

}  // extern "C"
