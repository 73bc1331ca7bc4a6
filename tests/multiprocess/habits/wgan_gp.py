"""A WGAN-GP: a penalty on gradients of the inputs, several critic steps for one of the generator.

After https://keras.io/examples/generative/wgan_gp.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tests.multiprocess.habits.way import weights_of

LATENT, BATCH, CRITIC_STEPS, PENALTY = 3, 8, 2, 10.0


class WGAN(keras.Model):
    def __init__(self, critic, generator):
        super().__init__()
        self.critic, self.generator = critic, generator

    def compile(self, c_optimizer, g_optimizer):
        super().compile()
        self.c_optimizer, self.g_optimizer = c_optimizer, g_optimizer

    def gradient_penalty(self, real, fake, share):
        mixed = real + share * (fake - real)
        with tf.GradientTape() as tape:
            tape.watch(mixed)
            scores = self.critic(mixed, training=True)
        gradients = tape.gradient(scores, mixed)
        norms = tf.sqrt(tf.reduce_sum(tf.square(gradients), axis=1) + 1e-12)
        return tf.reduce_mean((norms - 1.0) ** 2)

    def train_step(self, data):
        real, noise, share = data
        for step in range(CRITIC_STEPS):
            with tf.GradientTape() as tape:
                fake = self.generator(noise[:, step], training=True)
                cost = tf.reduce_mean(self.critic(fake, training=True))
                cost -= tf.reduce_mean(self.critic(real, training=True))
                c_loss = cost + PENALTY * self.gradient_penalty(real, fake, share)
            variables = self.critic.trainable_variables
            self.c_optimizer.apply_gradients(zip(tape.gradient(c_loss, variables), variables, strict=True))
        with tf.GradientTape() as tape:
            g_loss = -tf.reduce_mean(self.critic(self.generator(noise[:, -1], training=True), training=True))
        variables = self.generator.trainable_variables
        self.g_optimizer.apply_gradients(zip(tape.gradient(g_loss, variables), variables, strict=True))
        return {"c_loss": c_loss, "g_loss": g_loss}


def main(way):
    keras.utils.set_random_seed(1)
    critic = keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="tanh"), layers.Dense(1)])
    generator = keras.Sequential(
        [keras.Input((LATENT,)), layers.Dense(8, activation="tanh"), layers.Dense(6)]
    )
    random = np.random.default_rng(0)
    rows = 3 * BATCH
    parts = (
        random.normal(size=(rows, 6)),
        random.normal(size=(rows, CRITIC_STEPS + 1, LATENT)),
        random.random((rows, 1)),
    )
    shares = tuple(way.share(part).astype("float32") for part in parts)
    data = tf.data.Dataset.from_tensor_slices(shares).batch(BATCH // way.size)
    wgan = WGAN(critic, generator)
    wgan.compile(
        way.optimizer(keras.optimizers.Adam(1e-2, beta_1=0.5)),
        way.optimizer(keras.optimizers.Adam(1e-2, beta_1=0.5)),
    )
    history = wgan.fit(data, epochs=2, verbose=0, callbacks=list(way.callbacks))
    return {"weights": weights_of(critic, generator), "logs": history.history}
