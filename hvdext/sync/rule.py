"""What becomes of the ranks' mean: four rules, as arithmetic on flat vectors.

The symbols in all formulas, of which the left arrow `<-` makes the next values:

    x    this rank's values now
    s    what they were when the exchange started, as the wire has brought them; s = x without delay and loss
    m    the mean of the s of all ranks that have met
    c    the centre, values that all of them have in common; some rules and wires need it
    d    the mean displacement from the centre, m - c: with a centre it is what travels

A rule's methods are pure: tensors in, tensors out. `engine/fragment.py` reads and writes the variables.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import keras
import tensorflow as tf

from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_choice, require_number
from hvdext.common.wording import describe
from hvdext.gradients.apply_hook import hooks_of

_WEIGHTS = (None, "samples", "steps")


class Rule:
    """Base of the answers to "what becomes of it".

    Attributes:
        weight_by: None, "samples" or "steps": what a rank's share in the mean is proportional to.
    """

    weight_by: str | None = None

    @property
    def keeps_centre(self) -> bool:
        """Whether the rule needs values of its own besides the ranks': the same on all of them."""
        return False

    def among(self, ranks: int) -> Rule:
        """The rule for so many ranks, which some need to know."""
        return self

    def centred(self, c: tf.Tensor, d: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """With a centre: what the ranks move towards, and the next centre.

            target = m = c + d
            c <- m

        Args:
            c: the centre.
            d: the mean displacement from it.
        """
        mean = c + d
        return mean, mean

    def merged(self, x: tf.Tensor, s: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        """The next x.

        Args:
            x: this rank's values now.
            s: when the exchange started.
            target: m, or what `centred` says.
        """
        raise NotImplementedError


@suggests_keywords
@dataclass(frozen=True)
class Mean(Rule):
    """Everybody takes the mean, and keeps what it has learned since the exchange started.

        x <- x + (m - s),   which is m without delay

    With a centre, which only coarse wires need, it follows the mean: c <- m.

    Local SGD (Stich 2019, arXiv:1805.09767); with delay, as in DaSGD (Zhou et al. 2020, arXiv:2006.00441) an
    average arrives while training has gone on.

    Args:
        weight_by: None: all ranks count alike. "samples" or "steps": each counts by what it has trained on
            since its last exchange (of that fragment); where no rank has any, all count alike.

    Raises:
        ValueError: if `weight_by` is none of these.
    """

    weight_by: str | None = None

    def __post_init__(self):
        require_choice("weight_by", self.weight_by, _WEIGHTS)

    def merged(self, x: tf.Tensor, s: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        """As in `Rule`: the mean, and what was learned meanwhile.

        x <- m              if nothing has changed since the start: all ranks' bits are then equal
        x <- x + (m - s)    otherwise
        """
        is_untouched = tf.reduce_all(tf.equal(x, s))
        return tf.where(is_untouched, target, x + (target - s))


@suggests_keywords
@dataclass(frozen=True)
class Pull(Rule):
    """Everybody moves a part of the way towards the mean, or towards a centre that follows the mean.

        x <- x + alpha (m - s)                                       without centre_rate
        x <- x + alpha (c - s),   c <- c + centre_rate (m - c)       with it

    Elastic averaging, EASGD, with the centre c and both moves computed from the same c: Zhang et al. 2015,
    arXiv:1412.6651, whose beta is `centre_rate`.

    Args:
        alpha: in (0, 1].
        centre_rate: None, or in (0, 1].

    Raises:
        ValueError: if an argument lies outside.
    """

    alpha: float
    centre_rate: float | None = None

    def __post_init__(self):
        # Ranks compare settings by how they print: 1 and 1.0 are the same.
        alpha = require_number("alpha", self.alpha, lambda alpha: 0 < alpha <= 1, "lie in (0, 1]")
        object.__setattr__(self, "alpha", float(alpha))
        if self.centre_rate is not None:
            rate = require_number(
                "centre_rate", self.centre_rate, lambda rate: 0 < rate <= 1, "lie in (0, 1]"
            )
            object.__setattr__(self, "centre_rate", float(rate))

    @property
    def keeps_centre(self) -> bool:
        """As in `Rule`."""
        return self.centre_rate is not None

    def among(self, ranks: int) -> Rule:
        """The rule for so many ranks, which some need to know."""
        return self

    def centred(self, c: tf.Tensor, d: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """As in `Rule`; with `centre_rate` as the elastic averaging of Zhang et al., eqs. 5 and 6.

        target = c                       as it was
        c <- c + centre_rate (m - c)     where m - c = d
        """
        if self.centre_rate is None:
            return super().centred(c, d)
        return c, c + tf.constant(self.centre_rate, c.dtype) * d

    def merged(self, x: tf.Tensor, s: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        """As in `Rule`: a part of the way.

        x <- x + alpha (target - s)
        """
        return x + tf.constant(self.alpha, s.dtype) * (target - s)


class Outer(Rule):
    """An outer optimizer takes the ranks' mean movement as its gradient; everybody goes on from the outcome.

        g <- c - m                     c: the values all ranks started the round from
        c <- outer optimizer(c, g)
        x <- alpha x + (1 - alpha) c

    DiLoCo: Douillard et al. 2023, arXiv:2311.08105. With delay and alpha, Streaming DiLoCo: Douillard et al.
    2025, arXiv:2501.18512. Trainable variables are treated so; batch-norm statistics and optimizer slots,
    which are no sums of gradients, are averaged as by `Mean`.

    Each fragment has an outer optimizer of its own, a copy of `optimizer`: its state and its schedule count
    that fragment's rounds.

    Args:
        optimizer: a plain Keras optimizer, also of a class of your own; it is copied, never changed.
        alpha: in [0, 1], the share of its own values that a rank keeps; 0: none, as DiLoCo does it.

    Raises:
        TypeError: if `optimizer` is not a plain Keras optimizer, or cannot be copied by way of its config.
        ValueError: if `alpha` lies outside.
    """

    @suggests_keywords
    def __init__(self, optimizer: keras.optimizers.Optimizer, alpha: float = 0.0):
        wrapped = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if not isinstance(optimizer, keras.optimizers.Optimizer) or wrapped or hooks_of(optimizer):
            raise TypeError(
                "`optimizer` must be a plain Keras optimizer, such as keras.optimizers.SGD(0.7), "
                f"neither scaled nor distributed. Received: optimizer={optimizer!r}."
            )
        self.alpha = float(require_number("alpha", alpha, lambda alpha: 0 <= alpha <= 1, "lie in [0, 1]"))
        self._copies(optimizer)

    def _copies(self, optimizer):
        """Notes what copies of `optimizer` are made of."""
        # Keras would look for the class by its name, and not find one of the user's own.
        self._kind = type(optimizer)
        try:
            self._config = keras.optimizers.serialize(optimizer)["config"]
            # Keras numbers its optimizers: a rank that has made one more means the same.
            self._config.pop("name", None)
            self.new_optimizer()
        except Exception as error:  # the user's own class may raise anything
            raise TypeError(
                "`optimizer` (`outer` of a preset) must be one that its class can make again, by "
                f"{self._kind.__name__}.from_config(optimizer.get_config()), as each fragment has a copy. "
                f"Received: {optimizer!r}, with {describe(error)}"
            ) from error

    @property
    def keeps_centre(self) -> bool:
        """As in `Rule`."""
        return True

    def new_optimizer(self) -> keras.optimizers.Optimizer:
        """A fresh copy of the outer optimizer."""
        return self._kind.from_config(copy.deepcopy(self._config))

    def target(self, before: tf.Tensor, after: tf.Tensor) -> tf.Tensor:
        """What the ranks move towards.

        Args:
            before: the centre that they have exchanged their distances from.
            after: the centre that the outer optimizer has made of it.
        """
        return after

    def gradient(self, d: tf.Tensor) -> tf.Tensor:
        """What the outer optimizer takes for a gradient.

            g = c - m = -d

        Args:
            d: the mean displacement from the centre.
        """
        return -d

    def merged(self, x: tf.Tensor, s: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        """As in `Rule`; `target` is the centre that the outer optimizer has moved, and s does not count.

        x <- alpha x + (1 - alpha) c,   which is c, whatever x is, for alpha = 0
        """
        if not self.alpha:
            return target
        alpha = tf.constant(self.alpha, x.dtype)
        return alpha * x + (1 - alpha) * target

    def __repr__(self) -> str:
        return f"Outer({self._kind.__name__}({self._config}), alpha={self.alpha})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outer) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


class Corrected(Outer):
    """The ranks are corrected towards a centre, which moves by the sum of all corrections, with momentum.

        k_i <- alpha (s_i - c)                       the correction of rank i
        x_i <- x_i - k_i
        c   <- c + sum of k_i + momentum (c - c'),   c' being the centre before c

    Synchronous model averaging: Koliousis et al. 2019, "Crossbow: Scaling Deep Learning with Small Batch
    Sizes on Multi-GPU Servers", PVLDB 12(11), algorithm 1, arXiv:1901.02244. There gradient and correction
    are taken at the same weights, which is an exchange with delay=1. The centre's move is that of SGD with
    momentum.

    Batch-norm statistics and optimizer slots are averaged as by `Mean`.

    Args:
        alpha: in (0, 1]; None: 1 / number of ranks, so that the corrections add up to the mean distance.
        momentum: of the centre, in [0, 1).

    Raises:
        ValueError: if an argument lies outside.
    """

    @suggests_keywords
    def __init__(self, alpha: float | None = None, momentum: float = 0.9):
        if alpha is not None:
            alpha = float(require_number("alpha", alpha, lambda a: 0 < a <= 1, "lie in (0, 1] or be None"))
        self._given = alpha
        self.momentum = float(require_number("momentum", momentum, lambda m: 0 <= m < 1, "lie in [0, 1)"))
        self._set(1)

    def _set(self, ranks):
        self.alpha = 1 / ranks if self._given is None else self._given
        self._copies(keras.optimizers.SGD(self.alpha * ranks, momentum=self.momentum))

    def among(self, ranks: int) -> Corrected:
        """As in `Rule`: their number decides how far the sum of corrections goes."""
        rule = Corrected(self._given, self.momentum)
        rule._set(ranks)
        return rule

    def target(self, before: tf.Tensor, after: tf.Tensor) -> tf.Tensor:
        """As in `Outer`: the centre as it was, from which the distances were taken."""
        return before

    def merged(self, x: tf.Tensor, s: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        """As in `Rule`: less the correction.

        x <- x - alpha (s - c)
        """
        return x - tf.constant(self.alpha, s.dtype) * (s - target)

    def __repr__(self) -> str:
        return f"Corrected(alpha={self._given}, momentum={self.momentum})"
