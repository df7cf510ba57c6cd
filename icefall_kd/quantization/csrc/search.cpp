// The refinement search of search.py for one frame after the other: what a frame needs stays in the cache, a
// frame whose indexes did not change leaves at once, and no table of all frames is written.
//
// Every sum has the terms and the order of search.py, so scores are equal bit for bit (compile without
// contraction), and so are the codes, but for exact ties.  No header of torch is needed.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// Which candidates of the two halves a merged candidate took.
struct Pick {
  int32_t even, odd;
};

// The rows of a candidate in the four tables of the halves of two slots.
struct Rows {
  const float *even_even, *even_odd, *odd_even, *odd_odd;
  float sum(int32_t even, int32_t odd) const {
    return ((even_even[even] + even_odd[odd]) + odd_even[even]) + odd_odd[odd];
  }
};

// Finds the positions of the lowest scores of a row; an object, so that its memory is kept.
class Lowest {
 public:
  explicit Lowest(size_t largest)
      : index(largest + vector), before_(largest), value_(largest + vector), lane_(largest) {}

  std::vector<int32_t> index;  // the result, in any order

  // The `keep` lowest of `size`; both are powers of two, and keep <= size.
  void select(const float *score, int size, int keep) {
    if (keep == 1) {
      index[0] = static_cast<int32_t>(std::min_element(score, score + size) - score);
      return;
    }
    for (int i = 0; i < size; ++i) index[i] = i;
    if (keep == size) return;
    std::copy(score, score + size, value_.begin());
    // Entries of a product codebook lie in rows and columns, so the bound can be poor at first; of what it left
    // it is better.
    int found = size;
    for (int before = found + 1; found > 3 * keep && found < before;) {
      before = found;
      found = up_to(bound(found, keep), found);
    }
    if (found > keep) count_out(found, keep);
  }

 private:
  static constexpr int vector = 8;

  // The highest of the minima of `keep` disjoint sets is no lower than the last score to be kept.
  float bound(int found, int keep) {
    std::copy(value_.begin(), value_.begin() + keep, lane_.begin());
    for (int start = keep; start + keep <= found; start += keep)
      for (int i = 0; i < keep; ++i) lane_[i] = std::min(lane_[i], value_[start + i]);
    return *std::max_element(lane_.begin(), lane_.begin() + keep);
  }

  int up_to(float limit, int found) {
    int left = 0;
    for (int i = 0; i < found; ++i) {
      const float value = value_[i];
      value_[left] = value;
      index[left] = index[i];
      left += value <= limit;
    }
    return left;
  }

  // Keep those that fewer than `keep` others go before.  Counting has no branches, which sorting has.
  void count_out(int found, int keep) {
    std::fill(&value_[found], &value_[found] + vector, std::numeric_limits<float>::infinity());
    int taken = 0, last = 0;
    for (int i = 0; i < found; ++i) {
      int32_t lower[vector] = {};
      for (int j = 0; j < found; j += vector)
        for (int k = 0; k < vector; ++k) lower[k] += value_[j + k] < value_[i];
      before_[i] = std::accumulate(lower, lower + vector, 0);
      if (before_[i] < keep) {
        ++taken;
        last = std::max(last, before_[i]);
      }
    }
    // Equal scores at the limit have the highest count of those taken: the first of them stay.  NaN counts none,
    // so that of NaN alone there can be more than `keep`.
    int surplus = taken - keep, left = 0;
    for (int i = found - 1; surplus > 0 && i >= 0; --i)
      if (before_[i] == last) {
        before_[i] = keep;
        --surplus;
      }
    for (int i = 0; i < found; ++i)
      if (before_[i] < keep) index[left++] = index[i];
  }

  std::vector<int32_t> before_;
  std::vector<float> value_, lane_;
};

