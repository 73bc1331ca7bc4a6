"""A layer of a user's own: workers know it by `--import`."""

import keras


@keras.saving.register_keras_serializable("hvdext_tests")
class PlusOne(keras.layers.Layer):
    def call(self, inputs):
        return inputs + 1
