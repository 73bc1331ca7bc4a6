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
        "_outputs_struct": "the structure of what it gives",
    },
    "keras.Layer": {
        "_call_context_args": "which arguments, such as `training`, go on to the layers in a layer",
        "_flatten_layers": "the layers in a model or layer",
    },
    "keras.Model": {
        "_compile_config": "what `compile` was given",
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
        "_initializer": "what makes the value of a variable that has none yet",
        "_path": "the name with those of the layers around it",
        "_value": "the TensorFlow variable in it, None before it has one",
    },
    "keras.layers.BatchNormalization": {
        "_moments": "mean and variance of a batch",
        "_reduction_axes": "the axes that these are over",
    },
    "keras.optimizers.Optimizer": {
        "_clip_gradients": "where the sums of micro-batches pass before they are applied",
        "_iterations": "how often `apply` was called",
        "_learning_rate": "the variable, schedule or function that the rate comes from",
        "_trainable_variables": "the variables that it was built for",
        "_variables": "a list that is no slots: all variables of its own",
    },
    "keras.optimizers.RMSprop": {
        "_momentums": "its velocities",
    },
    "keras.src.backend.common.global_state": {
        "get_global_attribute": "Keras' lists, by name",
        "set_global_attribute": "the same, to put them back as they were",
    },
    "keras.src.backend.common.variables": {
        "uninitialized_variables": "the list of variables that have no value yet",
    },
    "keras.src.ops.node": {
        "_keras_history": "which call has made a symbolic tensor",
    },
    "keras.src.utils.naming": {
        "object_name_uids": "the table of how often each name is taken",
    },
    "tensorflow.data.Dataset": {
        "_inputs": "the data sets that one is made of",
        "_variant_tensor": "the data set as TensorFlow runs it",
    },
    "tensorflow.python.ops.control_flow_util": {
        "GraphOrParentsInXlaContext": "whether XLA is going to compile a graph",
    },
}
