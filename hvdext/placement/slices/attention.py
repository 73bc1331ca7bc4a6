"""Attention cut by heads: each rank computes some of the heads and projects them; the projections are summed.

One all-reduce forward, after the output's projection, and one backward, in front of those of query, key and
value (Shoeybi et al. 2019, arXiv:1909.08053, figure 3b).
"""

from __future__ import annotations

import keras
import tensorflow as tf

from hvdext.keras_tools import attention
from hvdext.keras_tools.layers import mask_of, set_mask
from hvdext.keras_tools.slice_marks import Slice, require_divides
from hvdext.placement.slices.dropout import SlicedDropout
from hvdext.placement.slices.layer import SlicedLayer
from hvdext.placement.slices.operators import copy, gather, reduce


class _IntoHeads(SlicedLayer, keras.layers.EinsumDense):
    """Projects features, shape (..., features), to this rank's heads, shape (..., heads, width)."""

    def cut_axes(self):
        return {"kernel": 1, "bias": 0}


class _OutOfHeads(SlicedLayer, keras.layers.EinsumDense):
    """Projects this rank's heads, shape (..., heads, width), to features and adds up the ranks' results."""

    def cut_axes(self):
        return {"kernel": 0}

    def call(self, inputs, training=None):
        partial = keras.ops.einsum(self.equation, inputs, self.kernel)
        outputs = reduce(self.comm, partial, self.exchange_name)
        return outputs if self.bias is None else keras.ops.add(outputs, self.bias)


class _SlicedAttention(SlicedLayer):
    """What attention of both kinds shares; an attention layer of `keras_tools` comes next among the bases."""

    def cut_axes(self):
        return {}  # the weights are those of the projections

    def call(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
    ):
        """As in Keras. A mask with heads, shape (batch, heads, T, S), holds all heads, as do the scores."""
        originals = [t for t in (query, value, key) if t is not None]
        copies = self._copied(originals)
        result = super().call(
            *copies,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=self._own_heads(attention_mask),
            return_attention_scores=return_attention_scores,
            training=training,
            use_causal_mask=use_causal_mask,
        )
        for original, copied in zip(originals, copies, strict=True):
            set_mask(original, mask_of(copied))  # Keras may have taken the mask off
        if not return_attention_scores:
            return result
        outputs, scores = result
        return outputs, gather(self.comm, scores, 1, f"{self.exchange_name}.scores")

    def _copied(self, tensors):
        """`operators.copy` of all different tensors in one message; Keras' masks go along."""
        different = {id(t): t for t in tensors}
        copies = copy(self.comm, list(different.values()), self.exchange_name)
        for original, copied in zip(different.values(), copies, strict=True):
            set_mask(copied, mask_of(original))
        found = dict(zip(different, copies, strict=True))
        return [found[id(t)] for t in tensors]

    def _own_heads(self, mask):
        if mask is None or len(mask.shape) != 4 or mask.shape[1] in (1, None) or self.comm.size == 1:
            return mask
        require_divides(self.comm.size, self.name, "attention_mask.shape[1]", mask.shape[1])
        return Slice(1, self.comm.rank, self.comm.size).of(tf.convert_to_tensor(mask))

    def _projection(self, kind, name, equation, output_shape, input_shape, bias_axes, **settings):
        layer = kind(
            equation,
            output_shape=output_shape,
            bias_axes=bias_axes if settings.pop("use_bias") else None,
            name=name,
            grid=self.comm,
            **settings,
            **self.projection_settings(),
        )
        layer.build(input_shape)
        return layer

    def into_heads(self, name, shape, heads, width, use_bias, **settings):
        """As in `keras_tools.attention`: to this rank's heads."""
        free = _free(shape)
        return self._projection(
            _IntoHeads,
            name,
            f"{free}d,dnh->{free}nh",
            (*[None] * (len(free) - 1), heads, width),
            shape,
            "nh",
            use_bias=use_bias,
            **settings,
        )

    def out_of_heads(self, query_shape, heads, width, features, use_bias):
        """As in `keras_tools.attention`: from this rank's heads."""
        free, letters = _free(query_shape), "opqrstuvw"[: len(features)]
        return self._projection(
            _OutOfHeads,
            "attention_output",
            f"{free}nh,nh{letters}->{free}{letters}",
            (*[None] * (len(free) - 1), *features),
            (*query_shape[:-1], heads, width),
            letters,
            use_bias=use_bias,
        )

    def scores_dropout(self, rate):
        """The layer that drops this rank's part of what the uncut layer would drop of the scores."""
        return SlicedDropout(rate, axis=1, dtype=self.dtype_policy, seed=self.seed, grid=self.comm)

    def _require_arguments(self, heads):
        for name, value in heads.items():
            require_divides(self.comm.size, self.name, name, value)
        for regularizer in self.activity_regularizers():
            if regularizer is not None:
                raise ValueError(
                    "`activity_regularizer` must be None in a layer cut by heads. "
                    f"Received: {type(regularizer).__name__} in layer {self.name!r}."
                )


@keras.saving.register_keras_serializable(package="hvdext")
class SlicedMultiHeadAttention(_SlicedAttention, attention.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` of which each rank has `num_heads / slices` heads.

    Every rank of the group gets the same query, value and key; self- and cross-attention, masks, causal
    masks, sliding windows and gates work as in Keras. Dropout of the scores drops what the uncut layer drops.

    Args:
        num_heads: of all ranks together; a multiple of the number of slices.
        *args: as for `keras.layers.MultiHeadAttention`.
        grid: as in `SlicedLayer`.
        **kwargs: as for `keras.layers.MultiHeadAttention`; see `SlicedLayer`.

    Raises:
        ValueError: if the slices do not divide `num_heads`, or an argument breaks its rule.
    """

    def __init__(self, num_heads, *args, grid=None, **kwargs):
        super().__init__(num_heads, *args, grid=grid, **kwargs)
        self._require_arguments({"num_heads": num_heads})

    def uncut(self):
        """As in `SlicedLayer`."""
        return keras.layers.MultiHeadAttention.from_config(self.get_config())


@keras.saving.register_keras_serializable(package="hvdext")
class SlicedGroupQueryAttention(_SlicedAttention, attention.GroupQueryAttention):
    """`keras.layers.GroupQueryAttention` of which each rank has some groups of heads.

    As `SlicedMultiHeadAttention`; a rank has the key and value heads that its query heads use.

    Args:
        head_dim: as in Keras.
        num_query_heads: of all ranks together; a multiple of the number of slices.
        num_key_value_heads: of all ranks together; a multiple of the number of slices.
        *args: as for `keras.layers.GroupQueryAttention`.
        grid: as in `SlicedLayer`.
        **kwargs: as for `keras.layers.GroupQueryAttention`; see `SlicedLayer`.

    Raises:
        ValueError: if the slices do not divide the heads, or an argument breaks its rule.
    """

    def __init__(self, head_dim, num_query_heads, num_key_value_heads, *args, grid=None, **kwargs):
        super().__init__(head_dim, num_query_heads, num_key_value_heads, *args, grid=grid, **kwargs)
        self._require_arguments(
            {"num_query_heads": num_query_heads, "num_key_value_heads": num_key_value_heads}
        )

    def uncut(self):
        """As in `SlicedLayer`."""
        return keras.layers.GroupQueryAttention.from_config(self.get_config())


def _free(shape):
    """Letters for all axes but the last. TensorFlow's einsum computes "..." wrongly in float16 on CPUs."""
    return "ABCDEFGHIJKLM"[: len(shape) - 1]
