// The mask functions of `masks_cpu.h` as operators of torch, sizes checked with the values in the message.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "masks_cpu.h"

namespace solq {
namespace {

void check_type(const at::Tensor& tensor, at::ScalarType type, const char* name) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == type, name, " must be ", type, ", got ", tensor.scalar_type());
}

// The tables of one codec, dense and in double precision for as long as a call lasts.
struct CosineTables {
  at::Tensor row_basis, column_basis, kept;

  CosineTables(const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& places)
      : row_basis(rows.to(at::kDouble).contiguous()),
        column_basis(columns.to(at::kDouble).contiguous()),
        kept(places.contiguous()) {
    TORCH_CHECK_VALUE(rows.dim() == 2 && columns.dim() == 2 && rows.size(1) == columns.size(1),
                      "the bases must be (U, N) and (V, N), got ", rows.sizes(), " and ", columns.sizes());
    check_type(kept, at::kLong, "kept");
  }

  Cosines cosines() const {
    return {row_basis.size(1), row_basis.size(0), column_basis.size(0), kept.numel(),
            row_basis.const_data_ptr<double>(), column_basis.const_data_ptr<double>(), kept.const_data_ptr<int64_t>()};
  }
};

void check_vectors(const at::Tensor& vectors, const Cosines& cosines) {
  check_type(vectors, at::kFloat, "vectors");
  TORCH_CHECK_VALUE(vectors.dim() == 2 && vectors.size(1) == cosines.vector_dim, "vectors must be (K, ",
                    cosines.vector_dim, "), got ", vectors.sizes());
}

at::Tensor encode(const at::Tensor& masks, const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& kept) {
  const CosineTables tables(rows, columns, kept);
  const Cosines cosines = tables.cosines();
  check_type(masks, at::kBool, "masks");
  TORCH_CHECK_VALUE(masks.dim() == 3 && masks.size(1) == cosines.mask_size && masks.size(2) == cosines.mask_size,
                    "masks must be (K, ", cosines.mask_size, ", ", cosines.mask_size, "), got ", masks.sizes());
  const at::Tensor dense = masks.contiguous();
  at::Tensor vectors = at::empty({masks.size(0), cosines.vector_dim}, rows.options().dtype(at::kFloat));
  dct_encode(cosines, dense.const_data_ptr<bool>(), masks.size(0), vectors.mutable_data_ptr<float>());
  return vectors;
}

at::Tensor decode(const at::Tensor& vectors, const at::Tensor& rows, const at::Tensor& columns,
                  const at::Tensor& kept) {
  const CosineTables tables(rows, columns, kept);
  const Cosines cosines = tables.cosines();
  check_vectors(vectors, cosines);
  const at::Tensor dense = vectors.contiguous();
  at::Tensor masks = at::empty({vectors.size(0), cosines.mask_size, cosines.mask_size}, vectors.options());
  dct_decode(cosines, dense.const_data_ptr<float>(), vectors.size(0), masks.mutable_data_ptr<float>());
  return masks;
}

at::Tensor decode_bits(const at::Tensor& vectors, const at::Tensor& rows, const at::Tensor& columns,
                       const at::Tensor& kept) {
  const CosineTables tables(rows, columns, kept);
  const Cosines cosines = tables.cosines();
  check_vectors(vectors, cosines);
  const at::Tensor dense = vectors.contiguous();
  at::Tensor bits =
      at::empty({vectors.size(0), cosines.mask_size, cosines.mask_size}, vectors.options().dtype(at::kBool));
  dct_decode_bits(cosines, dense.const_data_ptr<float>(), vectors.size(0), bits.mutable_data_ptr<bool>());
  return bits;
}

// Masks (K, N, N) bool and boxes (K, 4) float.
void check_pairs(const at::Tensor& masks, const at::Tensor& boxes) {
  check_type(masks, at::kBool, "masks");
  check_type(boxes, at::kFloat, "boxes");
  TORCH_CHECK_VALUE(masks.dim() == 3 && masks.size(1) == masks.size(2), "masks must be (K, N, N), got ",
                    masks.sizes());
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(0) == masks.size(0) && boxes.size(1) == 4, "boxes must be (",
                    masks.size(0), ", 4), got ", boxes.sizes());
}

