// y = x W^T + b of a matrix W of which blocks of 8 rows and 1 column are kept: what a device would run (our design).
//
// Frames are taken 16 at a time and turned, so that a column of x is two vectors; a block is 8 weights that meet it.

#include <cstdint>
#include <vector>

typedef float vector8 __attribute__((vector_size(32)));

constexpr int kFrames = 16, kRows = 8, kHalf = 4;

// x (frames, columns), y (frames, 8 * block_rows), bias (8 * block_rows); block b of row r, offsets[r] <= b <
// offsets[r + 1], holds values[8 b ...] of column places[b].
extern "C" void block_sparse_linear(const float* x, const float* values, const uint16_t* places, const int32_t* offsets,
                                    const float* bias, float* y, int64_t frames, int64_t columns, int64_t block_rows) {
  static thread_local std::vector<vector8> turned;
  turned.assign(2 * columns, vector8{});
  float* flat = reinterpret_cast<float*>(turned.data());
  for (int64_t begin = 0; begin < frames; begin += kFrames) {
    const int64_t n = frames - begin < kFrames ? frames - begin : kFrames;
    for (int64_t t = 0; t < n; ++t)
      for (int64_t c = 0; c < columns; ++c) flat[kFrames * c + t] = x[(begin + t) * columns + c];
    for (int64_t r = 0; r < block_rows; ++r) {
      for (int half = 0; half < kRows; half += kHalf) {  // sums of 4 x 16 fit into the registers of AVX2
        const float* b = bias + kRows * r + half;
        vector8 sum[kHalf][2];
        for (int j = 0; j < kHalf; ++j) sum[j][0] = sum[j][1] = vector8{} + b[j];
        for (int32_t k = offsets[r]; k < offsets[r + 1]; ++k) {
          const float* v = values + kRows * k + half;
          const vector8 first = turned[2 * places[k]], second = turned[2 * places[k] + 1];
          for (int j = 0; j < kHalf; ++j) {
            sum[j][0] += v[j] * first;
            sum[j][1] += v[j] * second;
          }
        }
        for (int64_t t = 0; t < n; ++t)
          for (int j = 0; j < kHalf; ++j) y[(begin + t) * kRows * block_rows + kRows * r + half + j] = sum[j][t / 8][t % 8];
      }
    }
  }
}
