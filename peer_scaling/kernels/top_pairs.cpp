// The k best pairs of sub-keys of a product of two sets: He 2024 (2407.04153), equation (5).

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "lanes.h"

namespace {

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

#define EXPORT(T, NAME)                                                                            \
  void best_pairs_##NAME(const T* score, int64_t tokens, int64_t heads, int64_t by_token,          \
                         int64_t by_head, int64_t by_half, int64_t size, int64_t k, T* out_score,  \
                         int64_t* out_index) {                                                     \
    best_pairs(score, tokens, heads, by_token, by_head, by_half, size, k, out_score, out_index);   \
  }

EXPORT(float, float32)
EXPORT(double, float64)

}  // extern "C"