std::vector<std::string> paste(const at::Tensor& masks, const at::Tensor& boxes, int64_t height, int64_t width) {
  check_pairs(masks, boxes);
  TORCH_CHECK_VALUE(height > 0 && width > 0, "an image cannot be ", height, " x ", width, " pixels");
  const at::Tensor dense_masks = masks.contiguous(), dense_boxes = boxes.contiguous();
  return paste_to_counts(dense_masks.const_data_ptr<bool>(), masks.size(1), dense_boxes.const_data_ptr<float>(),
                         masks.size(0), height, width);
}

at::Tensor move(const at::Tensor& masks, const at::Tensor& boxes, const at::Tensor& others) {
  check_pairs(masks, boxes);
  check_pairs(masks, others);
  const at::Tensor dense = masks.contiguous(), from = boxes.contiguous(), to = others.contiguous();
  at::Tensor moved = at::empty(masks.sizes(), masks.options());
  reframe(dense.const_data_ptr<bool>(), masks.size(1), from.const_data_ptr<float>(), to.const_data_ptr<float>(),
          masks.size(0), moved.mutable_data_ptr<bool>());
  return moved;
}

Codes read_codes(const at::Tensor& texts, const at::Tensor& ends) {
  check_type(texts, at::kByte, "texts");
  check_type(ends, at::kLong, "ends");
  const int64_t* const places = ends.const_data_ptr<int64_t>();
  int64_t before = 0;
  for (int64_t i = 0; i < ends.numel(); ++i) {
    TORCH_CHECK_VALUE(before <= places[i] && places[i] <= texts.numel(), "code ", i, " ends at ", places[i],
                      ", the one before at ", before, ", all at ", texts.numel());
    before = places[i];
  }
  return {reinterpret_cast<const char*>(texts.const_data_ptr<uint8_t>()), places, ends.numel()};
}

at::Tensor crop(const at::Tensor& texts, const at::Tensor& ends, const at::Tensor& heights, const at::Tensor& corners,
                const at::Tensor& boxes, int64_t height, int64_t width, int64_t mask_size) {
  const Codes codes = read_codes(texts, ends);
  check_type(heights, at::kLong, "heights");
  check_type(corners, at::kLong, "corners");
  check_type(boxes, at::kFloat, "boxes");
  TORCH_CHECK_VALUE(heights.numel() == codes.count && corners.numel() == 2 * codes.count &&
                        boxes.numel() == 4 * codes.count,
                    codes.count, " codes need heights (K,), corners (K, 2) and boxes (K, 4), got ", heights.sizes(),
                    ", ", corners.sizes(), " and ", boxes.sizes());
  TORCH_CHECK_VALUE(height > 0 && width > 0 && mask_size > 0, "an image cannot be ", height, " x ", width,
                    " pixels, nor a mask ", mask_size, " cells wide");
  at::Tensor masks = at::zeros({codes.count, mask_size, mask_size}, boxes.options().dtype(at::kBool));
  crop_codes(codes, heights.const_data_ptr<int64_t>(), corners.const_data_ptr<int64_t>(),
             boxes.const_data_ptr<float>(), height, width, mask_size, masks.mutable_data_ptr<bool>());
  return masks;
}

}  // namespace
}  // namespace solq

TORCH_LIBRARY_FRAGMENT(solq_lab, library) {
  const auto define = [&library](const char* schema, auto* function) {
    library.def(schema, torch::dispatch(c10::kCPU, function));
  };
  define("dct_encode(Tensor masks, Tensor row_basis, Tensor column_basis, Tensor kept) -> Tensor", &solq::encode);
  define("dct_decode(Tensor vectors, Tensor row_basis, Tensor column_basis, Tensor kept) -> Tensor", &solq::decode);
  define("dct_decode_bits(Tensor vectors, Tensor row_basis, Tensor column_basis, Tensor kept) -> Tensor",
         &solq::decode_bits);
  define("paste_to_rle(Tensor masks, Tensor boxes, int height, int width) -> str[]", &solq::paste);
  define("reframe(Tensor masks, Tensor boxes, Tensor other_boxes) -> Tensor", &solq::move);
  define(
      "crop_codes(Tensor texts, Tensor ends, Tensor heights, Tensor corners, Tensor boxes, int height, int width,"
      " int mask_size) -> Tensor",
      &solq::crop);
}