class Search {
 public:
  Search(const float *gram, int codebooks, int entries, const int32_t *beams)
      : gram_(gram),
        codebooks_(codebooks),
        entries_(entries),
        width_(int64_t{codebooks} * entries),
        beams_(beams),
        lowest_(largest(codebooks, entries, beams)) {
    score_.resize(static_cast<size_t>(width_));
    pairs_.resize(lowest_.index.size());
    odd_.resize(lowest_.index.size());
    int levels = 0;
    for (int slots = codebooks; slots > 1; slots /= 2) ++levels;
    picks_.resize(levels);
  }

  // Refine the codes of a frame once; true when one changed.
  bool round(const float *products, int64_t *codes) {
    const int top = first_scores(products, codes);
    if (codebooks_ == 1) {
      const int64_t best = first_[0];
      const bool changed = best != codes[0];
      codes[0] = best;
      return changed;
    }
    int slots = codebooks_, size = top;
    for (size_t level = 0; level < picks_.size(); ++level) {
      const bool direct = level == 0;  // only neighbours have met so far: straight from the Gram matrix
      slots /= 2;
      const int keep = slots == 1 ? 1 : std::min(beams_[level + 1], size * size);
      std::vector<Pick> &picks = picks_[level];
      picks.resize(static_cast<size_t>(slots) * keep);
      next_.resize(static_cast<size_t>(slots) * keep);
      for (int slot = 0; slot < slots; ++slot) {
        const float *cross = direct ? neighbours(slot, size) : table(2 * slots, 2 * slot, 2 * slot + 1, size);
        const float *left = &scores_[size_t(2 * slot) * size], *right = left + size;
        for (int a = 0; a < size; ++a)
          for (int b = 0; b < size; ++b) pairs_[a * size + b] = (cross[a * size + b] + left[a]) + right[b];
        lowest_.select(pairs_.data(), size * size, keep);
        for (int i = 0; i < keep; ++i) {
          const int32_t kept = lowest_.index[i];
          picks[size_t(slot) * keep + i] = {kept / size, kept % size};
          next_[size_t(slot) * keep + i] = pairs_[kept];
        }
      }
      scores_.swap(next_);
      if (slots > 1) direct ? first_tables(slots, size, keep) : merged_tables(slots, size, keep, picks);
      size = keep;
    }
    return walk_back(codes);
  }

 private:
  // The most scores that are ever compared.
  static size_t largest(int codebooks, int entries, const int32_t *beams) {
    int most = entries;
    for (; codebooks > 1; codebooks /= 2, ++beams) most = std::max(most, *beams * *beams);
    return most;
  }

  // The table of the pair (p, q), p < q, of `slots` slots of `size` candidates.
  const float *table(int slots, int p, int q, int size) const {
    return &table_[(size_t(p) * slots - size_t(p) * (p + 1) / 2 + (q - p - 1)) * size * size];
  }

  int first_scores(const float *products, const int64_t *codes) {
    chosen_.resize(codebooks_);
    for (int n = 0; n < codebooks_; ++n) chosen_[n] = int64_t{n} * entries_ + codes[n];
    const float *row = gram_ + chosen_[0] * width_;
    std::copy(row, row + width_, score_.begin());
    for (int n = 1; n < codebooks_; ++n) {
      row = gram_ + chosen_[n] * width_;
      for (int64_t i = 0; i < width_; ++i) score_[i] += row[i];
    }
    for (int64_t i = 0; i < width_; ++i) score_[i] -= products[i];
    const int keep = codebooks_ == 1 ? 1 : std::min(beams_[0], entries_);
    first_.resize(size_t(codebooks_) * keep);
    scores_.resize(size_t(codebooks_) * keep);
    for (int n = 0; n < codebooks_; ++n) {
      const float *score = &score_[size_t(n) * entries_];
      lowest_.select(score, entries_, keep);
      for (int i = 0; i < keep; ++i) {
        first_[size_t(n) * keep + i] = lowest_.index[i];
        scores_[size_t(n) * keep + i] = score[lowest_.index[i]];
      }
    }
    first_size_ = keep;
    return keep;
  }

  const float *row_of(int codebook, int entry) const { return gram_ + (int64_t{codebook} * entries_ + entry) * width_; }

