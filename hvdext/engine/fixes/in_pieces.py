"""Several tensors are reduced as one message without being copied into one."""

from __future__ import annotations

from hvdext.engine.fixes.edits import Edit, Fix
from hvdext.engine.fixes.sources import new_files

_OPS_FILE = "horovod/tensorflow/mpi_ops.cc"
_SHAPES_FILE = "horovod/common/common.cc"

IN_PIECES = Fix(
    name="in-pieces",
    why=(
        "One message of all gradients takes a copy into one tensor and one out of it, both in memory that is "
        "new in every step; a message per gradient has to be negotiated each. The added operation negotiates "
        "one message, and reduces each tensor where it lies."
    ),
    edits=(
        Edit(
            file=_OPS_FILE,
            old='#include "../common/common.h"\n',
            new='#include "../common/common.h"\n#include "../common/local/pieces_tensor.h"\n',
        ),
        Edit(
            file=_OPS_FILE,
            old="class HorovodAllgatherOp : public AsyncOpKernel {\n",
            new='#include "../common/local/pieces_op.h"\n\n'
            "class HorovodAllgatherOp : public AsyncOpKernel {\n",
        ),
        Edit(
            file=_SHAPES_FILE,
            old='#include "common.h"\n',
            new='#include "common.h"\n#include "local/pieces_shape.h"\n',
        ),
        Edit(
            file=_SHAPES_FILE,
            old="std::string TensorShape::DebugString() const {\n",
            new=(
                "std::string TensorShape::DebugString() const {\n"
                "  if (hvdext::IsShapeOfPieces(shape_)) {\n"
                "    return hvdext::DescribePieces(shape_);\n"
                "  }\n"
            ),
        ),
        Edit(
            file=_SHAPES_FILE,
            old="int64_t TensorShape::num_elements() const {\n",
            new=(
                "int64_t TensorShape::num_elements() const {\n"
                "  if (hvdext::IsShapeOfPieces(shape_)) {\n"
                "    return hvdext::NumbersInPieces(shape_);\n"
                "  }\n"
            ),
        ),
    ),
    files=new_files("pieces_op.h", "pieces_shape.h", "pieces_tensor.h"),
)
