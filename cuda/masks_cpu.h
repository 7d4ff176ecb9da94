// What the CPU does with masks, free of torch's tensors: compiling those headers takes ten times as long.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace solq {

// The cosine code. `kept` are the places of a vector's entries in the corner (U, V) of the spectrum.
struct Cosines {
  int64_t mask_size, rows, columns, vector_dim;  // N, U, V, D
  const double *row_basis, *column_basis;        // (U, N) and (V, N)
  const int64_t* kept;                           // (D,)

  int64_t pixels() const { return mask_size * mask_size; }
};

// masks (count, N, N) <-> vectors (count, D)
void dct_encode(const Cosines& cosines, const bool* masks, int64_t count, float* vectors);
void dct_decode(const Cosines& cosines, const float* vectors, int64_t count, float* masks);

// The cells of the decoded masks that lie above the middle of their mask's range.
void dct_decode_bits(const Cosines& cosines, const float* vectors, int64_t count, bool* bits);

// Compressed run-length codes of box-frame masks (count, N, N) in images of height x width pixels.
// boxes: (count, 4) x0 y0 x1 y1, pixels.
std::vector<std::string> paste_to_counts(const bool* masks, int64_t mask_size, const float* boxes, int64_t count,
                                         int64_t height, int64_t width);

// Box-frame masks (count, N, N) in the frames of other boxes. boxes, others: (count, 4) centre x, y, width, height.
void reframe(const bool* masks, int64_t mask_size, const float* boxes, const float* others, int64_t count, bool* moved);

// Compressed run-length codes of several masks, one after another: that of mask k ends before texts[ends[k]].
struct Codes {
  const char* texts;
  const int64_t* ends;
  int64_t count;
};

// Objects as box-frame masks. The code of object k is of an image part of heights[k] rows whose first pixel is at
// corners[2 * k] (x), corners[2 * k + 1] (y) of the image. masks: (codes.count, N, N).
void crop_codes(const Codes& codes, const int64_t* heights, const int64_t* corners, const float* boxes, int64_t height,
                int64_t width, int64_t mask_size, bool* masks);

}  // namespace solq
