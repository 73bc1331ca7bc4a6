"""What parameter sync should do, written down once more in plain NumPy: ranks as rows of an array.

A rank's weights are one row of four layers; a step of "training" adds numbers that depend on rank and step
only. Everything is float64.
"""

from __future__ import annotations

import numpy as np

WIDTHS = (3, 2, 4, 1)  # elements of each layer
LAYERS = [slice(sum(WIDTHS[:i]), sum(WIDTHS[: i + 1])) for i in range(len(WIDTHS))]
SIZE = sum(WIDTHS)


def start(rank):
    """Rank r's first weights."""
    return np.linspace(-1.0, 1.0, SIZE) * (1 + rank) + rank**2


def update(rank, step):
    """What training adds at `step`, from 1."""
    return 0.1 * np.sin(np.arange(SIZE) * 0.7 + 1.3 * rank + 0.37 * step**1.5)


def samples(rank, step):
    """How many samples it was."""
    return 8 + 5 * rank + step % 3


def layers_of_fragment(p, fragments):
    """Strided: layer i belongs to fragment i mod fragments."""
    found = np.zeros(SIZE, bool)
    for i, layer in enumerate(LAYERS):
        if i % fragments == p:
            found[layer] = True
    return found


def due(step, every, p, fragments, warmup=0):
    """Whether fragment p leaves at `step`."""
    return step <= warmup or (step - warmup) % every == ((p + 1) * every // fragments) % every


class MeanRule:
    """Everybody takes the mean, weighted or not."""

    def __init__(self, n, weight_by=None):
        self.weight_by = weight_by

    def weights(self, counted):
        return counted[self.weight_by] if self.weight_by else np.ones(len(counted["samples"]))

    def merge(self, now, left, weights, where):
        mean = weights @ left / weights.sum()
        return now + (mean - left)


class PullRule(MeanRule):
    def __init__(self, n, alpha):
        super().__init__(n)
        self.alpha = alpha

    def merge(self, now, left, weights, where):
        return now + self.alpha * (left.mean(axis=0) - left)


class ElasticRule(MeanRule):
    """Zhang et al. 2015, equations 5 and 6; the centre starts from the first rank."""

    def __init__(self, n, alpha, beta):
        super().__init__(n)
        self.alpha, self.beta, self.centre = alpha, beta, start(0)

    def merge(self, now, left, weights, where):
        centre = self.centre[where].copy()
        self.centre[where] = (1 - self.beta) * centre + self.beta * left.mean(axis=0)
        return now - self.alpha * (left - centre)


class CorrectedRule(MeanRule):
    """Koliousis et al. 2019, algorithm 1: corrections to a centre that their sum moves, with momentum."""

    def __init__(self, n, alpha, momentum):
        super().__init__(n)
        self.alpha, self.momentum = alpha, momentum
        self.centre, self.before = start(0), start(0)

    def merge(self, now, left, weights, where):
        centre, before = self.centre[where].copy(), self.before[where]
        corrections = self.alpha * (left - centre)
        self.before[where] = centre
        self.centre[where] = centre + corrections.sum(axis=0) + self.momentum * (centre - before)
        return now - corrections


class OuterRule(MeanRule):
    """Outer SGD with Keras' momentum: v <- m v - lr g; c <- c + v, or with Nesterov c + m v - lr g."""

    def __init__(self, n, rate, momentum=0.0, nesterov=False, alpha=0.0):
        super().__init__(n)
        self.rate, self.momentum, self.nesterov, self.alpha = rate, momentum, nesterov, alpha
        self.centre, self.velocity = start(0), np.zeros(SIZE)

    def merge(self, now, left, weights, where):
        gradient = self.centre[where] - left.mean(axis=0)
        self.velocity[where] = velocity = self.momentum * self.velocity[where] - self.rate * gradient
        step = self.momentum * velocity - self.rate * gradient if self.nesterov else velocity
        self.centre[where] += step
        return self.alpha * now + (1 - self.alpha) * self.centre[where]


def simulate(n, steps, *, every, rule, fragments=1, delay=0, warmup=0, mixing=None, only=None):
    """Every rank's weights after each step: shape (steps, n, SIZE).

    Args:
        n: ranks.
        steps: how many.
        every, delay, warmup: of the schedule, in steps.
        rule: one of the rules above.
        fragments: how many.
        mixing: None, or a function of the turn that returns a matrix: x <- matrix @ x instead of the rule.
        only: None, or a mask of the elements that are exchanged at all.
    """
    x = np.array([start(rank) for rank in range(n)])
    in_flight, history, turns = {}, [], [0] * fragments
    since = [{"samples": np.zeros(n), "steps": np.zeros(n)} for _ in range(fragments)]
    for t in range(1, steps + 1):
        for rank in range(n):
            x[rank] += update(rank, t)
            for counted in since:
                counted["samples"][rank] += samples(rank, t)
                counted["steps"][rank] += 1
        for p in range(fragments):
            where = layers_of_fragment(p, fragments)
            where = where if only is None else where & only
            if p in in_flight and in_flight[p][0] + delay == t:
                _, left, weights = in_flight.pop(p)
                x[:, where] = rule.merge(x[:, where], left, weights, where)
            if not due(t, every, p, fragments, warmup):
                continue
            if mixing is not None:
                x[:, where] = mixing(turns[p]) @ x[:, where]
                turns[p] += 1
                continue
            weights = rule.weights(since[p])
            since[p] = {"samples": np.zeros(n), "steps": np.zeros(n)}
            if delay and t > warmup:
                in_flight[p] = (t, x[:, where].copy(), weights)
            else:
                x[:, where] = rule.merge(x[:, where], x[:, where].copy(), weights, where)
        history.append(x.copy())
    return np.array(history)
