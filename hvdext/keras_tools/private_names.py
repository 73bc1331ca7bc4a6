"""Every private name of Keras and TensorFlow that hvdext uses, by owner, and what for.

A test asks the installed Keras for each of them, and refuses a private name in this room that is not here:
what the next Keras has renamed is found in one place.

An owner is a class or a module. A name of a class is one of its attributes, or one that its methods give to
`self`. A name of a module is one of its attributes, or one by which its functions keep something elsewhere;
what lies in `keras.src` or `tensorflow.python` is private, with an underscore or without.
"""

from __future__ import annotations

PRIVATE_NAMES: dict[str, dict[str, str]] = {
    "keras.Function": {
        "_inputs_struct": "the structure of what a functional model takes",
        "_nodes_by_depth": "the calls of layers in it",
        "_outputs_struct": "the structure of what it gives",
        "_run_through_graph": "the same calls of other layers on other inputs",
    },
    "keras.Layer": {
        "_allow_non_tensor_positional_args": "whether arguments may be lists",
        "_call_context_args": "which arguments, such as `training`, go on to the layers in a layer",
        "_convert_input_args": "whether arguments are cast and converted",
        "_flatten_layers": "the layers in a model or layer",
        "_get_own_losses": "what a layer has added to the loss",
    },
    "keras.Model": {
        "_aggregate_additional_loss": "what a penalty adds to the loss",
        "_assert_compile_called": "the error of a model that is not compiled",
        "_compile_config": "what `compile` was given",
        "_compile_loss": "the losses that `compile` was given, as one",
        "_compile_metrics": "the metrics that `compile` was given",
        "_flatten_metrics_in_order": "the list that `evaluate` returns",
        "_get_metrics_result_or_logs": "what `evaluate` reads of the metrics",
        "_initial_epoch": "the epoch that `BackupAndRestore` lets `fit` go on with",
        "_loss_tracker": "the mean of the loss, and of how many samples",
    },
    "keras.Operation": {
        "_inbound_nodes": "the calls of a layer in functional models",
    },
    "keras.Sequential": {
        "_functional": "the graph of its layers",
    },
    "keras.Variable": {
        "_deferred_initialize": "the first value of a variable that has none",
        "_initialize": "a value for a variable that may have none",
        "_initializer": "what makes the value of a variable that has none yet",
        "_name": "its own name",
        "_path": "the name with those of the layers around it",
        "_value": "the TensorFlow variable in it, None before it has one",
    },
    "keras.layers.BatchNormalization": {
        "_moments": "mean and variance of a batch",
        "_reduction_axes": "the axes that these are over",
    },
    "keras.layers.GroupQueryAttention": {
        "_combine_equation": "how scores and values become outputs",
        "_dot_product_equation": "how queries and keys become scores",
        "_dropout_layer": "what drops scores",
        "_gate_dense": "the projection to gates",
        "_get_common_kwargs_for_sublayer": "settings that all projections have alike",
        "_key_dense": "the projection of keys",
        "_output_dense": "the projection of outputs",
        "_query_dense": "the projection of queries",
        "_softmax": "what makes weights of scores",
        "_value_dense": "the projection of values",
    },
    "keras.layers.Lambda": {
        "_output_shape": "the shape that the user has given",
    },
    "keras.layers.MultiHeadAttention": {
        "_activity_regularizer": "what regularizes the outputs of the projections",
        "_build_attention": "how scores are made and used",
        "_dropout": "the share of scores that is dropped",
        "_dropout_layer": "what drops scores",
        "_gate_dense": "the projection to gates",
        "_get_common_kwargs_for_sublayer": "settings that all projections have alike",
        "_key_dense": "the projection of keys",
        "_key_dim": "the width of a head's queries and keys",
        "_num_heads": "how many heads",
        "_output_dense": "the projection of outputs",
        "_output_shape": "the features that it gives",
        "_query_dense": "the projection of queries",
        "_use_bias": "whether projections have biases",
        "_use_gate": "whether outputs are gated",
        "_value_dense": "the projection of values",
        "_value_dim": "the width of a head's values",
    },
    "keras.layers.TextVectorization": {
        "_lookup_layer": "the table of its tokens",
    },
    "keras.optimizers.Optimizer": {
        "_all_reduce_sum_gradients": "a sum over the replicas of a strategy",
        "_clip_gradients": "where the sums of micro-batches pass before they are applied",
        "_iterations": "how often `apply` was called",
        "_learning_rate": "the variable, schedule or function that the rate comes from",
        "_trainable_variables": "the variables that it was built for",
        "_variables": "a list that is no slots: all variables of its own",
    },
    "keras.optimizers.RMSprop": {
        "_momentums": "its velocities",
    },
    "keras.src.backend": {
        "compute_output_spec": "a call on no values, which builds what is called",
    },
    "keras.src.backend.common.global_state": {
        "get_global_attribute": "Keras' lists, by name",
        "set_global_attribute": "the same, to put them back as they were",
    },
    "keras.src.backend.common.masking": {
        "get_keras_mask": "the mask that a tensor carries",
        "set_keras_mask": "the same, to change it",
    },
    "keras.src.backend.common.stateless_scope": {
        "stateless_scope": "the scope in which nothing is assigned",
    },
    "keras.src.backend.common.variables": {
        "uninitialized_variables": "the list of variables that have no value yet",
    },
    "keras.src.backend.tensorflow.trainer": {
        "TFEpochIterator": "the batches that `fit` makes of its arguments",
    },
    "keras.src.losses.loss": {
        "apply_mask": "the weights of samples that a mask leaves",
        "reduce_weighted_values": "how losses of samples become one number",
    },
    "keras.src.models.functional": {
        "Functional": "what models of inputs and outputs are",
    },
    "keras.src.models.functional.Functional": {
        "_standardize_inputs": "the tensors of what a functional model is given",
    },
    "keras.src.models.model": {
        "inject_functional_model_class": "what makes a subclass of `keras.Model` one of functional models",
    },
    "keras.src.ops.node": {
        "_keras_history": "which call has made a symbolic tensor",
    },
    "keras.src.random.seed_generator": {
        "global_seed_generator": "the generator of what has none of its own",
    },
    "keras.src.saving.saving_lib": {
        "DiskIOStore": "the assets in a file",
        "H5IOStore": "the weights in a file",
        "_load_state": "what is read of a file, but for some layers",
        "_raise_loading_failure": "the error of a file that does not fit",
    },
    "keras.src.trainers.compile_utils.CompileLoss": {
        "_flat_losses": "the losses of all outputs",
        "call": "one loss of those of all outputs",
    },
    "keras.src.trainers.data_adapters": {
        "get_data_adapter": "how many batches data has",
    },
    "keras.src.trainers.data_adapters.array_data_adapter": {
        "can_convert_arrays": "whether data is arrays",
    },
    "keras.src.trainers.data_adapters.array_slicing": {
        "train_validation_split": "what `validation_split` splits",
    },
    "keras.src.trainers.data_adapters.data_adapter_utils": {
        "class_weight_to_sample_weights": "what `class_weight` becomes",
    },
    "keras.src.utils.file_utils": {
        "copy": "a file from elsewhere",
        "is_remote_path": "whether a file is elsewhere",
    },
    "keras.src.utils.naming": {
        "object_name_uids": "the table of how often each name is taken",
    },
    "tensorflow.data.Dataset": {
        "_as_serialized_graph": "the data set as a graph",
        "_functions": "the functions that it calls",
        "_inputs": "the data sets that one is made of",
        "_variant_tensor": "the data set as TensorFlow runs it",
    },
    "tensorflow.Graph": {
        "_get_function": "the body of a call in a graph",
    },
    "tensorflow.python.data.ops.from_tensor_slices_op._TensorSliceDataset": {
        "_tensors": "the rows that a data set is made of",
    },
    "tensorflow.python.data.ops.map_op._ParallelMapDataset": {
        "_deterministic": "whether elements keep their order",
    },
    "tensorflow.python.data.ops.range_op._RangeDataset": {
        "_start": "the first number",
        "_step": "how far it is to the next one",
        "_stop": "the number after the last one",
    },
    "tensorflow.python.data.ops.readers.TFRecordDatasetV2": {
        "_filenames": "the files that are read",
    },
    "tensorflow.python.data.ops.shuffle_op._ShuffleDataset": {
        "_reshuffle_each_iteration": "whether each pass has another order",
        "_seed": "what decides the order",
        "_seed2": "the other half of it",
    },
    "tensorflow.python.eager.context": {
        "global_seed": "the seed that `tf.random.set_seed` was given",
    },
    "tensorflow.python.eager.record": {
        "could_possibly_record": "whether a tape is recording",
    },
    "tensorflow.python.ops.control_flow_util": {
        "GraphOrParentsInXlaContext": "whether XLA is going to compile a graph",
    },
    "tensorflow.python.ops.embedding_ops": {
        "embedding_lookup_sparse_impl": "the sparse lookup behind all public ones",
    },
    "tensorflow.python.ops.resource_variable_ops": {
        "ResourceVariable": "a variable that is made here and now, in whatever function",
    },
}

# What the oldest supported Keras (3.12) has not: the release that brought it.
SINCE: dict[str, tuple[int, int]] = {
    "keras.layers.GroupQueryAttention._gate_dense": (3, 14),
    "keras.layers.MultiHeadAttention._gate_dense": (3, 14),
    "keras.layers.MultiHeadAttention._use_gate": (3, 14),
}