  // <delta_even[a], delta_odd[b]> of the neighbours 2 slot and 2 slot + 1, less a constant.
  const float *neighbours(int slot, int size) {
    const int p = 2 * slot, q = p + 1;
    const int32_t *left = &first_[size_t(p) * size], *right = &first_[size_t(q) * size];
    const float *present = gram_ + chosen_[p] * width_ + int64_t{q} * entries_;
    cross_.resize(size_t(size) * size);
    for (int b = 0; b < size; ++b) odd_[b] = present[right[b]];
    for (int a = 0; a < size; ++a) {
      const float *row = row_of(p, left[a]), *part = row + int64_t{q} * entries_;
      const float even = row[chosen_[q]];
      for (int b = 0; b < size; ++b) cross_[a * size + b] = (part[right[b]] - even) - odd_[b];
    }
    return cross_.data();
  }

  // The same of all pairs of merged slots, whose candidates are two entries each.  The candidates of a slot share
  // entries, so the Gram matrix, which is larger than the caches, is read once for every pair of distinct ones.
  void first_tables(int slots, int size, int keep) {
    entries_of(size, keep);
    table_.resize(size_t(slots) * (slots - 1) / 2 * keep * keep);
    float *table = table_.data();
    for (int p = 0; p < slots; ++p)
      for (int q = p + 1; q < slots; ++q, table += keep * keep) fill_table(table, p, q, keep);
  }

  // For each codebook the distinct entries of its slot's candidates, the present one last, and which of them a
  // candidate has.
  void entries_of(int size, int keep) {
    distinct_.resize(codebooks_);
    local_.resize(size_t(codebooks_) * keep);
    for (int n = 0; n < codebooks_; ++n) {
      const Pick *picks = &picks_[0][size_t(n / 2) * keep];
      seen_.assign(size, -1);
      distinct_[n].clear();
      for (int i = 0; i < keep; ++i) {
        const int32_t first = n % 2 ? picks[i].odd : picks[i].even;
        if (seen_[first] < 0) {
          seen_[first] = static_cast<int32_t>(distinct_[n].size());
          distinct_[n].push_back(first_[size_t(n) * size + first]);
        }
        local_[size_t(n) * keep + i] = seen_[first];
      }
      distinct_[n].push_back(static_cast<int32_t>(chosen_[n] - int64_t{n} * entries_));
    }
  }

  // The block of the Gram matrix of the distinct entries of two codebooks; returns its row length.
  size_t gather(int m, int n, std::vector<float> &block) const {
    const std::vector<int32_t> &rows = distinct_[m], &columns = distinct_[n];
    block.resize(rows.size() * columns.size());
    float *out = block.data();
    for (const int32_t entry : rows) {
      const float *part = row_of(m, entry) + int64_t{n} * entries_;
      for (const int32_t column : columns) *out++ = part[column];
    }
    return columns.size();
  }

  void fill_table(float *table, int p, int q, int keep) {
    const int m = 2 * p, n = 2 * q;
    const size_t width0 = gather(m, n, blocks_[0]), width1 = gather(m, n + 1, blocks_[1]);
    gather(m + 1, n, blocks_[2]);
    gather(m + 1, n + 1, blocks_[3]);
    const int32_t *left0 = &local_[size_t(m) * keep], *left1 = left0 + keep;
    const int32_t *right0 = &local_[size_t(n) * keep], *right1 = right0 + keep;
    const auto rows = [&](size_t i, size_t j) {
      return Rows{&blocks_[0][i * width0], &blocks_[1][i * width1], &blocks_[2][j * width0], &blocks_[3][j * width1]};
    };
    const Rows present = rows(distinct_[m].size() - 1, distinct_[m + 1].size() - 1);
    for (int b = 0; b < keep; ++b) odd_[b] = present.sum(right0[b], right1[b]);
    for (int a = 0; a < keep; ++a, table += keep) {
      const Rows row = rows(left0[a], left1[a]);
      const float even = row.sum(static_cast<int32_t>(width0 - 1), static_cast<int32_t>(width1 - 1));
      for (int b = 0; b < keep; ++b) table[b] = (row.sum(right0[b], right1[b]) - even) - odd_[b];
    }
  }

