"""The options of an exchange: checked once, kept as Python's own, picked out of a function's arguments."""

import dataclasses
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.gradients.options import ExchangeOptions


def test_numpys_numbers_are_kept_as_pythons():
    options = ExchangeOptions(groups=np.int64(3), gradient_predivide_factor=np.float32(2))
    assert type(options.groups) is int
    assert options.groups == 3
    assert type(options.gradient_predivide_factor) is float
    assert options.gradient_predivide_factor == 2
    assert hvd.DistributedGradientTape(tf.GradientTape(), groups=np.int32(2), num_groups=0)


@pytest.mark.parametrize(
    "public",
    [
        hvd.DistributedOptimizer,
        hvd.DistributedGradientTape,
        hvd.PartialDistributedOptimizer,
        hvd.PartialDistributedGradientTape,
    ],
)
def test_public_functions_have_the_same_defaults(public):
    parameters = inspect.signature(public).parameters
    own = {"select"} if public.__name__.startswith("Partial") else set()
    for field in dataclasses.fields(ExchangeOptions):
        if field.name not in own:
            assert parameters[field.name].default == field.default, field.name


def test_options_come_out_of_the_arguments_of_the_same_names():
    def public(op, compression, something_else, **others):
        return ExchangeOptions.from_arguments(ExchangeOptions().as_arguments() | locals(), groups=2)

    options = public(hvd.Sum, hvd.Compression.fp16, "not an option")
    assert options == ExchangeOptions(op=hvd.Sum, compression=hvd.Compression.fp16, groups=2)


def test_an_argument_that_is_missing_is_noticed():
    arguments = ExchangeOptions().as_arguments()
    del arguments["sparse_as_dense"]
    with pytest.raises(KeyError, match="sparse_as_dense"):
        ExchangeOptions.from_arguments(arguments)


@pytest.mark.parametrize("public", [hvd.PartialDistributedOptimizer, hvd.PartialDistributedGradientTape])
def test_wrong_options_of_partial_names(public):
    first = tf.GradientTape() if "Tape" in public.__name__ else keras.optimizers.SGD()
    with pytest.raises(ValueError, match=r"`groups` must be a positive number .* groups=-1"):
        public(first, groups=-1)
    with pytest.raises(ValueError, match=r"`gradient_predivide_factor` must be a positive number\. .*=0\."):
        public(first, gradient_predivide_factor=0)
    assert public(first, groups=0) is not None  # unset, as in Horovod
