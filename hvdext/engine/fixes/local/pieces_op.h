// TensorFlow's operation for the allreduce of several tensors as one message. Part of mpi_ops.cc: it stands in the
// namespace that is open there.

class HorovodPiecesAllreduceOp : public AsyncOpKernel {
public:
  explicit HorovodPiecesAllreduceOp(OpKernelConstruction* context) : AsyncOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("reduce_op", &reduce_op_));
    OP_REQUIRES_OK(context, context->GetAttr("prescale_factor", &prescale_factor_));
    OP_REQUIRES_OK(context, context->GetAttr("postscale_factor", &postscale_factor_));
    OP_REQUIRES_OK(context, context->GetAttr("process_set_id", &process_set_id_));
  }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    OP_REQUIRES_OK_ASYNC(context, ConvertStatus(common::CheckInitialized()), done);
    std::vector<hvdext::Piece> pieces;
    common::TensorShape shapes;
    shapes.AddDim(-1); // see pieces_shape.h
    for (int i = 0; i < context->num_inputs(); ++i) {
      // In the input's own memory where nobody else needs it.
      Tensor* output;
      OP_REQUIRES_OK_ASYNC(
          context, context->forward_input_or_allocate_output({i}, i, context->input(i).shape(), &output), done);
      pieces.push_back({context->input(i).tensor_data().data(), const_cast<char*>(output->tensor_data().data()),
                        output->tensor_data().size()});
      shapes.AddDim(output->dims());
      for (int64_t axis : output->shape().dim_sizes()) {
        shapes.AddDim(axis);
      }
    }
    Tensor input = context->input(0);
    const TFTensor first(input);
    auto tensor = std::make_shared<common::PiecesTensor>(
        first.dtype(), context->num_inputs() == 1 ? first.shape() : shapes, std::move(pieces));
    auto enqueued = EnqueueTensorAllreduce(
        std::make_shared<TFOpContext>(context), tensor, tensor, common::ReadyEventList(),
        name().substr(name().find_last_of('/') + 1), GetDeviceID(context),
        [context, done, tensor](const common::Status& status) {
          if (status.ok()) {
            tensor->Finish();
          }
          context->SetStatus(ConvertStatus(status));
          done();
        },
        static_cast<common::ReduceOp>(reduce_op_), prescale_factor_, postscale_factor_, process_set_id_);
    OP_REQUIRES_OK_ASYNC(context, ConvertStatus(enqueued), done);
  }

private:
  int reduce_op_;
  float prescale_factor_; // TensorFlow's operations have no float64 attributes
  float postscale_factor_;
  int process_set_id_;
};

REGISTER_KERNEL_BUILDER(Name("HorovodPiecesAllreduce").Device(DEVICE_CPU), HorovodPiecesAllreduceOp);

REGISTER_OP("HorovodPiecesAllreduce")
    .SetIsStateful()
    .Attr("T: {uint8, int8, int32, int64, float16, float32, float64}")
    .Attr("N: int >= 1")
    .Attr("reduce_op: int")
    .Attr("prescale_factor: float")
    .Attr("postscale_factor: float")
    .Attr("process_set_id: int = 0")
    .Input("tensors: N * T")
    .Output("results: N * T")
    .SetShapeFn([](shape_inference::InferenceContext* context) {
      for (int i = 0; i < context->num_inputs(); ++i) {
        context->set_output(i, context->input(i));
      }
      return Status();
    });
