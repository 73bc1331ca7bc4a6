// What ranks compare of several tensors in one message: -1, and then of each its number of axes and its axes.

#ifndef HVDEXT_PIECES_SHAPE_H
#define HVDEXT_PIECES_SHAPE_H

#include <cstdint>
#include <string>
#include <vector>

namespace hvdext {

inline bool IsShapeOfPieces(const std::vector<int64_t>& shape) { return !shape.empty() && shape[0] < 0; }

// visit(first axis, axes) for each of the tensors.
template <typename Visit> void ForEachShape(const std::vector<int64_t>& shape, Visit visit) {
  for (size_t at = 1; at < shape.size(); at += 1 + shape[at]) {
    visit(shape.data() + at + 1, shape[at]);
  }
}

inline int64_t NumbersInPieces(const std::vector<int64_t>& shape) {
  int64_t total = 0;
  ForEachShape(shape, [&](const int64_t* axis, int64_t axes) {
    int64_t numbers = 1;
    for (int64_t i = 0; i < axes; ++i) {
      numbers *= axis[i];
    }
    total += numbers;
  });
  return total;
}

inline std::string DescribePieces(const std::vector<int64_t>& shape) {
  std::string text;
  ForEachShape(shape, [&](const int64_t* axis, int64_t axes) {
    text += text.empty() ? "[" : ", [";
    for (int64_t i = 0; i < axes; ++i) {
      text += (i > 0 ? ", " : "") + std::to_string(axis[i]);
    }
    text += "]";
  });
  return text;
}

} // namespace hvdext

#endif // HVDEXT_PIECES_SHAPE_H
