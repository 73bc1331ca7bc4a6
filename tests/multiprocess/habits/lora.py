"""LoRA: of a backbone of transformer blocks only the small factors of queries and values train.

After https://keras.io/examples/nlp/parameter_efficient_finetuning_of_gpt2_with_lora: the backbone is written
as KerasHub's are, a functional model that builds itself, and switched as its `enable_lora` does.
"""

import keras
import numpy as np
from keras import layers

from tests.multiprocess.habits.way import weights_of

BATCH, VOCABULARY, LENGTH, WIDTH = 8, 11, 5, 8


class Backbone(keras.Model):
    def __init__(self, layers_count, **options):
        tokens = keras.Input((LENGTH,), dtype="int32", name="token_ids")
        x = layers.Embedding(VOCABULARY, WIDTH, name="token_embedding")(tokens)
        for number in range(layers_count):
            attended = layers.MultiHeadAttention(2, WIDTH // 2, name=f"attention_{number}")(x, x)
            x = layers.LayerNormalization(name=f"attention_norm_{number}")(x + attended)
            fed = layers.Dense(WIDTH, activation="gelu", name=f"feedforward_{number}")(x)
            x = layers.LayerNormalization(name=f"feedforward_norm_{number}")(x + fed)
        super().__init__(inputs=tokens, outputs=x, **options)
        self.layers_count = layers_count

    def enable_lora(self, rank):
        attentions = [self.get_layer(f"attention_{number}") for number in range(self.layers_count)]
        for layer in self.layers:
            if layer not in attentions:
                layer.trainable = False
        for attention in attentions:
            attention.key_dense.trainable = attention.output_dense.trainable = False
            for part in (attention.query_dense, attention.value_dense):
                part.enable_lora(rank)


def main(way):
    keras.utils.set_random_seed(1)
    backbone = Backbone(2)
    backbone.enable_lora(2)
    model = keras.Sequential([backbone, layers.Dense(VOCABULARY, name="logits")])
    model.compile(
        way.optimizer(keras.optimizers.AdamW(1e-2, weight_decay=0.01)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCABULARY, (4 * BATCH, LENGTH + 1)).astype("int32")
    x, y = tokens[:, :-1], tokens[:, 1:]
    history = model.fit(
        way.share(x),
        way.share(y),
        batch_size=BATCH // way.size,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=list(way.callbacks),
    )
    return {"weights": weights_of(model), "logs": history.history}
