"""Keras' attention layers whose projections, and the dropout of whose scores, a subclass makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras


class _MadeOfParts:
    """What both kinds of attention ask a subclass for."""

    def into_heads(
        self, name: str, shape: Sequence, heads: int, width: int, use_bias: bool, **settings: Any
    ) -> keras.Layer:
        """A built layer from features, shape (..., features), to heads, shape (..., heads, width).

        Args:
            name: the layer's.
            shape: of what it takes.
            heads: how many.
            width: of a head.
            use_bias: whether it has a bias.
            **settings: of `keras.layers.EinsumDense`, besides `projection_settings`.
        """
        raise NotImplementedError

    def out_of_heads(
        self, query_shape: Sequence, heads: int, width: int, features: Sequence[int], use_bias: bool
    ) -> keras.Layer:
        """A built layer from heads, shape (..., heads, width), to features.

        Args:
            query_shape: of the query, whose first axes it keeps.
            heads: how many.
            width: of a head.
            features: the last axes of what it gives.
            use_bias: whether it has a bias.
        """
        raise NotImplementedError

    def scores_dropout(self, rate: float) -> keras.Layer:
        """The layer that drops some of the scores; a rate of 0 drops none."""
        raise NotImplementedError

    def activity_regularizers(self) -> list:
        """What would regularize the layer's or its projections' outputs; None for nothing."""
        return [self.activity_regularizer]  # type: ignore[attr-defined]

    def projection_settings(self) -> Mapping[str, Any]:
        """What all projections have alike: initializers, regularizers, constraints, the type.

        Each call draws the initializers new seeds: only who makes a projection may call it.
        """
        return self._get_common_kwargs_for_sublayer()  # type: ignore[attr-defined]


class MultiHeadAttention(_MadeOfParts, keras.layers.MultiHeadAttention):
    """Keras' layer, made of such parts."""

    _dropout: float

    def activity_regularizers(self) -> list:
        """As above; Keras keeps that of the projections under a name of its own."""
        return [*super().activity_regularizers(), self._activity_regularizer]

    def build(self, query_shape, value_shape, key_shape=None):
        """As in Keras."""
        key_shape = value_shape if key_shape is None else key_shape
        heads, bias = self._num_heads, self._use_bias
        self._query_dense = self.into_heads("query", query_shape, heads, self._key_dim, bias)
        self._key_dense = self.into_heads("key", key_shape, heads, self._key_dim, bias)
        if getattr(self, "_use_gate", False):
            self._gate_dense = self.into_heads(
                "gate", query_shape, heads, self._value_dim, bias, activation="sigmoid"
            )
        self._value_dense = self.into_heads("value", value_shape, heads, self._value_dim, bias)
        self._build_attention(len(value_shape) + 1)
        features = self._output_shape or [query_shape[-1]]
        self._output_dense = self.out_of_heads(query_shape, heads, self._value_dim, features, bias)

    def _build_attention(self, rank):
        rate = self._dropout
        self._dropout = 0.0  # Keras' own dropout draws no seed then
        super()._build_attention(rank)
        self._dropout = rate
        self._dropout_layer = self.scores_dropout(rate)


class GroupQueryAttention(_MadeOfParts, keras.layers.GroupQueryAttention):
    """Keras' layer, made of such parts."""

    def build(self, query_shape, value_shape, key_shape=None):
        """As in Keras."""
        key_shape = value_shape if key_shape is None else key_shape
        heads, width, bias = self.num_key_value_heads, self.head_dim, self.use_bias
        self.feature_dim = query_shape[-1]
        self._query_dense = self.into_heads("query", query_shape, self.num_query_heads, width, bias)
        self._key_dense = self.into_heads("key", key_shape, heads, width, bias)
        if getattr(self, "use_gate", False):
            self._gate_dense = self.into_heads(
                "gate", query_shape, self.num_query_heads, width, bias, activation="sigmoid"
            )
        self._value_dense = self.into_heads("value", value_shape, heads, width, bias)
        self._softmax = keras.layers.Softmax(axis=-1, dtype=self.dtype_policy)
        self._dropout_layer = self.scores_dropout(self.dropout)
        self._dot_product_equation = "bquh,bkuh->buqk"
        self._combine_equation = "buqk,bkuh->bquh"
        self._output_dense = self.out_of_heads(
            query_shape, self.num_query_heads, width, [self.feature_dim], bias
        )