  // The tables of merged slots from those of their halves.
  void merged_tables(int slots, int size, int keep, const std::vector<Pick> &picks) {
    merged_.resize(size_t(slots) * (slots - 1) / 2 * keep * keep);
    float *out = merged_.data();
    const auto half = [&](int p, int q) { return table(2 * slots, p, q, size); };
    for (int p = 0; p < slots; ++p)
      for (int q = p + 1; q < slots; ++q) {
        const float *ee = half(2 * p, 2 * q), *eo = half(2 * p, 2 * q + 1);
        const float *oe = half(2 * p + 1, 2 * q), *oo = half(2 * p + 1, 2 * q + 1);
        const Pick *left = &picks[size_t(p) * keep], *right = &picks[size_t(q) * keep];
        for (int a = 0; a < keep; ++a, out += keep) {
          const int even = left[a].even * size, odd = left[a].odd * size;
          const Rows row{ee + even, eo + even, oe + odd, oo + odd};
          for (int b = 0; b < keep; ++b) out[b] = row.sum(right[b].even, right[b].odd);
        }
      }
    table_.swap(merged_);
  }

  bool walk_back(int64_t *codes) {
    choice_.assign(1, 0);
    for (size_t level = picks_.size(); level-- > 0;) {
      const size_t slots = choice_.size(), keep = picks_[level].size() / slots;
      halves_.resize(2 * slots);
      for (size_t slot = 0; slot < slots; ++slot) {
        const Pick pick = picks_[level][slot * keep + choice_[slot]];
        halves_[2 * slot] = pick.even;
        halves_[2 * slot + 1] = pick.odd;
      }
      choice_.swap(halves_);
    }
    bool changed = false;
    for (int n = 0; n < codebooks_; ++n) {
      const int64_t code = first_[size_t(n) * first_size_ + choice_[n]];
      changed |= code != codes[n];
      codes[n] = code;
    }
    return changed;
  }

  const float *gram_;
  const int codebooks_, entries_;
  const int64_t width_;
  const int32_t *beams_;
  int first_size_ = 0;
  Lowest lowest_;
  std::vector<float> score_, scores_, next_, pairs_, cross_, table_, merged_, odd_;
  std::vector<int32_t> first_, local_, seen_, choice_, halves_;
  std::vector<int64_t> chosen_;
  std::vector<std::vector<int32_t>> distinct_;
  std::vector<float> blocks_[4];
  std::vector<std::vector<Pick>> picks_;
};

}  // namespace

// gram (codebooks * entries)^2, products (frames, codebooks * entries), codes (frames, codebooks) in and out;
// beams: how many candidates a slot of 1, 2, 4, ... codebooks keeps.
extern "C" void icefall_kd_refine(const float *gram, const float *products, int64_t *codes, int64_t frames,
                                  int32_t codebooks, int32_t entries, const int32_t *beams, int32_t rounds,
                                  int32_t threads) {
  const int64_t width = int64_t{codebooks} * entries;
  const auto work = [=](int64_t begin, int64_t end) {
    Search search(gram, codebooks, entries, beams);
    for (int64_t t = begin; t < end; ++t)
      for (int round = 0; round < rounds; ++round)
        if (!search.round(products + t * width, codes + t * codebooks)) break;
  };
  // A thread for a handful of frames costs more than it brings.
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, frames / 64));
  const int64_t size = (frames + parts - 1) / parts;
  std::vector<std::thread> pool;
  int64_t k = 1;
  try {
    for (; k < parts; ++k) pool.emplace_back(work, k * size, std::min(frames, (k + 1) * size));
  } catch (const std::system_error &) {  // a limit on processes or memory: this thread does what is left
  }
  work(0, std::min(frames, size));
  work(k * size, frames);
  for (std::thread &thread : pool) thread.join();
}
