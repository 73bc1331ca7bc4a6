// Several tensors that the engine takes for one, and reduces where they lie.

#ifndef HVDEXT_PIECES_TENSOR_H
#define HVDEXT_PIECES_TENSOR_H

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "../common.h"
#include "local_collectives.h"

namespace horovod {
namespace common {

// Both what is reduced and the result. Who cannot work on pieces asks for data(), and gets them copied into a row.
class PiecesTensor : public Tensor {
public:
  // shape: what ranks compare; of one tensor its own, of several see pieces_shape.h.
  PiecesTensor(DataType dtype, TensorShape shape, std::vector<hvdext::Piece> pieces)
      : dtype_(dtype), shape_(std::move(shape)), pieces_(std::move(pieces)), bytes_(hvdext::BytesOf(pieces_)) {}

  const DataType dtype() const override { return dtype_; }

  const TensorShape shape() const override { return shape_; }

  int64_t size() const override { return bytes_; }

  const void* data() const override {
    if (row_ == nullptr) {
      row_.reset(new uint8_t[bytes_]);
      size_t at = 0;
      for (const hvdext::Piece& piece : pieces_) {
        std::memcpy(row_.get() + at, piece.in, piece.bytes);
        at += piece.bytes;
      }
    }
    return row_.get();
  }

  const std::vector<hvdext::Piece>& pieces() const { return pieces_; }

  // The results to where they belong, if they are in a row.
  void Finish() const {
    size_t at = 0;
    for (const hvdext::Piece& piece : pieces_) {
      if (row_ != nullptr) {
        std::memcpy(piece.out, row_.get() + at, piece.bytes);
      }
      at += piece.bytes;
    }
  }

private:
  DataType dtype_;
  TensorShape shape_;
  std::vector<hvdext::Piece> pieces_;
  int64_t bytes_;
  mutable std::unique_ptr<uint8_t[]> row_;
};

// What of an operation's tensors is to be reduced, in order.
inline std::vector<hvdext::Piece> PiecesOf(const std::vector<TensorTableEntry>& entries) {
  std::vector<hvdext::Piece> pieces;
  for (const TensorTableEntry& entry : entries) {
    if (auto* several = dynamic_cast<const PiecesTensor*>(entry.tensor.get())) {
      pieces.insert(pieces.end(), several->pieces().begin(), several->pieces().end());
    } else {
      pieces.push_back({entry.tensor->data(), const_cast<void*>(entry.output->data()),
                        static_cast<size_t>(entry.tensor->size())});
    }
  }
  return pieces;
}

} // namespace common
} // namespace horovod

#endif // HVDEXT_PIECES_TENSOR_H
